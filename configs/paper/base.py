"""What the paper's configs share: the data set to fill in, bf16, and a smoke form.

The paper trained on 650 M private pairs. Name your own: a folder, or a prepared TFDS data set,

    --config.data.name=tfds:coco_captions --config.data.split=train --config.heldout_split=val \
    --config.data.caption_key=captions/text

The figures are table 3 of the paper (appendix C); AdamW with beta1 0.9 throughout. Where the paper
gives no figure (warm-up, clipping), the value here is ours and says so.
"""

import dataclasses

from unclip_jax.configs import base
from unclip_jax.data.datasets import DataConfig
from unclip_jax.training.config import TrainConfig

WARMUP_STEPS = 1000  # ours
GRAD_CLIP = 1.0  # ours


def train_config(**paper):
    """The loop's settings with the paper's figures in them."""
    common = {
        "warmup_steps": WARMUP_STEPS,
        "grad_clip": GRAD_CLIP,
        "b1": 0.9,
        "ema_warmup": True,
        "log_every": 100,
        "eval_every": 10_000,
        "preview_every": 10_000,
        "checkpoint_every": 5_000,
    }
    return TrainConfig(**(common | paper))


def make(stage, train, variant, small, **rest):
    """The paper's config; `:smoke` trains the stage `small` on emoji for seconds instead."""
    if base.is_smoke(variant):
        return base.smoke(base.make(small, DataConfig(name="emoji"), train, **rest))
    return base.make(stage, DataConfig(name="YOUR_DATA"), train, **rest)


def bfloat16(config):
    """A network's config computing in bf16 with its blocks recomputed in the backward pass."""
    nested = {
        field.name: bfloat16(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if dataclasses.is_dataclass(getattr(config, field.name))
    }
    if hasattr(config, "dtype"):
        nested |= {"dtype": "bfloat16", "remat": "full"}
    return dataclasses.replace(config, **nested)
