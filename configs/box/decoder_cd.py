"""The box model's decoder in 1 to 4 steps: consistency distillation of the trained one.

    unclip train --config=box/decoder_cd --workdir=runs/box/decoder_cd \
        --config.init=runs/box/decoder --config.clip=runs/box/clip --config.prior=runs/box/prior

The trained decoder, guided and walked by DDIM over 40 steps, teaches a copy of itself to say at any
step where its way ends. The copy asks the network once a step and needs no guidance, so that a
picture in two steps costs a third of the decoder's three guided ones; another guidance scale takes
another distillation. A training step asks the teacher for two rows an example, the student twice.

On the box it loses, see docs/methods.md: asked as seldom and without guidance, the decoder itself
draws better than what is distilled from it here, and at higher learning rates the copy drifts away.
"""

import dataclasses

from unclip_jax import stages
from unclip_jax.common import config as settings
from unclip_jax.configs.box import base, decoder
from unclip_jax.diffusion import Sampling
from unclip_jax.training.config import TrainConfig
from unclip_jax.training.distillation import Distillation


def get_config(variant=""):
    """The config; `:gpu` for an accelerator, `:smoke` runs in seconds on a smoke run's decoder."""
    trained = stages.build(decoder.get_config().stage)
    few = Sampling(method="consistency", spacing="2", clip_x_0=1.0)
    stage = dataclasses.replace(trained, sampling=few, guidance_scale=1.0)
    train = TrainConfig(
        batch_size=64,
        steps=300,
        learning_rate=1e-5,
        warmup_steps=20,
        optimizer="adamw",
        schedule="cosine",
        b2=0.99,
        grad_clip=1.0,
        ema_decay=0.98,
        log_every=20,
        eval_every=150,
        preview_every=150,
        checkpoint_every=100,
        keep_checkpoints=1,
    )
    gpu = {"batch_size": 256, "steps": 2000, "warmup_steps": 100, "ema_decay": 0.99}
    config = base.make(stage, train, variant, gpu=gpu)
    config.init = "runs/box/decoder"
    teaches = Distillation(steps=40, guidance_scale=trained.guidance_scale, huber=3.3)
    config.distillation.update(settings.to_dict(teaches))
    return config
