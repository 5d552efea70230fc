"""T5's encoder (Raffel et al., arXiv 1910.10683), the frozen text encoder of Imagen.

A Transformer that knows a token's place only by its distance to others: a bias on the attention
scores, learned for 32 ranges of distance, one per head, and shared by all layers. It has no
biases elsewhere, norms by the root mean square alone, and no 1/sqrt(head dim) in its attention.
Version 1.1, whose largest encoder Imagen uses (arXiv 2205.11487, section 2.1), has a gated
perceptron; version 1.0 a plain one with ReLU.

It is made to be loaded, with `weights.convert.t5`, and never trained here. Norms, softmax and
the residual stream are float32: the stream's values run to the tens of thousands, where half
precision overflows and bfloat16 is left with three digits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.common import checks
from unclip_jax.models.attention import attention
from unclip_jax.models.layers import check, check_compute, check_counts, scanned

PERCEPTRONS = ("gated_gelu", "relu")
NORM_EPS = 1e-6


@dataclass(frozen=True)
class T5Config:
    """Size of a `T5Encoder`. The defaults are T5 v1.1 XXL's.

    Attributes:
        vocab_size: rows of the embedding table, which is padded: the tokenizer has 32100 ids.
        width: features of a token.
        layers: Transformer blocks.
        heads: attention heads; any number, as heads need not divide the width.
        head_dim: features of a head.
        mlp_width: hidden width of the perceptron.
        perceptron: "gated_gelu" (v1.1; tanh's approximation of GELU) or "relu" (v1.0).
        buckets: ranges of distance that have a bias each, half of them to either side; even.
        max_distance: all distances from here on share a bias; more than `buckets` / 4.
        dtype: compute dtype of the matrix products.
        remat: "none", "full" or "dots", see `layers.remat`.
    """

    vocab_size: int = 32128
    width: int = 4096
    layers: int = 24
    heads: int = 64
    head_dim: int = 64
    mlp_width: int = 10240
    perceptron: str = "gated_gelu"
    buckets: int = 32
    max_distance: int = 128
    dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self) -> None:
        """Raise `UserError` where a field makes no network."""
        check_counts(self, "vocab_size", "width", "layers", "heads", "head_dim", "mlp_width")
        check_counts(self, "buckets", least=4)
        check_counts(self, "max_distance")
        checks.choice("T5Config.perceptron", self.perceptron, PERCEPTRONS)
        check(self, "buckets", self.buckets % 4 == 0, "a multiple of 4: two sides, near and far")
        far = self.max_distance > self.buckets // 4
        check(self, "max_distance", far, f"more than buckets / 4 = {self.buckets // 4}")
        check_compute(self)


def distance_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of every pair's distance, key minus query.

    Half of the buckets are for keys after the query. Of each half, the first half holds one
    distance each, from 0; the others ranges that grow geometrically up to `max_distance`, and the
    last all beyond. It is computed with NumPy, so that no accelerator's logarithm moves a border.

    Returns:
        `[length, length]` int, rows are queries, in 0..buckets-1.
    """
    one_side, near = buckets // 2, buckets // 4
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    size = np.abs(distance)
    growth = np.log(np.maximum(size, near) / near) / math.log(max_distance / near)
    far = np.minimum(near + (growth * (one_side - near)).astype(int), one_side - 1)
    return np.where(size < near, size, far) + one_side * (distance > 0)


class RMSNorm(nn.Module):
    """Scaling to a root mean square of one over the last axis, then by learned factors; float32."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[b, l, d]` of any float dtype to the same shape in float32."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + NORM_EPS) * scale[None, None]


class T5Block(nn.Module):
    """Pre-norm residual block: self-attention with the shared bias, then a perceptron."""

    config: T5Config

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        """`[b, l, d]` to `([b, l, d], None)`, the pair that `nn.scan` wants."""
        c = self.config
        dense = partial(nn.DenseGeneral, use_bias=False, dtype=c.dtype)
        h = RMSNorm(name="norm_1")(x).astype(c.dtype)
        q, k, v = jnp.moveaxis(dense((3, c.heads, c.head_dim), name="qkv")(h), (2, 3), (0, 2))
        h = jnp.moveaxis(attention(q, k, v, mask, bias=bias, scale=1.0), 1, 2)
        x = x + dense(c.width, axis=(-2, -1), name="out")(h)
        h = RMSNorm(name="norm_2")(x).astype(c.dtype)
        if c.perceptron == "gated_gelu":
            gate, value = jnp.moveaxis(dense((2, c.mlp_width), name="up")(h), 2, 0)
            h = jax.nn.gelu(gate, approximate=True) * value
        else:
            h = jax.nn.relu(dense(c.mlp_width, name="up")(h))
        return x + dense(c.width, name="down")(h), None


class T5Encoder(nn.Module):
    """Token ids to states; the blocks are scanned, so every parameter of theirs has a layer axis.

    The params are "tokens", "relative_bias" (`[buckets, heads]`, once), "blocks" and "norm_out".
    """

    config: T5Config

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Encode captions.

        Args:
            tokens: `[b, l]` int, of any length.
            mask: `[b, l]` bool, True on the caption's tokens, its end included. The states there
                depend on nothing else; those under False are of no use.

        Returns:
            `[b, l, width]` float32 states after the final norm.

        Raises:
            UserError: `tokens` or `mask` is of another shape.
        """
        c = self.config
        checks.shape("T5 tokens", tokens, (None, None))
        checks.shape("T5 mask", mask, tokens.shape)
        table = self.param(
            "relative_bias", nn.initializers.normal(c.width**-0.5), (c.buckets, c.heads)
        )
        near = table[distance_buckets(tokens.shape[1], c.buckets, c.max_distance)]
        bias = near.transpose(2, 0, 1)[None]
        embed = nn.Embed(
            c.vocab_size, c.width, embedding_init=nn.initializers.normal(1.0), name="tokens"
        )
        blocks = scanned(T5Block, c.layers, c.remat, nn.broadcast)
        x = embed(tokens).astype(jnp.float32)
        x, _ = blocks(c, name="blocks")(x, bias, mask[:, None, None, :])
        return RMSNorm(name="norm_out")(x)
