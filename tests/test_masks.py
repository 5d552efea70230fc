"""What a mask says, whatever file it is in, and that what it says is painted at every size."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from tests import tiny
from unclip_jax.errors import UserError
from unclip_jax.pipeline import manipulate
from unclip_jax.pipeline.manipulate import Walk, edits, masks
from unclip_jax.pipeline.tasks.inputs import read_mask
from unclip_jax.stages.pixels import squared

KEY = jax.random.key(3)
STROKES = np.zeros((40, 40), bool)
STROKES[10:12, 5:35] = True
CORNER = np.zeros((40, 40), bool)
CORNER[20:, 20:] = True
NOISE = np.random.default_rng(0)
BRIGHT = NOISE.integers(0, 256, (40, 40, 3), np.uint8)
DARK = NOISE.integers(0, 60, (40, 40, 3), np.uint8)


def grey(hole, low=0, high=255, dtype=np.uint8):
    return Image.fromarray(np.where(hole, high, low).astype(dtype))


def with_alpha(colours, clear, alpha=0):
    opacity = np.where(clear, alpha, 255).astype(np.uint8)
    colours = np.broadcast_to(np.uint8(colours), (40, 40, 3))
    return Image.fromarray(np.dstack([colours, opacity]))


def palette():
    """Strokes in the second of two colours, which is white; and the first, black."""
    image = Image.fromarray(STROKES.astype(np.uint8), "P")
    image.putpalette([0, 0, 0, 255, 255, 255])
    return image


READ = {
    "white on black": (lambda: grey(STROKES), "png", STROKES),
    "of colours": (lambda: grey(STROKES).convert("RGB"), "png", STROKES),
    "1 bit": (lambda: Image.fromarray(STROKES), "png", STROKES),
    "1 bit TIFF": (lambda: Image.fromarray(STROKES), "tiff", STROKES),
    "palette": (palette, "png", STROKES),
    "GIF": (palette, "gif", STROKES),
    "16 bits": (lambda: grey(STROKES, 0, 65535, np.uint16), "png", STROKES),
    "JPEG": (lambda: grey(CORNER), "jpg", CORNER),
    "grey with alpha": (lambda: grey(STROKES).convert("LA"), "png", STROKES),
    "opaque RGBA": (lambda: grey(STROKES).convert("RGBA"), "png", STROKES),
    "a half-transparent layer": (
        lambda: Image.merge("LA", (grey(STROKES), Image.new("L", (40, 40), 128))), "png", STROKES,
    ),
    "black with an erased part": (lambda: with_alpha(0, CORNER), "png", CORNER),
    "black, erased, white beneath": (
        lambda: with_alpha(np.where(CORNER, 255, 0)[..., None], CORNER), "png", CORNER,
    ),
    "a dark picture with an erased part": (lambda: with_alpha(DARK, CORNER), "png", CORNER),
    "palette with a transparent colour": (
        lambda: with_alpha(0, CORNER).quantize(), "png", CORNER,
    ),
    "white all over": (lambda: grey(np.ones((40, 40))), "png", np.ones((40, 40), bool)),
}  # fmt: skip
TWO_READINGS = r"mask.png.*by transparency {} is to paint, by white {}; give one without"
REFUSED = {
    "a bright picture with an erased part": (
        lambda: with_alpha(BRIGHT, CORNER), TWO_READINGS.format("25%", "36.9%"),
    ),
    "white strokes on nothing": (
        lambda: with_alpha(np.where(STROKES, 255, 0)[..., None], ~STROKES),
        TWO_READINGS.format("96.2%", "3.75%"),
    ),
    "white with an erased part": (
        lambda: with_alpha(255, CORNER), TWO_READINGS.format("25%", "75%"),
    ),
    "white, erased by less than half": (
        lambda: with_alpha(255, CORNER, 140), TWO_READINGS.format("0%", "100%"),
    ),
    "transparent all over": (
        lambda: with_alpha(0, np.ones((40, 40), bool)), "transparent all over",
    ),
    "black all over": (lambda: grey(np.zeros((40, 40))), "nothing to paint.*lightest grey is 0"),
    "classes by number": (lambda: grey(STROKES, 0, 1), "nothing to paint.*lightest grey is 1 of"),
    "floats": (lambda: grey(STROKES, 0, 1, np.float32), "floating-point"),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_a_mask_means_the_same_in_every_file(name, tmp_path):
    make, suffix, hole = READ[name]
    make().save(tmp_path / f"mask.{suffix}")
    np.testing.assert_array_equal(read_mask(str(tmp_path / f"mask.{suffix}")), hole)


@pytest.mark.parametrize("name", REFUSED)
def test_a_mask_that_says_two_things_or_nothing_is_refused(name, tmp_path):
    make, words = REFUSED[name]
    path = tmp_path / ("mask.tiff" if name == "floats" else "mask.png")
    make().save(path)
    with pytest.raises(UserError, match=words):
        read_mask(str(path))


def test_a_mask_is_turned_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    grey(CORNER[:, 10:]).save(tmp_path / "mask.png", exif=exif)
    found = read_mask(str(tmp_path / "mask.png"))
    np.testing.assert_array_equal(found, np.rot90(CORNER[:, 10:], -1))


@pytest.mark.parametrize("shape", [(256, 256), (64, 64), (300, 200), (199, 301)])
@pytest.mark.parametrize("scale", [1, 2])
def test_every_pixel_is_painted_at_every_size(shape, scale):
    image = np.zeros((*shape, 3), np.uint8)
    rng = np.random.default_rng(0)
    for size in (16, 64, 200):
        left, top, right, bottom = masks.CENTRE.box(shape[1], shape[0], size)
        for _ in range(10):
            hole = np.zeros((scale * shape[0], scale * shape[1]), bool)
            y = rng.integers(scale * np.ceil(top), scale * np.floor(bottom))
            x = rng.integers(scale * np.ceil(left), scale * np.floor(right))
            hole[y, x] = True
            covered = masks.cover(hole, image, size)[..., 0]
            step = (right - left) * scale / size, (bottom - top) * scale / size
            row, column = (y + 0.5 - scale * top) / step[1], (x + 0.5 - scale * left) / step[0]
            assert covered[int(row), int(column)]
            assert covered.sum() <= np.prod([np.ceil(1 / s) + 1 for s in step])
            wide = masks.cover(hole, image, size, wider=1)[..., 0]
            assert wide[max(0, int(row) - 1) : int(row) + 2, int(column)].all()


def test_a_mask_of_another_size_covers_the_same_part():
    image = np.zeros((120, 80, 3), np.uint8)
    hole = np.zeros((12, 8), bool)
    hole[5:7, 2:3] = True
    same = np.kron(hole, np.ones((10, 10), bool))
    for size in (8, 33, 160):
        np.testing.assert_array_equal(*(masks.cover(h, image, size) for h in (hole, same)))


@pytest.mark.parametrize("side", [24, 40, 64, 100])
def test_what_is_kept_has_nothing_of_what_was_in_the_hole(side):
    hole = np.zeros((side, side), bool)
    hole[side // 3 : side // 3 + 2] = True
    image = np.full((side, side, 3), (40, 90, 160), np.uint8)
    scratched = np.where(hole[..., None], np.uint8(255), image)
    for size in (16, 32, 64):
        left = ~masks.cover(hole, image, size)[..., 0]
        found = masks.kept(scratched, hole, size)[left].astype(int)
        assert np.abs(found - (40, 90, 160)).max() <= 1
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    far = ~masks.cover(hole, noise, 32, wider=2 + 3 * (side < 32))[..., 0]
    np.testing.assert_array_equal(masks.kept(noise, hole, 32)[far], squared([noise], 32)[0][far])


def test_a_thin_scratch_is_painted_and_the_rest_is_as_it_was(monkeypatch):
    """256 px, a scratch 2 px wide and a 24 px corner, a decoder of 16 px that draws black."""
    model = tiny.model()
    image = np.full((256, 256, 3), 200, np.uint8)
    hole = np.zeros((256, 256), bool)
    hole[100:102, 30:220] = hole[:24, :24] = True
    image[hole] = (255, 0, 0)
    seen = []

    def black(model, keys, latents, walk, known, progress):
        small = np.where(known[1], np.float32(-1), known[0])
        seen.append(known[1])
        return small

    monkeypatch.setattr(edits, "decode", black)

    def larger(model, keys, small, *_):
        return np.uint8(np.kron(small * 127.5 + 127.5, np.ones((16, 16, 1))))

    monkeypatch.setattr(edits, "render", larger)
    (made,) = manipulate.inpaint(model, KEY, image, hole, Walk(steps=4, eta=1.0))
    assert (made[hole] == 0).all() and (made[~hole] == 200).all()
    assert seen[0][0, 6, 1:14].all()


@pytest.mark.parametrize(
    ("hole", "words"),
    [
        (np.full((16, 16), 255, np.uint8), "hole: got 'uint8 of shape.*mask >= 128"),
        (np.full((16, 16), 0.5), "hole: got 'float64"),
        (np.ones((16, 16, 1), bool), "hole: got 'bool of shape"),
        (np.ones((0, 0), bool), "hole: got 'bool of shape"),
        (np.ones((16, 24), bool), "mask of 24 x 16 pixels: expected the proportions"),
        (np.zeros((16, 16), np.uint8), "nothing to paint"),
    ],
)
def test_a_hole_that_is_none_is_named(hole, words):
    image = np.zeros((16, 16, 3), np.uint8)
    with pytest.raises(UserError, match=words):
        manipulate.inpaint(tiny.model(), KEY, image, hole, Walk(steps=4))


def test_a_hole_of_ones_and_zeros_is_a_hole():
    hole = np.eye(4, dtype=np.uint8)
    np.testing.assert_array_equal(masks.check_hole(hole, np.zeros((4, 4, 3))), hole.astype(bool))


def test_a_picture_painted_all_over_is_a_new_one():
    model = dataclasses.replace(tiny.model(), upsamplers=())
    whole, walk = np.ones((16, 16), bool), Walk(steps=4, eta=1.0, caption="a dog", batch_size=1)
    made = [
        manipulate.inpaint(model, KEY, np.full((16, 16, 3), level, np.uint8), whole, walk)
        for level in (0, 200)
    ]
    np.testing.assert_array_equal(*made)
