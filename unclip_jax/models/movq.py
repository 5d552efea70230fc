"""MoVQ: Kandinsky's autoencoder between pictures and latents (arXiv 2209.09002).

A VQGAN whose decoder is told of the latents at every norm: their gain and shift are products of
the latents at that place. A decoder over latents (`models.decoder`) draws what `encode` gives, and
nothing is quantised on the way from there to a picture; `quantise` is for who wants the codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.common import checks
from unclip_jax.errors import wrong
from unclip_jax.models.attention import attention
from unclip_jax.models.convolution import Conv, OfRows
from unclip_jax.models.layers import DTYPES, GroupNorm, as_tuple, check, check_counts
from unclip_jax.models.resample import DoublingConv
from unclip_jax.parallel.axes import constrain

EPS, GROUPS = 1e-6, 32
QUERIES = 2048  # whose attention is computed at once, at most


@dataclass(frozen=True)
class MoVQConfig:
    """Size of a `MoVQ`. The defaults are Kandinsky's, 2.1 and 2.2.

    Attributes:
        channels: of the first level; a multiple of 32, the groups of every GroupNorm.
        channel_mults: channels of each level over `channels`; each but the last halves the side.
        res_blocks: residual blocks of a level on the way down; one more on the way up.
        attention_levels: levels at which attention follows each residual block, 0 the first; the
            middle attends anyway. It has one head.
        latent_channels: of the latents, and of the codebook's vectors.
        codes: vectors in the codebook.
        dtype: compute dtype.
    """

    channels: int = 128
    channel_mults: tuple[int, ...] = (1, 2, 2, 4)
    res_blocks: int = 2
    attention_levels: tuple[int, ...] = (3,)
    latent_channels: int = 4
    codes: int = 16384
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Raise `UserError` where a field makes no network."""
        as_tuple(self, "channel_mults")
        as_tuple(self, "attention_levels")
        check_counts(self, "channels", "res_blocks", "latent_channels", "codes")
        mults = self.channel_mults
        positive = len(mults) > 0 and all(isinstance(m, int) and m > 0 for m in mults)
        check(self, "channel_mults", positive, "one or more positive integers")
        known = set(self.attention_levels) <= set(range(len(mults)))
        check(self, "attention_levels", known, f"levels from 0 to {len(mults) - 1}")
        check(self, "channels", self.channels % GROUPS == 0, f"a multiple of {GROUPS}")
        checks.choice("MoVQConfig.dtype", self.dtype, DTYPES)

    @property
    def factor(self) -> int:
        """Pixels along a side for each latent."""
        return 2 ** (len(self.channel_mults) - 1)


class Later(nn.Module):
    """A linear layer as the function that it is, which a loop over rows may call."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> Callable[[jax.Array], jax.Array]:
        """The layer for arrays like `x` `[..., c]`; params are those of `nn.Dense`."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return lambda y: jnp.dot(y, kernel) + bias.reshape((1,) * (y.ndim - 1) + (-1,))


class Norm(nn.Module):
    """GroupNorm; with latents, each place then has the gain and the shift that they say."""

    @nn.compact
    def __call__(self, x: jax.Array, z: jax.Array | None = None) -> OfRows:
        """What the norm of images `[b, h, w, c]` does to rows of them, in float32.

        `z` `[b, h / k, w / k, d]` are the latents, each over k x k places.
        """
        mean, gain, bias = GroupNorm(GROUPS, EPS, name="norm").measure(x)
        if z is None:
            return lambda part, rows: (part.astype(jnp.float32) - mean) * gain + bias
        layers = [Later(x.shape[-1], name=name)(z) for name in ("z_scale", "z_shift")]
        side = x.shape[1] // z.shape[1]

        def norm(part: jax.Array, rows: jax.Array | None) -> jax.Array:
            def enlarged(layer: Callable[[jax.Array], jax.Array]) -> jax.Array:
                if rows is None:
                    y = jnp.repeat(layer(z), side, axis=1)
                else:
                    y = layer(jnp.take(z, rows // side, axis=1))
                return jnp.repeat(y, side, axis=2)

            h = (part.astype(jnp.float32) - mean) * gain + bias
            return h * enlarged(layers[0]) + enlarged(layers[1])

        return norm


def activated(norm: OfRows) -> OfRows:
    """SiLU of what a norm makes."""
    return lambda part, rows: nn.silu(norm(part, rows))


class ResBlock(nn.Module):
    """Twice norm, SiLU, convolution; around them a residual, of one product where it must be."""

    config: MoVQConfig
    features: int
    bands: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, z: jax.Array | None) -> jax.Array:
        """`[b, h, w, c]` and latents, of the decoder, to `[b, h, w, features]`."""
        c, h = self.config, constrain(x, "batch", "height", None, None)
        for i in (1, 2):
            first = activated(Norm(name=f"norm_{i}")(h, z))
            h = Conv(self.features, c.dtype, name=f"conv_{i}")(h, first, self.bands)
        if x.shape[-1] != self.features:
            x = nn.Dense(self.features, dtype=c.dtype, name="skip")(x)
        return constrain(x + h, "batch", "height", None, None)


class AttentionBlock(nn.Module):
    """Self-attention of one head over all places, `QUERIES` of them at a time."""

    config: MoVQConfig

    @nn.compact
    def __call__(self, x: jax.Array, z: jax.Array | None) -> jax.Array:
        """`[b, h, w, c]` and latents, of the decoder, to `[b, h, w, c]`."""
        c, (b, height, width, features) = self.config, x.shape
        h = Norm(name="norm")(x, z)(x, None).reshape(b, 1, -1, features)
        qkv = nn.Dense(3 * features, dtype=c.dtype, name="qkv")(h.astype(c.dtype))
        q, k, v = jnp.split(qkv, 3, axis=-1)
        fits = (n for n in range(1, height + 1) if height % n == 0)
        parts = next((n for n in fits if height // n * width <= QUERIES), height)
        if parts == 1:
            h = attention(q, k, v)
        else:
            q = jnp.moveaxis(q.reshape(b, 1, parts, -1, features), 2, 0)
            h = jnp.moveaxis(jax.lax.map(lambda part: attention(part, k, v), q), 0, 2)
        h = nn.Dense(features, dtype=c.dtype, name="out")(h.reshape(b, height, width, features))
        return x + h


class Level(nn.Module):
    """Residual blocks of one size, perhaps with attention after each, and the way to the next.

    Attributes:
        config: of the network.
        level: which, 0 the first.
        blocks: how many residual blocks.
        then: what comes after them: "halve", "double" or "" for nothing.
        bands: see `MoVQ.decode`.
    """

    config: MoVQConfig
    level: int
    blocks: int
    then: str
    bands: int

    @nn.compact
    def __call__(self, x: jax.Array, z: jax.Array | None = None) -> jax.Array:
        """`[b, h, w, c]`, and latents on the way up, to `[b, h', w', c']`."""
        c = self.config
        features = c.channels * c.channel_mults[self.level]
        for i in range(self.blocks):
            x = ResBlock(c, features, self.bands, name=f"res_{i}")(x, z)
            if self.level in c.attention_levels:
                x = AttentionBlock(c, name=f"attention_{i}")(x, z)
        if self.then == "halve":  # the zeros are below and to the right alone
            x = Conv(features, c.dtype, stride=2, pads=((0, 1), (0, 1)), name="halve")(x)
        if self.then == "double":
            x = DoublingConv(features, c.dtype, name="double")(x, None, self.bands)
        return x


class Way(nn.Module):
    """All of one side: the first convolution, levels and middle, the last norm and convolution.

    Attributes:
        config: of the network.
        up: whether it goes from latents to pictures.
        bands: see `MoVQ.decode`.
    """

    config: MoVQConfig
    up: bool
    bands: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, z: jax.Array | None = None) -> jax.Array:
        """Pictures `[b, h, w, 3]` to latents `[b, h / factor, w / factor, latent_channels]`.

        Or, with `up`, latents to pictures; `z` are then the latents as they are outside.
        """
        c, last = self.config, len(self.config.channel_mults) - 1
        start = c.channels * c.channel_mults[last if self.up else 0]
        h = Conv(start, c.dtype, name="conv_in")(x, None, self.bands)
        if self.up:
            h = self._middle(h, z)
        for level in reversed(range(last + 1)) if self.up else range(last + 1):
            ends = level == (0 if self.up else last)
            then = "" if ends else ("double" if self.up else "halve")
            blocks = c.res_blocks + self.up
            h = Level(c, level, blocks, then, self.bands, name=f"level_{level}")(h, z)
        if not self.up:
            h = self._middle(h, z)
        first = activated(Norm(name="norm_out")(h, z))
        return Conv(3 if self.up else c.latent_channels, name="conv_out")(h, first, self.bands)

    def _middle(self, h: jax.Array, z: jax.Array | None) -> jax.Array:
        features = h.shape[-1]
        h = ResBlock(self.config, features, self.bands, name="middle_res_0")(h, z)
        h = AttentionBlock(self.config, name="middle_attention")(h, z)
        return ResBlock(self.config, features, self.bands, name="middle_res_1")(h, z)


class MoVQ(nn.Module):
    """The autoencoder. Its params do not depend on `bands`."""

    config: MoVQConfig
    bands: int = 1

    def setup(self) -> None:
        """Name the parts."""
        c = self.config
        self.encoder, self.decoder = Way(c, False, self.bands), Way(c, True, self.bands)
        self.quant, self.post_quant = (nn.Dense(c.latent_channels) for _ in range(2))
        self.codebook = nn.Embed(c.codes, c.latent_channels)

    def encode(self, images: jax.Array) -> jax.Array:
        """Latents of pictures: nothing is drawn, scaled or quantised.

        Args:
            images: `[b, h, w, 3]` in [-1, 1]; the sides are multiples of `config.factor`.

        Returns:
            `[b, h / factor, w / factor, latent_channels]` float32.

        Raises:
            UserError: images of another shape, or `bands` do not divide the latents' rows.
        """
        checks.shape("MoVQ images", images, (None, None, None, 3))
        factor = self.config.factor
        if any(side % factor for side in images.shape[1:3]):
            expected = f"height and width that are multiples of {factor}"
            raise wrong("MoVQ images' shape", images.shape, expected, "pad or crop the images")
        self._check_bands(images.shape[1] // factor)
        return self.quant(self.encoder(images))

    def decode(self, z: jax.Array) -> jax.Array:
        """Pictures of latents, which are not quantised.

        With `bands` every convolution is computed in so many bands of rows, one after the other.
        Norms still see the whole picture, so the result is the same; only less memory is needed.

        Args:
            z: `[b, h, w, latent_channels]`.

        Returns:
            `[b, factor * h, factor * w, 3]` float32, for [-1, 1] and not clipped to it.

        Raises:
            UserError: latents of another shape, or `bands` do not divide their rows.
        """
        checks.shape("MoVQ latents", z, (None, None, None, self.config.latent_channels))
        self._check_bands(z.shape[1])
        return self.decoder(self.post_quant(z), z)

    def quantise(self, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The nearest vectors of the codebook: their numbers, int32 `[b, h, w]`, and themselves."""
        table = self.codebook.embedding

        def nearest(row: jax.Array) -> jax.Array:
            exact = jax.lax.Precision.HIGHEST
            products = jnp.einsum("bwc,kc->bwk", row, table, precision=exact)
            return jnp.argmin((table**2).sum(-1)[None, None] - 2 * products, axis=-1)

        codes = jnp.moveaxis(jax.lax.map(nearest, jnp.moveaxis(z, 1, 0)), 0, 1)
        return codes, self.codebook(codes)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Pictures by way of the codebook: encoded, quantised, decoded."""
        return self.decode(self.quantise(self.encode(images))[1])

    def _check_bands(self, rows: int) -> None:
        checks.count("MoVQ.bands", self.bands)
        if rows % self.bands:
            raise wrong("MoVQ.bands", self.bands, f"a divisor of the {rows} rows of latents")
