"""The decoder's own caption Transformer, as in GLIDE (arXiv 2112.10741, section 2.3)."""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.common import checks
from unclip_jax.models.layers import (
    Embed,
    Transformer,
    check_compute,
    check_counts,
    check_heads,
    layer_norm,
)


@dataclass(frozen=True)
class TextConfig:
    """Size of a `TextEncoder`.

    Attributes:
        vocab_size: tokens in the vocabulary.
        context_length: tokens in every caption, padding included.
        width: features of a token; a multiple of `heads`.
        layers, heads: Transformer blocks, and attention heads of each.
        dtype: compute dtype.
        remat: "none", "full" or "dots", see `layers.remat`.
    """

    vocab_size: int = 49408
    context_length: int = 77
    width: int = 512
    layers: int = 6
    heads: int = 8
    dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self) -> None:
        """Raise `UserError` where a field makes no network."""
        check_counts(self, "vocab_size", "context_length", "width", "layers", "heads")
        check_heads(self, "width", "heads")
        check_compute(self)


class TextEncoder(nn.Module):
    """Bidirectional Transformer over a caption; nothing is masked.

    Where there is no token there is a learned padding embedding, one for each position. A
    caption dropped for guidance is a mask that is False everywhere: its states are then a
    learned null caption that no token id reaches.
    """

    config: TextConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Encode captions.

        Args:
            tokens: `[b, l]` int, with l = `context_length`; ids under False in `mask` are not read.
            mask: `[b, l]` bool, True on the caption's tokens.

        Returns:
            `[b, l, width]` states after the final LayerNorm, in the compute dtype.
        """
        c = self.config
        checks.shape("tokens", tokens, (None, c.context_length))
        checks.shape("text_mask", mask, tokens.shape)
        normal = nn.initializers.normal(0.02)
        table = (c.context_length, c.width)
        positions = self.param("positions", normal, table)
        padding = self.param("padding", normal, table)
        embedded = Embed(c.vocab_size, c.width, name="tokens")(tokens)
        x = jnp.where(mask[:, :, None], embedded + positions[None], padding[None])
        x = Transformer(c.layers, c.heads, dtype=c.dtype, remat=c.remat, name="transformer")(x)
        return layer_norm("norm_out")(x).astype(c.dtype)
