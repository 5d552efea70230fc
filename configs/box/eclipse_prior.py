"""A prior of one forward pass for the box model: ECLIPSE, by regression and contrast.

    unclip styles build --data emoji_art --size 48
    unclip train --config=box/eclipse_prior --workdir=runs/box/eclipse_prior \
        --config.clip=runs/box/clip

In place of the diffusion prior, by a network of its size. A caption's z_i is one call of the
network, and draws as well (docs/methods.md has the figures), but always the same: noise is an
input that it does not heed.
"""

from unclip_jax.common import config as settings
from unclip_jax.configs.box import base, prior
from unclip_jax.models.prior import PriorConfig
from unclip_jax.stages import EclipsePriorStage
from unclip_jax.training.config import TrainConfig


def get_config(variant=""):
    """The config; `:gpu` for an accelerator, `:smoke` runs in seconds."""
    network = prior.get_config().stage.model
    stage = EclipsePriorStage(model=settings.build(PriorConfig, network))
    train = TrainConfig(
        batch_size=128,
        steps=900,
        learning_rate=1e-3,
        warmup_steps=50,
        optimizer="muon",
        schedule="cosine",
        b2=0.96,
        eps=1e-6,
        weight_decay=6e-2,
        grad_clip=1.0,
        ema_decay=0.995,
        log_every=50,
        eval_every=300,
        preview_every=900,
        checkpoint_every=100,
        keep_checkpoints=1,
    )
    gpu = {"batch_size": 512, "steps": 10_000, "warmup_steps": 500, "ema_decay": 0.999}
    return base.make(stage, train, variant, gpu=gpu)
