"""CLIP on emoji: the first stage to train; all others stand on it.

    unclip train --config=emoji/clip --workdir=runs/emoji/clip

Under three minutes on two CPU cores. What it reaches: docs/training.md.
"""

from unclip_jax.configs import base
from unclip_jax.data.datasets import DataConfig
from unclip_jax.models.clip import ClipConfig
from unclip_jax.stages import ClipStage
from unclip_jax.training.config import TrainConfig

CONTEXT_LENGTH = 24
VOCAB_SIZE = 4096
EMBED_DIM = 128


def get_config(variant=""):
    """The config; `:smoke` runs in seconds."""
    stage = ClipStage(
        model=ClipConfig(
            image_size=64,
            patch=8,
            vision_width=128,
            vision_layers=4,
            vision_heads=4,
            text_width=128,
            text_layers=2,
            text_heads=4,
            vocab_size=VOCAB_SIZE,
            context_length=CONTEXT_LENGTH,
            embed_dim=EMBED_DIM,
            activation="gelu",
        )
    )
    train = TrainConfig(
        batch_size=128,
        steps=180,
        learning_rate=1e-3,
        warmup_steps=20,
        schedule="cosine",
        b2=0.98,
        weight_decay=0.1,
        grad_clip=1.0,
        ema_decay=0.99,
        log_every=20,
        eval_every=90,
        preview_every=1000,
        checkpoint_every=90,
    )
    config = base.make(stage, DataConfig(name="emoji", augment=0.15), train)
    return base.smoke(config) if base.is_smoke(variant) else config
