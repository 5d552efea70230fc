"""What the public feature networks are made of: convolutions whose batch statistics are fixed.

These networks are measuring instruments. They are never trained, so their normalisation is an
affine map, and they compute in float32 on every device: a rounder product would move every figure.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

EPS = 1e-3  # of TensorFlow's batch normalisation, under which both networks were trained


class FixedNorm(nn.Module):
    """Batch normalisation with the statistics of the training set (Ioffe & Szegedy 2015)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[b, h, w, c]` to the same."""
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        mean = self.param("mean", nn.initializers.zeros, shape)
        variance = self.param("variance", nn.initializers.ones, shape)
        gain = scale * jax.lax.rsqrt(variance + EPS)
        return x * gain[None, None, None] + (bias - mean * gain)[None, None, None]


class Depthwise(nn.Module):
    """A convolution of each feature by itself, "SAME" as TensorFlow means it.

    A sum over the places of its kernel: XLA's own takes five times as long on a CPU, where it finds
    no matrix product in it. Params are those of `flax.linen.Conv`.

    Attributes:
        kernel: height and width.
        stride: in both directions.
    """

    kernel: tuple[int, int]
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[b, h, w, c]` to `[b, h / stride, w / stride, c]`."""
        shape = (*self.kernel, 1, x.shape[-1])
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        sides = [-(-side // self.stride) for side in x.shape[1:3]]
        reach = [(side - 1) * self.stride + 1 for side in sides]
        lacking = [
            max(r + k - 1 - side, 0)
            for r, k, side in zip(reach, self.kernel, x.shape[1:3], strict=True)
        ]
        x = jnp.pad(x, [(0, 0), *((n // 2, n - n // 2) for n in lacking), (0, 0)])
        return sum(
            x[:, i : i + reach[0] : self.stride, j : j + reach[1] : self.stride]
            * kernel[i : i + 1, j : j + 1]
            for i in range(self.kernel[0])
            for j in range(self.kernel[1])
        )


class ConvNorm(nn.Module):
    """A convolution without bias, its normalisation, and perhaps an activation.

    Attributes:
        features: of the result.
        kernel: height and width.
        stride: in both directions.
        padding: "SAME" or "VALID", as TensorFlow means them.
        depthwise: whether each feature is convolved by itself, "SAME".
        activation: applied last; None for none.
    """

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"
    depthwise: bool = False
    activation: Callable[[jax.Array], jax.Array] | None = nn.relu

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[b, h, w, c]` to `[b, h / stride, w / stride, features]`."""
        if self.depthwise:
            x = Depthwise(self.kernel, self.stride, name="conv")(x)
        else:
            x = nn.Conv(
                self.features,
                self.kernel,
                self.stride,
                self.padding,
                use_bias=False,
                precision=jax.lax.Precision.HIGHEST,
                name="conv",
            )(x)
        x = FixedNorm(name="norm")(x)
        return x if self.activation is None else self.activation(x)


def resize_bilinear(images: jax.Array, size: int) -> jax.Array:
    """`[b, h, w, c]` to `[b, size, size, c]` as PyTorch's interpolate does it.

    Pixels have their centres at halves (align_corners=False), and nothing is smoothed first.
    """
    b, c = images.shape[0], images.shape[-1]
    images = images.astype(jnp.float32)
    return jax.image.resize(
        images, (b, size, size, c), "linear", antialias=False, precision=jax.lax.Precision.HIGHEST
    )
