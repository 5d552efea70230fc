"""The diffusion prior's causal Transformer (arXiv 2204.06125, section 2.2)."""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.models.attention import causal_mask
from unclip_jax.models.layers import (
    Embed,
    TimeEmbedding,
    Transformer,
    check,
    check_compute,
    check_counts,
    check_heads,
    check_shape,
    layer_norm,
)


@dataclass(frozen=True)
class PriorConfig:
    """Size of a `Prior`.

    Attributes:
      embed_dim: dimension of CLIP's embeddings z_i and z_t.
      width: features of a token; even, and a multiple of `heads`.
      layers: Transformer blocks.
      heads: attention heads.
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


class Prior(nn.Module):
    """Predicts a vector, the clean z_i in the paper, from a noised z_i and a caption.

    The sequence is: the caption's tokens, z_t, the timestep, the noised z_i, and a learned query
    whose output is the prediction. Attention is causal and skips the caption's padding.
    """

    config: PriorConfig

    @nn.compact
    def __call__(
        self,
        z_noised: jax.Array,
        t: jax.Array,
        z_t: jax.Array,
        text: jax.Array,
        text_mask: jax.Array,
    ) -> jax.Array:
        """Predict.

        A caption whose mask is False everywhere is dropped, z_t with it: z_t is then zeroed, and
        the output depends on neither.

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
        c = self.config
        b = z_noised.shape[0]
        check_shape("z_noised", z_noised, (b, c.embed_dim))
        check_shape("z_t", z_t, (b, c.embed_dim))
        check_shape("text_mask", text_mask, (b, c.context_length))
        normal = nn.initializers.normal(0.02)
        if c.vocab_size:
            check_shape("text (tokens)", text, (b, c.context_length))
            caption = Embed(c.vocab_size, c.width, name="tokens")(text).astype(c.dtype)
        else:
            check_shape("text (states)", text, (b, c.context_length, c.text_width))
            caption = nn.Dense(c.width, dtype=c.dtype, name="text_in")(text)
        z_t = jnp.where(text_mask.any(-1, keepdims=True), z_t, 0.0)
        query = self.param("query", normal, (c.width,))
        last_four = [
            nn.Dense(c.width, dtype=c.dtype, name="z_t_in")(z_t),
            TimeEmbedding(c.width, c.width, name="time")(t).astype(c.dtype),
            nn.Dense(c.width, dtype=c.dtype, name="z_i_in")(z_noised),
            jnp.broadcast_to(query.astype(c.dtype), (b, c.width)),
        ]
        x = jnp.concatenate([caption, jnp.stack(last_four, axis=1)], axis=1)
        length = c.context_length + 4
        x = x + self.param("positions", normal, (length, c.width)).astype(c.dtype)[None]
        attended = jnp.pad(text_mask, ((0, 0), (0, 4)), constant_values=True)
        mask = causal_mask(length) & attended[:, None, None, :]
        x = Transformer(c.layers, c.heads, dtype=c.dtype, remat=c.remat, name="transformer")(
            x, mask
        )
        x = layer_norm("norm_out")(x[:, -1])
        return nn.Dense(c.embed_dim, dtype=c.dtype, name="out")(x).astype(jnp.float32)
