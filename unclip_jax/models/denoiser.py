"""What the U-Net and the DiT share: checks of what they are told, and a head over pixels."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.common import checks
from unclip_jax.errors import UserError, wrong
from unclip_jax.models.convolution import Conv


def check_conditions(
    who: str,
    config: Any,
    rows: int,
    emb: jax.Array | None,
    context: jax.Array | None,
    context_mask: jax.Array | None,
) -> None:
    """Raise `UserError` unless what a denoiser is told fits its config.

    Args:
        who: the denoiser, for messages.
        config: what has its `embedding_features` and `context_dim`.
        rows: images in the batch.
        emb: as `UNet` is given it.
        context: likewise.
        context_mask: likewise.
    """
    if emb is not None:
        checks.shape(f"{who} emb", emb, (rows, config.embedding_features))
    if (context is None) != (config.context_dim == 0):
        given = None if context is None else context.shape
        expected = f"what context_dim = {config.context_dim} says"
        raise wrong(f"{who} context's shape", given, expected)
    if context is not None:
        checks.shape(f"{who} context", context, (rows, None, config.context_dim))
    if context_mask is not None:
        if context is None:
            raise UserError(f"{who} context_mask: given without a context; give both or neither")
        checks.shape(f"{who} context_mask", context_mask, context.shape[:2])


class PixelHead(nn.Module):
    """Two convolutions over pixels that see a U-Net's input beside its output, and correct that.

    A U-Net of patches has to carry every pixel of a patch through its features, and too few of
    them cannot: its output is blurred even where the input is nearly clean. Here detail takes a
    short way, and the embedding scales it. The second convolution starts at zero.

    Attributes:
        features: channels between the two.
        dtype: compute dtype.
    """

    features: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, y: jax.Array, emb: jax.Array) -> jax.Array:
        """Input `[b, h, w, i]`, output `[b, h, w, o]`, active embedding `[b, d]`: a new output."""
        h = jnp.concatenate([x, y], axis=-1).astype(self.dtype)
        h = Conv(self.features, dtype=self.dtype, name="conv_in")(h)
        emb = nn.Dense(2 * self.features, dtype=self.dtype, name="emb")(emb)[:, None, None, :]
        scale, shift = jnp.split(emb, 2, axis=-1)
        h = nn.silu(h * (1 + scale) + shift)
        return y + Conv(y.shape[-1], kernel_init=nn.initializers.zeros, name="conv_out")(h)
