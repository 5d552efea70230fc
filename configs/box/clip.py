"""CLIP of the box model: emoji in three styles, captions that name the style.

    python -m unclip_jax.data.styles build --size 48
    python train.py --config=configs/box/clip.py --workdir=runs/box/clip

On an accelerator: --config.train.batch_size=1024 --config.stage.model.dtype=bfloat16. What it
reaches: MODEL_CARD.md.
"""

from configs import base
from unclip_jax.data.datasets import DataConfig
from unclip_jax.models.clip import ClipConfig
from unclip_jax.stages import ClipStage
from unclip_jax.train_config import TrainConfig

CONTEXT_LENGTH = 28  # the longest caption has 27 tokens
VOCAB_SIZE = 4096
EMBED_DIM = 192


def get_config(variant=""):
    """The config; `:smoke` runs in seconds."""
    stage = ClipStage(
        model=ClipConfig(
            image_size=48,
            patch=8,
            vision_width=192,
            vision_layers=4,
            vision_heads=6,
            text_width=160,
            text_layers=3,
            text_heads=5,
            vocab_size=VOCAB_SIZE,
            context_length=CONTEXT_LENGTH,
            embed_dim=EMBED_DIM,
            activation="gelu",
        )
    )
    train = TrainConfig(
        batch_size=256,
        steps=1000,
        learning_rate=1e-3,
        warmup_steps=50,
        schedule="cosine",
        b2=0.98,
        weight_decay=0.1,
        grad_clip=1.0,
        ema_decay=0.99,
        log_every=20,
        eval_every=100,
        preview_every=500,
        checkpoint_every=50,
        keep_checkpoints=1,
    )
    config = base.make(stage, DataConfig(name="emoji_styles", augment=0.1), train)
    return base.smoke(config) if base.is_smoke(variant) else config
