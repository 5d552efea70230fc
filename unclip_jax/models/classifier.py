"""A classifier of noised images: the encoder half of the U-Net, and attention that pools.

Section 4 of ADM (Dhariwal & Nichol 2021, arXiv 2105.05233): the network that classifier guidance
takes its gradient of. It sees x_t and t, as the U-Net that it guides does.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.models.attention import attention, split_heads
from unclip_jax.models.layers import GroupNorm, TimeEmbedding, check
from unclip_jax.models.unet import Blocks, UNetConfig
from unclip_jax.parallel.axes import constrain


def check_classifier(config: UNetConfig) -> None:
    """Raise `UserError` unless the encoder half of this U-Net can be a `Classifier`."""
    check(config, "out_channels", config.out_channels > 1, "the number of classes, 2 or more")
    check(config, "context_dim", config.context_dim == 0, "0: a classifier reads the image alone")
    pooled = config.channels * config.channel_mults[-1]
    divides = pooled % config.head_channels == 0
    check(config, "head_channels", divides, f"a divisor of the {pooled} channels that are pooled")


class AttentionPool(nn.Module):
    """Attention of the mean over all positions to each of them and to itself, as in CLIP's ResNets.

    Attributes:
        head_channels: features per head.
        out: features of the result.
        dtype: compute dtype.
    """

    head_channels: int
    out: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[b, h, w, c]` to `[b, out]` float32."""
        b, height, width, c = x.shape
        heads = (c // self.head_channels, self.head_channels)
        x = x.reshape(b, height * width, c)
        x = jnp.concatenate([x.mean(1, keepdims=True), x], axis=1)
        init = nn.initializers.normal(c**-0.5)
        x += self.param("positions", init, (1 + height * width, c))[None]
        x = constrain(x.astype(self.dtype), "batch", None, None)
        q = nn.DenseGeneral(heads, dtype=self.dtype, name="query")(x[:, :1])
        kv = nn.DenseGeneral((2, *heads), dtype=self.dtype, name="key_value")(x)
        q = constrain(jnp.moveaxis(q, 1, 2), "batch", "heads", None, None)
        pooled = constrain(attention(q, *split_heads(kv)).reshape(b, c), "batch", None)
        return nn.Dense(self.out, name="out")(pooled.astype(jnp.float32))


class Classifier(nn.Module):
    """The way down through `config`'s U-Net, its middle, and one logit per output channel."""

    config: UNetConfig

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, deterministic: bool = True) -> jax.Array:
        """Apply the network.

        Args:
            x: `[b, h, w, in_channels]` noisy images of the config's size.
            t: `[b]` timesteps, int or float.
            deterministic: False in training: dropout then draws from the rng "dropout".

        Returns:
            logits `[b, out_channels]` float32.

        Raises:
            UserError: `x` does not fit the config.
        """
        c = self.config
        c.check_image(x)
        emb = TimeEmbedding(c.channels, c.embedding_features, name="time")(t)
        active = nn.silu(emb).astype(c.dtype)
        blocks = Blocks(c, active, 0.0 if deterministic else c.dropout)
        h = blocks.middle(blocks.down(x)[-1])
        h = nn.silu(GroupNorm(c.groups, name="norm_out")(h))
        return AttentionPool(c.head_channels, c.out_channels, c.dtype, name="pool")(h)
