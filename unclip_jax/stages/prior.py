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

from unclip_jax.diffusion import gaussian, guidance, samplers
from unclip_jax.diffusion.losses import training_losses
from unclip_jax.diffusion.progress import Loop, whole
from unclip_jax.errors import UserError
from unclip_jax.models.prior import Prior, PriorConfig
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


@dataclasses.dataclass(frozen=True)
class PriorStage:
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
        check_analytic(self.sampling, self.analytic)
        self.diffusion.process(self.sampling.spacing)  # a wrong spacing is an error now, not later
        if self.draws < 1:
            raise UserError(f"stage.draws: got {self.draws}, expected at least 1")
        if not 0.0 <= self.caption_drop < 1.0:
            raise UserError(f"stage.caption_drop: got {self.caption_drop}, expected 0 <= p < 1")

    @property
    def network(self) -> Prior:
        """The Linen module."""
        return Prior(self.model)

    @property
    def reads_states(self) -> bool:
        """Whether captions come as CLIP's text states; else as tokens."""
        return not self.model.vocab_size

    @property
    def context(self) -> tuple[int, int]:
        """Context length and vocabulary size of the tokens this stage reads; 0 where it doesn't."""
        return self.model.context_length, self.model.vocab_size

    def init(self, key: jax.Array) -> Params:
        """Random params, with the identity as normalisation until `with_normalisation`."""
        e = self.model.embed_dim
        cond = self._blank_condition()
        variables = self.network.init(
            key,
            jnp.zeros((1, e)),
            jnp.zeros((1,), jnp.int32),
            cond["z_t"],
            cond["text"],
            cond["text_mask"],
        )
        params = {
            "network": checked(variables["params"]),
            "normalisation": normalisation.identity(e),
        }
        if self.empty_null:
            c = self.model
            params["null_caption"] = empty_caption(c.context_length, c.text_width, e)
        if self.analytic:
            params["analytic"] = jnp.zeros(self.diffusion.steps)
        return params

    def _blank_condition(self) -> Condition:
        length = self.model.context_length
        if self.model.vocab_size:
            text = jnp.zeros((1, length), jnp.int32)
        else:
            text = jnp.zeros((1, length, self.model.text_width))
        mask = jnp.ones((1, length), bool)
        return {"text": text, "text_mask": mask, "z_t": jnp.zeros((1, self.model.embed_dim))}

    def condition(
        self, text: jax.Array, z_t: jax.Array, mask: jax.Array | None = None
    ) -> Condition:
        """Condition from captions and z_t [b, e].

        Args:
            text: tokens [b, l], or CLIP's text states [b, l, d] where the prior reads those.
            z_t: CLIP's text embeddings [b, e].
            mask: True on the captions' tokens [b, l]; None works it out from tokens.
        """
        if mask is None:
            mask = text_mask(text, self.model.vocab_size)
        return {"text": text, "text_mask": mask, "z_t": z_t}

    def null(self, params: Params, cond: Condition) -> Condition:
        """The condition without its caption: no token and a z_t of zero, or the empty caption."""
        none = jnp.zeros(cond["z_t"].shape[0], bool)
        return drop_caption(cond, none, params.get("null_caption"))

    def encode(self, params: Params, cond: Condition) -> dict[str, Any]:
        """All of the conditioning that depends on neither x_t nor t, computed once."""
        text = cond["z_t"], cond["text"], cond["text_mask"]
        return self.network.apply({"params": params["network"]}, *text, method=self.network.encode)

    def denoise(
        self, params: Params, x_t: jax.Array, t: jax.Array, encoded: dict[str, Any]
    ) -> jax.Array:
        """The network's output for noised, normalised embeddings x_t [b, e] at t [b]."""
        return self.network.apply(
            {"params": params["network"]}, x_t, t, encoded, method=self.network.denoise
        )

    def denoiser(self, params: Params, cond: Condition) -> gaussian.Denoise:
        """`denoise(x_t, t)` under a condition, which is encoded once, without guidance."""
        encoded = self.encode(params, cond)
        return lambda x_t, t: self.denoise(params, x_t, t, encoded)

    def data(self, params: Params, batch: dict[str, jax.Array]) -> tuple[jax.Array, Condition]:
        """x_0 [b, e] and the whole condition of a batch, see `loss`."""
        x_0 = normalisation.normalise(params["normalisation"], batch["z_i"])
        if self.reads_states:
            return x_0, self.condition(batch["text_states"], batch["z_t"], batch["text_mask"])
        return x_0, self.condition(batch["tokens"], batch["z_t"])

    def loss(
        self, params: Params, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss of a batch {"tokens": int32 [b, l], "z_i": [b, e], "z_t": [b, e]}.

        A prior that reads CLIP's text states takes "text_states" [b, l, d] and "text_mask" [b, l]
        in place of tokens.
        """
        t_key, noise_key, drop_key = jax.random.split(key, 3)
        x_0, cond = self.data(params, batch)
        t = random_timesteps(t_key, len(x_0), self.diffusion)
        noise = jax.random.normal(noise_key, x_0.shape)
        kept = keep(drop_key, len(x_0), self.caption_drop)
        cond = drop_caption(cond, kept, params.get("null_caption"))
        text = cond["z_t"], cond["text"], cond["text_mask"]

        def denoise(x_t: jax.Array, t: jax.Array) -> jax.Array:  # all tokens at once
            return self.network.apply({"params": params["network"]}, x_t, t, *text)

        terms = training_losses(self.diffusion, denoise, x_0, t, noise)
        return jnp.mean(terms["loss"]), {"mse": jnp.mean(terms["mse"])}

    def draw(
        self,
        params: Params,
        keys: jax.Array,
        cond: Condition,
        *,
        guidance_scale: float | jax.Array = 1.0,
        null: Condition | None = None,
        eta: float | jax.Array = 0.0,
        noise: jax.Array | None = None,
        loop: Loop = whole,
    ) -> jax.Array:
        """One embedding per condition, in CLIP's coordinates.

        Arguments as for `sample`, but noise is float [b, steps, e].
        """
        null = self.null(params, cond) if null is None else null
        denoise = guidance.classifier_free(
            lambda x_t, t, encoded: self.denoise(params, x_t, t, encoded),
            cond,
            null,
            guidance_scale,
            learned_variance=self.diffusion.learned_variance,
            encode=lambda condition: loop.once(self.encode, params, condition),
        )
        x_T, step_keys, step_noise = initial_noise(keys, (self.model.embed_dim,), noise)
        x_0 = samplers.sample(
            denoise,
            x_T,
            step_keys,
            self.diffusion,
            self.sampling,
            noise=step_noise,
            eta=eta,
            analytic=params.get("analytic"),
            loop=loop,
        )
        z_i = normalisation.denormalise(params["normalisation"], x_0)
        return normalisation.unit(z_i) if self.unit_embeddings else z_i

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
        loop: Loop = whole,
    ) -> jax.Array:
        """Draw `draws` embeddings per condition and keep the one nearest z_t.

        Args:
            params: as `init` made them.
            keys: one typed key per example [b]; draw i uses the i-th of its `split`.
            cond: a condition of b rows.
            guidance_scale: classifier-free guidance; 1 is the conditional model. May be traced.
            null: what guidance leads away from; by default the condition without its caption.
            eta: DDIM's noise, for sampling.method "ddim".
            noise: float [b, draws, steps, e] to use instead of the keys' draws: x_T, then what
                each step but the last adds.
            loop: what does the steps, see `samplers.sample`.

        Returns:
            z_i [b, e] in CLIP's coordinates.
        """

        def repeat(tree: Condition | None) -> Condition | None:
            return jax.tree.map(lambda x: jnp.repeat(x, self.draws, axis=0), tree)

        keys = jax.vmap(lambda key: jax.random.split(key, self.draws))(keys).reshape(-1)
        z_i = self.draw(
            params,
            keys,
            repeat(cond),
            guidance_scale=guidance_scale,
            null=repeat(null),
            eta=eta,
            noise=None if noise is None else noise.reshape(-1, *noise.shape[2:]),
            loop=loop,
        ).reshape(cond["z_t"].shape[0], self.draws, -1)
        best = jnp.argmax(jnp.einsum("bre,be->br", z_i, cond["z_t"]), axis=1)
        return jnp.take_along_axis(z_i, best[:, None, None], axis=1)[:, 0]
