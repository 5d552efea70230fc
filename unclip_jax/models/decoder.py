"""The decoder: a U-Net or a Transformer over patches, told of a CLIP image embedding and a caption.

Section 2.1 of arXiv 2204.06125: GLIDE, to which z_i comes in two ways, projected and added to
the timestep's embedding, and as four more tokens after the caption's states. Either condition
can be left out for some examples, which is how classifier-free guidance is trained and sampled.

Kandinsky's decoders are settings of it: x_t is then of an autoencoder's latents, z_i alone is told
of (2.2), and a picture to be filled in, or a hint such as a depth map, may stand beside x_t.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.common import checks
from unclip_jax.errors import wrong
from unclip_jax.models.convolution import Conv
from unclip_jax.models.dit import DiT, DiTConfig
from unclip_jax.models.layers import as_tuple, check, check_counts, layer_norm
from unclip_jax.models.text_encoder import TextConfig, TextEncoder
from unclip_jax.models.unet import UNet, UNetConfig

CONDITIONS = ("z_i", "z_i_mask", "tokens", "text_states", "text_mask", "z_t", "label", "canvas")
CONDITIONS += ("known", "hint")
NORMS = ("text", "z_i", "z_t")

# Of Kandinsky's hint: channels and stride of each convolution. A latent is told of 8 x 8 pixels.
HINT = ((16, 1), (16, 1), (32, 2), (32, 1), (96, 2), (96, 1), (256, 2), (4, 1))
HINT_CHANNELS, HINT_FACTOR = 4, 8


@dataclass(frozen=True)
class DecoderConfig:
    """Size of a `Decoder`, and what it is conditioned on.

    Attributes:
        unet: the network that denoises, a U-Net or a Transformer over patches; its `context_dim` is
            the width of the context tokens, 0 where there are none. What its input has beyond x_t's
            channels, and those of `inpaint` or `hint`, are those of a canvas beside x_t.
        text: the decoder's own caption Transformer, as wide as the context; None where there is
            none.
        text_width: features of a frozen encoder's text states (CLIP's in Karlo, T5's in Imagen),
            where those are given instead of tokens; else 0.
        pool_text: whether the mean of those text states is also normalised, projected and added to
            the timestep's embedding (Imagen, arXiv 2205.11487, section 2.5).
        embed_dim: dimension of z_i; 0 for a decoder without it (GLIDE).
        clip_tokens: context tokens made of z_i.
        use_z_t: whether CLIP's text embedding z_t, of `embed_dim` too, is projected and added to
            the timestep's embedding.
        learned_null: whether a z_i that is left out is a learned embedding; otherwise it is zeros.
        norms: which of the projections of "text" to the context, "z_i" (to both) and "z_t" (to the
            embedding) a LayerNorm follows. Karlo ("text",), Kandinsky 2.2 ("z_i",), 2.1 ("z_t",).
        tokens_first: whether the projection of z_i to the context is tokens of features
            (Kandinsky), or features of tokens (Karlo).
        x_channels: channels of x_t: 3 for pixels, 4 for MoVQ's latents.
        inpaint: whether the U-Net sees beside x_t what is known of it, in as many channels, and
            where that is, in one more.
        hint: whether it sees `HINT_CHANNELS` channels that convolutions make of a picture.
        num_classes: classes, each with a learned embedding added to the timestep's (ADM,
            arXiv 2105.05233); class `num_classes` itself stands for none. 0 for a decoder without.
    """

    unet: UNetConfig | DiTConfig
    text: TextConfig | None = None
    text_width: int = 0
    pool_text: bool = False
    embed_dim: int = 0
    clip_tokens: int = 4
    use_z_t: bool = False
    learned_null: bool = False
    norms: tuple[str, ...] = ("text",)
    tokens_first: bool = False
    x_channels: int = 3
    inpaint: bool = False
    hint: bool = False
    num_classes: int = 0

    def __post_init__(self) -> None:
        """Raise `UserError` where a field makes no network."""
        check_counts(self, "text_width", "embed_dim", "clip_tokens", "num_classes", least=0)
        check_counts(self, "x_channels")
        as_tuple(self, "norms")
        check(self, "norms", set(self.norms) <= set(NORMS), f"some of {NORMS}")
        check(self, "hint", not (self.hint and self.inpaint), "False, as inpaint is True")
        beside = (self.x_channels + 1) * self.inpaint + HINT_CHANNELS * self.hint
        whole = self.unet.in_channels == self.x_channels + beside
        fits = whole if beside else self.unet.in_channels >= self.x_channels
        expected = f"in_channels of {self.x_channels + beside}, x_t's and what stands beside it"
        check(self, "unet", fits, expected)
        width = self.unet.context_dim
        if self.text is not None:
            check(self, "text_width", self.text_width == 0, "0, as the decoder has its own `text`")
            ok = self.text.width == width
            check(self, "text", ok, f"a width equal to unet.context_dim = {width}")
        given = self.text_width > 0
        check(self, "pool_text", given or not self.pool_text, "False, as text_width is 0")
        if not self.embed_dim:
            for field in ("use_z_t", "learned_null"):
                check(self, field, not getattr(self, field), "False, as embed_dim is 0")
        if self.use_z_t:
            check(self, "use_z_t", self.has_text, "False, as there is neither text nor text_width")
        tokens = self.has_text or bool(self.embed_dim and self.clip_tokens)
        ok = tokens == (width > 0)
        need = "more than 0, the width of the context tokens" if tokens else "0: no context tokens"
        check(self, "unet", ok, f"a context_dim of {need}")

    @property
    def has_text(self) -> bool:
        """Whether there is a caption at all."""
        return self.text is not None or self.text_width > 0

    @property
    def conditions(self) -> tuple[str, ...]:
        """Names that `cond` must have; "z_i_mask" may come besides where z_i does."""
        names = ("z_i",) if self.embed_dim else ()
        if self.has_text:
            names += ("tokens" if self.text else "text_states", "text_mask")
        names += ("z_t",) if self.use_z_t else ()
        names += ("label",) if self.num_classes else ()
        return names + ((self.beside,) if self.beside else ())

    @property
    def beside(self) -> str:
        """The condition that stands beside x_t in the U-Net's input: "" for none."""
        if self.inpaint or self.hint:
            return "known" if self.inpaint else "hint"
        return "canvas" if self.canvas_channels else ""

    @property
    def canvas_channels(self) -> int:
        """Channels of the canvas that the U-Net sees beside x_t; 0 for none."""
        more = self.unet.in_channels - self.x_channels
        return 0 if self.inpaint or self.hint else more


def masked_mean(states: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean over the tokens where `mask` `[b, l]` is True: `[b, l, d]` to `[b, d]` float32.

    Where there is none, it is zero.
    """
    weights = mask / jnp.maximum(mask.sum(-1, keepdims=True), 1)
    return jnp.einsum("bl,bld->bd", weights, states, preferred_element_type=jnp.float32)


class Hint(nn.Module):
    """Convolutions with SiLU between them: `[b, 8 h, 8 w, 3]` to `[b, h, w, HINT_CHANNELS]`."""

    dtype: str

    @nn.compact
    def __call__(self, picture: jax.Array) -> jax.Array:
        """What the U-Net sees of a picture, beside x_t."""
        h = picture
        for i, (features, stride) in enumerate(HINT):
            h = nn.silu(h) if i else h
            h = Conv(features, self.dtype, stride=stride, name=f"hint_{i}")(h)
        return h


class Decoder(nn.Module):
    """A network that denoises and the encoder of its conditions."""

    config: DecoderConfig

    def setup(self) -> None:
        """Name the parameters."""
        c, width = self.config, self.config.unet.context_dim
        features, dtype = c.unet.embedding_features, c.unet.dtype
        self.unet = (UNet if isinstance(c.unet, UNetConfig) else DiT)(c.unet)
        if c.text is not None:
            self.text = TextEncoder(c.text)
            self.text_to_emb = nn.Dense(features)
        if c.text_width:
            self.text_to_context = nn.Dense(width, dtype=dtype)
            self.text_norm = self._norm("text")
        if c.pool_text:
            self.pool_norm = layer_norm(None)
            self.pool_to_emb = nn.Dense(features)
        if c.embed_dim:
            self.z_i_to_emb = nn.Dense(features)
            self.z_i_emb_norm = self._norm("z_i")
            if c.clip_tokens:
                self.z_i_to_context = nn.Dense(c.clip_tokens * width, dtype=dtype)
                self.z_i_context_norm = self._norm("z_i")
        if c.use_z_t:
            self.z_t_to_emb = nn.Dense(features)
            self.z_t_norm = self._norm("z_t")
        if c.hint:
            self.hint = Hint(dtype)
        if c.learned_null:
            self.null_z_i = self.param("null_z_i", nn.initializers.normal(0.02), (c.embed_dim,))
        if c.num_classes:
            self.label_to_emb = nn.Embed(c.num_classes + 1, features)

    def _norm(self, of: str) -> Callable[[jax.Array], jax.Array]:
        return layer_norm(None) if of in self.config.norms else lambda x: x

    def encode(self, cond: Mapping[str, jax.Array]) -> dict[str, Any]:
        """Everything that depends on neither x_t nor t: once for each sample, not once a step.

        Dropping is done with masks. A z_i whose "z_i_mask" is False is replaced by zeros or by
        the learned null. A caption whose "text_mask" is False everywhere is dropped with its z_t:
        the result depends on neither.

        Args:
            cond: the arrays named by `config.conditions`, and optionally "z_i_mask":
                "z_i" `[b, e]`; "z_i_mask" `[b]` bool; "tokens" `[b, l]` int or "text_states"
                `[b, l, text_width]`; "text_mask" `[b, l]` bool; "z_t" `[b, e]`; "label" `[b]` int,
                where `num_classes` stands for a class that is left out; "canvas" `[b, s, s, 3]`,
                of the U-Net's image size; "known" `[b, h, w, x_channels + 1]`, x_0 where it is
                known and 0 elsewhere, then 1 and 0 likewise; "hint" `[b, 8 h, 8 w, 3]`, a picture
                in [0, 1]. Other conditions of `CONDITIONS` may be there and are not read.

        Returns:
            What `denoise` takes: "emb" `[b, embedding_features]`, "context" `[b, m, context_dim]`
            and "context_mask" `[b, m]`, each None where there is none (no mask: all is attended
            to); and what stands beside x_t under its condition's name, if anything does.

        Raises:
            UserError: a condition is missing, unknown or of the wrong shape.
        """
        c = self.config
        self._check_conditions(cond)
        embs, contexts, masks = [], [], []
        if c.embed_dim:
            z_i = self._z_i(cond)
            embs.append(self.z_i_emb_norm(self.z_i_to_emb(z_i)))
            if c.clip_tokens:
                contexts.append(self._z_i_tokens(z_i))
                masks.append(jnp.ones(contexts[-1].shape[:2], bool))
        if c.text is not None:
            states = self.text(cond["tokens"], cond["text_mask"])
            embs.append(self.text_to_emb(states[:, -1]))
            contexts.append(states)
            masks.append(jnp.ones(states.shape[:2], bool))
        if c.text_width:
            states = self.text_norm(self.text_to_context(cond["text_states"]))
            contexts.append(states.astype(c.unet.dtype))
            masks.append(cond["text_mask"])
        if c.pool_text:
            pooled = masked_mean(cond["text_states"], cond["text_mask"])
            embs.append(self.pool_to_emb(self.pool_norm(pooled)))
        if c.use_z_t:
            has_caption = cond["text_mask"].any(-1, keepdims=True)
            z_t = jnp.where(has_caption, cond["z_t"], 0.0)
            embs.append(self.z_t_norm(self.z_t_to_emb(z_t)))
        if c.num_classes:
            embs.append(self.label_to_emb(cond["label"]))
        beside = {c.beside: cond[c.beside]} if c.beside else {}
        if c.hint:
            beside["hint"] = self.hint(cond["hint"])
        return beside | {
            "emb": sum(embs) if embs else None,
            "context": jnp.concatenate(contexts, axis=1) if contexts else None,
            "context_mask": jnp.concatenate(masks, axis=1) if c.has_text else None,
        }

    def denoise(
        self, x_t: jax.Array, t: jax.Array, encoded: Mapping[str, Any], deterministic: bool = True
    ) -> jax.Array:
        """One evaluation of the U-Net.

        Args:
            x_t: `[b, h, w, x_channels]` noisy images or latents.
            t: `[b]` timesteps, int or float.
            encoded: what `encode` returned.
            deterministic: False in training: dropout then draws from the rng "dropout".

        Returns:
            `[b, h, w, out_channels]` float32.
        """
        checks.shape("decoder x_t", x_t, (None, None, None, self.config.x_channels))
        if name := self.config.beside:
            shape = (*x_t.shape[:3], encoded[name].shape[-1])
            checks.shape(f"decoder cond {name}, as large as x_t", encoded[name], shape)
            x_t = jnp.concatenate([x_t, encoded[name].astype(x_t.dtype)], axis=-1)
        return self.unet(
            x_t,
            t,
            encoded["emb"],
            encoded["context"],
            encoded["context_mask"],
            deterministic=deterministic,
        )

    def __call__(
        self,
        x_t: jax.Array,
        t: jax.Array,
        cond: Mapping[str, jax.Array],
        deterministic: bool = True,
    ) -> jax.Array:
        """`denoise` with `encode(cond)`."""
        return self.denoise(x_t, t, self.encode(cond), deterministic)

    def _z_i(self, cond: Mapping[str, jax.Array]) -> jax.Array:
        z_i = cond["z_i"]
        if "z_i_mask" not in cond:
            return z_i
        null = self.null_z_i if self.config.learned_null else jnp.zeros(z_i.shape[-1:])
        return jnp.where(cond["z_i_mask"][:, None], z_i, null[None, :])

    def _z_i_tokens(self, z_i: jax.Array) -> jax.Array:
        """The context tokens that are made of z_i, `[b, clip_tokens, context_dim]`."""
        c, width = self.config, self.config.unet.context_dim
        tokens = self.z_i_to_context(z_i)
        if c.tokens_first:
            tokens = tokens.reshape(-1, c.clip_tokens, width)
        else:
            tokens = tokens.reshape(-1, width, c.clip_tokens).swapaxes(1, 2)
        return self.z_i_context_norm(tokens).astype(tokens.dtype)

    def _check_conditions(self, cond: Mapping[str, jax.Array]) -> None:
        c = self.config
        missing = [name for name in c.conditions if name not in cond]
        unknown = [name for name in cond if name not in CONDITIONS]
        if missing or unknown:
            expected = f"{list(c.conditions)}{' and optionally z_i_mask' if c.embed_dim else ''}"
            do = f"add {missing}" if missing else f"unknown: {unknown}"
            raise wrong("decoder cond", sorted(cond), expected, do)
        for name in ("z_i", "z_t"):
            if name in c.conditions:
                checks.shape(f"decoder cond {name}", cond[name], (None, c.embed_dim))
        if c.embed_dim and "z_i_mask" in cond:
            checks.shape("decoder cond z_i_mask", cond["z_i_mask"], cond["z_i"].shape[:1])
        if c.text_width:
            states = cond["text_states"]
            checks.shape("decoder cond text_states", states, (None, None, c.text_width))
            checks.shape("decoder cond text_mask", cond["text_mask"], states.shape[:2])
        if c.num_classes:
            checks.shape("decoder cond label", cond["label"], (None,))
        if c.canvas_channels:
            size = c.unet.image_size
            shape = (None, size, size, c.canvas_channels)
            checks.shape("decoder cond canvas", cond["canvas"], shape)
        if c.inpaint:
            checks.shape("decoder cond known", cond["known"], (None, None, None, c.x_channels + 1))
        if c.hint:
            hint = cond["hint"]
            checks.shape("decoder cond hint", hint, (None, None, None, 3))
            if any(side % HINT_FACTOR for side in hint.shape[1:3]):
                expected = f"height and width that are multiples of {HINT_FACTOR}"
                raise wrong("decoder cond hint's shape", hint.shape, expected)
