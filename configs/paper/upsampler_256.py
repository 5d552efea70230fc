"""The paper's first upsampler, 64 to 256 px: 700 M parameters, 27 DDIM steps.

    unclip train --config=paper/upsampler_256 --workdir=runs/paper/upsampler_256 \
        --config.data.name=tfds:YOUR_DATA

Trained on 64 px crops; the low-resolution image is blurred by a random Gaussian half of the time.
"""

import dataclasses

from unclip_jax.configs.paper import base
from unclip_jax.diffusion import Diffusion, Sampling
from unclip_jax.models import presets
from unclip_jax.stages import UpsamplerStage


def get_config(variant=""):
    """The config; `:smoke` trains a tiny upsampler on emoji in seconds."""
    train = base.train_config(
        batch_size=1024,
        steps=1_000_000,
        learning_rate=1.2e-4,
        b2=0.999,
        eps=1e-8,
        ema_decay=0.9999,
    )
    stage = UpsamplerStage(
        model=base.bfloat16(presets.PAPER_UPSAMPLER_256),
        low_size=64,
        diffusion=Diffusion(steps=1000, schedule="cosine", prediction="eps"),
        sampling=Sampling(method="ddim", spacing="27", clip_x_0=1.0),
        crop=0.25,
    )
    tiny = dataclasses.replace(
        presets.PAPER_UPSAMPLER_256, channels=32, channel_mults=(1, 2), res_blocks=1, patch=4
    )
    small = dataclasses.replace(
        stage, model=tiny, sampling=dataclasses.replace(stage.sampling, spacing="3")
    )
    return base.make(stage, train, variant, small=small)
