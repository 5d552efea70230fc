"""A canvas: a small picture that a perceptron draws of CLIP's embeddings, all at once.

A decoder that sees it beside x_t need not learn the layout of a picture from z_i and z_t itself,
which a diffusion model is slow to do: a perceptron is trained on thousands of pictures a second.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.common import checks
from unclip_jax.models.layers import ACTIVATIONS, DTYPES, check_counts

_EPS = 1e-6


@dataclass(frozen=True)
class CanvasConfig:
    """Size of a `Canvas`.

    Attributes:
        embed_dim: dimension of CLIP's embeddings z_i and z_t.
        width: features between its products.
        layers: products from `width` to `width`, each with a residual around it.
        size: side of the pictures that it draws, in pixels.
        dtype: compute dtype.
    """

    embed_dim: int = 768
    width: int = 2048
    layers: int = 2
    size: int = 32
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Raise `UserError` where a field makes no network."""
        check_counts(self, "embed_dim", "width", "size")
        check_counts(self, "layers", least=0)
        checks.choice("CanvasConfig.dtype", self.dtype, DTYPES)


class Canvas(nn.Module):
    """The perceptron: GELU after each product but the last, and RMS norms before those inside."""

    config: CanvasConfig

    @nn.compact
    def __call__(self, embeddings: jax.Array) -> jax.Array:
        """Normalised z_i and z_t, joined `[b, 2 * embed_dim]`, to `[b, size, size, 3]` float32."""
        c = self.config
        checks.shape("canvas embeddings", embeddings, (None, 2 * c.embed_dim))
        gelu, width = ACTIVATIONS["gelu"], c.width
        h = gelu(nn.Dense(width, dtype=c.dtype, name="in")(embeddings))
        for i in range(c.layers):
            h = h + gelu(nn.Dense(width, dtype=c.dtype, name=f"hidden_{i}")(rms_norm(h)))
        small = nn.initializers.variance_scaling(0.01, "fan_in", "truncated_normal")
        pixels = nn.Dense(3 * c.size**2, dtype=c.dtype, kernel_init=small, name="pixels")
        return pixels(rms_norm(h)).astype(jnp.float32).reshape(-1, c.size, c.size, 3)


def rms_norm(x: jax.Array) -> jax.Array:
    """`[..., d]` scaled to a root mean square of one along d, float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + _EPS)
