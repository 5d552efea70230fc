"""The upsampler of the box model: 64 px to 256 px, trained on 64 px crops. 3.1 M parameters.

unclip styles build --data emoji_art --size 256
unclip train --config=box/upsampler --workdir=runs/box/upsampler
"""

import dataclasses

from unclip_jax.configs.box import base
from unclip_jax.diffusion import Diffusion, Sampling
from unclip_jax.models.unet import UNetConfig
from unclip_jax.stages import UpsamplerStage
from unclip_jax.training.config import TrainConfig


def get_config(variant=""):
    """The config; `:gpu` for an accelerator, `:smoke` runs in seconds."""
    stage = UpsamplerStage(
        model=UNetConfig(
            image_size=256,
            in_channels=6,
            out_channels=3,
            channels=64,
            channel_mults=(1, 2),
            res_blocks=1,
            attention_sizes=(),
            patch=4,
        ),
        low_size=64,
        diffusion=Diffusion(prediction="x_0"),
        sampling=Sampling(method="ddim", spacing="10", clip_x_0=1.0),
    )
    train = TrainConfig(
        batch_size=16,
        steps=6000,
        learning_rate=8e-4,
        warmup_steps=100,
        schedule="cosine",
        b2=0.99,
        grad_clip=1.0,
        ema_decay=0.999,
        log_every=50,
        eval_every=500,
        preview_every=1000,
        checkpoint_every=100,
        keep_checkpoints=1,
    )
    gpu = {"batch_size": 128, "steps": 20_000, "warmup_steps": 500}
    data = dataclasses.replace(base.DATA, captions="first")
    return base.make(stage, train, variant, gpu=gpu, data=data)
