"""The decoder as a stage: p(x | z_i, y) at 64 px, section 2.1 of the paper.

An ADM U-Net with learned variance. Without z_i it is GLIDE, or Imagen's base model where it reads
a frozen encoder's text states; with a class in place of both it is ADM itself (arXiv 2105.05233).
With every condition dropped it is an unconditional model, which is what classifier-free guidance
leads away from.

With a canvas (`models.canvas`, trained before it and frozen) the U-Net sees beside x_t what a
perceptron draws of z_i and z_t, of those that are given. In training the canvas is made worse at
random, or the decoder would trust it too much. Guidance leads away from the canvas of
nothing; with `empty_null`, whose dropped captions have a z_t, from that of the empty caption.

With an autoencoder (`models.movq`, frozen; Kandinsky) it denoises latents: pictures go in and come
out as pixels, of any size that the levels of both networks divide.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from unclip_jax.common import checks
from unclip_jax.diffusion import gaussian, samplers
from unclip_jax.errors import UserError, wrong
from unclip_jax.models.canvas import CanvasConfig
from unclip_jax.models.decoder import Decoder, DecoderConfig
from unclip_jax.models.movq import MoVQConfig
from unclip_jax.stages import normalisation
from unclip_jax.stages.base import Batch, Loss
from unclip_jax.stages.canvas import CanvasStage, enlarge, noised
from unclip_jax.stages.conditioning import (
    Condition,
    Field,
    Params,
    blank,
    caption_fields,
    drop_caption,
    keep,
    z_i_field,
    z_t_field,
)
from unclip_jax.stages.denoising import Denoising, denoising_loss
from unclip_jax.stages.latents import OfPictures
from unclip_jax.stages.pixels import to_float

# What a canvas is clipped to: as far as it may overshoot the range of pictures.
CANVAS_RANGE = 1.05


@dataclasses.dataclass(frozen=True)
class DecoderStage(OfPictures):
    """The decoder: network, diffusion and sampling settings together.

    Attributes:
        model: U-Net, caption Transformer and conditioning.
        diffusion: schedule, prediction, variance and loss.
        sampling: method, number of steps and clipping.
        z_i_drop: how often training drops the image embedding.
        caption_drop: how often training drops the caption.
        label_drop: how often training drops the class.
        guidance_scale: the classifier-free guidance that sampling uses unless told otherwise.
        empty_null: whether a dropped caption is the empty caption as CLIP encodes it (Karlo),
            kept in the params under `null_caption`, rather than no caption at all.
        states_length: tokens of a caption where the decoder reads another network's text states.
        canvas: the perceptron whose picture is three more channels of the U-Net's input; its params
            are constant, under `canvas`. None for none.
        canvas_z_i_drop: how often training draws the canvas without z_i, where the decoder has it.
        canvas_z_t_drop: likewise without z_t.
        canvas_noise: the most noise that training adds to the canvas's normalised inputs: a
            standard deviation, for each example uniform from 0 to this.
        from_canvas: whether `draw` begins with the canvas under the noise of its first step, rather
            than with noise alone. `sampling.spacing` says which step that is: (600, 400, 200, 0).
        z_i_noise: standard deviation of the noise that training adds to the normalised z_i.
        autoencoder: what makes latents of pictures, and pictures of latents, which are x_0; its
            params are constant, under `autoencoder`. None for a decoder of pixels.
        null_picture: whether a z_i that is left out is CLIP's embedding of a picture of zeros
            (Kandinsky), kept in the params under `null_z_i`, rather than zero.
        sides: height and width of its pictures, in pixels, multiples of `size_multiple`; () for
            squares of the U-Net's image_size. See `of_size`.
        analytic: whether the statistic of the analytic variance is in the params, under
            `analytic`; `unclip analytic` measures it on a trained stage.
    """

    kind: ClassVar[str] = "decoder"
    module: ClassVar[type] = Decoder
    preview: ClassVar[str] = "drawn"
    makes: ClassVar[tuple[str, str]] = ("images", "RGB in [-1, 1]")
    obeys: ClassVar[str] = "conditions"
    normalisations: ClassVar[tuple[str, ...]] = normalisation.NAMES

    model: DecoderConfig
    diffusion: gaussian.Diffusion = gaussian.Diffusion(variance="learned_range", loss="hybrid")
    sampling: samplers.Sampling = samplers.Sampling(method="ddpm", spacing="250", clip_x_0=1.0)
    z_i_drop: float = 0.1
    caption_drop: float = 0.5
    label_drop: float = 0.1
    guidance_scale: float = 3.0
    empty_null: bool = False
    states_length: int = 77
    canvas: CanvasConfig | None = None
    canvas_z_i_drop: float = 0.25
    canvas_z_t_drop: float = 0.15
    canvas_noise: float = 0.5
    from_canvas: bool = False
    z_i_noise: float = 0.0
    analytic: bool = False
    autoencoder: MoVQConfig | None = None
    null_picture: bool = False
    sides: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check that the network has the channels that diffusion, canvas and autoencoder need."""
        self.check_sampling()
        self.check_drops("z_i", "caption", "label", "canvas_z_i", "canvas_z_t")
        for name in ("canvas_noise", "z_i_noise"):
            checks.number(f"stage.{name}", getattr(self, name), least=0)
        if self.empty_null and not (self.reads_states and self.model.use_z_t):
            raise UserError(
                "stage.empty_null: got True, expected False unless the decoder reads CLIP's text"
                " states and z_t (stage.model.text_width above 0, use_z_t)"
            )
        if self.null_picture and not self.model.embed_dim:
            raise wrong("stage.null_picture", True, "False, as stage.model.embed_dim is 0")
        self.check_pictures()
        self._check_canvas()

    def _check_canvas(self) -> None:
        if self.from_canvas and not self.canvas:
            raise wrong("stage.from_canvas", True, "False, as there is no stage.canvas")
        if self.canvas and self.autoencoder:
            raise wrong("stage.canvas", self.canvas, "none, as there is an autoencoder")
        found, expected = self.model.canvas_channels, 3 if self.canvas else 0
        if found != expected:
            what = f"{self.model.unet.in_channels - found + expected}: x_t's"
            what += " and the canvas's" * bool(self.canvas)
            raise wrong("stage.model.unet.in_channels", self.model.unet.in_channels, what)
        if self.canvas and self.canvas.embed_dim != self.model.embed_dim:
            what = f"stage.model.embed_dim = {self.model.embed_dim}, which must be above 0"
            raise wrong("stage.canvas.embed_dim", self.canvas.embed_dim, what)

    def with_canvas(self, canvas: CanvasConfig) -> DecoderStage:
        """The stage with a canvas of that size, and room for it in the U-Net's input.

        UserError if the stage says another size.
        """
        if self.canvas is not None:
            of_own = dataclasses.replace(canvas, dtype=self.canvas.dtype)
            if self.canvas != of_own:
                raise wrong("config.stage.canvas", self.canvas, f"{of_own}, that of config.canvas")
            return self
        unet = dataclasses.replace(self.model.unet, in_channels=6)
        model = dataclasses.replace(self.model, unet=unet)
        return dataclasses.replace(self, model=model, canvas=canvas)

    @property
    def _canvas_stage(self) -> CanvasStage:
        return CanvasStage(self.canvas, image_size=self.canvas.size)

    @property
    def text_encoder(self) -> str:
        """CLIP in Karlo, T5 in Imagen; none for a decoder with its own caption Transformer."""
        if not self.model.text_width:
            return ""
        return "clip" if self.empty_null else "t5"

    @property
    def context(self) -> tuple[int, int]:
        """Context length and vocabulary size of its captions' tokens; 0 where others read them."""
        text = self.model.text
        return (text.context_length, text.vocab_size) if text else (self.states_length, 0)

    @property
    def conditions(self) -> dict[str, Field]:
        """What the network reads, each with its shape and meaning."""
        model, found = self.model, {}
        if model.num_classes:
            n = model.num_classes
            meaning = f"the class, 0 to {n - 1}; {n} is none"
            found["label"] = Field((), "int32", meaning, below=n)
        if model.has_text:
            found |= caption_fields(*self.context, model.text_width)
        if model.embed_dim:
            found |= z_i_field(model.embed_dim)
        reads_z_t = model.use_z_t or (self.canvas and model.has_text)
        found |= z_t_field(model.embed_dim) if reads_z_t else {}
        if model.inpaint:
            shape = (*self.x_shape[:2], model.x_channels + 1)
            meaning = "x_0 where it is known and 0 elsewhere; then 1 and 0 likewise"
            found["known"] = Field(shape, "float32", meaning)
        if model.hint:
            meaning = "a picture in [0, 1] that says what is where, such as a depth map"
            found["hint"] = Field((*self.picture_size, 3), "float32", meaning)
        return found

    @property
    def learns(self) -> dict[str, Field]:
        """Pictures, squares; UserError for a stage that cannot be trained here."""
        if len(set(self.picture_size)) > 1:
            raise wrong("stage.sides", self.sides, "a square, to be trained")
        for name in ("inpaint", "hint"):
            if getattr(self.model, name):
                expected = "False: a decoder with it is drawn with here, not trained"
                raise wrong(f"stage.model.{name}", True, expected)
        return super().learns

    def constants(self) -> Params:
        """What stands beside the network in its params, until it is measured."""
        found = super().constants()
        if self.null_picture:
            found["null_z_i"] = jnp.zeros(self.model.embed_dim)
        return found

    @property
    def drops(self) -> tuple[str, ...]:
        """The conditions that training drops, each as often as the field NAME_drop says."""
        reads = {"z_i": "z_i", "caption": "text_mask", "label": "label"}
        return tuple(name for name, entry in reads.items() if entry in self.conditions)

    def init(self, key: jax.Array) -> Params:
        """Random params, with the identity as normalisation of z_i until it is replaced."""
        x_t, t = jnp.zeros((1, *self.x_shape)), jnp.zeros((1,), jnp.int32)
        cond, params = blank(self.conditions), self.constants()
        if self.canvas:
            params["canvas"] = self._canvas_stage.init(jax.random.fold_in(key, 1))
            cond["canvas"] = x_t
        if self.autoencoder:
            params["autoencoder"] = self.fresh_autoencoder(jax.random.fold_in(key, 2))
        return {"network": self.fresh(key, x_t, t, cond)} | params

    def condition(
        self,
        text: jax.Array | None = None,
        z_i: jax.Array | None = None,
        z_t: jax.Array | None = None,
        mask: jax.Array | None = None,
        **others: jax.Array,
    ) -> Condition:
        """Condition from what the decoder reads; the rest is left out, given or not.

        Args:
            text: tokens [b, l], or text states [b, l, d] where the decoder reads those.
            z_i: CLIP's image embeddings [b, e], in CLIP's coordinates.
            z_t: CLIP's text embeddings [b, e].
            mask: True on the captions' tokens [b, l]; None works it out of tokens.
            **others: what else `conditions` names, such as `label`: classes int32 [b], of which
                model.num_classes stands for none.

        Raises:
            UserError: the decoder reads a class, and none is given.
        """
        if self.model.inpaint and others.get("known") is None:  # nothing is known
            others["known"] = jnp.zeros((len(z_i), *self.conditions["known"].shape))
        caption = {"text_states" if self.reads_states else "tokens": text}
        return self.condition_of(caption | {"z_i": z_i, "z_t": z_t} | others, mask)

    def condition_of(self, batch: Batch, mask: jax.Array | None = None) -> Condition:
        """The condition of a batch, see `loss`; the rest of it is left out."""
        if self.model.num_classes and batch.get("label") is None:
            raise UserError(
                f"label: none given, but this decoder draws one of {self.model.num_classes}"
                " classes; use unclip class_conditional"
            )
        cond = super().condition_of(batch, mask)
        return cond | ({"z_i_mask": jnp.ones(cond["z_i"].shape[:1], bool)} if "z_i" in cond else {})

    def drop(self, params: Params, cond: Condition, kept: dict[str, jax.Array]) -> Condition:
        """The condition without what `kept`, of a bit [b] for each of `drops`, says False to."""
        if "z_i" in kept:
            cond = cond | {"z_i_mask": cond["z_i_mask"] & kept["z_i"]}
        if "caption" in kept:
            cond = drop_caption(cond, kept["caption"], params.get("null_caption"))
        if "label" in kept:
            none = self.model.num_classes
            cond = cond | {"label": jnp.where(kept["label"], cond["label"], none)}
        return cond

    def null(self, params: Params, cond: Condition, kept: jax.Array | None = None) -> Condition:
        """The condition with everything dropped that training drops.

        `kept` [b] is True where the caption alone stays, a negative prompt; or, of a decoder
        without captions, the z_i of one.
        """
        none = jnp.zeros(jnp.shape(next(iter(cond.values()), 0))[:1], bool)
        said = {} if kept is None else {"caption" if "caption" in self.drops else "z_i": kept}
        return self.drop(params, cond, dict.fromkeys(self.drops, none) | said)

    def encode(
        self, params: Params, cond: Condition, worse_key: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """All of the conditioning that depends on neither x_t nor t, computed once.

        A key makes the canvas worse at random, as training does.
        """
        canvas = {"canvas": self.draw_canvas(params, cond, worse_key)} if self.canvas else {}
        if self.null_picture and "z_i_mask" in cond:
            kept = cond["z_i_mask"]
            z_i = jnp.where(kept[:, None], cond["z_i"], params["null_z_i"][None])
            cond = cond | {"z_i": z_i, "z_i_mask": jnp.ones_like(kept)}
        if "z_i" in self.conditions:
            cond = cond | {"z_i": normalisation.normalise(params["normalisation"], cond["z_i"])}
        return self.apply(params, cond | canvas, method="encode")

    def begun(self, params: Params, cond: Condition, noise: jax.Array) -> jax.Array:
        """See the base; with `from_canvas` what the canvas shows is there from the beginning."""
        if not self.from_canvas:
            return noise
        canvas = self.draw_canvas(params, cond)
        return samplers.noised(canvas, noise, self.diffusion, self.sampling)

    def draw_canvas(
        self, params: Params, cond: Condition, worse_key: jax.Array | None = None
    ) -> jax.Array:
        """The canvas [b, h, w, 3] of what a condition has of z_i and z_t, as large as x_t."""
        rows, e = cond["z_i"].shape
        none = jnp.zeros(rows, bool)
        told = {"z_i": cond["z_i"], "z_t": cond.get("z_t", jnp.zeros((rows, e)))}
        kept = {"z_i": cond.get("z_i_mask", ~none), "z_t": none}
        if "z_t" in cond:
            kept["z_t"] = cond["text_mask"].any(axis=-1)
        noise = 0.0
        if worse_key is not None:
            z_i_key, z_t_key, size_key, noise_key = jax.random.split(worse_key, 4)
            kept["z_i"] &= keep(z_i_key, rows, self.canvas_z_i_drop)
            kept["z_t"] &= keep(z_t_key, rows, self.canvas_z_t_drop)
            size = jax.random.uniform(size_key, (rows, 1), maxval=self.canvas_noise)
            noise = size * jax.random.normal(noise_key, (rows, 2 * e))
        small = self._canvas_stage.draw(params["canvas"], told, kept, noise)
        return enlarge(jnp.clip(small, -CANVAS_RANGE, CANVAS_RANGE), self.image_size)

    def data(self, params: Params, batch: Batch) -> tuple[jax.Array, Condition]:
        """x_0 [b, h, w, c] and the whole condition of a batch, see `loss`."""
        images = self.x_0_of(params, to_float(batch["image"]))
        return jax.lax.stop_gradient(images), self.condition_of(batch)

    def denoising(self, params: Params, batch: Batch, key: jax.Array) -> Denoising:
        """See the base; captions are dropped as often as in training, pictures alone never are."""
        x_0, cond = self.data(params, batch)
        if "caption" in self.drops:
            kept = keep(key, len(x_0), self.caption_drop)
            cond = drop_caption(cond, kept, params.get("null_caption"))
        return x_0, lambda params, scale: self.guided(params, cond, scale)

    def loss(self, params: Params, batch: Batch, key: jax.Array) -> Loss:
        """Loss of {"image": uint8 [b,h,w,3], "tokens": int32 [b,l], "z_i": [b,e]}.

        What the decoder does not read may be missing. One that reads text states takes
        "text_states" [b, l, d] and "text_mask" [b, l] in place of tokens, and "z_t" [b, e] where it
        reads that, and one of classes "label" int32 [b].
        """
        t_key, noise_key, z_i_key, caption_key, dropout_key = jax.random.split(key, 5)
        drop_keys = {"z_i": z_i_key, "caption": caption_key}
        drop_keys["label"] = jax.random.fold_in(caption_key, 1)
        x_0, cond = self.data(params, batch)
        if self.z_i_noise and "z_i" in cond:
            more_key = jax.random.fold_in(z_i_key, 1)
            stats = params["normalisation"]
            cond = cond | {"z_i": noised(more_key, cond["z_i"], stats, self.z_i_noise)}
        kept = {
            name: keep(drop_keys[name], len(x_0), getattr(self, f"{name}_drop"))
            for name in self.drops
        }
        worse_key = jax.random.fold_in(caption_key, 2)
        encoded = self.encode(params, self.drop(params, cond, kept), worse_key)

        def denoise(x_t: jax.Array, t: jax.Array) -> jax.Array:
            return self.denoise(params, x_t, t, encoded, dropout_key)

        return denoising_loss(self.diffusion, denoise, x_0, t_key, noise_key)

    def sample(
        self, params: Params, keys: jax.Array, cond: Condition, **settings: Any
    ) -> jax.Array:
        """Images [b, h, w, 3] in [-1, 1] for b conditions, one typed key each.

        The arguments are those of `GuidedDiffusion.draw`. By default guidance leads away from z_i,
        the caption and the class dropped. `noise` is of latents where there is an autoencoder.
        """
        return self.images_of(params, self.draw(params, keys, cond, **settings))
