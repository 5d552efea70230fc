"""A canvas: a small picture that a perceptron draws of CLIP's embeddings, all at once.

A decoder that sees it beside x_t need not learn the layout of a picture from z_i and z_t itself,
which a diffusion model is slow to do: a perceptron is trained on thousands of pictures a second.

Its first layer is a product, or a network of normalised radial basis functions (Moody and Darken
1989): centres in the space of the embeddings, each with a value, and what the embeddings are near
to is what they become. That learns many pictures by heart sooner and more sharply.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.common import checks
from unclip_jax.models.layers import ACTIVATIONS, DTYPES, check_counts

_EPS = 1e-6

SHARPNESS = 20.0  # s, to begin with
VALUE_SCALE = 30.0  # Adam moves all params alike, and values have as far to go as pictures differ


@dataclass(frozen=True)
class CanvasConfig:
    """Size of a `Canvas`.

    Attributes:
        embed_dim: dimension of CLIP's embeddings z_i and z_t.
        width: features between its products, and of each centre's value.
        layers: products from `width` to `width`, each with a residual around it.
        centres: radial basis functions in the first layer; 0 for a product instead.
        size: side of the pictures that it draws, in pixels.
        dtype: compute dtype.
    """

    embed_dim: int = 768
    width: int = 2048
    layers: int = 2
    size: int = 32
    centres: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Raise `UserError` where a field makes no network."""
        check_counts(self, "embed_dim", "width", "size")
        check_counts(self, "layers", "centres", least=0)
        checks.choice("CanvasConfig.dtype", self.dtype, DTYPES)


class Canvas(nn.Module):
    """The perceptron: GELU after each product but the last, and RMS norms before those inside.

    What the centres make of its input is a mean of pictures, and goes to the last without a norm.
    """

    config: CanvasConfig

    @nn.compact
    def __call__(self, embeddings: jax.Array) -> jax.Array:
        """Normalised z_i and z_t, joined `[b, 2 * embed_dim]`, to `[b, size, size, 3]` float32."""
        c = self.config
        checks.shape("canvas embeddings", embeddings, (None, 2 * c.embed_dim))
        gelu, width = ACTIVATIONS["gelu"], c.width
        if c.centres:
            h = RadialBasis(c.centres, width, c.dtype, name="basis")(embeddings)
        else:
            h = gelu(nn.Dense(width, dtype=c.dtype, name="in")(embeddings))
        for i in range(c.layers):
            h = h + gelu(nn.Dense(width, dtype=c.dtype, name=f"hidden_{i}")(rms_norm(h)))
        gain = 1.0 if c.centres else 0.01  # values begin at zero themselves
        init = nn.initializers.variance_scaling(gain, "fan_in", "truncated_normal")
        pixels = nn.Dense(3 * c.size**2, dtype=c.dtype, kernel_init=init, name="pixels")
        h = h if c.centres else rms_norm(h)
        return pixels(h).astype(jnp.float32).reshape(-1, c.size, c.size, 3)


class RadialBasis(nn.Module):
    """A mean of values, of those whose centres lie in the direction of the input.

    With x of length one, `sum_k p_k v_k` where p is the softmax of `s (x c_k + b_k)`. It wants
    centres that lie where inputs do, `CanvasStage.fit_constants`; at random it learns slowly.

    Attributes:
        centres: how many.
        features: of each value.
        dtype: compute dtype of the mean; how near a centre is stays float32.
    """

    centres: int
    features: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[b, d]` to `[b, features]`."""
        unit = rms_norm(x) / np.sqrt(x.shape[-1])
        # Sharpened, what bfloat16 rounds off would show.
        near = nn.Dense(self.centres, dtype="float32", name="centres")(unit)
        log_scale = self.param("log_scale", nn.initializers.constant(np.log(SHARPNESS)), ())
        scale = jnp.exp(log_scale.astype(jnp.float32))  # the weights may be kept in bfloat16
        p = jax.nn.softmax(scale * near, axis=-1)
        zeros = nn.initializers.zeros
        values = nn.Dense(
            self.features, use_bias=False, dtype=self.dtype, kernel_init=zeros, name="values"
        )
        return VALUE_SCALE * values(p)


def rms_norm(x: jax.Array) -> jax.Array:
    """`[..., d]` scaled to a root mean square of one along d, float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + _EPS)
