"""The decoder as a stage: p(x | z_i, y) at 64 px, section 2.1 of the paper.

An ADM U-Net with learned variance. Without z_i it is GLIDE, or Imagen's base model where it reads
a frozen encoder's text states; with a class in place of both it is ADM itself (arXiv 2105.05233).
With every condition dropped it is an unconditional model, which is what classifier-free guidance
leads away from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from unclip_jax.diffusion import gaussian, guidance, samplers
from unclip_jax.diffusion.losses import training_losses
from unclip_jax.diffusion.progress import Loop, whole
from unclip_jax.errors import UserError
from unclip_jax.models.decoder import Decoder, DecoderConfig
from unclip_jax.models.unet import UNetConfig
from unclip_jax.parallel.axes import checked
from unclip_jax.stages import normalisation
from unclip_jax.stages.conditioning import (
    Condition,
    Params,
    check_analytic,
    drop_caption,
    empty_caption,
    initial_noise,
    keep,
    random_timesteps,
    text_mask,
)
from unclip_jax.stages.pixels import to_float


@dataclasses.dataclass(frozen=True)
class DecoderStage:
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
        analytic: whether the statistic of the analytic variance is in the params, under
            `analytic`; `unclip analytic` measures it on a trained stage.
    """

    kind: ClassVar[str] = "decoder"

    model: DecoderConfig
    diffusion: gaussian.Diffusion = gaussian.Diffusion(variance="learned_range", loss="hybrid")
    sampling: samplers.Sampling = samplers.Sampling(method="ddpm", spacing="250", clip_x_0=1.0)
    z_i_drop: float = 0.1
    caption_drop: float = 0.5
    label_drop: float = 0.1
    guidance_scale: float = 3.0
    empty_null: bool = False
    states_length: int = 77
    analytic: bool = False

    def __post_init__(self) -> None:
        """Check that the network has the channels that the diffusion needs."""
        check_analytic(self.sampling, self.analytic)
        self.diffusion.process(self.sampling.spacing)  # a wrong spacing is an error now, not later
        for name in ("z_i_drop", "caption_drop", "label_drop"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"stage.{name}: got {getattr(self, name)}, expected 0 <= p < 1")
        if self.empty_null and not (self.reads_states and self.model.use_z_t):
            raise UserError(
                "stage.empty_null: got True, expected False unless the decoder reads CLIP's text"
                " states and z_t (stage.model.text_width above 0, use_z_t)"
            )
        check_channels(self.model.unet.out_channels, self.diffusion, "stage.model.unet")

    @property
    def network(self) -> Decoder:
        """The Linen module."""
        return Decoder(self.model)

    @property
    def reads_states(self) -> bool:
        """Whether captions come as another network's text states; else as tokens."""
        return self.model.text_width > 0

    @property
    def context(self) -> tuple[int, int]:
        """Context length and vocabulary size of its captions' tokens; 0 where others read them."""
        text = self.model.text
        return (text.context_length, text.vocab_size) if text else (self.states_length, 0)

    @property
    def image_size(self) -> int:
        """Side, in pixels, of the images this stage makes."""
        return self.model.unet.image_size

    @property
    def unet(self) -> UNetConfig:
        """The config of its U-Net."""
        return self.model.unet

    @property
    def num_classes(self) -> int:
        """How many classes it draws; 0 where it reads none."""
        return self.model.num_classes

    def init(self, key: jax.Array) -> Params:
        """Random params, with the identity as normalisation of z_i until it is replaced."""
        size, e = self.image_size, self.model.embed_dim
        variables = self.network.init(
            key,
            jnp.zeros((1, size, size, 3)),
            jnp.zeros((1,), jnp.int32),
            self._blank_condition(),
        )
        params = {"network": checked(variables["params"])}
        if e:
            params["normalisation"] = normalisation.identity(e)
        if self.empty_null:
            params["null_caption"] = empty_caption(self.states_length, self.model.text_width, e)
        if self.analytic:
            params["analytic"] = jnp.zeros(self.diffusion.steps)
        return params

    def _blank_condition(self) -> Condition:
        blank = {
            "z_i": jnp.zeros((1, self.model.embed_dim)),
            "z_t": jnp.zeros((1, self.model.embed_dim)),
            "tokens": jnp.zeros((1, self.context[0]), jnp.int32),
            "text_states": jnp.zeros((1, self.states_length, self.model.text_width)),
            "text_mask": jnp.ones((1, self.context[0]), bool),
            "label": jnp.zeros((1,), jnp.int32),
        }
        return {name: blank[name] for name in self.model.conditions}

    def condition(
        self,
        text: jax.Array | None = None,
        z_i: jax.Array | None = None,
        z_t: jax.Array | None = None,
        mask: jax.Array | None = None,
        label: jax.Array | None = None,
    ) -> Condition:
        """Condition from what the decoder reads; the rest is left out, given or not.

        Args:
            text: tokens [b, l], or text states [b, l, d] where the decoder reads those.
            z_i: CLIP's image embeddings [b, e], in CLIP's coordinates.
            z_t: CLIP's text embeddings [b, e].
            mask: True on the captions' tokens [b, l]; None works it out from tokens.
            label: classes int32 [b]; model.num_classes stands for none.

        Raises:
            UserError: the decoder reads a class, and none is given.
        """
        cond = {}
        if self.model.num_classes:
            if label is None:
                raise UserError(
                    "label: none given, but this decoder draws one of"
                    f" {self.model.num_classes} classes; use unclip class_conditional"
                )
            cond["label"] = label
        if self.model.has_text:
            mask = text_mask(text, self.context[1]) if mask is None else mask
            cond |= {"text_states" if self.reads_states else "tokens": text, "text_mask": mask}
        if self.model.embed_dim:
            cond |= {"z_i": z_i, "z_i_mask": jnp.ones(z_i.shape[0], bool)}
        return cond | ({"z_t": z_t} if self.model.use_z_t else {})

    def condition_of(self, batch: dict[str, jax.Array]) -> Condition:
        """The condition of a batch, see `loss`."""
        text = batch.get("text_states" if self.reads_states else "tokens")
        mask = batch.get("text_mask") if self.reads_states else None
        return self.condition(text, batch.get("z_i"), batch.get("z_t"), mask, batch.get("label"))

    def null(self, params: Params, cond: Condition) -> Condition:
        """The condition with z_i, the caption and the class dropped."""
        if self.model.has_text:
            none = jnp.zeros(cond["text_mask"].shape[0], bool)
            cond = drop_caption(cond, none, params.get("null_caption"))
        if self.model.embed_dim:
            cond = cond | {"z_i_mask": jnp.zeros_like(cond["z_i_mask"])}
        if self.model.num_classes:
            cond = cond | {"label": jnp.full_like(cond["label"], self.model.num_classes)}
        return cond

    def encode(self, params: Params, cond: Condition) -> dict[str, jax.Array]:
        """All of the conditioning that depends on neither x_t nor t, computed once."""
        if self.model.embed_dim:
            cond = cond | {"z_i": normalisation.normalise(params["normalisation"], cond["z_i"])}
        return self.network.apply({"params": params["network"]}, cond, method=self.network.encode)

    def denoise(
        self,
        params: Params,
        x_t: jax.Array,
        t: jax.Array,
        encoded: dict[str, jax.Array],
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """The network's output [b, h, w, 3 or 6]; a dropout key means training."""
        return self.network.apply(
            {"params": params["network"]},
            x_t,
            t,
            encoded,
            deterministic=dropout_key is None,
            rngs={} if dropout_key is None else {"dropout": dropout_key},
            method=self.network.denoise,
        )

    def denoiser(
        self, params: Params, cond: Condition, dropout_key: jax.Array | None = None
    ) -> gaussian.Denoise:
        """`denoise(x_t, t)` under a condition, which is encoded once, without guidance."""
        encoded = self.encode(params, cond)
        return lambda x_t, t: self.denoise(params, x_t, t, encoded, dropout_key)

    def data(self, params: Params, batch: dict[str, jax.Array]) -> tuple[jax.Array, Condition]:
        """x_0 [b, h, w, 3] and the whole condition of a batch, see `loss`."""
        return to_float(batch["image"]), self.condition_of(batch)

    def loss(
        self, params: Params, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss of {"image": uint8 [b,h,w,3], "tokens": int32 [b,l], "z_i": [b,e]}.

        What the decoder does not read may be missing. One that reads text states takes
        "text_states" [b, l, d] and "text_mask" [b, l] in place of tokens, and "z_t" [b, e] where it
        reads that, and one of classes "label" int32 [b].
        """
        t_key, noise_key, z_i_key, caption_key, dropout_key = jax.random.split(key, 5)
        x_0, cond = self.data(params, batch)
        t = random_timesteps(t_key, len(x_0), self.diffusion)
        noise = jax.random.normal(noise_key, x_0.shape)
        if self.model.embed_dim:
            cond["z_i_mask"] = keep(z_i_key, len(x_0), self.z_i_drop)
        if self.model.has_text:
            kept = keep(caption_key, len(x_0), self.caption_drop)
            cond = drop_caption(cond, kept, params.get("null_caption"))
        if self.model.num_classes:
            kept = keep(jax.random.fold_in(caption_key, 1), len(x_0), self.label_drop)
            cond["label"] = jnp.where(kept, cond["label"], self.model.num_classes)
        denoise = self.denoiser(params, cond, dropout_key)
        terms = training_losses(self.diffusion, denoise, x_0, t, noise)
        metrics = {name: jnp.mean(value) for name, value in terms.items() if name != "loss"}
        return jnp.mean(terms["loss"]), metrics

    def sample(
        self,
        params: Params,
        keys: jax.Array,
        cond: Condition,
        *,
        guidance_scale: float | jax.Array = 1.0,
        null: Condition | None = None,
        eta: float | jax.Array = 0.0,
        noise: jax.Array | None = None,
        guide: Callable[[gaussian.Denoise], gaussian.Denoise] | None = None,
        loop: Loop = whole,
    ) -> jax.Array:
        """Images [b, h, w, 3] in [-1, 1] for b conditions, one typed key each.

        Args:
            params: as `init` made them.
            keys: one typed key per example [b].
            cond: as `condition` makes it.
            guidance_scale: classifier-free guidance; 1 is the conditional model. May be traced.
            null: what guidance leads away from; by default z_i, the caption and the class dropped.
            eta: DDIM's noise, for sampling.method "ddim".
            noise: float [b, steps, h, w, 3] to use instead of the keys' draws: x_T, then what each
                step but the last adds.
            guide: guidance on top, such as `guidance.classifier_guided` with all but its network.
            loop: what does the steps, see `samplers.sample`.
        """
        null = self.null(params, cond) if null is None else null
        size = self.image_size
        denoise = guidance.classifier_free(
            lambda x_t, t, encoded: self.denoise(params, x_t, t, encoded),
            cond,
            null,
            guidance_scale,
            learned_variance=self.diffusion.learned_variance,
            encode=lambda condition: loop.once(self.encode, params, condition),
        )
        x_T, step_keys, step_noise = initial_noise(keys, (size, size, 3), noise)
        return samplers.sample(
            denoise if guide is None else guide(denoise),
            x_T,
            step_keys,
            self.diffusion,
            self.sampling,
            noise=step_noise,
            eta=eta,
            analytic=params.get("analytic"),
            loop=loop,
        )


def check_channels(out_channels: int, diffusion: gaussian.Diffusion, path: str) -> None:
    """A learned variance needs a second set of output channels; a fixed one must not have it.

    Raises:
        UserError: out_channels is neither.
    """
    expected = 6 if diffusion.learned_variance else 3
    if out_channels != expected:
        raise UserError(
            f"{path}.out_channels: got {out_channels}, expected {expected} with"
            f" diffusion.variance={diffusion.variance!r}"
        )
