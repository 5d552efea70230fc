"""A Transformer over patches that denoises, in place of a U-Net (DiT, arXiv 2212.09748).

Every patch is a token. What the network is told of time and conditions scales and shifts the inside
of each block and gates what it adds (adaLN-Zero); context tokens are read beside the patches, as in
the U-Net. One config makes the networks of several papers:

    DiT     the defaults: layer norms, GELU, sinusoids for positions
    PixArt  modulation="shared" (arXiv 2310.00426, adaLN-single)
    JiT     norm="rms", mlp="swiglu", qk_norm, rope, and a bottleneck, which lets patches be large
            where the network predicts x_0 (arXiv 2511.13720)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.common import checks
from unclip_jax.models.attention import attention, caption_mask, split_heads
from unclip_jax.models.canvas import rms_norm
from unclip_jax.models.denoiser import PixelHead, check_conditions
from unclip_jax.models.layers import (
    TimeEmbedding,
    check,
    check_compute,
    check_counts,
    check_heads,
    check_hidden,
    scanned,
)
from unclip_jax.models.resample import depth_to_space, space_to_depth
from unclip_jax.parallel.axes import constrain

MODULATIONS = ("block", "shared")
NORMS = ("layer", "rms")
MLPS = ("gelu", "swiglu")
TIME_FEATURES = 256  # sinusoids of the timestep
NORM_EPS = 1e-6  # DiT's
MAX_PERIOD = 10000.0  # of positions, in patches


@dataclass(frozen=True)
class DiTConfig:
    """Size of a `DiT`. The defaults but for `context_dim` are those of DiT-S over pixels.

    Attributes:
        image_size: side of the images in pixels, a multiple of `patch`; it takes this size only.
        in_channels, out_channels: of the input and of the output.
        patch: side of a patch in pixels.
        width: features of a patch; a multiple of `heads`, and of 4.
        layers: blocks.
        heads: attention heads.
        mlp_ratio: hidden width of each block's perceptron over `width`.
        context_dim: features of the context tokens that attention also reads; 0 for no context.
        bottleneck: features between a patch's pixels and its `width`; 0 for one product.
        modulation: whether each "block" makes its own scales, shifts and gates of the embedding,
            or they are "shared" but for an offset of each block's own.
        norm: "layer" or "rms", neither with weights.
        mlp: "gelu" (its tanh form), or "swiglu", of two thirds of the hidden width.
        qk_norm: whether queries and keys are RMS-normalised over each head, with a scale.
        rope: whether positions also turn queries and keys (arXiv 2104.09864), half of a head's
            features by the row and half by the column; a head then needs a multiple of 4 features.
        pixel_channels: channels of a `PixelHead` behind the patches; 0 for none.
        dtype: compute dtype.
        remat: "none", "full" or "dots", applied to every block, see `layers.remat`.
    """

    image_size: int = 64
    in_channels: int = 3
    out_channels: int = 3
    patch: int = 4
    width: int = 384
    layers: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    context_dim: int = 0
    bottleneck: int = 0
    modulation: str = "block"
    norm: str = "layer"
    mlp: str = "gelu"
    qk_norm: bool = False
    rope: bool = False
    pixel_channels: int = 0
    dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self) -> None:
        """Raise `UserError` where a field makes no network."""
        check_counts(self, "image_size", "in_channels", "out_channels", "patch", "width")
        check_counts(self, "layers", "heads")
        check_counts(self, "context_dim", "bottleneck", "pixel_channels", least=0)
        checks.number("DiTConfig.mlp_ratio", self.mlp_ratio, above=0)
        check_hidden(self, "mlp_ratio", self.hidden)
        fits = self.image_size % self.patch == 0
        check(self, "image_size", fits, f"a multiple of patch = {self.patch}")
        check(self, "width", self.width % 4 == 0, "a multiple of 4, for the sinusoids of positions")
        check_heads(self, "width", "heads")
        turns = not self.rope or self.width // self.heads % 4 == 0
        check(self, "rope", turns, f"False, as a head has {self.width // self.heads} features")
        for name, choices in (("modulation", MODULATIONS), ("norm", NORMS), ("mlp", MLPS)):
            checks.choice(f"DiTConfig.{name}", getattr(self, name), choices)
        check_compute(self)

    @property
    def embedding_features(self) -> int:
        """Features of the time embedding, and of the `emb` added to it."""
        return self.width

    @property
    def side(self) -> int:
        """Patches in a row, and in a column."""
        return self.image_size // self.patch

    @property
    def hidden(self) -> int:
        """Features inside a perceptron."""
        hidden = int(self.width * self.mlp_ratio)
        return hidden if self.mlp == "gelu" else hidden * 2 // 3


def positions(side: int, features: int) -> np.ndarray:
    """Sinusoids of the columns and rows of a square, float32 `[side * side, features]`.

    The first half of the features tells the column, the second the row, each by sines and then
    cosines (MAE's and DiT's order).
    """
    angles = np.arange(side)[:, None] * _frequencies(features // 4)
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    column = np.tile(line, (side, 1))
    row = np.repeat(line, side, axis=0)
    return np.concatenate([column, row], axis=1).astype(np.float32)


def turned(x: jax.Array, side: int) -> jax.Array:
    """Queries or keys `[b, n, side * side, k]`, rotated by the row and column of their patch.

    Feature i of the first half is the pair of feature i of the second.
    """
    k = x.shape[-1]
    angles = np.arange(side)[:, None] * _frequencies(k // 4)
    angles = np.concatenate([np.repeat(angles, side, axis=0), np.tile(angles, (side, 1))], axis=1)
    cos, sin = (jnp.asarray(f(angles), jnp.float32)[None, None] for f in (np.cos, np.sin))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    out = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return out.astype(x.dtype)


def _frequencies(count: int) -> np.ndarray:
    return MAX_PERIOD ** (-np.arange(count) / count)


def _norm(x: jax.Array, kind: str) -> jax.Array:
    """`x` normalised over its features in float32, without weights."""
    if kind == "rms":
        return rms_norm(x)
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + NORM_EPS)


class HeadNorm(nn.Module):
    """Queries or keys `[b, n, l, k]`, RMS-normalised over each head's features, and scaled."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The same shape and dtype."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        return (rms_norm(x) * scale.reshape(1, 1, 1, -1)).astype(x.dtype)


class DiTBlock(nn.Module):
    """Attention, then a perceptron; each of them modulated, and gated from zero on."""

    config: DiTConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        active: jax.Array,
        shared: jax.Array | None,
        context: jax.Array | None,
        mask: jax.Array | None,
    ) -> tuple[jax.Array, None]:
        """Apply the block.

        Args:
            x: `[b, l, width]`.
            active: the activated embedding `[b, width]`.
            shared: what all blocks share of scales, shifts and gates `[b, 6 * width]`, or None.
            context: `[b, m, context_dim]` or None.
            mask: over the context's keys and the patches', `[b, 1, 1, m + l]`, or None.

        Returns:
            The pair that `nn.scan` wants: `[b, l, width]` float32, and None.
        """
        c = self.config
        zeros = nn.initializers.zeros
        x = constrain(x, "batch", "height", None)
        if shared is None:
            told = nn.Dense(6 * c.width, dtype=c.dtype, kernel_init=zeros, name="modulation")(
                active
            )
        else:
            told = shared + self.param("offset", zeros, (6 * c.width,))[None]
        told = jnp.split(told.astype(jnp.float32)[:, None], 6, axis=-1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = told
        h = _norm(x, c.norm) * (1 + scale) + shift
        x = x + gate * self.attend(h.astype(c.dtype), context, mask)
        h = _norm(x, c.norm) * (1 + mlp_scale) + mlp_shift
        x = x + mlp_gate * self.perceptron(h.astype(c.dtype))
        return constrain(x, "batch", "height", None), None

    def attend(self, h: jax.Array, context: jax.Array | None, mask: jax.Array | None) -> jax.Array:
        """Attention of `[b, l, width]` to itself, and to the context before it."""
        c = self.config
        heads = (c.heads, c.width // c.heads)
        q, k, v = split_heads(nn.DenseGeneral((3, *heads), dtype=c.dtype, name="qkv")(h))
        if c.qk_norm:
            q, k = HeadNorm(name="query_norm")(q), HeadNorm(name="key_norm")(k)
        if c.rope:
            q, k = turned(q, c.side), turned(k, c.side)
        if context is not None:
            kv = nn.DenseGeneral((2, *heads), dtype=c.dtype, name="context_kv")(context)
            context_k, context_v = split_heads(kv)
            if c.qk_norm:
                context_k = HeadNorm(name="context_norm")(context_k)
            k = jnp.concatenate([context_k, k], axis=2)
            v = jnp.concatenate([context_v, v], axis=2)
        h = jnp.moveaxis(attention(q, k, v, mask), 1, 2)
        return nn.DenseGeneral(c.width, axis=(-2, -1), dtype=c.dtype, name="out")(h)

    def perceptron(self, h: jax.Array) -> jax.Array:
        """`[b, l, width]` to the same shape."""
        c = self.config
        dense = partial(nn.Dense, dtype=c.dtype)
        up = dense(c.hidden, name="up")(h)
        if c.mlp == "gelu":
            up = jax.nn.gelu(up, approximate=True)
        else:
            up = jax.nn.silu(up) * dense(c.hidden, name="gate")(h)
        return dense(c.width, name="down")(constrain(up, "batch", None, "mlp"))


class DiT(nn.Module):
    """The Transformer; it is called as a `UNet` is."""

    config: DiTConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        emb: jax.Array | None = None,
        context: jax.Array | None = None,
        context_mask: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        """Apply the network.

        Args:
            x: `[b, image_size, image_size, in_channels]`.
            t: `[b]` timesteps, int or float.
            emb: `[b, embedding_features]`, added to the timestep's embedding, or None.
            context: `[b, m, context_dim]` tokens; required exactly where `context_dim` > 0.
            context_mask: `[b, m]` bool, True = attend; None attends to every token.
            deterministic: of no effect: there is no dropout.

        Returns:
            `[b, image_size, image_size, out_channels]` float32.

        Raises:
            UserError: `x`, `emb` or `context` does not fit the config.
        """
        c = self.config
        checks.shape("DiT input", x, (None, c.image_size, c.image_size, c.in_channels))
        check_conditions("DiT", c, x.shape[0], emb, context, context_mask)
        time = TimeEmbedding(TIME_FEATURES, c.width, name="time")(t)
        active = nn.silu(time if emb is None else time + emb).astype(c.dtype)
        mask = None if context_mask is None else caption_mask(context_mask, c.side**2)
        h = self.embed(x)
        h = self.blocks(h, active, None if context is None else context.astype(c.dtype), mask)
        zeros = nn.initializers.zeros
        told = nn.Dense(2 * c.width, kernel_init=zeros, name="modulation_out")(active)
        shift, scale = jnp.split(told[:, None], 2, axis=-1)
        h = _norm(h, c.norm) * (1 + scale) + shift
        h = nn.Dense(c.out_channels * c.patch**2, kernel_init=zeros, name="to_pixels")(h)
        y = depth_to_space(h.reshape(-1, c.side, c.side, h.shape[-1]), c.patch)
        if not c.pixel_channels:
            return y
        return PixelHead(c.pixel_channels, c.dtype, name="pixels")(x, y, active)

    def embed(self, x: jax.Array) -> jax.Array:
        """Images to tokens `[b, l, width]`, with their positions."""
        c = self.config
        h = space_to_depth(x, c.patch).reshape(x.shape[0], c.side**2, -1)
        if c.bottleneck:
            h = nn.Dense(c.bottleneck, use_bias=False, dtype=c.dtype, name="narrow")(h)
        return (
            nn.Dense(c.width, dtype=c.dtype, name="from_pixels")(h)
            + positions(c.side, c.width)[None]
        )

    def blocks(
        self, h: jax.Array, active: jax.Array, context: jax.Array | None, mask: Any
    ) -> jax.Array:
        """All blocks, one scanned over a layer axis."""
        c, shared = self.config, None
        if c.modulation == "shared":
            zeros = nn.initializers.zeros
            shared = nn.Dense(6 * c.width, kernel_init=zeros, name="modulation")(active)
        stack = scanned(DiTBlock, c.layers, c.remat, nn.broadcast)(c, name="blocks")
        return stack(h, active, shared, context, mask)[0]
