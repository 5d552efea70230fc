"""`unclip train-all` on a folder of little pictures, with networks of a few weights.

Tests run it as a script, which they kill: `python -m tests.train_all_run DATA OUT MINUTES`.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from unclip_jax.train_all import budget, page, run, sizes

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 230)}
TOWER = {"width": 16, "layers": 1, "heads": 1}
UNET = {"channels": 32, "channel_mults": (1,)}
NANO = {
    "clip": {
        "model": {
            **{f"{side}_{name}": n for side in ("vision", "text") for name, n in TOWER.items()},
            "image_size": 16, "embed_dim": 16,
        },
        "batch_size": 8,
    },
    "prior": {"model": TOWER | {"embed_dim": 16}, "batch_size": 8},
    "decoder": {
        "model": {
            "unet": UNET | {"image_size": 16, "attention_sizes": (4,), "context_dim": 16},
            "text": TOWER, "embed_dim": 16,
        },
        "batch_size": 8,
    },
    "upsampler": {"model": UNET | {"image_size": 32}, "low_size": 16, "batch_size": 8},
}  # fmt: skip
STEPS = 5  # that each stage trains, as there is no time for more


def make(folder: Path, count: int, side: int = 24) -> Path:
    """A folder of pictures of one colour each, in sub-folders by colour, with captions."""
    rng = np.random.default_rng(0)
    for i in range(count):
        name, colour = list(COLOURS.items())[i % len(COLOURS)]
        pixels = np.clip(np.array(colour) + rng.normal(0, 20, (side + i % 3, side, 3)), 0, 255)
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
        (folder / name / f"{i}.txt").write_text(f"a {name} <thing> no {i % 4}")
    return folder


def shrink(set_attribute=setattr) -> None:
    """Make all that costs time small."""
    set_attribute(sizes, "_CHANGES", {"tiny": NANO})
    set_attribute(sizes, "PREVIEWS", 2)
    set_attribute(budget, "FEWEST_STEPS", STEPS)
    set_attribute(run, "FEWEST_STEPS", STEPS)
    set_attribute(page, "CAPTIONS", 2)
    set_attribute(page, "EACH", 1)
    set_attribute(page, "BATCH", 4)


if __name__ == "__main__":
    data, out, minutes = sys.argv[1:]
    shrink()
    run.run(data, Path(out), "tiny", float(minutes))
