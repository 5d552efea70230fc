"""A prior of one forward pass on emoji: ECLIPSE, by regression and contrast.

    unclip train --config=emoji/eclipse_prior --workdir=runs/emoji/eclipse_prior \
        --config.clip=runs/emoji/clip

Instead of the diffusion prior, on the same CLIP, with a network of the same size. A caption's z_i
is one call of the network in place of 128 (64 steps, two draws), so that with a distilled decoder
a caption is a picture in three calls. It is nearer to the mean of a caption's pictures, and less
varied: noise is an input, but nothing rewards heeding it.
"""

from unclip_jax.configs import base
from unclip_jax.configs.emoji.clip import CONTEXT_LENGTH, EMBED_DIM, VOCAB_SIZE
from unclip_jax.data.datasets import DataConfig
from unclip_jax.models.prior import PriorConfig
from unclip_jax.stages import EclipsePriorStage
from unclip_jax.training.config import TrainConfig


def get_config(variant=""):
    """The config; `:smoke` runs in seconds."""
    stage = EclipsePriorStage(
        model=PriorConfig(
            embed_dim=EMBED_DIM,
            width=128,
            layers=4,
            heads=4,
            context_length=CONTEXT_LENGTH,
            vocab_size=VOCAB_SIZE,
            text_width=0,
        ),
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
