"""The paper's second upsampler, 256 to 1024 px: 300 M parameters, 15 DDIM steps, linear schedule.

    unclip train --config=paper/upsampler_1024 --workdir=runs/paper/upsampler_1024 \
        --config.data.name=tfds:YOUR_DATA

Trained on 256 px crops, the low-resolution image corrupted by BSR degradation, as in the paper. It
does not say how strongly: here, the milder ranges of Rombach et al. (stages.degrade.BSR).
"""

import dataclasses

from unclip_jax.configs.paper import base
from unclip_jax.diffusion import Diffusion, Sampling
from unclip_jax.models import presets
from unclip_jax.stages import UpsamplerStage


def get_config(variant=""):
    """The config; `:smoke` trains a tiny upsampler to 256 px on emoji in seconds."""
    train = base.train_config(
        batch_size=512,
        steps=1_000_000,
        learning_rate=1.0e-4,
        b2=0.999,
        eps=1e-8,
        ema_decay=0.9999,
    )
    stage = UpsamplerStage(
        model=base.bfloat16(presets.PAPER_UPSAMPLER_1024),
        low_size=256,
        diffusion=Diffusion(steps=1000, schedule="linear", prediction="eps"),
        sampling=Sampling(method="ddim", spacing="15", clip_x_0=1.0),
        crop=0.25,
        corruption="bsr",
    )
    tiny = dataclasses.replace(
        presets.PAPER_UPSAMPLER_1024,
        image_size=256,
        channels=32,
        channel_mults=(1, 2),
        res_blocks=1,
        patch=4,
    )
    small = dataclasses.replace(
        stage,
        model=tiny,
        low_size=64,
        sampling=dataclasses.replace(stage.sampling, spacing="3"),
    )
    return base.make(stage, train, variant, small=small)
