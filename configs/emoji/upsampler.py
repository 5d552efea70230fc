"""The upsampler on emoji: 64 px to 256 px, trained on 64 px crops.

    unclip train --config=emoji/upsampler --workdir=runs/emoji/upsampler

About one minute on two CPU cores. What it reaches: docs/training.md.
"""

from unclip_jax.configs import base
from unclip_jax.data.datasets import DataConfig
from unclip_jax.diffusion import Diffusion, Sampling
from unclip_jax.models.unet import UNetConfig
from unclip_jax.stages import UpsamplerStage
from unclip_jax.training.config import TrainConfig


def get_config(variant=""):
    """The config; `:smoke` runs in seconds."""
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
        steps=200,
        learning_rate=1e-3,
        warmup_steps=30,
        schedule="cosine",
        b2=0.99,
        grad_clip=1.0,
        ema_decay=0.99,
        log_every=25,
        eval_every=1000,
        preview_every=1000,
        checkpoint_every=200,
    )
    config = base.make(stage, DataConfig(name="emoji", captions="first"), train)
    return base.smoke(config) if base.is_smoke(variant) else config
