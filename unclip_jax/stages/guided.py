"""What the stages share that denoise under a condition and are guided: prior and decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from unclip_jax.diffusion import gaussian, guidance, samplers
from unclip_jax.diffusion.progress import Loop, whole
from unclip_jax.errors import UserError
from unclip_jax.stages import normalisation
from unclip_jax.stages.base import Batch, Stage
from unclip_jax.stages.conditioning import Condition, Params, empty_caption, initial_noise
from unclip_jax.stages.denoising import Denoising, dropout


class GuidedDiffusion(Stage):
    """A stage that denoises under a condition, and is guided away from the condition's null.

    It has the fields `diffusion`, `sampling`, `guidance_scale`, `empty_null` and `analytic`, and
    its network the methods `encode`, for what depends on neither x_t nor t, and `denoise`. Beside
    `encode` it has `null`, and `data`: x_0 [b, ...] and the whole condition of a batch.
    """

    @property
    def x_shape(self) -> tuple[int, ...]:
        """The shape of one x_t."""
        return *self.picture_size, 3

    def x_0_of(self, params: Params, images: jax.Array) -> jax.Array:
        """What is denoised of pictures [b, h, w, 3] in [-1, 1]: themselves."""
        return images

    def images_of(self, params: Params, x_0: jax.Array) -> jax.Array:
        """The pictures [b, h, w, 3], about in [-1, 1], of what was drawn."""
        return x_0

    def check_sampling(self) -> None:
        """Raise UserError where it cannot sample as its fields say."""
        if self.sampling.method == "analytic" and not self.analytic:
            raise UserError(
                'stage.sampling.method: got "analytic", but this stage has no analytic variance;'
                " use another method, such as ddpm, until unclip analytic --stage DIR"
                " has measured it on the trained stage in DIR"
            )
        self.diffusion.process(self.sampling.spacing)

    def constants(self) -> Params:
        """What stands beside the network in its params, until it is measured."""
        e = self.model.embed_dim
        found = {"normalisation": normalisation.identity(e)} if e else {}
        if self.empty_null:
            found["null_caption"] = empty_caption(self.context[0], self.model.text_width, e)
        if self.analytic:
            found["analytic"] = jnp.zeros(self.diffusion.steps)
        return found

    def denoise(
        self,
        params: Params,
        x_t: jax.Array,
        t: jax.Array,
        encoded: Any,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """The network's output for x_t [b, ...]; a dropout key means training."""
        settings = {} if dropout_key is None else dropout(dropout_key)
        return self.apply(params, x_t, t, encoded, method="denoise", **settings)

    def denoiser(
        self, params: Params, cond: Condition, dropout_key: jax.Array | None = None
    ) -> gaussian.Denoise:
        """`denoise(x_t, t)` under a condition, which is encoded once, without guidance."""
        encoded = self.encode(params, cond)
        return lambda x_t, t: self.denoise(params, x_t, t, encoded, dropout_key)

    def guided(
        self,
        params: Params,
        cond: Condition,
        scale: float | jax.Array,
        null: Condition | None = None,
        loop: Loop = whole,
    ) -> gaussian.Denoise:
        """`denoise(x_t, t)` under a condition, guided; the arguments are those of `draw`."""
        return guidance.classifier_free(
            lambda x_t, t, encoded: self.denoise(params, x_t, t, encoded),
            cond,
            self.null(params, cond) if null is None else null,
            scale,
            learned_variance=self.diffusion.learned_variance,
            encode=lambda condition: loop.once(self.encode, params, condition),
        )

    def denoising(self, params: Params, batch: Batch, key: jax.Array) -> Denoising:
        """x_0 [b, ...] of a batch, and what makes `denoise(x_t, t)` of params and a scale."""
        x_0, cond = self.data(params, batch)
        return x_0, lambda params, scale: self.guided(params, cond, scale)

    def begun(self, params: Params, cond: Condition, noise: jax.Array) -> jax.Array:
        """The state [b, ...] that `draw` begins with, of standard normal noise [b, ...]."""
        return noise

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
        guide: Callable[[gaussian.Denoise], gaussian.Denoise] | None = None,
        loop: Loop = whole,
    ) -> jax.Array:
        """x_0 [b, ...] for b conditions.

        Args:
            params: as `init` made them.
            keys: one typed key per example [b].
            cond: as `condition` makes it.
            guidance_scale: classifier-free guidance; 1 is the conditional model. May be traced.
            null: what guidance leads away from; by default `null` of the condition.
            eta: DDIM's noise, for sampling.method "ddim".
            noise: float [b, steps, ...] to use instead of the keys' draws: x_T, then what each step
                but the last adds.
            guide: guidance on top, such as `guidance.classifier_guided` with all but its network.
            loop: what does the steps, see `samplers.sample`.
        """
        denoise = self.guided(params, cond, guidance_scale, null, loop)
        drawn, step_keys, step_noise = initial_noise(keys, self.x_shape, noise)
        return samplers.sample(
            denoise if guide is None else guide(denoise),
            self.begun(params, cond, drawn),
            step_keys,
            self.diffusion,
            self.sampling,
            noise=step_noise,
            eta=eta,
            analytic=params.get("analytic"),
            loop=loop,
        )
