"""Runs of a canvas and of decoders on it, as the command trains them."""

import numpy as np
import pytest
from PIL import Image

from configs import base
from tests import tiny
from unclip_jax import stages
from unclip_jax.data.datasets import DataConfig
from unclip_jax.training import command
from unclip_jax.training.config import TrainConfig
from unclip_jax.weights import folder as model_folder
from unclip_jax.weights.trained import load_part


def fill(folder):
    """Put pictures there, and the folders of a tiny CLIP, prior and decoder without a canvas."""
    rng = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for i in range(40):
        pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{i:02d}.png")
        (folder / "pictures" / f"{i:02d}.txt").write_text(f"picture {i}\nthe same {i}")
    clip = tiny.params(tiny.CLIP)
    about = {"stage": stages.describe(tiny.CLIP)}
    model_folder.save_stage(folder / "clip", params=clip, description=about)
    for part, name in ((tiny.model().decoder, "plain"), (tiny.model().prior, "prior")):
        model_folder.save_stage(folder / name, params=part.params, description=part.description)


def run(folder, stage, name, **settings):
    """Train for a few steps in `folder`/`name`, as the command does."""
    config = config_of(folder, stage, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "parse", lambda argv: None)
        patch.setattr(command.command_line, "name_of", lambda values: "a config of this test")
        for flag, value in (("CONFIG", config), ("WORKDIR", str(folder / name))):
            patch.setattr(command, flag, type("Flag", (), {"value": value}))
        for flag in ("DISTRIBUTED", "COORDINATOR", "PROCESSES", "PROCESS", "PROFILE"):
            value = {"DISTRIBUTED": "off", "PROFILE": ""}.get(flag)
            patch.setattr(command, flag, type("Flag", (), {"value": value}))
        command.main([])
    return load_part(folder / name)


def config_of(folder, stage, train=None, **settings):
    data = DataConfig(name=str(folder / "pictures"), cache_dir=str(folder / "cache"))
    train = {"batch_size": 8, "steps": 4, "checkpoint_every": 2, "log_every": 2} | (train or {})
    train = TrainConfig(**{"eval_every": 4, "preview_every": 4} | train)
    given = {"previews": 2, "clip": str(folder / "clip")} | settings
    return base.make(stage, data, train, **given)
