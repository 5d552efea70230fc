"""CLIP's two towers (arXiv 2103.00020): a vision Transformer and a causal text Transformer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.common import checks
from unclip_jax.data.images import INTERPOLATIONS, RESIZE_MODES, Fit
from unclip_jax.errors import UserError, wrong
from unclip_jax.models.attention import causal_mask
from unclip_jax.models.layers import (
    ACTIVATIONS,
    Embed,
    Transformer,
    as_tuple,
    check,
    check_compute,
    check_counts,
    check_heads,
    check_hidden,
    layer_norm,
)

MAX_LOG_SCALE = math.log(100.0)
TOWERS = ("both", "text", "image")


@dataclass(frozen=True)
class ClipConfig:
    """Size of a `Clip`. The defaults are OpenAI's ViT-L/14.

    Attributes:
        image_size: side of the images in pixels; without `margin`, a multiple of `patch`.
        patch: side of a patch in pixels.
        margin: pixels at the right and at the bottom that no patch covers, as in some public CLIPs.
        vision_width: features of a patch; a multiple of `vision_heads`.
        vision_layers, vision_heads: blocks, and attention heads, of the image tower.
        text_width: features of a token; a multiple of `text_heads`.
        text_layers, text_heads: likewise of the text tower.
        vocab_size: tokens in the vocabulary.
        context_length: most tokens in a caption.
        embed_dim: dimension of the shared space.
        activation: "quick_gelu" (OpenAI's weights) or "gelu" (exact).
        mlp_ratio: hidden width of both towers' perceptrons over the width.
        vision_mlp_ratio: that of the image tower, where it differs; 0 stands for `mlp_ratio`.
        end_token: the id that ends a caption: z_t is read where it first stands. -1 stands for the
            last one, which OpenAI's CLIP looks for as the highest id of the caption.
        pixel_mean, pixel_std: of each channel, of pixels in [0, 1].
        resize_mode: how a picture of any shape becomes one of `image_size`. "shortest": its shorter
            side is resized to `resize_to`, "squash": both sides are, and the centre is cropped;
            "longest": its longer side is, and `fill` put around it.
        resize_to: pixels, `image_size` or more; 0 stands for `image_size`.
        interpolation: of the resizing, antialiased: "bicubic" or "bilinear".
        fill: grey around the picture for "longest", 0 (black) to 255.
        towers: "both", or "text" or "image" where the weights hold one tower only.
        dtype: compute dtype.
        remat: "none", "full" or "dots", see `layers.remat`.
    """

    image_size: int = 224
    patch: int = 14
    margin: int = 0
    vision_width: int = 1024
    vision_layers: int = 24
    vision_heads: int = 16
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    vocab_size: int = 49408
    context_length: int = 77
    embed_dim: int = 768
    activation: str = "quick_gelu"
    mlp_ratio: float = 4.0
    vision_mlp_ratio: float = 0.0
    end_token: int = -1
    pixel_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    pixel_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    resize_mode: str = "shortest"
    resize_to: int = 0
    interpolation: str = "bicubic"
    fill: int = 0
    towers: str = "both"
    dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self) -> None:
        """Raise `UserError` where a field makes no network."""
        checks.choice("ClipConfig.towers", self.towers, TOWERS)
        check_counts(self, "image_size", "patch", "vision_width", "vision_layers", "vision_heads")
        check_counts(self, "text_width", "text_layers", "text_heads")
        check_counts(self, "vocab_size", "context_length", "embed_dim")
        check_counts(self, "margin", least=0)
        seen = self.image_size - self.margin
        expected = f"a multiple of patch = {self.patch}" + f", and {self.margin}" * bool(
            self.margin
        )
        check(self, "image_size", seen > 0 and seen % self.patch == 0, expected)
        check(self, "margin", self.margin < self.patch, f"less than patch = {self.patch}")
        check_heads(self, "vision_width", "vision_heads")
        check_heads(self, "text_width", "text_heads")
        checks.choice("ClipConfig.activation", self.activation, ACTIVATIONS)
        checks.number("ClipConfig.mlp_ratio", self.mlp_ratio, above=0)
        checks.number("ClipConfig.vision_mlp_ratio", self.vision_mlp_ratio, least=0)
        check_hidden(self, "mlp_ratio", int(self.text_width * self.mlp_ratio))
        seen_by = "vision_mlp_ratio" if self.vision_mlp_ratio else "mlp_ratio"
        check_hidden(self, seen_by, int(self.vision_width * getattr(self, seen_by)))
        known = -1 <= self.end_token < self.vocab_size
        check(self, "end_token", known, f"an id below vocab_size = {self.vocab_size}, or -1")
        for field in ("pixel_mean", "pixel_std"):
            as_tuple(self, field)
            check(self, field, len(getattr(self, field)) == 3, "three numbers, one per channel")
        check(self, "pixel_std", all(s > 0 for s in self.pixel_std), "positive numbers")
        checks.choice("ClipConfig.resize_mode", self.resize_mode, RESIZE_MODES)
        checks.choice("ClipConfig.interpolation", self.interpolation, INTERPOLATIONS)
        check_counts(self, "resize_to", "fill", least=0)
        large = self.resize_to >= self.image_size and self.resize_mode != "longest"
        expected = f"at least image_size = {self.image_size}, or 0; 0 for the longest side"
        check(self, "resize_to", not self.resize_to or large, expected)
        check(self, "fill", self.fill <= 255, "0 to 255")
        check_compute(self)

    @property
    def fit(self) -> Fit:
        """How a picture of any shape becomes one of `image_size`."""
        return Fit(self.resize_mode, self.resize_to, self.interpolation, self.fill)

    @property
    def end(self) -> int:
        """The id that ends a caption."""
        return self.vocab_size - 1 if self.end_token < 0 else self.end_token

    def transformer(self, layers: int, heads: int, mlp_ratio: float) -> Transformer:
        """The Transformer of a tower, in the body of its module."""
        settings = mlp_ratio, self.activation, self.dtype, self.remat
        return Transformer(layers, heads, *settings, name="transformer")


@jax.custom_vjp
def _clip_log_scale(log_scale: jax.Array) -> jax.Array:
    """min(log_scale, ln 100); beyond the limit only a gradient that leads back passes."""
    return jnp.minimum(log_scale, MAX_LOG_SCALE)


def _clip_log_scale_backward(log_scale: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    return (jnp.where((log_scale < MAX_LOG_SCALE) | (g > 0), g, 0.0),)


_clip_log_scale.defvjp(lambda s: (_clip_log_scale(s), s), _clip_log_scale_backward)


class VisionTower(nn.Module):
    """Patches and a class token, LayerNorm, Transformer, LayerNorm of the class token."""

    config: ClipConfig

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """`[b, h, w, 3]` in [-1, 1] to `[b, vision_width]`."""
        c = self.config
        checks.shape("images", images, (None, c.image_size, c.image_size, 3))
        mean, std = (jnp.array(s).reshape(1, 1, 1, 3) for s in (c.pixel_mean, c.pixel_std))
        pixels = ((images.astype(jnp.float32) + 1.0) / 2.0 - mean) / std
        b, width, tile = images.shape[0], c.vision_width, (c.patch, c.patch)
        cut = nn.Conv(width, tile, tile, "VALID", use_bias=False, dtype=c.dtype, name="patches")
        patches = cut(pixels).reshape(b, -1, width)
        small = nn.initializers.normal(width**-0.5)
        first = self.param("class_token", small, (width,)).astype(c.dtype)
        x = jnp.concatenate([jnp.broadcast_to(first, (b, 1, width)), patches], axis=1)
        x = x + self.param("positions", small, (x.shape[1], width)).astype(c.dtype)[None]
        x = layer_norm("norm_in")(x)
        x = c.transformer(c.vision_layers, c.vision_heads, c.vision_mlp_ratio or c.mlp_ratio)(x)
        return layer_norm("norm_out")(x[:, 0])


class TextTower(nn.Module):
    """Token and position embeddings, causal Transformer, LayerNorm."""

    config: ClipConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """`[b, l]` int, l at most `context_length`, to `[b, l, text_width]` float32 states."""
        c = self.config
        checks.shape("tokens", tokens, (None, None))
        length = tokens.shape[1]
        if length > c.context_length:
            expected = f"at most context_length = {c.context_length}"
            raise wrong("the tokens' length", length, expected, "truncate the captions")
        embed = Embed(c.vocab_size, c.text_width, name="tokens")
        small = nn.initializers.normal(0.01)
        positions = self.param("positions", small, (c.context_length, c.text_width))
        x = embed(tokens) + positions[None, :length]
        x = c.transformer(c.text_layers, c.text_heads, c.mlp_ratio)(x, causal_mask(length))
        return layer_norm("norm_out")(x)


class Clip(nn.Module):
    """Both towers, their projections into the shared space, and the learned temperature."""

    config: ClipConfig

    def setup(self) -> None:
        """Name the parameters."""
        c = self.config

        def projection(width: int) -> nn.Dense:
            small = nn.initializers.normal(width**-0.5)
            return nn.Dense(c.embed_dim, use_bias=False, kernel_init=small)

        if c.towers != "text":
            self.vision = VisionTower(c)
            self.vision_projection = projection(c.vision_width)
        if c.towers != "image":
            self.text = TextTower(c)
            self.text_projection = projection(c.text_width)
        if c.towers == "both":
            start = nn.initializers.constant(math.log(1 / 0.07))
            self.log_scale = self.param("log_scale", start, ())

    def encode_image(self, images: jax.Array) -> jax.Array:
        """Image embeddings z_i, projected but not normalised.

        Args:
            images: `[b, image_size, image_size, 3]` in [-1, 1].

        Returns:
            `[b, embed_dim]` float32.

        Raises:
            UserError: this CLIP has no image tower.
        """
        self._check_tower("image")
        return self.vision_projection(self.vision(images))

    def encode_text(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Text embeddings z_t, projected but not normalised, and the states they are read from.

        z_t is read where a caption ends, see `ClipConfig.end_token`. Every caption must have that
        token: without it the state at position 0 would be read, or at its highest id.

        Args:
            tokens: `[b, l]` int, with l at most `context_length`.

        Returns:
            `[b, embed_dim]` float32, and `[b, l, text_width]` float32 outputs of the final
            LayerNorm, before the projection.

        Raises:
            UserError: this CLIP has no text tower.
        """
        self._check_tower("text")
        states = self.text(tokens)
        given = self.config.end_token
        end = jnp.argmax(tokens if given < 0 else tokens == given, axis=-1)
        pooled = jnp.take_along_axis(states, end[:, None, None], axis=1)[:, 0]
        return self.text_projection(pooled), states

    def _check_tower(self, wanted: str) -> None:
        if self.config.towers not in ("both", wanted):
            raise UserError(
                f"CLIP: its weights hold the {self.config.towers} tower alone, but the {wanted}"
                f" tower is needed; use a CLIP that has it (of Karlo's repositories, text-to-image"
                " has the text tower and image-variation both)"
            )

    def logit_scale(self) -> jax.Array:
        """The factor on cosine similarities: exp of the learned log scale, at most 100."""
        return jnp.exp(_clip_log_scale(self.log_scale))

    def __call__(
        self, images: jax.Array, tokens: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`(z_i [b, e], z_t [b, e], logit_scale [])`: see the three methods."""
        z_t, _ = self.encode_text(tokens)
        return self.encode_image(images), z_t, self.logit_scale()
