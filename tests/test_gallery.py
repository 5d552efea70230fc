"""The gallery of the docs: what is claimed there is in its data, and nothing else."""

import importlib.util
from pathlib import Path

import pytest
from PIL import Image

from unclip_jax.pipeline.unclip import UnCLIP

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def gallery():
    spec = importlib.util.spec_from_file_location("gallery", DOCS / "gallery.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DATA = {"names": 1914, "seeds": [0, 1], "captions": [f"a {i}" for i in range(48)]}


def test_the_page_is_of_the_data_and_every_picture_is_there(gallery):
    found = gallery.read()
    assert gallery.PAGE.read_text(encoding="utf-8") == gallery.page(found)
    if found is None:
        pytest.skip("not drawn yet")
    assert len(found["captions"]) == gallery.COUNT
    files = sorted(gallery.PICTURES.glob("*.png"))
    assert [file.name for file in files] == [f"{i:02d}.png" for i in range(gallery.COUNT)]
    for file in files:
        assert Image.open(file).size == (gallery.SIDE * len(found["seeds"]), gallery.SIDE)


def test_nobody_chose_the_captions(gallery):
    found, known = gallery.read(), UnCLIP.load().known
    if found is None:
        pytest.skip("not drawn yet")
    assert found["captions"] == known.every(gallery.COUNT), "run python docs/gallery.py --draw"
    assert found["names"] == len(known.names)


def test_a_share_is_claimed_only_when_someone_has_looked(gallery):
    plain = DATA | {"recognised": None}
    assert "every 40th of the 1,914 names" in gallery.page(plain)
    assert gallery.page(plain).count("](images/gallery/") == 48
    assert "recognised" not in gallery.page(plain) and "%" not in gallery.page(plain)
    looked = {"right": 12, "of": 48, "seed": 0, "by": "one person in December 2026"}
    said = gallery.page(plain | {"recognised": looked})
    assert "25 % were recognised" in said and "one person in December 2026" in said
