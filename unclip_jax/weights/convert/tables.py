"""Key maps between other libraries' checkpoints and our params, as data.

A table is a list of rows (kind, our path, their names). The kind says which arrays belong to a
layer and how they are laid out on each side; "{i}" in their names counts the layers of a scanned
stack. One table is read in both directions: `to_ours` converts, `to_theirs` exports, and both are
exact. Nothing is guessed: every tensor must be used once, with the shape that our tree implies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.common.params import compare_shapes, flatten, unflatten
from unclip_jax.errors import UserError
from unclip_jax.weights.convert.tensor_files import Shapes, Tensors

Params = dict[str, Any]


class Row(NamedTuple):
    """One layer: how it is laid out, where it is in our tree, what they call it."""

    kind: str
    ours: str
    theirs: tuple[str, ...]


class Layout(NamedTuple):
    """One of our leaves of a layer and the arrays of theirs that it is made of.

    Attributes:
        leaf: its name in our layer; "" where the row's path names the leaf itself.
        suffix: what their names end in.
        to_ours: their arrays and our shape to our array.
        to_theirs: our array and how many arrays they have to theirs.
    """

    leaf: str
    suffix: str
    to_ours: Callable[[list[Any], tuple[int, ...]], Any]
    to_theirs: Callable[[Any, int], list[Any]]


# ---------------------------------------------------------------- layouts
#
# Their weights are [out, in]; ours are [in, ..., out], where the dots are heads and the like.


def _from_heads(weights, shape):
    """[heads * group * k, in] to [in, group, heads, k]: q, k, v of one head side by side."""
    d, group, n, k = shape
    return weights[0].reshape(n, group, k, d).transpose(3, 1, 0, 2)


def _from_head_biases(biases, shape):
    group, n, k = shape
    return biases[0].reshape(n, group, k).swapaxes(0, 1)


def _with_leading(axes):
    """An array that they keep with leading axes of length one."""
    return Layout(
        "",
        "",
        lambda arrays, shape: arrays[0].reshape(shape),
        lambda array, count: [array.reshape((1,) * axes + array.shape)],
    )


def _pointwise(layout):
    """The same layer as a convolution of width one: their weight has a last axis of length one."""
    return layout._replace(
        to_ours=lambda arrays, shape: layout.to_ours([a[..., 0] for a in arrays], shape),
        to_theirs=lambda array, count: [a[..., None] for a in layout.to_theirs(array, count)],
    )


_UNCHANGED = (lambda arrays, shape: arrays[0], lambda array, count: [array])
_VECTORS = (
    lambda vectors, shape: np.stack(vectors).reshape(shape),
    lambda array, count: list(array.reshape(count, -1)),
)
_LINEAR = Layout(
    "kernel",
    ".weight",
    lambda weights, shape: np.stack([w.T for w in weights], axis=1).reshape(shape),
    lambda kernel, count: [w.T for w in kernel.reshape(len(kernel), count, -1).swapaxes(0, 1)],
)
_OUTPUT = _LINEAR._replace(
    to_ours=lambda weights, shape: weights[0].T.reshape(shape),
    to_theirs=lambda kernel, count: [kernel.reshape(-1, kernel.shape[-1]).T],
)
_HEADS = _LINEAR._replace(
    to_ours=_from_heads,
    to_theirs=lambda kernel, count: [kernel.transpose(2, 1, 3, 0).reshape(-1, len(kernel))],
)
_CONV = _LINEAR._replace(
    to_ours=lambda weights, shape: weights[0].transpose(2, 3, 1, 0),
    to_theirs=lambda kernel, count: [kernel.transpose(3, 2, 0, 1)],
)
_BIAS = Layout("bias", ".bias", *_VECTORS)
_HEAD_BIAS = Layout(
    "bias", ".bias", _from_head_biases, lambda bias, count: [bias.swapaxes(0, 1).reshape(-1)]
)
_SCALE = Layout("scale", ".weight", *_VECTORS)

KINDS: dict[str, tuple[Layout, ...]] = {
    # A dense layer; several of theirs may stand side by side in ours (q, k and v).
    "linear": (_LINEAR, _BIAS),
    # A dense layer that reads [heads, k].
    "output": (_OUTPUT, _BIAS),
    # A dense layer for q, k and v (or k and v), interleaved head by head.
    "heads": (_HEADS, _HEAD_BIAS),
    # Dense layers that they keep as convolutions of width one.
    "output_1d": (_pointwise(_OUTPUT), _BIAS),
    "heads_1d": (_pointwise(_HEADS), _HEAD_BIAS),
    "linear_2d": (_pointwise(_pointwise(_LINEAR)), _BIAS),
    # PyTorch's MultiheadAttention: q, k and v one after the other in one weight.
    "packed": (_LINEAR._replace(suffix="_weight"), _BIAS._replace(suffix="_bias")),
    # Dense layers without bias, and as a bare [in, out] matrix.
    "projection": (_LINEAR,),
    "projection_output": (_OUTPUT,),
    "matrix": (Layout("kernel", "", *_UNCHANGED),),
    "conv": (_CONV, _BIAS),
    "patches": (_CONV,),
    "norm": (_SCALE, _BIAS),
    # Batch normalisation with its fixed statistics.
    "batch_norm": (
        _SCALE,
        _BIAS,
        Layout("mean", ".running_mean", *_VECTORS),
        Layout("variance", ".running_var", *_VECTORS),
    ),
    # Without bias (T5's RMSNorm).
    "rms_norm": (_SCALE,),
    "embedding": (Layout("embedding", ".weight", *_UNCHANGED),),
    "array": (_with_leading(0),),
    "array_1": (_with_leading(1),),
    "array_11": (_with_leading(2),),
}


def row(kind: str, ours: str, *theirs: str) -> Row:
    """A row of a table."""
    return Row(kind, ours, theirs)


def under(prefix: str, table: list[Row]) -> list[Row]:
    """The same table for params that lie under `prefix` in a larger tree of ours."""
    return [r._replace(ours=f"{prefix}/{r.ours}") for r in table]


def named(prefix: str, table: list[Row]) -> list[Row]:
    """The same table where all their names begin with `prefix`."""
    return [r._replace(theirs=tuple(prefix + name for name in r.theirs)) for r in table]


# ---------------------------------------------------------------- both directions


class _Leaf(NamedTuple):
    """One of our leaves, or one layer of a scanned one, and their names for it."""

    path: str
    layer: int | None
    layout: Layout
    names: list[str]
    shape: tuple[int, ...]


def _leaves(table: list[Row], target: Mapping[str, Any]) -> Iterator[_Leaf]:
    """Every leaf that a table names, with its shape in the flat `target`."""
    for kind, ours, theirs in table:
        for layout in KINDS[kind]:
            path = f"{ours}/{layout.leaf}" if layout.leaf else ours
            if path not in target:
                raise ValueError(f"table row {ours!r}: our params have no {path!r}")
            shape = tuple(target[path].shape)
            if "{i}" in theirs[0]:
                for i in range(shape[0]):
                    names = [name.format(i=i) + layout.suffix for name in theirs]
                    yield _Leaf(path, i, layout, names, shape[1:])
            else:
                yield _Leaf(path, None, layout, [n + layout.suffix for n in theirs], shape)


def their_shapes(table: list[Row], target: Params) -> Shapes:
    """Name, shape and dtype of every tensor they must have for our params `target`.

    Raises:
        ValueError: the table names a leaf or one of their tensors twice, or leaves one out.
    """
    flat = flatten(target)
    shapes: Shapes = {}
    for leaf in _leaves(table, flat):
        ours = jax.ShapeDtypeStruct(leaf.shape, flat[leaf.path].dtype)
        take_apart = functools.partial(leaf.layout.to_theirs, count=len(leaf.names))
        theirs = jax.eval_shape(take_apart, ours)
        repeated = set(leaf.names) & set(shapes)
        if repeated:
            raise ValueError(f"table: {sorted(repeated)} named twice")
        shapes |= dict(zip(leaf.names, theirs, strict=True))
    untouched = set(flat) - {leaf.path for leaf in _leaves(table, flat)}
    if untouched:
        raise ValueError(f"table: nothing fills {sorted(untouched)}")
    return shapes


def to_ours(table: list[Row], tensors: Tensors, target: Params, dtype: str = "") -> Params:
    """Params like `target` made of `tensors`, which are read one at a time.

    Args:
        table: the key map.
        tensors: theirs; all of them are used, once each.
        target: tree of things with shape and dtype, as `jax.eval_shape(stage.init, key)` gives.
        dtype: of the result; "" stands for the narrowest that holds all of theirs.

    Returns:
        a tree of NumPy arrays.

    Raises:
        UserError: tensors are missing, unexpected, or of another shape, or not floating point.
    """
    flat = flatten(target)
    problems = compare_shapes(tensors.shapes, their_shapes(table, target), conforms=_floating)
    if problems:
        raise UserError(f"{tensors.origin}: the tensors do not fit: {problems}")
    if not dtype:
        dtype = functools.reduce(jnp.promote_types, (s.dtype for s in tensors.shapes.values()))
    leaves: dict[str, np.ndarray] = {}
    for leaf in _leaves(table, flat):
        array = leaf.layout.to_ours([tensors.read(name) for name in leaf.names], leaf.shape)
        if leaf.path not in leaves:
            leaves[leaf.path] = np.empty(flat[leaf.path].shape, jnp.dtype(dtype))
        leaves[leaf.path][... if leaf.layer is None else leaf.layer] = array
    return unflatten(leaves)


def _floating(found: np.dtype, wanted: np.dtype) -> bool:
    return jnp.issubdtype(found, jnp.floating) and jnp.issubdtype(wanted, jnp.floating)


def to_theirs(table: list[Row], params: Params) -> Tensors:
    """Our params as their tensors, made one at a time: the inverse of `to_ours`, exactly."""
    flat = flatten(params)
    leaves = {name: (leaf, j) for leaf in _leaves(table, flat) for j, name in enumerate(leaf.names)}

    def read(name: str) -> np.ndarray:
        leaf, j = leaves[name]
        array = np.asarray(flat[leaf.path])
        array = array if leaf.layer is None else array[leaf.layer]
        return np.asarray(leaf.layout.to_theirs(array, len(leaf.names))[j], order="C")

    return Tensors(their_shapes(table, params), read, "our params")
