"""JPEG noise against Pillow, that is libjpeg-turbo, on the same pixels and qualities.

Stated tolerance: none, every value is the same. All of it is integers.
"""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from unclip_jax.errors import UserError
from unclip_jax.stages.degrade import jpeg
from unclip_jax.stages.degrade.jpeg import CHROMA_STEPS, LUMA_STEPS, jpeg_corner, quantiser_steps

QUALITIES = np.array([1, 10, 50, 75, 95, 100])
TABLES = LUMA_STEPS, CHROMA_STEPS
PILLOW = {"4:2:0": 2, "4:4:4": 0}
save = jax.jit(jpeg, static_argnums=2)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def photograph(height, width, seed=0):
    """Smooth colours with some grain, 0..255."""
    rng = np.random.default_rng(seed)
    smooth, grain = (
        ndimage.gaussian_filter(rng.normal(size=(height, width, 3)), (blur, blur, 0))
        for blur in (4, 0.7)
    )
    return np.uint8(np.clip(127.5 + 110 * smooth / np.abs(smooth).max() + 15 * grain, 0, 255))


def stripes(height, width):
    """Black and white columns: the largest coefficients there are."""
    return np.broadcast_to(np.uint8(255 * (np.arange(width) % 2))[:, None], (height, width, 3))


def pillow_file(pixels, quality, subsampling="4:2:0"):
    file = io.BytesIO()
    options = {"quality": int(quality), "subsampling": PILLOW[subsampling]}
    Image.fromarray(pixels).save(file, "JPEG", **options)
    return file


def pillow(pixels, quality, subsampling="4:2:0"):
    return np.asarray(Image.open(pillow_file(pixels, quality, subsampling)))


def to_float(pixels):
    return pixels.astype(np.float32) / np.float32(127.5) - 1


def to_levels(images):
    return np.round((np.asarray(images) + 1) * 127.5).astype(int)


def ours(pixels, qualities, subsampling="4:2:0"):
    """One picture at several qualities at once: int [q, h, w, 3]."""
    images = np.stack([to_float(pixels)] * len(qualities))
    return to_levels(save(images, np.asarray(qualities), subsampling))


@pytest.mark.parametrize(
    ("height", "width", "subsampling"),
    [(64, 64, "4:2:0"), (37, 50, "4:2:0"), (34, 51, "4:2:0"), (37, 51, "4:4:4")],
)
def test_it_is_pillows(height, width, subsampling):
    for pixels in (photograph(height, width), noise(height, width), stripes(height, width)):
        for image, quality in zip(ours(pixels, QUALITIES, subsampling), QUALITIES, strict=True):
            np.testing.assert_array_equal(image, pillow(pixels, quality, subsampling))


@pytest.mark.parametrize("size", [(1, 1), (3, 4), (2, 5), (5, 3), (16, 7)])
def test_tiny_pictures_are_pillows(size):
    pixels = noise(*size)
    for image, quality in zip(ours(pixels, QUALITIES), QUALITIES, strict=True):
        np.testing.assert_array_equal(image, pillow(pixels, quality))


def test_the_quantisers_steps_are_those_in_pillows_files():
    qualities = jnp.arange(1, 101)
    tables = [jax.jit(jax.vmap(functools.partial(quantiser_steps, t)))(qualities) for t in TABLES]
    tables = [np.asarray(table) for table in tables]
    for quality, *found in zip(qualities, *tables, strict=True):
        stored = Image.open(pillow_file(noise(8, 8), quality)).quantization
        for k in range(2):
            np.testing.assert_array_equal(found[k].reshape(64), stored[k])


def test_grey_stays_grey_and_a_flat_picture_stays_as_it_is():
    grey = np.repeat(photograph(24, 17)[..., :1], 3, axis=-1)
    image = ours(grey, [20])[0]
    np.testing.assert_array_equal(image, image[..., :1] * np.ones((1, 1, 3), int))
    flat = np.full((19, 22, 3), 90, np.uint8)
    np.testing.assert_array_equal(ours(flat, [90])[0], flat)


def test_saving_better_loses_less():
    pixels = photograph(48, 48)
    errors = ((ours(pixels, QUALITIES) - pixels[None]) ** 2).mean((1, 2, 3))
    assert np.all(np.diff(errors) < 0)


def test_each_picture_has_its_own_quality_and_no_neighbours():
    pixels = np.stack([noise(20, 20, seed) for seed in range(3)])
    together = save(to_float(pixels), jnp.array([10, 95, 50]), "4:2:0")
    alone = save(to_float(pixels[1:2]), jnp.array([95]), "4:2:0")
    np.testing.assert_array_equal(together[1:2], alone)


def test_qualities_out_of_range_are_the_nearest_in_it():
    pixels = noise(16, 16)
    low, one, hundred, high = ours(pixels, [-3, 1, 100, 250])
    np.testing.assert_array_equal(low, one)
    np.testing.assert_array_equal(hundred, high)


@pytest.mark.parametrize("size", [(13, 9), (8, 16), (1, 2)])
def test_it_sees_only_its_corner_of_the_canvas(size):
    h, w = size
    canvas = to_float(noise(21, 18))
    inside = jax.jit(jpeg_corner)(canvas, 40, h, w)[:h, :w]
    np.testing.assert_array_equal(inside, save(canvas[None, :h, :w], jnp.array([40]), "4:2:0")[0])


def test_dtype_is_kept_and_values_beyond_are_clipped():
    image = jnp.asarray(to_float(noise(8, 8))[None], jnp.bfloat16)
    assert save(image, jnp.array([50]), "4:2:0").dtype == jnp.bfloat16
    bright = jnp.full((1, 8, 8, 3), 7.0)
    np.testing.assert_array_equal(save(bright, jnp.array([100]), "4:2:0"), jnp.ones((1, 8, 8, 3)))


def test_bad_input_is_named():
    x, quality = jnp.zeros((2, 8, 8, 3)), jnp.array([50, 60])
    for call, words in [
        (lambda: jpeg(x[..., :1], quality), r"expected \[any, any, any, 3\]"),
        (lambda: jpeg(x.astype(jnp.uint8), quality), "uint8"),
        (lambda: jpeg(x, quality[:1]), r"quality.s shape: got \(1,\), expected \[2\]"),
        (lambda: jpeg(x, quality / 1.0), "whole numbers"),
        (lambda: jpeg(x, quality, "4:2:2"), "subsampling: got '4:2:2'"),
    ]:
        with pytest.raises(UserError, match=words):
            call()
