"""The paper's diffusion prior: 1 B parameters, 64 sampling steps.

    unclip train --config=paper/prior --workdir=runs/paper/prior \
        --config.clip=runs/paper/clip --config.data.name=tfds:YOUR_DATA

Sampling is DDPM with the fixed variance. The paper used the analytic one, which is measured on the
trained prior, and stays in its folder:

    unclip analytic --stage runs/paper/prior --clip runs/paper/clip
"""

import dataclasses

from unclip_jax.configs.paper import base
from unclip_jax.diffusion import Diffusion, Sampling
from unclip_jax.models import presets
from unclip_jax.stages import PriorStage


def get_config(variant=""):
    """The config; `:smoke` trains a tiny prior on emoji in seconds, with --config.clip."""
    train = base.train_config(
        batch_size=4096,
        steps=600_000,
        learning_rate=1.1e-4,
        b2=0.96,
        eps=1e-6,
        weight_decay=6e-2,
        ema_decay=0.9999,
    )
    stage = PriorStage(
        model=base.bfloat16(presets.PAPER_PRIOR),
        diffusion=Diffusion(
            steps=1000, schedule="cosine", prediction="x_0", variance="fixed_small_log"
        ),
        sampling=Sampling(method="ddpm", spacing="64"),
        caption_drop=0.1,
        draws=2,
    )
    tiny = dataclasses.replace(
        presets.PAPER_PRIOR,
        embed_dim=presets.CLIP_TINY.embed_dim,
        width=64,
        layers=2,
        heads=2,
        context_length=32,
    )
    small = dataclasses.replace(stage, model=tiny)
    return base.make(stage, train, variant, small=small, normalisation="scale")
