"""The 3x3 convolution of U-Nets."""

from __future__ import annotations

import flax.linen as nn
import jax
from flax.typing import Initializer

Pads = tuple[tuple[int, int], tuple[int, int]]  # zeros above and below, left and right

SAME: Pads = ((1, 1), (1, 1))


class Conv(nn.Module):
    """A 3x3 convolution of images that keeps their sides; params are those of `flax.linen.Conv`.

    Attributes:
        features: output channels.
        dtype: compute dtype.
        kernel_init: what the kernel starts as.
    """

    features: int
    dtype: str = "float32"
    kernel_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[b, h, w, c]` to `[b, h, w, features]`."""
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        bias = bias.astype(self.dtype).reshape(1, 1, 1, -1)
        return self.convolve(x.astype(self.dtype), kernel) + bias

    def convolve(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """What is done with the kernel, which is in float32."""
        return convolve(x, kernel.astype(x.dtype))


def convolve(x: jax.Array, kernel: jax.Array, pads: Pads = SAME) -> jax.Array:
    """Convolve images `[b, h, w, c]` with a kernel `[i, j, c, f]` to `[b, h, w, f]`.

    Args:
        x: the images.
        kernel: of the same dtype.
        pads: zeros around the images: along each axis one fewer than the kernel is long.
    """
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), pads, dimension_numbers=dims)
