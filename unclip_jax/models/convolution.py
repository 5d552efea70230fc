"""The 3x3 convolution of U-Nets."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Initializer

Pads = tuple[tuple[int, int], tuple[int, int]]  # zeros above and below, left and right
# What is done to some rows of an image `[b, r, w, c]`, given their numbers `[r]`; None is all rows.
OfRows = Callable[[jax.Array, jax.Array | None], jax.Array]

SAME: Pads = ((1, 1), (1, 1))


class Conv(nn.Module):
    """A 3x3 convolution of images that keeps their sides; params are those of `flax.linen.Conv`.

    Attributes:
        features: output channels.
        dtype: compute dtype.
        kernel_init: what the kernel starts as.
        stride: how far apart the places of the kernel are; 2 halves even sides.
        pads: zeros around the images.
        grows: how many rows come out for one that goes in.
    """

    features: int
    dtype: str = "float32"
    kernel_init: Initializer = nn.initializers.lecun_normal()
    stride: int = 1
    pads: Pads = SAME
    grows: ClassVar[int] = 1

    @nn.compact
    def __call__(self, x: jax.Array, first: OfRows | None = None, bands: int = 1) -> jax.Array:
        """`[b, h, w, c]` to `[b, h, w, features]`.

        Args:
            x: the images.
            first: what is done to them before, place by place.
            bands: in how many bands of rows, which divide h, that and the convolution are computed,
                one after the other: less memory. Only with a stride of 1.
        """
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        bias = bias.astype(self.dtype).reshape(1, 1, 1, -1)

        def convolved(part: jax.Array, rows: jax.Array | None) -> jax.Array:
            part = (first(part, rows) if first else part).astype(self.dtype)
            if rows is not None:  # beyond the image are zeros
                inside = (rows >= 0) & (rows < x.shape[1])
                part = jnp.where(inside.reshape(1, -1, 1, 1), part, 0)
            return self.convolve(part, kernel) + bias

        return convolved(x, None) if bands == 1 else in_bands(convolved, x, bands, self.grows)

    def convolve(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """What is done with the kernel, which is in float32."""
        return convolve(x, kernel.astype(x.dtype), self.pads, self.stride)


def in_bands(change: OfRows, x: jax.Array, bands: int, grows: int) -> jax.Array:
    """`change` of an image, band by band of its rows; it looks one row up and down.

    Args:
        change: makes `grows` rows of each row it is given; of what is beyond the image it is given
            the nearest row, with its number beyond.
        x: `[b, h, w, c]`.
        bands: a divisor of h.
        grows: see `change`.
    """
    height = x.shape[1] // bands

    def band(i: jax.Array) -> jax.Array:
        rows = i * height + jnp.arange(-1, height + 1)
        part = jnp.take(x, rows, axis=1, mode="clip")
        return change(part, rows)[:, grows:-grows]

    parts = jnp.moveaxis(jax.lax.map(band, jnp.arange(bands)), 0, 1)
    return parts.reshape(x.shape[0], grows * x.shape[1], *parts.shape[3:])


def convolve(x: jax.Array, kernel: jax.Array, pads: Pads = SAME, stride: int = 1) -> jax.Array:
    """Convolve images `[b, h, w, c]` with a kernel `[i, j, c, f]` to `[b, h, w, f]`.

    Args:
        x: the images.
        kernel: of the same dtype.
        pads: zeros around the images: along each axis one fewer than the kernel is long.
        stride: how far apart the places of the kernel are.
    """
    dims, strides = ("NHWC", "HWIO", "NHWC"), (stride, stride)
    return jax.lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=dims)
