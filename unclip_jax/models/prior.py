"""The diffusion prior's causal Transformer (arXiv 2204.06125, section 2.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.common import checks
from unclip_jax.models.attention import caption_mask, causal_mask
from unclip_jax.models.layers import (
    Embed,
    TimeEmbedding,
    Transformer,
    check,
    check_compute,
    check_counts,
    check_heads,
    layer_norm,
)


@dataclass(frozen=True)
class PriorConfig:
    """Size of a `Prior`.

    Attributes:
        embed_dim: dimension of CLIP's embeddings z_i and z_t.
        width: features of a token; even, and a multiple of `heads`.
        layers, heads: Transformer blocks, and attention heads of each.
        context_length: tokens of every caption, padding included.
        vocab_size: size of the vocabulary where the prior embeds token ids itself; 0 where it is
            given CLIP's text states instead.
        text_width: features of those text states; 0 where it embeds token ids.
        dtype: compute dtype.
        remat: "none", "full" or "dots", see `layers.remat`.
    """

    embed_dim: int = 768
    width: int = 512
    layers: int = 6
    heads: int = 8
    context_length: int = 77
    vocab_size: int = 0
    text_width: int = 768
    dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self) -> None:
        """Raise `UserError` where a field makes no network."""
        check_counts(self, "embed_dim", "width", "layers", "heads", "context_length")
        check_counts(self, "vocab_size", "text_width", least=0)
        check_heads(self, "width", "heads")
        check(self, "width", self.width % 2 == 0, "an even number, for the sinusoids of time")
        one = (self.vocab_size > 0) != (self.text_width > 0)
        other = f"exactly one of vocab_size and text_width = {self.text_width} above 0"
        check(self, "vocab_size", one, other)
        check_compute(self)


class Captioned(nn.Module):
    """What reads a caption and z_t first; its params are "z_t_in", "positions" and "tokens".

    A caption whose mask is False everywhere is dropped, z_t with it: z_t is then zeroed, and the
    output depends on neither.
    """

    config: Any

    def _prefix(self, z_t: jax.Array, text: jax.Array, text_mask: jax.Array) -> jax.Array:
        """Embeddings `[b, l + 1, width]` of the caption and z_t, at their positions."""
        c = self.config
        b = z_t.shape[0]
        checks.shape("z_t", z_t, (None, c.embed_dim))
        checks.shape("text_mask", text_mask, (b, c.context_length))
        if c.vocab_size:
            checks.shape("text (tokens)", text, (b, c.context_length))
            caption = self.tokens(text).astype(c.dtype)
        else:
            checks.shape("text (states)", text, (b, c.context_length, c.text_width))
            caption = self.text_in(text)
        z_t = jnp.where(text_mask.any(-1, keepdims=True), z_t, 0.0)
        x = jnp.concatenate([caption, self.z_t_in(z_t)[:, None]], axis=1)
        return x + self.positions[: c.context_length + 1].astype(c.dtype)[None]


class Prior(Captioned):
    """Predicts a vector, the clean z_i in the paper, from a noised z_i and a caption.

    The sequence is: the caption's tokens, z_t, the timestep, the noised z_i, and a learned query
    whose output is the prediction. Attention is causal and skips the caption's padding. So the
    caption and z_t see neither the timestep nor the noised z_i: a sampler has their keys and values
    from `encode`, once, and `denoise` computes the last three tokens alone at each step.
    """

    config: PriorConfig

    def setup(self) -> None:
        """Name the parts."""
        c = self.config
        normal = nn.initializers.normal(0.02)
        if c.vocab_size:
            self.tokens = Embed(c.vocab_size, c.width)
        else:
            self.text_in = nn.Dense(c.width, dtype=c.dtype)
        self.z_t_in = nn.Dense(c.width, dtype=c.dtype)
        self.time = TimeEmbedding(c.width, c.width)
        self.z_i_in = nn.Dense(c.width, dtype=c.dtype)
        self.query = self.param("query", normal, (c.width,))
        self.positions = self.param("positions", normal, (c.context_length + 4, c.width))
        self.transformer = Transformer(c.layers, c.heads, dtype=c.dtype, remat=c.remat, caches=True)
        self.norm_out = layer_norm("norm_out")
        self.out = nn.Dense(c.embed_dim, dtype=c.dtype)

    def __call__(
        self,
        z_noised: jax.Array,
        t: jax.Array,
        z_t: jax.Array,
        text: jax.Array,
        text_mask: jax.Array,
    ) -> jax.Array:
        """Predict.

        Args:
            z_noised: `[b, e]` noised image embeddings.
            t: `[b]` timesteps, int or float.
            z_t: `[b, e]` text embeddings, projected, not normalised.
            text: `[b, l]` int tokens where `vocab_size` > 0, else `[b, l, text_width]` CLIP text
                states; l = `context_length`.
            text_mask: `[b, l]` bool, True on the caption's tokens.

        Returns:
            `[b, e]` float32.
        """
        x = jnp.concatenate([self._prefix(z_t, text, text_mask), self._last(z_noised, t)], axis=1)
        mask = causal_mask(x.shape[1]) & caption_mask(text_mask, 4)
        return self._prediction(self.transformer(x, mask))

    def encode(self, z_t: jax.Array, text: jax.Array, text_mask: jax.Array) -> dict[str, Any]:
        """All that depends on neither z_noised nor t; arguments as for `__call__`.

        Returns:
            What `denoise` takes: "past", keys and values of the caption and z_t, and "text_mask".
        """
        x = self._prefix(z_t, text, text_mask)
        mask = causal_mask(x.shape[1]) & caption_mask(text_mask, 1)
        _, past = self.transformer.extend(x, mask)
        return {"past": past, "text_mask": text_mask}

    def denoise(self, z_noised: jax.Array, t: jax.Array, encoded: Mapping[str, Any]) -> jax.Array:
        """What `__call__` computes, given what `encode` returned."""
        x = self._last(z_noised, t)
        seen = causal_mask(self.config.context_length + 4)[:, :, -x.shape[1] :]
        mask = seen & caption_mask(encoded["text_mask"], 4)
        return self._prediction(self.transformer.extend(x, mask, encoded["past"])[0])

    def _last(self, z_noised: jax.Array, t: jax.Array) -> jax.Array:
        """Embeddings `[b, 3, width]` of the timestep, z_noised and the query, likewise."""
        c = self.config
        b = t.shape[0]
        checks.shape("z_noised", z_noised, (b, c.embed_dim))
        query = jnp.broadcast_to(self.query.astype(c.dtype), (b, c.width))
        x = jnp.stack([self.time(t).astype(c.dtype), self.z_i_in(z_noised), query], axis=1)
        return x + self.positions[c.context_length + 1 :].astype(c.dtype)[None]

    def _prediction(self, x: jax.Array) -> jax.Array:
        return self.out(self.norm_out(x[:, -1])).astype(jnp.float32)
