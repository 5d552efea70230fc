"""What the axes of arrays mean, and where a device mesh puts them.

Two tables hold everything. `MESH_AXES` maps a logical axis, such as "heads", to the axes of the
mesh that split it. `PARAM_AXES` names the logical axes of every trained param by its path. Networks
name the axes of their activations where blocks meet, with `constrain`, and know no mesh: outside
`on(mesh)` it does nothing.

The logical axes:

    batch   examples
    height  rows of pixels, of which every device has a band, and a few rows of its neighbours' for
            each convolution; also over devices between which the examples are not split
    embed   features of the residual stream, as params hold them: split, each device keeps its part
            and gathers the rest when a block needs it (FSDP: Zhao et al. 2023, arXiv 2304.11277)
    heads   attention heads, and
    mlp     features inside a block: split, each device computes its part of the block and the
            results are summed (tensor parallelism: Shoeybi et al. 2019, arXiv 1909.08053)
    vocab   rows of a table of token embeddings
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from unclip_jax.errors import UserError

DATA, FSDP, SPATIAL, TENSOR = "data", "fsdp", "spatial", "tensor"

MESH_AXES = {
    "batch": (DATA, FSDP),
    "height": (DATA, FSDP, SPATIAL),
    "embed": (FSDP,),
    "heads": (TENSOR,),
    "mlp": (TENSOR,),
    "vocab": (TENSOR,),
}

Names = tuple[str | None, ...]

# The last one or two names on a param's path and its rank, without the layer axis of a scanned
# stack; the longer name counts first. What is small stays whole on every device.
PARAM_AXES: dict[tuple[str, int], Names] = {
    # Attention.
    ("qkv/kernel", 4): ("embed", None, "heads", None),
    ("qkv/bias", 3): (None, "heads", None),
    ("context_kv/kernel", 4): ("embed", None, "heads", None),
    ("context_kv/bias", 3): (None, "heads", None),
    ("key_value/kernel", 4): ("embed", None, "heads", None),
    ("key_value/bias", 3): (None, "heads", None),
    ("query/kernel", 3): ("embed", "heads", None),
    ("query/bias", 2): ("heads", None),
    ("out/kernel", 3): ("heads", None, "embed"),
    # Perceptrons: of a Transformer's block, and of the timestep.
    ("up/kernel", 2): ("embed", "mlp"),
    ("up/bias", 1): ("mlp",),
    ("down/kernel", 2): ("mlp", "embed"),
    ("linear_1/kernel", 2): ("embed", "mlp"),
    ("linear_1/bias", 1): ("mlp",),
    ("linear_2/kernel", 2): ("mlp", "embed"),
    # Convolutions: two of a residual block, and those at the ends.
    ("conv_1/kernel", 4): (None, None, "embed", "mlp"),
    ("conv_1/bias", 1): ("mlp",),
    ("conv_2/kernel", 4): (None, None, "mlp", "embed"),
    ("conv_in/kernel", 4): (None, None, None, "embed"),
    ("conv_out/kernel", 4): (None, None, "embed", None),
    ("patches/kernel", 4): (None, None, None, "embed"),
    # Tables of embeddings.
    ("tokens/embedding", 2): ("vocab", "embed"),
    ("latents/embedding", 2): ("vocab", "embed"),
    ("label_to_emb/embedding", 2): (None, None),
    # Everything else.
    ("kernel", 2): ("embed", None),
    ("bias", 1): (None,),
    ("scale", 1): (None,),
    ("class_token", 1): (None,),
    ("query", 1): (None,),
    ("positions", 2): (None, None),
    ("padding", 2): (None, None),
    ("null_z_i", 1): (None,),
    ("log_scale", 0): (),
}

ADAPTERS = ("lora_a", "lora_b")  # of low rank: whole on every device
STACKED = "blocks"  # what is below it on a path has a layer axis first, which is never split

_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)


def of_param(path: tuple[str, ...], rank: int) -> Names:
    """The logical axes of the param at `path`, one for each of its `rank` axes.

    Raises:
        UserError: no row of `PARAM_AXES` is for it.
    """
    if path[-1] in ADAPTERS:
        return (None,) * rank
    layers = (None,) if STACKED in path else ()
    for name in ("/".join(path[-2:]), path[-1]):
        row = PARAM_AXES.get((name, rank - len(layers)))
        if row is not None:
            return layers + row
    raise UserError(
        f"param {'/'.join(path)!r} with {rank} axes: no row of parallel.axes.PARAM_AXES says what"
        " they are; add one"
    )


def spec(names: Names) -> PartitionSpec:
    """Where a mesh splits an array whose axes have these logical names."""
    return PartitionSpec(*(None if name is None else MESH_AXES[name] for name in names))


def split(mesh: Mesh, name: str) -> int:
    """Into how many parts `mesh` splits a logical axis."""
    return math.prod(mesh.shape[axis] for axis in MESH_AXES[name])


@contextlib.contextmanager
def on(mesh: Mesh | None) -> Iterator[None]:
    """While this is in force, `constrain` places what is traced on `mesh`; nowhere with None.

    Enter it inside the function that is compiled: a program remembers the mesh it was traced for,
    and is not traced again for another.
    """
    token = _mesh.set(mesh)
    try:
        yield
    finally:
        _mesh.reset(token)


def current() -> Mesh | None:
    """The mesh that `on` has put in force, or None."""
    return _mesh.get()


def fitting(mesh: Mesh, shape: tuple[int, ...], names: Names) -> PartitionSpec:
    """Where `mesh` splits an activation of this shape, whose axes have these logical names.

    An axis of the mesh splits one axis of the array at most, the first that names it. An axis whose
    length the mesh does not divide stays whole. Beside tensor parallelism the height stays whole:
    XLA (jaxlib 0.10.2) computes a convolution of doubled images wrongly where both it and features
    are split.
    """
    taken: set[str] = set()
    places: list[tuple[str, ...] | None] = []
    for name, size in zip(names, shape, strict=True):
        own = () if name is None else MESH_AXES[name]
        free = tuple(axis for axis in own if axis not in taken)
        whole = name == "height" and mesh.shape[TENSOR] > 1
        if not free or whole or size % math.prod(mesh.shape[axis] for axis in free):
            places.append(None)
            continue
        taken.update(free)
        places.append(free)
    return PartitionSpec(*places)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x`, its axes split over the mesh in force as `fitting` says; None stands for whole.

    Outside `on(mesh)`, or on one device, this is `x` itself.
    """
    mesh = _mesh.get()
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, fitting(mesh, x.shape, names)))
