"""The canvas of the box model: z_i and z_t to 32 px, for its decoder. 9.9 M parameters.

    unclip styles build --data emoji_art --size 48 64
    unclip train --config=box/canvas --workdir=runs/box/canvas \
        --config.clip=runs/box/clip --config.prior=runs/box/prior

As many radial basis functions as there are pictures learn them by heart; half of the rows take the
prior's own z_i, see `config.prior`.
"""

from unclip_jax.configs.box import base
from unclip_jax.stages import CanvasStage
from unclip_jax.training.config import TrainConfig


def get_config(variant=""):
    """The config; `:gpu` for an accelerator, `:smoke` runs in seconds."""
    stage = CanvasStage(model=base.CANVAS, image_size=base.IMAGE_SIZE, z_t_drop=0.1)
    train = TrainConfig(
        batch_size=256,
        steps=6000,
        learning_rate=1e-3,
        warmup_steps=50,
        schedule="cosine",
        b2=0.99,
        grad_clip=1.0,
        ema_decay=0.998,
        log_every=100,
        eval_every=1000,
        preview_every=3000,
        checkpoint_every=500,
        keep_checkpoints=1,
    )
    gpu = {"batch_size": 1024, "steps": 20_000, "warmup_steps": 200, "ema_decay": 0.9995}
    return base.make(stage, train, variant, gpu=gpu)
