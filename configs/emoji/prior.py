"""The diffusion prior on emoji: caption to CLIP image embedding.

    unclip train --config=emoji/prior --workdir=runs/emoji/prior \
        --config.clip=runs/emoji/clip

Over a minute on two CPU cores. What it reaches: docs/training.md.
"""

from unclip_jax.configs import base
from unclip_jax.configs.emoji.clip import CONTEXT_LENGTH, EMBED_DIM, VOCAB_SIZE
from unclip_jax.data.datasets import DataConfig
from unclip_jax.diffusion import Sampling
from unclip_jax.models.prior import PriorConfig
from unclip_jax.stages import PriorStage
from unclip_jax.training.config import TrainConfig


def get_config(variant=""):
    """The config; `:smoke` runs in seconds."""
    stage = PriorStage(
        model=PriorConfig(
            embed_dim=EMBED_DIM,
            width=128,
            layers=4,
            heads=4,
            context_length=CONTEXT_LENGTH,
            vocab_size=VOCAB_SIZE,
            text_width=0,
        ),
        sampling=Sampling(method="ddpm", spacing="64"),
    )
    train = TrainConfig(
        batch_size=64,
        steps=400,
        learning_rate=1e-3,
        warmup_steps=30,
        schedule="cosine",
        b2=0.96,
        eps=1e-6,
        weight_decay=6e-2,
        grad_clip=1.0,
        ema_decay=0.99,
        log_every=50,
        eval_every=1000,
        preview_every=1000,
        checkpoint_every=200,
    )
    config = base.make(stage, DataConfig(name="emoji"), train)
    return base.smoke(config) if base.is_smoke(variant) else config
