"""The prior of the box model: caption to CLIP image embedding. 2.8 M parameters.

    unclip styles build --data emoji_art --size 48
    unclip train --config=box/prior --workdir=runs/box/prior \
        --config.clip=runs/box/clip
"""

from unclip_jax.configs.box import base
from unclip_jax.diffusion import Sampling
from unclip_jax.models.prior import PriorConfig
from unclip_jax.stages import PriorStage
from unclip_jax.training.config import TrainConfig


def get_config(variant=""):
    """The config; `:gpu` for an accelerator, `:smoke` runs in seconds."""
    stage = PriorStage(
        model=PriorConfig(
            embed_dim=base.EMBED_DIM,
            width=192,
            layers=4,
            heads=6,
            context_length=base.CONTEXT_LENGTH,
            vocab_size=base.VOCAB_SIZE,
            text_width=0,
        ),
        sampling=Sampling(method="dpm++", spacing="6"),
    )
    train = TrainConfig(
        batch_size=128,
        steps=900,
        learning_rate=1e-3,
        warmup_steps=100,
        optimizer="muon",
        schedule="cosine",
        b2=0.96,
        eps=1e-6,
        weight_decay=6e-2,
        grad_clip=1.0,
        ema_decay=0.999,
        log_every=50,
        eval_every=250,
        preview_every=1000,
        checkpoint_every=100,
        keep_checkpoints=1,
    )
    gpu = {"batch_size": 512, "steps": 10_000, "warmup_steps": 500}
    return base.make(stage, train, variant, gpu=gpu)
