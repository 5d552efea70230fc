"""The model in the package: whole, small, and obeying captions."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests import compiling
from unclip_jax.data.emoji.art import MORE_PACKAGES, PACKAGES
from unclip_jax.pipeline import manipulate
from unclip_jax.pipeline.unclip import UnCLIP
from unclip_jax.weights import box
from unclip_jax.weights import folder as model_folder

MOST_BYTES = 64_000_000


@pytest.fixture(scope="module")
def model():
    return UnCLIP.load()


def test_it_is_small_and_says_where_it_comes_from():
    folder = box.folder()
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= MOST_BYTES
    for stage in ("clip", "prior", "decoder", "upsampler_256"):
        description = model_folder.read_description(folder / stage)
        older = stage == "upsampler_256"
        assert description["data"]["name"] == ("emoji_styles" if older else "emoji_art")
        assert description["step"] > 0
    card = (folder.parent / "MODEL_CARD.md").read_text(encoding="utf-8")
    for style in (*PACKAGES, *MORE_PACKAGES):
        assert f'"{style} style"' in card
    for package in (*PACKAGES.values(), *MORE_PACKAGES.values()):
        owner = package.attribution.split("copyright ")[1].split()[0].rstrip(",")
        assert f"© {owner}" in card
    for licence in ("CC-BY 4.0", "Apache-2.0", "MIT"):
        assert licence in card


def test_no_machine_is_named_in_it():
    for path in box.folder().rglob("config.json"):
        text = json.dumps(json.loads(path.read_text(encoding="utf-8")))
        assert "/" not in text.replace("configs/", "").replace("image/png", ""), path


def test_drawing_with_the_box_imports_neither_transformers_nor_torch():
    """They are for public weights; the package alone imports not even JAX."""
    code = (
        "import sys; import unclip_jax; assert 'jax' not in sys.modules\n"
        "import jax; model = unclip_jax.UnCLIP.load()\n"
        "keys = jax.random.split(jax.random.key(0), 1)\n"
        "model.sample_prior(keys, ['a red apple'])\n"
        "assert not {'transformers', 'torch', 'diffusers'} & set(sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}
NAMES = (
    "red apple", "soccer ball", "sun with face", "pizza", "dog face", "sunflower", "crown", "fire",
    "banana", "rainbow", "ghost", "lemon",
)  # fmt: skip


@pytest.fixture(scope="module")
def drawn(model):
    """Hearts of every colour, and things, each for its caption: `(captions, images)`."""
    captions = [f"{colour} heart, noto style" for colour in COLOURS]
    captions += [f"{name}, fluent style" for name in NAMES]
    with compiling.optimised():
        return captions, model.generate(jax.random.key(0), captions, upsample=False)


def test_colours_are_those_of_the_captions(drawn):
    """Hearts, of which each colour is a caption of its own, on white."""
    for image, colour in zip(drawn[1] / 255.0, COLOURS.values(), strict=False):
        inked = image[image.min(axis=-1) < 0.8]
        assert len(inked) > 200, "something is drawn"
        # The channels that the colour has are brighter than those that it lacks.
        lacking = [inked[:, i].mean() for i in range(3) if not colour[i]]
        having = [inked[:, i].mean() for i in range(3) if colour[i]]
        assert min(having) > max(lacking) + 0.1
        corners = image[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert corners.min() > 0.8, "on white"


def test_its_clip_knows_what_was_drawn(model, drawn):
    """Of sixteen captions, most pictures are nearest to their own."""
    captions, images = drawn
    z_i = manipulate.embed(model, list(images))
    chances = manipulate.zero_shot(model, z_i, captions)
    right = np.mean(chances.argmax(axis=1) == np.arange(len(captions)))
    assert right >= 0.5, "chance is 0.06"


@pytest.mark.slow
def test_pictures_of_256_pixels_are_those_of_64_sharpened(model, drawn):
    captions, small = drawn
    with compiling.optimised():
        images = model.generate(jax.random.key(0), captions[:1])
    assert images.shape == (1, 256, 256, 3) and small.shape == (16, 64, 64, 3)
    mean = images.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
    assert np.abs(mean - small[0]).mean() < 8  # of 255
