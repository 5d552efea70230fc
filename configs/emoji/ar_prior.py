"""The autoregressive prior on emoji: caption to CLIP image embedding, code by code.

    unclip train --config=emoji/ar_prior --workdir=runs/emoji/ar_prior \
        --config.clip=runs/emoji/clip

Instead of the diffusion prior, on the same CLIP. Three minutes on two CPU cores. The paper keeps
319 of 1024 dimensions in 1024 buckets; 40 of 128 is the same share, and 64 buckets are enough to
keep what those hold: with fewer than two thousand pictures, finer ones would never be learned.
"""

from unclip_jax.configs import base
from unclip_jax.configs.emoji.clip import CONTEXT_LENGTH, EMBED_DIM, VOCAB_SIZE
from unclip_jax.data.datasets import DataConfig
from unclip_jax.models.ar_prior import ARPriorConfig
from unclip_jax.stages import ARPriorStage
from unclip_jax.training.config import TrainConfig


def get_config(variant=""):
    """The config; `:smoke` runs in seconds."""
    stage = ARPriorStage(
        model=ARPriorConfig(
            embed_dim=EMBED_DIM,
            width=128,
            layers=4,
            heads=4,
            context_length=CONTEXT_LENGTH,
            vocab_size=VOCAB_SIZE,
            code_dims=40,
            buckets=64,
            dot_buckets=16,
        ),
        guidance_scale=2.0,
    )
    train = TrainConfig(
        batch_size=64,
        steps=400,
        learning_rate=1e-3,
        warmup_steps=30,
        schedule="cosine",
        b2=0.91,
        eps=1e-10,
        weight_decay=4e-2,
        grad_clip=1.0,
        ema_decay=0.99,
        log_every=50,
        eval_every=1000,
        preview_every=1000,
        checkpoint_every=200,
    )
    config = base.make(stage, DataConfig(name="emoji"), train, normalisation="codes")
    return base.smoke(config) if base.is_smoke(variant) else config
