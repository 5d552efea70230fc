"""The classifier that guides ADM on emoji: which of ten groups is in a noised 64 px picture.

    unclip train --config=emoji/classifier --workdir=runs/adm/classifier

About two minutes on two CPU cores. It guides configs/emoji/class_decoder.py, with whose diffusion
it must share schedule and steps. Pictures are shifted and scaled a little in training, as few as
they are.
"""

from unclip_jax.configs import base
from unclip_jax.data.datasets import DataConfig
from unclip_jax.data.emoji.catalogue import groups
from unclip_jax.models.unet import UNetConfig
from unclip_jax.stages import ClassifierStage
from unclip_jax.training.config import TrainConfig


def get_config(variant=""):
    """The config; `:smoke` runs in seconds."""
    stage = ClassifierStage(
        model=UNetConfig(
            image_size=64,
            in_channels=3,
            out_channels=len(groups()),
            channels=64,
            channel_mults=(1, 1, 2),
            res_blocks=1,
            attention_sizes=(8, 4),
            head_channels=32,
            dropout=0.1,
            patch=4,
        )
    )
    train = TrainConfig(
        batch_size=32,
        steps=400,
        learning_rate=1e-3,
        warmup_steps=30,
        schedule="cosine",
        b2=0.99,
        weight_decay=0.05,
        grad_clip=1.0,
        ema_decay=0.99,
        log_every=50,
        eval_every=1000,
        preview_every=1000,
        checkpoint_every=200,
    )
    config = base.make(stage, DataConfig(name="emoji", captions="first", augment=0.1), train)
    return base.smoke(config) if base.is_smoke(variant) else config
