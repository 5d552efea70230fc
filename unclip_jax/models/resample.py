"""Changing the side of an image: folding patches, halving, doubling, and convolving the doubled."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp

from unclip_jax.models.convolution import Conv, convolve


def space_to_depth(x: jax.Array, patch: int) -> jax.Array:
    """Fold each `patch` x `patch` square of pixels into channels: `[b, h/p, w/p, p * p * c]`."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // patch, w // patch, patch * patch * c)


def depth_to_space(x: jax.Array, patch: int) -> jax.Array:
    """The inverse of `space_to_depth`."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, patch, patch, c // patch**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * patch, w * patch, c // patch**2)


def halve(x: jax.Array) -> jax.Array:
    """Average over 2x2 squares: `[b, h, w, c]` to `[b, h / 2, w / 2, c]`."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def double(x: jax.Array) -> jax.Array:
    """Nearest-neighbour upsampling by 2: `[b, h, w, c]` to `[b, 2 * h, 2 * w, c]`."""
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
    return x.reshape(b, 2 * h, 2 * w, c)


def _fold(kernel: jax.Array, axis: int, phase: int) -> jax.Array:
    """The three taps along an axis as the two that an even (0) or odd (1) place of a doubled
    image sees: two neighbours among three doubled pixels are always the same pixel."""
    first, middle, last = jnp.split(kernel, 3, axis)
    taps = [first + middle, last] if phase else [first, middle + last]
    return jnp.concatenate(taps, axis)


def convolve_doubled(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The 3x3 convolution, padded with zeros, of `double(x)`, which is never made.

    Every second place of the result, along each axis, is a 2x2 convolution of `x` itself: 16
    products a pixel and pair of channels instead of 36.

    Args:
        x: `[b, h, w, c]`.
        kernel: `[3, 3, c, f]`; its taps are added up in its own dtype, then cast to that of `x`.

    Returns:
        `[b, 2 * h, 2 * w, f]` of the dtype of `x`.
    """
    b, h, w, _ = x.shape

    def phase(down: int, right: int) -> jax.Array:
        taps = _fold(_fold(kernel, 0, down), 1, right).astype(x.dtype)
        pads = ((1 - down, down), (1 - right, right))
        return convolve(x, taps, pads)

    rows = [jnp.stack([phase(down, 0), phase(down, 1)], axis=3) for down in (0, 1)]
    return jnp.stack(rows, axis=2).reshape(b, 2 * h, 2 * w, kernel.shape[-1])


class DoublingConv(Conv):
    """A 3x3 convolution of the doubled image; attributes and params as those of `Conv`."""

    grows: ClassVar[int] = 2

    def convolve(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """`[b, h, w, c]` to `[b, 2 * h, 2 * w, features]`."""
        return convolve_doubled(x, kernel)
