"""Low-rank adapters alone: small files that change a trained stage, by as much as one likes.

What `config.lora` trains (arXiv 2106.09685) is two thin matrices beside each kernel, A and B, of
which the kernel's change is A B. A file holds them and, for each kernel, a mark of what it was
trained beside, so that adapters of another model are refused. Any number of files act at once, each
with its own weight: W + sum_i weight_i A_i B_i.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from unclip_jax.common import checks
from unclip_jax.common.files import replacing
from unclip_jax.common.params import TRAINED, Params, fingerprint, flatten, listing, unflatten
from unclip_jax.errors import UserError
from unclip_jax.models import low_rank
from unclip_jax.weights.folder import save_tensors
from unclip_jax.weights.mapped import mapped, shapes
from unclip_jax.weights.trained import Part

FORMAT = "unclip_jax adapters 1"
CHANGED = "adapters"  # of a part's description in memory: what changes it, and by how much
MARK = "mark"  # beside "lora_a" and "lora_b" of a kernel: float32 [3], see `marks`

# How far apart two marks of one kernel may be, of its length: rounding to bfloat16 moves them by
# less than 1/500, another kernel's are apart by about 1.
_APART = 1 / 100


class Adapters(NamedTuple):
    """A file of adapters, read.

    Attributes:
        path: of the file.
        kind: of the stage they change.
        image_size: of that stage, which tells upsamplers apart.
        about: what else the file says of them: how they were trained, and on what.
        kernels: {where in the network: (A, B, mark)}, float32.
    """

    path: str
    kind: str
    image_size: int
    about: dict[str, Any]
    kernels: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]


def save_adapters(
    path: str | Path,
    part: Part,
    adapters: Params,
    scale: float,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write adapters into a safetensors file, whole or not at all.

    Args:
        path: of the file, .safetensors.
        part: the stage as it was before they were trained.
        adapters: tree of "lora_a" and "lora_b", as `training.lora.init` makes them.
        scale: the factor on A B, which goes into B.
        about: JSON-able, what to remember of them.
    """
    if Path(path).suffix != ".safetensors":
        raise UserError(f"adapters {str(path)!r}: expected a name that ends in .safetensors")
    flat, network = flatten(adapters), flatten(part.params[TRAINED])
    tensors = {}
    for name in (name for name in flat if name.endswith(low_rank.A)):
        where = name.removesuffix(low_rank.A)
        tensors[name] = np.asarray(flat[name], np.float32)
        tensors[where + low_rank.B] = np.asarray(scale * flat[where + low_rank.B], np.float32)
        tensors[where + MARK] = np.asarray(_marks({where: network[where + "kernel"]})[where])
    stage = part.stage
    told = {"kind": stage.kind, "image_size": stage.image_size, "about": dict(about or {})}
    metadata = {"format": FORMAT, "stage": json.dumps(told)}
    metadata["fingerprint"] = fingerprint(unflatten(tensors))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(Path(path)) as temporary:
        save_tensors(tensors, temporary, metadata)


def read_adapters(path: str | Path) -> Adapters:
    """Read a file that `save_adapters` wrote.

    Raises:
        UserError: there is none, it is another kind of file, or it has changed since.
    """
    path = Path(path)
    name = f"adapters {str(path)!r}"
    if not path.is_file():
        raise UserError(f"{name}: no such file; give one that train.py or unclip save wrote")
    with mapped(path) as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise UserError(
                f"{name}: no adapters of this package's (its format is {metadata.get('format')!r},"
                f" expected {FORMAT!r}); give a file that train.py or unclip save wrote"
            )
        tensors = {n: file.get_tensor(n) for n in shapes(file, path)}
    damaged = UserError(f"{name}: damaged, it is not as it was written; copy it again")
    try:
        if fingerprint(unflatten(dict(sorted(tensors.items())))) != metadata["fingerprint"]:
            raise damaged
        told = json.loads(metadata["stage"])
        kind, size, about = told["kind"], told["image_size"], told["about"]
        places = [n.removesuffix(low_rank.A) for n in tensors if n.endswith(low_rank.A)]
        kernels = {p: tuple(tensors[p + n] for n in (low_rank.A, low_rank.B, MARK)) for p in places}
        if not isinstance(about, dict) or not all(np.isfinite(x).all() for x in tensors.values()):
            raise damaged
    except (KeyError, ValueError, TypeError, IndexError) as error:  # as only a made-up file does
        raise damaged from error
    return Adapters(str(path), kind, size, about, kernels)


def blended(part: Part, chosen: Sequence[tuple[Adapters, float]]) -> Part:
    """A part changed by adapters, each as much as its weight says; 0 is not at all.

    Weights in float32 take up the changes, and sampling costs what it did. Beside others, which
    would round most of a change away, the adapters act as they did in training. Either way another
    weight compiles nothing.

    Raises:
        UserError: adapters of another model, or a weight that is no finite number.
    """
    if CHANGED in part.description:
        raise UserError(
            "adapters: this model has some in it already; give all of them, with their weights, to"
            " the model as it was loaded"
        )
    network = flatten(part.params[TRAINED])
    weights = [checks.number(f"weight of {a.path!r}", weight) for a, weight in chosen]
    for adapters, _ in chosen:
        check(adapters, part)
    places = sorted({where for adapters, _ in chosen for where in adapters.kernels})
    changes = {
        where: [a.kernels[where][:2] if where in a.kernels else None for a, _ in chosen]
        for where in places
    }
    told, mesh = jnp.asarray(weights, jnp.float32), _mesh(part)
    kernels = {where: network[where + "kernel"] for where in places}
    if all(kernel.dtype == jnp.float32 for kernel in kernels.values()):
        whole = _added(kernels, changes, told)
        changed = {
            where + "kernel": jax.device_put(
                whole[where], getattr(kernels[where], "sharding", None)
            )
            for where in places
        }
    else:
        changed = _stacked(changes, told)
        if mesh is not None:
            changed = jax.device_put(changed, NamedSharding(mesh, PartitionSpec()))
    about = [{"file": a.path, "weight": w} for (a, _), w in zip(chosen, weights, strict=True)]
    return part._replace(
        params=part.params | {TRAINED: unflatten(network | changed)},
        description=part.description | {CHANGED: about},
    )


def check(adapters: Adapters, part: Part) -> None:
    """Raise UserError unless the adapters were trained beside this very part, rounded or not."""
    stage, network = part.stage, flatten(part.params[TRAINED])
    found, own = (adapters.kind, adapters.image_size), (stage.kind, stage.image_size)
    name = f"adapters {adapters.path!r}"
    if found != own:
        raise UserError(f"{name}: of a {found[0]} of {found[1]} px, expected one of {own[1]} px")
    canvas = adapters.about.get("canvas")
    own_canvas = part.description.get("canvas", canvas) if "canvas" in part.params else None
    if canvas != own_canvas and canvas:
        raise UserError(
            f"{name}: trained with another canvas (config.canvas) than this {stage.kind} has; use"
            " the model that the same training wrote"
        )
    wrong = []
    for where, (a, b, mark) in adapters.kernels.items():
        kernel = network.get(where + "kernel")
        shape = (
            None if kernel is None else low_rank.matrix_shape(where + "kernel", kernel.shape, True)
        )
        fits = shape is not None and a.ndim == b.ndim == len(shape)
        fits = fits and (*a.shape[:-1], b.shape[-1]) == shape
        if not (fits and b.shape == (*shape[:-2], a.shape[-1], shape[-1]) and mark.shape == (3,)):
            wrong.append(where + "kernel")
    if wrong or not adapters.kernels:
        listed = listing(wrong) or "none at all"
        raise UserError(f"{name}: of another model, with other kernels than this one ({listed})")
    marks = _marks({where: network[where + "kernel"] for where in adapters.kernels})
    marks = {where: np.asarray(mark) for where, mark in marks.items()}
    differing = [
        where
        for where, (_, _, mark) in adapters.kernels.items()
        if not np.abs(mark - marks[where]).max() <= _APART * abs(mark[0])
    ]
    if differing:
        raise UserError(
            f"{name}: trained beside other weights than this {stage.kind} has (of"
            f" {len(differing)} of {len(adapters.kernels)} kernels, {listing(differing)}); use the"
            " model that it was trained from, without other adapters in it"
        )


def settled(part: Part) -> Part:
    """A part to save: adapters beside its kernels go into them, which are then float32."""
    network = flatten(part.params[TRAINED])
    adapters = {n: x for n, x in network.items() if n.endswith((low_rank.A, low_rank.B))}
    about = {name: value for name, value in part.description.items() if name != CHANGED}
    if not adapters:
        return part._replace(description=about)
    bare = unflatten({n: x for n, x in network.items() if n not in adapters})
    whole = low_rank.merged(bare, unflatten(adapters))
    return part._replace(params=part.params | {TRAINED: whole}, description=about)


def _mesh(part: Part) -> Any:
    """The mesh that the weights of a part lie on; None for one device."""
    where = getattr(jax.tree.leaves(part.params[TRAINED])[0], "sharding", None)
    return where.mesh if isinstance(where, NamedSharding) else None


@jax.jit
def _marks(kernels: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Of each kernel its length, and its sums under two patterns of signs: float32 [3].

    Rounded weights have nearly the same marks; others agree in none.
    """

    def mark(kernel: jax.Array) -> jax.Array:
        kernel = kernel.astype(jnp.float32)
        count = jax.lax.iota(jnp.uint32, kernel.size).reshape(kernel.shape)
        signs = [
            1.0 - 2.0 * ((count * jnp.uint32(odd)) >> 31).astype(jnp.float32)
            for odd in (2654435761, 2246822519)
        ]
        return jnp.stack([jnp.sqrt(jnp.sum(kernel**2)), *(jnp.sum(s * kernel) for s in signs)])

    return jax.tree.map(mark, kernels)


@jax.jit
def _added(kernels, changes, weights):
    """The kernels with the weighted products added, float32; `changes` has None for no change."""
    whole = {}
    for where, kernel in kernels.items():
        products = [
            weights[i] * jnp.matmul(*pair, precision=jax.lax.Precision.HIGHEST)
            for i, pair in enumerate(changes[where])
            if pair is not None
        ]
        whole[where] = kernel + sum(products).reshape(kernel.shape)
    return whole


@jax.jit
def _stacked(changes, weights):
    """All adapters of a kernel as one pair of a higher rank, the weights in B."""
    stacked = {}
    for where, pairs in changes.items():
        there = [(a, weights[i] * b) for i, pair in enumerate(pairs) if pair for a, b in [pair]]
        stacked[where + low_rank.A] = jnp.concatenate([a for a, _ in there], axis=-1)
        stacked[where + low_rank.B] = jnp.concatenate([b for _, b in there], axis=-2)
    return stacked
