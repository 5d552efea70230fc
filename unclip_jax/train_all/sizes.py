"""The four stages in three sizes: configs of the package, for other data and any time.

The learning rate stays as it is after its warm-up, and the average of the weights is over the last
tenth of the steps, so that a run may end at any step, and go on from it.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import ml_collections

from unclip_jax.train_all.look import VOCAB_SIZE, Found

STAGES = ("clip", "prior", "decoder", "upsampler")
SIZES = ("tiny", "small", "base")
PREVIEWS = 8
FIFTHS = 5  # a preview and a checkpoint after each

# What differs in each stage's config of configs/emoji, as `stage.` or `train.` and its fields.
_TINY = {
    "clip": {
        "model": {
            "image_size": 32, "vision_width": 64, "vision_layers": 2, "vision_heads": 2,
            "text_width": 64, "text_layers": 1, "text_heads": 2, "embed_dim": 64,
        },
        "batch_size": 64,
    },
    "prior": {"model": {"width": 64, "layers": 2, "heads": 2, "embed_dim": 64}},
    "decoder": {
        "model": {
            "unet": {"image_size": 32, "channels": 32, "channel_mults": (1, 2),
                     "attention_sizes": (4,), "context_dim": 64},
            "text": {"width": 64, "layers": 1, "heads": 2}, "embed_dim": 64,
        },
    },
    # Whole pictures: on crops of a quarter it always sees an edge, and away from one draws wrong
    # colours (26 dB on the tiles of 32 px that it trained on, 16 dB on the same pictures whole).
    "upsampler": {
        "model": {"image_size": 128, "channels": 32}, "low_size": 32, "crop": 1.0, "batch_size": 8,
    },
}  # fmt: skip
_BASE_CLIP = {
    "image_size": 48, "vision_width": 192, "vision_heads": 6, "text_width": 160,
    "text_layers": 3, "text_heads": 5, "embed_dim": 192,
}  # fmt: skip
_BASE = {
    "clip": {"model": _BASE_CLIP, "batch_size": 256},
    "prior": {"model": {"width": 192, "heads": 6, "embed_dim": 192}, "batch_size": 128},
    "decoder": {
        "model": {
            "unet": {"channels": 96, "channel_mults": (1, 2, 3), "context_dim": 128,
                     "pixel_channels": 24},
            "text": {"width": 128, "layers": 2, "heads": 4}, "embed_dim": 192,
        },
        "batch_size": 64,
    },
    "upsampler": {"model": {"channels": 96}},
}  # fmt: skip
_CHANGES = {"tiny": _TINY, "small": {}, "base": _BASE}

# Of the time, what each stage gets.
SHARES = {"clip": 0.2, "prior": 0.1, "decoder": 0.5, "upsampler": 0.2}


def config(
    stage: str, size: str, found: Found, out: Path, steps: int = 1, seconds: float = 1.0
) -> ml_collections.ConfigDict:
    """The config of one stage.

    Args:
        stage: one of `STAGES`.
        size: one of `SIZES`.
        found: the data.
        out: the folder in which each stage has its workdir.
        steps: to train.
        seconds: that a step takes: log lines come every few seconds.
    """
    made = importlib.import_module(f"unclip_jax.configs.emoji.{stage}").get_config()
    change = dict(_CHANGES[size].get(stage, {}))
    batch_size = change.pop("batch_size", made.train.batch_size)
    _update(made.stage, change)
    for part in (made.stage.model, made.stage.model.get("text") or {}):
        if "context_length" in part:
            part.context_length, part.vocab_size = found.context_length, VOCAB_SIZE
    if stage == "decoder":  # as the box model's, see configs/box/decoder.py
        made.stage.update(caption_drop=0.3, z_i_noise=0.15)
        made.stage.diffusion.timestep_shift = 2.5
        made.stage.sampling.update(method="dpm++", spacing="12")
    if stage in ("prior", "decoder"):
        made.clip = str(out / "clip")
    made.data.name = found.data.name
    made.heldout_split, made.previews = found.heldout_split, PREVIEWS
    fifth = max(1, -(-steps // FIFTHS))
    made.train.update(
        batch_size=_at_most(batch_size, found.pairs),
        steps=steps,
        schedule="constant",
        warmup_steps=20,
        ema_decay=0.9995,
        ema_warmup=True,
        log_every=max(1, min(fifth, round(5 / seconds))),
        eval_every=fifth,
        preview_every=fifth,
        checkpoint_every=fifth,
        keep_checkpoints=1,
    )
    return made


def _update(tree: ml_collections.ConfigDict, change: dict[str, Any]) -> None:
    for name, value in change.items():
        if isinstance(value, dict):
            _update(tree[name], value)
        else:
            tree[name] = value


def _at_most(batch_size: int, pairs: int) -> int:
    """A batch of no more than all pairs, and of 8 at least: a power of two, as devices want it."""
    return min(batch_size, max(8, 2 ** (pairs.bit_length() - 1)))


def draws(size: str) -> int:
    """Side in pixels of the pictures that a model of this size draws."""
    return 128 if size == "tiny" else 256
