"""What the axes of arrays mean, and where a device mesh puts them.

Two tables hold everything. `MESH_AXES` says which axes of the mesh split a logical axis, such as
"heads". `PARAM_AXES` names the logical axes of every trained param, once: where a param lies, which
of its matrices Muon makes orthogonal, and where LoRA factorises it all follow from its row.
Networks name the axes of their activations where blocks meet, with `constrain`, and know no mesh:
outside `on(mesh)` it does nothing.

The logical axes that a mesh splits:

    batch   examples
    copy    the same, of each copy of the model, between whose devices they are not split
    height  rows of pixels, of which every device has a band, and a few rows of its neighbours' for
            each convolution; also over devices between which the examples are not split
    embed   features of the residual stream, as params hold them: split, each device keeps its part
            and gathers the rest when a block needs it (FSDP: Zhao et al. 2023, arXiv 2304.11277)
    heads   attention heads, and
    mlp     features inside a block: split, each device computes its part of the block and the
            results are summed (tensor parallelism: Shoeybi et al. 2019, arXiv 1909.08053)
    vocab   rows of a table of token embeddings

and those that stay whole:

    layer   blocks of a scanned stack
    fused   projections made as one: queries, keys and values
    head    features of one head
    window  rows or columns of a convolution's window
    pixel   channels of pixels
    row     rows of a small table
    feature any other features
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from unclip_jax.common.params import TRAINED, Params, flatten
from unclip_jax.errors import UserError

DATA, FSDP, SPATIAL, TENSOR = "data", "fsdp", "spatial", "tensor"

MESH_AXES: dict[str, tuple[str, ...]] = {
    "batch": (DATA, FSDP),
    "copy": (DATA,),
    "height": (DATA, FSDP, SPATIAL),
    "embed": (FSDP,),
    "heads": (TENSOR,),
    "mlp": (TENSOR,),
    "vocab": (TENSOR,),
} | dict.fromkeys(("layer", "fused", "head", "window", "pixel", "row", "feature"), ())

# By the last two names on a param's path, or else the last one: its axes but for the layers of a
# scanned stack. A kernel's arrow stands between the axes that it sums over and those that it makes.
PARAM_AXES: dict[str, str] = {
    # Attention.
    "qkv/kernel": "embed -> fused heads head",
    "qkv/bias": "fused heads head",
    "context_kv/kernel": "embed -> fused heads head",
    "context_kv/bias": "fused heads head",
    "key_value/kernel": "embed -> fused heads head",
    "key_value/bias": "fused heads head",
    "query/kernel": "embed -> heads head",
    "query/bias": "heads head",
    "out/kernel": "heads head -> embed",
    # Perceptrons: of a Transformer's block, and of the timestep.
    "up/kernel": "embed -> mlp",
    "up/bias": "mlp",
    "gate/kernel": "embed -> mlp",
    "gate/bias": "mlp",
    "down/kernel": "mlp -> embed",
    "linear_1/kernel": "embed -> mlp",
    "linear_1/bias": "mlp",
    "linear_2/kernel": "mlp -> embed",
    # Convolutions: two of a residual block, and those at the ends.
    "conv_1/kernel": "window window embed -> mlp",
    "conv_1/bias": "mlp",
    "conv_2/kernel": "window window mlp -> embed",
    "conv_in/kernel": "window window pixel -> embed",
    "conv_out/kernel": "window window embed -> pixel",
    "patches/kernel": "window window pixel -> embed",
    # Those of an autoencoder, between its levels and at its latents; and of a decoder's hint.
    "halve/kernel": "window window embed -> feature",
    "double/kernel": "window window embed -> feature",
    "z_scale/kernel": "pixel -> feature",
    "z_shift/kernel": "pixel -> feature",
    "quant/kernel": "pixel -> pixel",
    "post_quant/kernel": "pixel -> pixel",
    "codebook/embedding": "row pixel",
    **dict.fromkeys((f"hint_{i}/kernel" for i in range(8)), "window window pixel -> feature"),
    # Products at the ends: of a Transformer over patches, of a canvas.
    "narrow/kernel": "pixel -> feature",
    "from_pixels/kernel": "pixel -> embed",
    "to_pixels/kernel": "embed -> pixel",
    "to_pixels/bias": "pixel",
    "pixels/kernel": "embed -> pixel",
    "pixels/bias": "pixel",
    # Tables of embeddings.
    "tokens/embedding": "vocab embed",
    "latents/embedding": "vocab embed",
    "label_to_emb/embedding": "row feature",
    # Everything else.
    "kernel": "embed -> feature",
    "bias": "feature",
    "scale": "feature",
    "class_token": "feature",
    "query": "feature",
    "offset": "feature",
    "positions": "row feature",
    "padding": "row feature",
    "null_z_i": "feature",
    "log_scale": "",
}

ADAPTERS = ("lora_a", "lora_b")  # of low rank: whole on every device
STACKED = "blocks"  # what is below it on a path has a layer axis first

_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)


class ParamAxes(NamedTuple):
    """The axes of a param.

    Attributes:
        names: the logical name of each.
        inputs: which of them a kernel sums over; () for what is no kernel.
        outputs: which of them it makes, likewise.
    """

    names: tuple[str, ...]
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()


def of_param(path: tuple[str, ...], rank: int) -> ParamAxes:
    """The axes of the param at `path`, which has `rank` of them.

    Raises:
        UserError: no row of `PARAM_AXES` is for it.
    """
    if path[-1] in ADAPTERS:
        return ParamAxes(("feature",) * rank)
    layers = ("layer",) if STACKED in path else ()
    for name in ("/".join(path[-2:]), path[-1]):
        if (row := PARAM_AXES.get(name)) is None:
            continue
        before, arrow, after = (tuple(part.split()) for part in row.partition("->"))
        names, first = layers + before + after, len(layers + before)
        if len(names) == rank:
            inputs, outputs = range(len(layers), first), range(first, rank)
            return ParamAxes(names, tuple(inputs), tuple(outputs)) if arrow else ParamAxes(names)
    raise UserError(
        f"param {'/'.join(path)!r} with {rank} axes: no row of parallel.axes.PARAM_AXES says what"
        " they are; add one"
    )


def checked(network: Params) -> Params:
    """A network's params as they are, if each of them has a row in `PARAM_AXES`.

    Raises:
        UserError: one has none.
    """
    for name, leaf in flatten(network).items():
        of_param((TRAINED, *name.split("/")), len(leaf.shape))
    return network


def spec(names: tuple[str | None, ...]) -> PartitionSpec:
    """Where a mesh splits an array whose axes have these logical names; None stands for whole."""
    return PartitionSpec(*(None if name is None else MESH_AXES[name] or None for name in names))


def split(mesh: Mesh, name: str) -> int:
    """Into how many parts `mesh` splits a logical axis."""
    return math.prod(mesh.shape[axis] for axis in MESH_AXES[name])


def splits_params(mesh: Mesh) -> bool:
    """Whether `mesh` splits any param."""
    names = set(" ".join(PARAM_AXES.values()).split()) - {"->"}
    return any(split(mesh, name) > 1 for name in names)


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


def fitting(mesh: Mesh, shape: tuple[int, ...], names: tuple[str | None, ...]) -> PartitionSpec:
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
