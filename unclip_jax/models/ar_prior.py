"""The autoregressive prior's causal Transformer (arXiv 2204.06125, section 2.2).

It reads the caption's tokens, z_t and then latents one by one: first a token for the dot product
z_i . z_t, then the codes of z_i. The output at each latent predicts the code that follows it.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.common import checks
from unclip_jax.models.attention import caption_mask, causal_mask
from unclip_jax.models.layers import (
    Cache,
    Embed,
    check,
    check_compute,
    check_counts,
    check_heads,
    layer_norm,
    transformer_blocks,
)
from unclip_jax.models.prior import Captioned


@dataclass(frozen=True)
class ARPriorConfig:
    """Size of an `ARPrior`.

    Attributes:
        embed_dim: dimension of CLIP's embeddings z_i and z_t.
        width: features of a token; a multiple of `heads`.
        layers, heads: Transformer blocks, and attention heads of each.
        context_length: tokens of every caption, padding included.
        vocab_size: size of the caption's vocabulary.
        code_dims: codes that stand for one z_i, at most `embed_dim`.
        buckets: values that a code can have.
        dot_buckets: values that the dot product's token can have; even, to have a top half.
        dtype: compute dtype.
        remat: "none", "full" or "dots", see `layers.remat`.
    """

    embed_dim: int = 768
    width: int = 512
    layers: int = 6
    heads: int = 8
    context_length: int = 77
    vocab_size: int = 49408
    code_dims: int = 239
    buckets: int = 1024
    dot_buckets: int = 1024
    dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self) -> None:
        """Raise `UserError` where a field makes no network."""
        check_counts(self, "embed_dim", "width", "layers", "heads", "context_length", "vocab_size")
        check_counts(self, "code_dims")
        check_counts(self, "buckets", "dot_buckets", least=2)
        check_heads(self, "width", "heads")
        fits = self.code_dims <= self.embed_dim
        check(self, "code_dims", fits, f"at most embed_dim = {self.embed_dim}")
        check(self, "dot_buckets", self.dot_buckets % 2 == 0, "an even number")
        check_compute(self)


class ARPrior(Captioned):
    """Predicts the codes of z_i, each from the caption and the codes before it.

    A latent is an id below `buckets + dot_buckets`: a code, or `buckets` plus the bucket of the
    dot product, which is always the first. Attention is causal and skips the caption's padding.
    """

    config: ARPriorConfig

    def setup(self) -> None:
        """Name the parts."""
        c = self.config
        normal = nn.initializers.normal(0.02)
        self.tokens = Embed(c.vocab_size, c.width)
        self.latents = Embed(c.buckets + c.dot_buckets, c.width)
        self.z_t_in = nn.Dense(c.width, dtype=c.dtype)
        length = c.context_length + 1 + c.code_dims
        self.positions = self.param("positions", normal, (length, c.width))
        block = {"heads": c.heads, "dtype": c.dtype, "caches": True}
        self.blocks = transformer_blocks(c.layers, c.remat, **block)
        self.norm_out = layer_norm("norm_out")
        self.out = nn.Dense(c.buckets, dtype=c.dtype)

    def __call__(
        self, latents: jax.Array, z_t: jax.Array, text: jax.Array, text_mask: jax.Array
    ) -> jax.Array:
        """Logits of every code, given the true ones before it.

        Args:
            latents: `[b, k]` int: the dot product's latent and all codes but the last.
            z_t: `[b, e]` text embeddings, projected, not normalised.
            text: `[b, l]` int tokens, l = `context_length`.
            text_mask: `[b, l]` bool, True on the caption's tokens.

        Returns:
            `[b, k, buckets]` float32.
        """
        c = self.config
        checks.shape("latents", latents, (z_t.shape[0], c.code_dims))
        x = jnp.concatenate([self._prefix(z_t, text, text_mask), self._latents(latents)], axis=1)
        attended = caption_mask(text_mask, 1 + c.code_dims)
        x, _ = self.blocks(x, causal_mask(x.shape[1]) & attended, None)
        return self._logits(x[:, -c.code_dims :])

    def prefill(self, z_t: jax.Array, text: jax.Array, text_mask: jax.Array) -> Cache:
        """Keys and values of the caption and z_t, with room for every latent's; as `__call__`."""
        x = self._prefix(z_t, text, text_mask)
        mask = causal_mask(x.shape[1]) & caption_mask(text_mask, 1)
        _, cache = self.blocks(x, mask, None)
        room = [(0, 0), (0, 0), (0, 0), (0, self.config.code_dims), (0, 0)]
        return tuple(jnp.pad(part, room) for part in cache)

    def step(
        self, latent: jax.Array, i: jax.Array, cache: Cache, text_mask: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """Logits of code i, given latent i and the cache of all that comes before.

        Args:
            latent: `[b]` int; the dot product's at i = 0, else code i - 1.
            i: scalar int, may be traced.
            cache: from `prefill` or the last `step`.
            text_mask: `[b, l]` bool, as in `prefill`.

        Returns:
            `[b, buckets]` float32, and the cache with latent i in it.
        """
        c = self.config
        at = c.context_length + 1 + i
        x = self._latents(latent[:, None], i)
        before = jnp.arange(cache[0].shape[3]) < at
        mask = caption_mask(text_mask, 1 + c.code_dims) & before[None, None, None, :]
        mask = jnp.pad(mask, [(0, 0)] * 3 + [(0, 1)], constant_values=True)
        x, own = self.blocks(x, mask, cache)
        cache = tuple(
            jax.lax.dynamic_update_slice_in_dim(part, new, at, axis=3)
            for part, new in zip(cache, own, strict=True)
        )
        return self._logits(x)[:, 0], cache

    def _latents(self, latents: jax.Array, start: jax.Array | int = 0) -> jax.Array:
        """Embeddings `[b, m, width]` of latents start..start + m - 1, at their positions."""
        c = self.config
        first = c.context_length + 1 + start
        positions = jax.lax.dynamic_slice_in_dim(self.positions, first, latents.shape[1])
        return self.latents(latents).astype(c.dtype) + positions[None].astype(c.dtype)

    def _logits(self, x: jax.Array) -> jax.Array:
        return self.out(self.norm_out(x)).astype(jnp.float32)
