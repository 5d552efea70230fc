"""Blurs and resizing against scipy and torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from unclip_jax.degrade import gaussian_blur, random_gaussian_blur, upsample
from unclip_jax.errors import UserError

blur = jax.jit(gaussian_blur, static_argnums=2)
random_blur = jax.jit(random_gaussian_blur, static_argnums=(2, 3, 4))


def images(*shape, seed=0):
    values = np.random.default_rng(seed).uniform(-1, 1, shape)
    return jnp.asarray(values, jnp.float32)


@pytest.mark.parametrize("kernel_size", [1, 3, 9])
def test_blur_is_scipys_with_each_images_own_sigma(kernel_size):
    x, sigma = images(3, 11, 8, 2), np.array([0.4, 0.6, 2.5])
    blurred = blur(x, jnp.float32(sigma), kernel_size)
    for image, s, ours in zip(np.asarray(x), sigma, blurred, strict=True):
        expected = ndimage.gaussian_filter(
            image, s, axes=(0, 1), mode="mirror", radius=kernel_size // 2
        )
        np.testing.assert_allclose(ours, expected, atol=2e-6)


def test_blur_of_nothing_changes_nothing():
    x = images(2, 5, 5, 3)
    np.testing.assert_array_equal(blur(x, jnp.zeros(2), 5), x)
    flat = jnp.full((1, 6, 4, 1), 0.37)
    np.testing.assert_allclose(blur(flat, jnp.ones(1), 5), flat, rtol=1e-6)
    np.testing.assert_allclose(blur(images(1, 1, 1, 1), jnp.ones(1), 3), images(1, 1, 1, 1))


def test_blur_keeps_the_dtype():
    x = images(1, 6, 6, 3).astype(jnp.bfloat16)
    assert blur(x, jnp.ones(1), 3).dtype == jnp.bfloat16


def test_random_blur_strikes_as_often_as_told_and_never_looks_at_neighbours():
    x, keys = images(200, 6, 6, 1), jax.random.split(jax.random.key(1), 200)
    blurred = random_blur(keys, x, (0.4, 0.6), 0.3, 3)
    struck = np.any(blurred != x, axis=(1, 2, 3))
    assert 0.2 < struck.mean() < 0.4
    np.testing.assert_array_equal(blurred[7:8], random_blur(keys[7:8], x[7:8], (0.4, 0.6), 0.3, 3))
    always = random_blur(keys[:3], x[:3], (0.5, 0.5), 1.0, 3)
    np.testing.assert_allclose(always, blur(x[:3], jnp.full(3, 0.5), 3), atol=1e-6)
    np.testing.assert_array_equal(random_blur(keys, x, (0.4, 0.6), 0.0, 3), x)


@pytest.mark.parametrize("size", [32, 5, (20, 9)])
def test_resize_is_torchs_antialiased_bicubic(size):
    torch = pytest.importorskip("torch")
    x = images(2, 8, 8, 3)
    reference = torch.nn.functional.interpolate(
        torch.from_numpy(np.array(x)).permute(0, 3, 1, 2), size=size, mode="bicubic", antialias=True
    )
    np.testing.assert_allclose(upsample(x, size), reference.permute(0, 2, 3, 1), atol=2e-6)


def test_bad_input_is_named():
    x, keys = images(2, 4, 4, 3), jax.random.split(jax.random.key(0), 2)
    for call, words in [
        (lambda: gaussian_blur(x, jnp.ones(2), 4), "kernel_size=4"),
        (lambda: gaussian_blur(x, jnp.ones(3)), "one per image"),
        (lambda: gaussian_blur((255 * x).astype(jnp.uint8), jnp.ones(2)), "uint8"),
        (lambda: gaussian_blur(x[0], jnp.ones(4)), r"\[b, h, w, c\]"),
        (lambda: random_gaussian_blur(keys, x, (0.6, 0.4)), "sigma_range"),
        (lambda: random_gaussian_blur(keys, x, probability=1.5), "probability=1.5"),
        (lambda: upsample(x, 0), "size=0"),
    ]:
        with pytest.raises(UserError, match=words):
            call()
