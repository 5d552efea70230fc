"""The paper's autoregressive prior: 319 codes, 1 B parameters.

    unclip train --config=paper/ar_prior --workdir=runs/paper/ar_prior \
        --config.clip=runs/paper/clip --config.data.name=tfds:YOUR_DATA

The paper's table gives its latent decoder a context of 384; what that holds is in presets.py.
"""

import dataclasses

from unclip_jax.configs.paper import base
from unclip_jax.models import presets
from unclip_jax.stages import ARPriorStage


def get_config(variant=""):
    """The config; `:smoke` trains a tiny prior on emoji in seconds, with --config.clip."""
    train = base.train_config(
        batch_size=4096,
        steps=1_000_000,
        learning_rate=1.6e-4,
        b2=0.91,
        eps=1e-10,
        weight_decay=4e-2,
        ema_decay=0.999,
    )
    stage = ARPriorStage(model=base.bfloat16(presets.PAPER_AR_PRIOR), caption_drop=0.1)
    tiny = dataclasses.replace(
        presets.PAPER_AR_PRIOR,
        embed_dim=presets.CLIP_TINY.embed_dim,
        width=64,
        layers=2,
        heads=2,
        context_length=32,
        code_dims=40,
    )
    small = dataclasses.replace(stage, model=tiny)
    return base.make(stage, train, variant, small=small, normalisation="codes")
