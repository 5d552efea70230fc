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
            return self.convolve(part, kernel) + bias

        return convolved(x, None) if bands == 1 else in_bands(convolved, x, bands, self.grows)

    def convolve(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """What is done with the kernel, which is in float32."""
        return convolve(x, kernel.astype(x.dtype), self.pads, self.stride)


def in_bands(change: OfRows, x: jax.Array, bands: int, grows: int) -> jax.Array:
    """`change` of an image, band by band of its rows; it looks one row up and down.

    Args:
        change: makes `grows` rows of each row it is given, as if zeros were around those.
        x: `[b, h, w, c]`.
        bands: a divisor of h.
        grows: see `change`.
    """
    total = x.shape[1]
    height = total // bands
    given = min(height + 2, total)  # a band with its neighbours; one at the edge has two inside

    def band(i: jax.Array) -> jax.Array:
        start = jnp.clip(i * height - 1, 0, total - given)
        part = jax.lax.dynamic_slice_in_dim(x, start, given, axis=1)
        made = change(part, start + jnp.arange(given))
        ours = grows * (i * height - start)
        return jax.lax.dynamic_slice_in_dim(made, ours, grows * height, axis=1)

    def put(i: jax.Array, whole: jax.Array) -> jax.Array:
        # Written where it belongs, so that no copy is made of bands side by side.
        return jax.lax.dynamic_update_slice_in_dim(whole, band(i), grows * height * i, axis=1)

    made = jax.eval_shape(band, jnp.int32(0))
    # All of it is written over. Zeros would need nothing of x, and so be made long before.
    begun = x[:, :1, :1, :1].astype(made.dtype)
    whole = jnp.broadcast_to(begun, (x.shape[0], grows * total, *made.shape[2:]))
    return jax.lax.fori_loop(0, bands, put, whole)


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
