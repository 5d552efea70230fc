"""The diffusion prior as a stage: p(z_i | y), a caption in and a CLIP image embedding out.

Section 2.2 of the paper. The network predicts the clean z_i itself (x_0 prediction), trained with
mean squared error; sampling draws two embeddings and keeps the one with the larger dot product
with z_t.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from unclip_jax.common import checks
from unclip_jax.diffusion import gaussian, samplers
from unclip_jax.errors import UserError
from unclip_jax.models.prior import Prior, PriorConfig
from unclip_jax.stages import normalisation
from unclip_jax.stages.base import Batch, Loss
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
from unclip_jax.stages.denoising import denoising_loss
from unclip_jax.stages.guided import GuidedDiffusion


class OfCaptions:
    """What both priors read: a caption and its z_t, dropped together; and z_i, to learn it."""

    figures: ClassVar[tuple[str, ...]] = ("prior_cosines",)
    preview: ClassVar[str] = "nearest"
    makes: ClassVar[tuple[str, str]] = ("z_i", "CLIP's image embedding, in CLIP's coordinates")
    drops: ClassVar[tuple[str, ...]] = ("caption",)

    @property
    def text_encoder(self) -> str:
        """CLIP, where the prior does not embed tokens itself."""
        return "" if self.model.vocab_size else "clip"

    @property
    def learns(self) -> dict[str, Field]:
        """CLIP's embeddings of pictures."""
        return z_i_field(self.model.embed_dim)

    @property
    def conditions(self) -> dict[str, Field]:
        """The caption and CLIP's embedding of it."""
        width = self.model.text_width if self.reads_states else 0
        return caption_fields(*self.context, width) | z_t_field(self.model.embed_dim)

    def condition(
        self, text: jax.Array, z_t: jax.Array, mask: jax.Array | None = None
    ) -> Condition:
        """Condition from captions and z_t [b, e].

        Args:
            text: tokens [b, l], or CLIP's text states [b, l, d] where the prior reads those.
            z_t: CLIP's text embeddings [b, e].
            mask: True on the captions' tokens [b, l]; None works it out of tokens.
        """
        name = "text_states" if self.reads_states else "tokens"
        return self.condition_of({name: text, "z_t": z_t}, mask)

    def text(self, cond: Condition) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The condition as the network takes it."""
        return cond["z_t"], cond[next(iter(self.conditions))], cond["text_mask"]

    def null(self, params: Params, cond: Condition, kept: jax.Array | None = None) -> Condition:
        """The condition without its caption: no token and a z_t of zero, or the empty caption.

        `kept` [b] is True where the caption stays, a negative prompt.
        """
        kept = jnp.zeros(cond["z_t"].shape[0], bool) if kept is None else kept
        return drop_caption(cond, kept, params.get("null_caption"))


@dataclasses.dataclass(frozen=True)
class PriorStage(OfCaptions, GuidedDiffusion):
    """The diffusion prior: network, diffusion and sampling settings together.

    Attributes:
        model: the causal Transformer's size.
        diffusion: schedule, prediction and loss.
        sampling: method and number of steps.
        caption_drop: how often training drops the caption (tokens and z_t together).
        draws: how many embeddings sampling draws for each it returns (the paper draws two).
        guidance_scale: the classifier-free guidance that sampling uses unless told otherwise.
        unit_embeddings: whether CLIP's embeddings have length one here; a sample then has, too.
        empty_null: whether a dropped caption is the empty caption as CLIP encodes it (Karlo),
            kept in the params under `null_caption`, rather than no caption at all.
        analytic: whether the statistic of the analytic variance is in the params, under
            `analytic`; `unclip analytic` measures it on a trained stage.
    """

    kind: ClassVar[str] = "prior"
    module: ClassVar[type] = Prior
    obeys: ClassVar[str] = "captions"
    normalisations: ClassVar[tuple[str, ...]] = normalisation.NAMES

    model: PriorConfig
    diffusion: gaussian.Diffusion = gaussian.Diffusion(prediction="x_0", variance="fixed_small_log")
    sampling: samplers.Sampling = samplers.Sampling(method="ddpm", spacing="64")
    caption_drop: float = 0.1
    draws: int = 2
    unit_embeddings: bool = True
    guidance_scale: float = 1.0
    empty_null: bool = False
    analytic: bool = False

    def __post_init__(self) -> None:
        """Check the fields that no part checks alone."""
        if self.empty_null and not self.reads_states:
            raise UserError(
                "stage.empty_null: got True, expected False for a prior that embeds its tokens"
                " itself; set stage.model.vocab_size to 0 for one that reads CLIP's text states"
            )
        self.check_sampling()
        checks.count("stage.draws", self.draws)
        self.check_drops("caption")

    @property
    def x_shape(self) -> tuple[int, ...]:
        """The shape of one x_t."""
        return (self.model.embed_dim,)

    def data_power(self, normalised: str | None) -> float | None:
        """1 for whitened embeddings, scale^2 / e for those of length one."""
        if normalised == "whiten":
            return 1.0
        if normalised is None or not self.unit_embeddings:
            return None
        scale = normalisation.PAPER_SCALE if normalised == "scale" else 1.0
        return scale**2 / self.model.embed_dim

    def init(self, key: jax.Array) -> Params:
        """Random params, with the identity as normalisation of z_i until it is replaced."""
        x_t, t = jnp.zeros((1, self.model.embed_dim)), jnp.zeros((1,), jnp.int32)
        text = self.text(blank(self.conditions))
        return {"network": self.fresh(key, x_t, t, *text)} | self.constants()

    def encode(self, params: Params, cond: Condition) -> dict[str, Any]:
        """All of the conditioning that depends on neither x_t nor t, computed once."""
        return self.apply(params, *self.text(cond), method="encode")

    def data(self, params: Params, batch: Batch) -> tuple[jax.Array, Condition]:
        """x_0 [b, e] and the whole condition of a batch, see `loss`."""
        x_0 = normalisation.normalise(params["normalisation"], batch["z_i"])
        return x_0, self.condition_of(batch)

    def loss(self, params: Params, batch: Batch, key: jax.Array) -> Loss:
        """Loss of a batch {"tokens": int32 [b, l], "z_i": [b, e], "z_t": [b, e]}.

        A prior that reads CLIP's text states takes "text_states" [b, l, d] and "text_mask" [b, l]
        in place of tokens.
        """
        t_key, noise_key, drop_key = jax.random.split(key, 3)
        x_0, cond = self.data(params, batch)
        kept = keep(drop_key, len(x_0), self.caption_drop)
        text = self.text(drop_caption(cond, kept, params.get("null_caption")))

        def denoise(x_t: jax.Array, t: jax.Array) -> jax.Array:  # all tokens at once
            return self.apply(params, x_t, t, *text)

        return denoising_loss(self.diffusion, denoise, x_0, t_key, noise_key)

    def draw(self, params: Params, keys: jax.Array, cond: Condition, **settings: Any) -> jax.Array:
        """One embedding [b, e] per condition, in CLIP's coordinates."""
        x_0 = super().draw(params, keys, cond, **settings)
        z_i = normalisation.denormalise(params["normalisation"], x_0)
        return normalisation.unit(z_i) if self.unit_embeddings else z_i

    def sample(
        self,
        params: Params,
        keys: jax.Array,
        cond: Condition,
        *,
        null: Condition | None = None,
        noise: jax.Array | None = None,
        **settings: Any,
    ) -> jax.Array:
        """Draw `draws` embeddings per condition and keep the one nearest z_t.

        Args:
            params: as `init` made them.
            keys: one typed key per example [b]; draw i uses the i-th of its `split`.
            cond: a condition of b rows.
            null: what guidance leads away from; by default the condition without its caption.
            noise: float [b, draws, steps, e] to use instead of the keys' draws: x_T, then what
                each step but the last adds.
            **settings: `guidance_scale`, `eta` and `loop`, as for `GuidedDiffusion.draw`.

        Returns:
            z_i [b, e] in CLIP's coordinates.
        """

        def repeat(tree: Condition | None) -> Condition | None:
            return jax.tree.map(lambda x: jnp.repeat(x, self.draws, axis=0), tree)

        keys = jax.vmap(lambda key: jax.random.split(key, self.draws))(keys).reshape(-1)
        noise = None if noise is None else noise.reshape(-1, *noise.shape[2:])
        z_i = self.draw(params, keys, repeat(cond), null=repeat(null), noise=noise, **settings)
        z_i = z_i.reshape(cond["z_t"].shape[0], self.draws, -1)
        best = jnp.argmax(jnp.einsum("bre,be->br", z_i, cond["z_t"]), axis=1)
        return jnp.take_along_axis(z_i, best[:, None, None], axis=1)[:, 0]
