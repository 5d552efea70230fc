"""The ADM U-Net (Dhariwal and Nichol, arXiv 2105.05233) with GLIDE's caption attention.

It serves every diffusion over pixels: the decoder (attention, caption and image embedding) and
the upsamplers (convolutions only, so that they train on crops and run at full size).
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.common import checks
from unclip_jax.errors import wrong
from unclip_jax.models.attention import attention, caption_mask, split_heads
from unclip_jax.models.convolution import Conv
from unclip_jax.models.denoiser import PixelHead, check_conditions
from unclip_jax.models.layers import (
    GroupNorm,
    TimeEmbedding,
    as_tuple,
    check,
    check_compute,
    check_counts,
    remat,
)
from unclip_jax.models.resample import DoublingConv, depth_to_space, double, halve, space_to_depth
from unclip_jax.parallel.axes import constrain


@dataclass(frozen=True)
class UNetConfig:
    """Size of a `UNet`.

    Attributes:
        image_size: side of the images in pixels. A U-Net with attention takes this size only, but
            for `any_size`; one without takes any size its levels divide.
        in_channels, out_channels: of the input and of the output.
        channels: channels of the first level; a multiple of `groups`, and even.
        channel_mults: channels of each level over `channels`; each level halves the side.
        res_blocks: residual blocks per level on the way down; one more on the way up.
        attention_sizes: feature sides, in features, at which attention follows each residual block.
            With none, nothing attends; with some, the middle attends too.
        any_size: whether a U-Net with attention takes any size its levels divide, too. The levels
            that attend are those with these sides at `image_size`.
        head_channels: channels per attention head.
        dropout: rate inside residual blocks, in training.
        emb_dim: features of the time embedding; 0 stands for 4 * `channels`.
        context_dim: features of the context tokens that attention also reads; 0 for no context.
        scale_shift: whether the time embedding scales and shifts the second norm's output (FiLM)
            or is added before that norm.
        patch: the image is folded into patches of this side first, and unfolded last: the whole
            U-Net then works on sides `patch` times smaller.
        pixel_channels: channels of a `PixelHead` behind the unfolding; 0 for none.
        groups: groups of every GroupNorm.
        dtype: compute dtype.
        remat: "none", "full" or "dots", applied to every block, see `layers.remat`.
    """

    image_size: int = 64
    in_channels: int = 3
    out_channels: int = 6
    channels: int = 128
    channel_mults: tuple[int, ...] = (1, 2, 3, 4)
    res_blocks: int = 2
    attention_sizes: tuple[int, ...] = (32, 16, 8)
    any_size: bool = False
    head_channels: int = 64
    dropout: float = 0.0
    emb_dim: int = 0
    context_dim: int = 0
    scale_shift: bool = True
    patch: int = 1
    pixel_channels: int = 0
    groups: int = 32
    dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self) -> None:
        """Raise `UserError` where a field makes no network."""
        as_tuple(self, "channel_mults")
        as_tuple(self, "attention_sizes")
        check_counts(self, "image_size", "in_channels", "out_channels", "channels", "res_blocks")
        check_counts(self, "head_channels", "patch", "groups")
        check_counts(self, "emb_dim", "context_dim", "pixel_channels", least=0)
        mults = self.channel_mults
        positive = len(mults) > 0 and all(isinstance(m, int) and m > 0 for m in mults)
        check(self, "channel_mults", positive, "one or more positive integers")
        fits = self.image_size % self.size_multiple == 0
        check(self, "image_size", fits, f"a multiple of {self._multiple_in_words}")
        check(self, "channels", self.channels % 2 == 0, "an even number, for the sinusoids of time")
        grouped = self.channels % self.groups == 0
        check(self, "channels", grouped, f"a multiple of groups = {self.groups}")
        check(self, "dropout", 0.0 <= self.dropout < 1.0, "a rate in [0, 1)")
        self._check_attention()
        check_compute(self)

    def _check_attention(self) -> None:
        sides = [self.feature_size(level) for level in range(len(self.channel_mults))]
        known = set(self.attention_sizes) <= set(sides)
        check(self, "attention_sizes", known, f"feature sides among {tuple(sides)}")
        if not self.attention_sizes:
            check(self, "context_dim", self.context_dim == 0, "0, as nothing attends")
            return
        attending = [m for m, s in zip(self.channel_mults, sides, strict=True) if self.attends(s)]
        for mult in {*attending, self.channel_mults[-1]}:
            divides = self.channels * mult % self.head_channels == 0
            expected = f"a divisor of the {self.channels * mult} channels where attention is"
            check(self, "head_channels", divides, expected)

    @property
    def size_multiple(self) -> int:
        """What the sides of an input image must be a multiple of."""
        return self.patch * 2 ** (len(self.channel_mults) - 1)

    @property
    def _multiple_in_words(self) -> str:
        return f"{self.size_multiple} (patch * 2^(levels - 1))"

    @property
    def embedding_features(self) -> int:
        """Features of the time embedding, and of the `emb` added to it."""
        return self.emb_dim or 4 * self.channels

    @property
    def work(self) -> int:
        """A measure of its FLOPs for one image.

        Positions times channels squared, of each level's residual blocks on the way down.
        """
        sizes = [self.feature_size(level) for level in range(len(self.channel_mults))]
        levels = zip(sizes, self.channel_mults, strict=True)
        return self.res_blocks * sum((side * self.channels * mult) ** 2 for side, mult in levels)

    def feature_size(self, level: int) -> int:
        """Side of the features at a level, 0 being the first."""
        return self.image_size // self.patch // 2**level

    def attends(self, size: int) -> bool:
        """Whether attention follows the residual blocks at this feature side."""
        return size in self.attention_sizes

    def check_image(self, x: jax.Array) -> None:
        """Raise `UserError` unless this U-Net can run on `x`, `[b, h, w, c]`."""
        side = self.image_size if self.attention_sizes and not self.any_size else None
        checks.shape("U-Net input", x, (None, side, side, self.in_channels))
        if any(s % self.size_multiple for s in x.shape[1:3]):
            expected = f"height and width that are multiples of {self._multiple_in_words}"
            raise wrong("U-Net input's shape", x.shape, expected, "pad or crop the images")


class ResBlock(nn.Module):
    """BigGAN's residual block: norm, SiLU, resample, convolve; embedding; norm, SiLU, convolve.

    Attributes:
        config: of the U-Net.
        features: output channels.
        resample: "keep", "halve" or "double" the side of both branches.
        dropout: rate before the second convolution; drawn from the rng "dropout".
    """

    config: UNetConfig
    features: int
    resample: str = "keep"
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, emb: jax.Array) -> jax.Array:
        """`[b, h, w, c]` and an activated embedding `[b, emb_dim]` to `[b, h', w', features]`."""
        c, features, dtype = self.config, self.features, self.config.dtype
        x = constrain(x, "batch", "height", None, None)
        h = nn.silu(GroupNorm(c.groups, name="norm_1")(x)).astype(dtype)
        if self.resample == "double":
            h, x = DoublingConv(features, dtype, name="conv_1")(h), double(x)
        else:
            h, x = (halve(h), halve(x)) if self.resample == "halve" else (h, x)
            h = Conv(features, dtype, name="conv_1")(h)
        h = constrain(h, "batch", "height", None, "mlp")
        width = (1 + c.scale_shift) * features
        emb = nn.Dense(width, dtype=dtype, name="emb")(emb)[:, None, None, :]
        norm_2 = GroupNorm(c.groups, name="norm_2")
        if c.scale_shift:
            scale, shift = jnp.split(emb.astype(jnp.float32), 2, axis=-1)
            h = norm_2(h) * (1.0 + scale) + shift
        else:
            h = norm_2(h + emb)
        h = nn.Dropout(self.dropout, deterministic=False)(nn.silu(h).astype(dtype))
        h = Conv(features, dtype, nn.initializers.zeros, name="conv_2")(h)
        if x.shape[-1] != features:
            x = nn.Dense(features, dtype=dtype, name="skip")(x)
        return constrain(x + h, "batch", "height", None, None)


class AttentionBlock(nn.Module):
    """Self-attention over all positions of an image, which also reads the context tokens.

    The context's keys and values come before the image's own, as in GLIDE. The output
    projection starts at zero.
    """

    config: UNetConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, context: jax.Array | None, context_mask: jax.Array | None
    ) -> jax.Array:
        """`[b, h, w, c]`, context `[b, m, d]` and its mask `[b, m]` to `[b, h, w, c]`."""
        b, height, width, c = x.shape
        dtype, head_channels = self.config.dtype, self.config.head_channels
        heads = (c // head_channels, head_channels)
        h = GroupNorm(self.config.groups, name="norm")(x).reshape(b, height * width, c)
        qkv = nn.DenseGeneral((3, *heads), dtype=dtype, name="qkv")(h.astype(dtype))
        q, k, v = split_heads(qkv)
        q = constrain(q, "batch", "heads", "height", None)
        mask = None
        if context is not None:
            kv = nn.DenseGeneral((2, *heads), dtype=dtype, name="context_kv")(context)
            context_k, context_v = split_heads(kv)
            k = jnp.concatenate([context_k, k], axis=2)
            v = jnp.concatenate([context_v, v], axis=2)
            if context_mask is not None:
                mask = caption_mask(context_mask, height * width)
        h = jnp.moveaxis(attention(q, k, v, mask), 1, 2)
        zeros = nn.initializers.zeros
        h = nn.DenseGeneral(c, axis=(-2, -1), dtype=dtype, kernel_init=zeros, name="out")(h)
        return constrain(x + h.reshape(b, height, width, c), "batch", "height", None, None)


@dataclass(frozen=True)
class Blocks:
    """A U-Net's blocks, to be applied in the body of a Linen module.

    Attributes:
        config: the U-Net's.
        active: what every block is told of time and noise, `[b, embedding_features]`.
        dropout: rate inside residual blocks.
        context: as `UNet` is given it.
        context_mask: likewise.
    """

    config: UNetConfig
    active: jax.Array
    dropout: float
    context: jax.Array | None = None
    context_mask: jax.Array | None = None

    def res(self, h: jax.Array, name: str, mult: int, resample: str = "keep") -> jax.Array:
        """A residual block to `mult` times the first channels."""
        c, block = self.config, remat(ResBlock, self.config.remat)
        return block(c, c.channels * mult, resample, self.dropout, name=name)(h, self.active)

    def attend(self, h: jax.Array, name: str) -> jax.Array:
        """An attention block."""
        block = remat(AttentionBlock, self.config.remat)(self.config, name=name)
        return block(h, self.context, self.context_mask)

    def step(self, h: jax.Array, way: str, level: int, i: int) -> jax.Array:
        """Residual block i of a level on the "down" or "up" way, and attention where it is due."""
        c = self.config
        h = self.res(h, f"{way}_{level}_res_{i}", c.channel_mults[level])
        attends = c.attends(c.feature_size(level))
        return self.attend(h, f"{way}_{level}_attention_{i}") if attends else h

    def down(self, x: jax.Array) -> list[jax.Array]:
        """The features after every step of the way down, the first convolution's before them."""
        c = self.config
        h = Conv(c.channels, dtype=c.dtype, name="conv_in")(space_to_depth(x, c.patch))
        found = [h]
        for level, mult in enumerate(c.channel_mults):
            for i in range(c.res_blocks):
                found.append(h := self.step(h, "down", level, i))
            if level < len(c.channel_mults) - 1:
                found.append(h := self.res(h, f"down_{level}_halve", mult, "halve"))
        return found

    def middle(self, h: jax.Array) -> jax.Array:
        """The blocks between the way down and the way up."""
        mult = self.config.channel_mults[-1]
        h = self.res(h, "middle_res_0", mult)
        if self.config.attention_sizes:
            h = self.attend(h, "middle_attention")
        return self.res(h, "middle_res_1", mult)


class UNet(nn.Module):
    """ADM's U-Net."""

    config: UNetConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        emb: jax.Array | None = None,
        context: jax.Array | None = None,
        context_mask: jax.Array | None = None,
        *,
        level: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Apply the network.

        Args:
            x: `[b, h, w, in_channels]`; see `UNetConfig.image_size` for the sides allowed.
            t: `[b]` timesteps, int or float.
            emb: `[b, embedding_features]`, added to the timestep's embedding, or None.
            context: `[b, m, context_dim]` tokens; required exactly where `context_dim` > 0.
            context_mask: `[b, m]` bool, True = attend; None attends to every token.
            level: `[b]` timesteps that an image among the input's channels was noised to; only a
                U-Net that was initialised with them has params for it.
            deterministic: False in training: dropout then draws from the rng "dropout".

        Returns:
            `[b, h, w, out_channels]` float32.

        Raises:
            UserError: `x`, `emb` or `context` does not fit the config.
        """
        c = self.config
        c.check_image(x)
        check_conditions("U-Net", c, x.shape[0], emb, context, context_mask)
        active = self._embedding(t, emb, level)
        context = None if context is None else context.astype(c.dtype)
        blocks = Blocks(c, active, 0.0 if deterministic else c.dropout, context, context_mask)
        skips = blocks.down(x)
        h = blocks.middle(skips[-1])
        for scale in reversed(range(len(c.channel_mults))):
            for i in range(c.res_blocks + 1):
                h = blocks.step(jnp.concatenate([h, skips.pop()], axis=-1), "up", scale, i)
            if scale > 0:
                h = blocks.res(h, f"up_{scale}_double", c.channel_mults[scale], "double")
        h = nn.silu(GroupNorm(c.groups, name="norm_out")(h))
        out = c.out_channels * c.patch**2
        h = Conv(out, kernel_init=nn.initializers.zeros, name="conv_out")(h)
        h = depth_to_space(h, c.patch)
        if not c.pixel_channels:
            return h
        return PixelHead(c.pixel_channels, c.dtype, name="pixels")(x, h, active)

    def _embedding(self, t: jax.Array, emb: jax.Array | None, level: jax.Array | None) -> jax.Array:
        """What every block is told of time and noise: activated, `[b, embedding_features]`."""
        c = self.config
        time = TimeEmbedding(c.channels, c.embedding_features, name="time")(t)
        if level is not None:
            time += TimeEmbedding(c.channels, c.embedding_features, name="level")(level)
        return nn.silu(time if emb is None else time + emb).astype(c.dtype)
