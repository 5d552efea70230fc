"""Few steps: a stage distilled from a trained one, which stays beside it, frozen, as its teacher.

    params = distillation.attach(params)    # {"network": student, "base_network": teacher, ...}
    loss = distillation.loss(stage, config)

The student begins as a copy of the teacher and learns to say at once where the teacher's sampler
leads, guidance included (`diffusion.consistency`; with guidance in the teacher as in Luo et al.
2023, arXiv 2310.04378). What is saved is an ordinary stage that samples by "consistency".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from unclip_jax.common import checks
from unclip_jax.common.params import TRAINED, Params
from unclip_jax.diffusion import consistency
from unclip_jax.diffusion.samplers import Sampling
from unclip_jax.errors import UserError, wrong
from unclip_jax.stages.base import Batch, Loss, Stage
from unclip_jax.training.lora import BASE


@dataclasses.dataclass(frozen=True)
class Distillation:
    """Settings of consistency distillation.

    Attributes:
        steps: of the grid on which neighbouring x_0 are drawn together; 0 distils nothing. More
            steps are nearer to the teacher's flow and learn more slowly; 20 to 50 are usual.
        method: the teacher's solver: "ddim", or "heun", which asks it twice and errs less where the
            noisiest level is not far above the data (scaled_linear, EDM); cosine's wants "ddim".
        guidance_scale: at which the teacher is guided, for good: the student has no guidance left.
        huber: see `consistency.distillation_loss`; 0 takes its usual value.
    """

    steps: int = 0
    method: str = "ddim"
    guidance_scale: float = 1.0
    huber: float = 0.0

    def __post_init__(self) -> None:
        """Check every field."""
        if self.steps:
            checks.count("config.distillation.steps", self.steps, least=2)
        checks.choice("config.distillation.method", self.method, consistency.TEACHERS)
        checks.number("config.distillation.guidance_scale", self.guidance_scale)
        checks.number("config.distillation.huber", self.huber, least=0)


def attach(params: Params) -> Params:
    """A stage's params as student and, beside it, the same as teacher."""
    return params | {TRAINED: jax.tree.map(jnp.copy, params[TRAINED]), BASE: params[TRAINED]}


def detach(params: Params) -> Params:
    """The student's own params."""
    return {name: part for name, part in params.items() if name != BASE}


def loss(stage: Stage, config: Distillation) -> Callable[[Params, Batch, jax.Array], Loss]:
    """The loss of `attach`ed params, as the training loop takes it."""
    limits = ("clip_x_0", "dynamic_percentile", "dynamic_most")
    as_sampled = {name: getattr(stage.sampling, name) for name in limits}
    teaching = Sampling(config.method, config.steps, **as_sampled)

    def distils(params: Params, batch: Batch, key: jax.Array) -> Loss:
        i_key, noise_key, data_key = jax.random.split(key, 3)
        own = detach(params)
        frozen = jax.lax.stop_gradient(own | {TRAINED: params[BASE]})
        x_0, denoiser = stage.denoising(own, batch, data_key)
        apart = consistency.distillation_loss(
            stage.diffusion,
            denoiser(own, 1.0),
            denoiser(frozen, config.guidance_scale),
            x_0,
            jax.random.randint(i_key, x_0.shape[:1], 0, config.steps),
            jax.random.normal(noise_key, x_0.shape),
            teaching,
            config.huber or None,
        )
        return jnp.mean(apart), {}

    return distils


def check(stage: Stage, config: Distillation, has_origin: bool) -> None:
    """Raise UserError unless the stage can be distilled so."""
    field = "config.distillation.steps"
    if not has_origin:
        do = "give its folder with --config.init=DIR, or set it to 0"
        raise wrong(field, config.steps, "0 without config.init, the trained stage", do)
    if not hasattr(stage, "denoising") or stage.last_steps:
        raise wrong(field, config.steps, f"0 for this {stage.kind}, which cannot be distilled")
    if config.guidance_scale != 1 and "guidance_scale" not in stage.settings:
        raise wrong(
            "config.distillation.guidance_scale",
            config.guidance_scale,
            f"1: a {stage.kind} has no guidance",
        )
    if stage.sampling.method != "consistency" or getattr(stage, "guidance_scale", 1) != 1:
        raise UserError(
            "config.stage: a distilled stage samples by consistency, and its guidance is that of"
            ' config.distillation; set stage.sampling.method to "consistency", stage.sampling'
            '.spacing to "4", and stage.guidance_scale, if it has one, to 1'
        )
    stage.diffusion.process(config.steps)
