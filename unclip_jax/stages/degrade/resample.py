"""Resizing from and to sides that are traced: a matrix of weights, new pixels by old ones.

Pixel i of a side of `new` lies at (i + 1/2) old / new - 1/2 among the old ones. Every way to resize
is then a rule for one row of a matrix, and one matrix does for rows and columns of the image.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

BILINEAR, BICUBIC, AREA, NEAREST = range(4)


def resize_matrix(
    kind: int | jax.Array, old: int | jax.Array, new: int | jax.Array, sigma: jax.Array, size: int
) -> jax.Array:
    """Weights of the old pixels in each new one; rows sum to 1.

    "Bilinear" and "bicubic" (a = -3/4) look at the nearest 2 and 4 old pixels, however much smaller
    the image becomes, as video cards and OpenCV do: their aliasing is part of the degradation.
    "Area" averages what a new pixel covers. "Nearest" takes one point of the image after a Gaussian
    blur, the point where the new pixel lies: no shift remains to be undone.

    Args:
        kind: BILINEAR, BICUBIC, AREA or NEAREST; may be traced.
        old: pixels there are, at most `size`; may be traced.
        new: pixels there will be, at most `size`; may be traced.
        sigma: the blur before NEAREST, in old pixels, above 0.
        size: of the matrix; static.

    Returns:
        float32 `[size, size]`. Columns from `old` on are 0; rows from `new` on have no meaning.
    """
    ratio = jnp.asarray(old, jnp.float32) / new
    position = (jnp.arange(size) + 0.5) * ratio - 0.5
    rules = [
        lambda: _interpolation(_triangle, position, old),
        lambda: _interpolation(_cubic, position, old),
        lambda: _coverage(ratio, old, size),
        lambda: _gaussian(position, old, sigma),
    ]
    return jax.lax.switch(kind, rules)


def resize_corner(canvas: jax.Array, matrix: jax.Array) -> jax.Array:
    """Resize the image in the top left corner of a square canvas; `bsr` says why.

    Args:
        canvas: finite float32 `[size, size, c]`.
        matrix: as `resize_matrix` makes it, `[size, size]`.

    Returns:
        float32 `[size, size, c]`, without meaning outside the new corner.
    """
    precision = jax.lax.Precision.HIGHEST
    return jnp.einsum("iy,jx,yxc->ijc", matrix, matrix, canvas, precision=precision)


def _interpolation(
    kernel: Callable[[jax.Array], jax.Array], position: jax.Array, old: int | jax.Array
) -> jax.Array:
    """Rows of a kernel that reaches 2 pixels; where it leaves the image the edge is repeated."""
    size = len(position)
    first = jnp.floor(position).astype(jnp.int32) - 1
    matrix = jnp.zeros((size, size))
    for tap in range(4):
        weight = kernel(jnp.abs(position - (first + tap)))
        column = jnp.clip(first + tap, 0, old - 1)
        matrix += weight[:, None] * jax.nn.one_hot(column, size)
    return matrix


def _triangle(distance: jax.Array) -> jax.Array:
    return jnp.maximum(1.0 - distance, 0.0)


def _cubic(distance: jax.Array, a: float = -0.75) -> jax.Array:
    """Keys's cubic convolution kernel (1981, equation 4 with general a)."""
    d = distance
    near = ((a + 2) * d - (a + 3)) * d**2 + 1
    far = a * (((d - 5) * d + 8) * d - 4)
    return jnp.where(d <= 1, near, jnp.where(d < 2, far, 0.0))


def _coverage(ratio: jax.Array, old: int | jax.Array, size: int) -> jax.Array:
    """The share of each old pixel in new pixel i, which covers [i ratio, (i + 1) ratio]."""
    i, j = jnp.arange(size)[:, None], jnp.arange(size)[None, :]
    start, end = i * ratio, jnp.minimum((i + 1) * ratio, old)
    return jnp.maximum(jnp.minimum(end, j + 1) - jnp.maximum(start, j), 0.0) / ratio


def _gaussian(position: jax.Array, old: int | jax.Array, sigma: jax.Array) -> jax.Array:
    """Gaussian weights about each position, of the pixels that there are."""
    j = jnp.arange(len(position))[None, :]
    logits = -0.5 * ((j - position[:, None]) / sigma) ** 2
    return jax.nn.softmax(jnp.where(j < old, logits, -jnp.inf), axis=1)
