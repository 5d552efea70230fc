"""Blurs against scipy, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from unclip_jax.errors import UserError
from unclip_jax.stages.degrade import (
    correlate,
    gaussian_blur,
    gaussian_kernels,
    random_gaussian_blur,
)
from unclip_jax.stages.degrade.blur import correlate_corner

blur = jax.jit(gaussian_blur, static_argnums=2)
random_blur = jax.jit(random_gaussian_blur, static_argnums=(2, 3, 4))
kernels_of = jax.jit(gaussian_kernels, static_argnums=3)
filter_with = jax.jit(correlate)


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


def rotated_gaussian(sigma_x, sigma_y, angle, size):
    """The same kernel from its covariance R diag(sigma^2) R^T, in float64."""
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    precision = np.linalg.inv(turn @ np.diag([sigma_x**2, sigma_y**2]) @ turn.T)
    offsets = np.arange(size) - size // 2
    xy = np.stack(np.meshgrid(offsets, offsets), axis=-1)
    kernel = np.exp(-0.5 * np.einsum("hwi,ij,hwj->hw", xy, precision, xy))
    return kernel / kernel.sum()


@pytest.mark.parametrize("kernel_size", [3, 21])
def test_an_anisotropic_blur_is_scipys_with_each_images_own_kernel(kernel_size):
    x = images(3, 12, 9, 2)
    shapes = np.array([[0.6, 3.0, 0.4], [8.0, 0.5, 2.0], [1.5, 1.5, 1.0]])
    kernels = kernels_of(*jnp.float32(shapes.T), kernel_size)
    blurred = filter_with(x, kernels)
    for image, shape, kernel, ours in zip(np.asarray(x), shapes, kernels, blurred, strict=True):
        exact = rotated_gaussian(*shape, kernel_size)
        np.testing.assert_allclose(kernel, exact, atol=1e-6)
        expected = ndimage.convolve(image.astype(np.float64), exact[..., None], mode="mirror")
        np.testing.assert_allclose(ours, expected, atol=2e-6)


def test_a_round_kernel_has_no_direction_and_is_the_separable_blur():
    x, sigma, angle = images(2, 10, 7, 3), jnp.array([0.5, 1.7]), jnp.array([0.3, 2.0])
    kernels = kernels_of(sigma, sigma, angle, 9)
    np.testing.assert_allclose(kernels, kernels_of(sigma, sigma, 0 * angle, 9), atol=1e-6)
    np.testing.assert_allclose(filter_with(x, kernels), blur(x, sigma, 9), atol=2e-6)


def test_a_kernel_cut_short_is_the_small_kernel():
    shape = jnp.array([2.0]), jnp.array([0.7]), jnp.array([0.5])
    cut = kernels_of(*shape, 11, radius=jnp.array([2]))[0]
    small = kernels_of(*shape, 5)[0]
    np.testing.assert_allclose(cut, np.pad(small, 3), atol=1e-7)


def test_the_first_axis_points_along_the_angle():
    """A line-like kernel at 45 degrees lies on the diagonal on which x and y grow together."""
    kernel = np.asarray(kernels_of(jnp.array(3.0), jnp.array(0.0), jnp.pi / 4, 7))
    np.testing.assert_allclose(kernel.sum(), np.trace(kernel), rtol=1e-6)
    assert kernel[0, 0] > 0


def test_a_blur_sees_only_its_corner_of_the_canvas():
    x, kernel = images(1, 13, 13, 3), kernels_of(3.0, 1.0, 0.5, 21)
    apart = filter_with(x[:, :5, :8], kernel[None])[0]
    inside = jax.jit(correlate_corner)(1e6 * x[0].at[:5, :8].mul(1e-6), kernel, 5, 8)
    np.testing.assert_allclose(inside[:5, :8], apart, atol=1e-6)


def test_bad_input_is_named():
    x, keys = images(2, 4, 4, 3), jax.random.split(jax.random.key(0), 2)
    for call, words in [
        (lambda: gaussian_blur(x, jnp.ones(2), 4), "kernel_size: got 4"),
        (lambda: gaussian_blur(x, jnp.ones(3)), r"sigma's shape: got \(3,\), expected \[2\]"),
        (lambda: gaussian_blur((255 * x).astype(jnp.uint8), jnp.ones(2)), "uint8"),
        (lambda: gaussian_blur(x[0], jnp.ones(4)), r"images.s shape: got \(4, 4, 3\)"),
        (lambda: random_gaussian_blur(keys, x, (0.6, 0.4)), "sigma_range"),
        (lambda: random_gaussian_blur(keys, x, probability=1.5), "probability: got 1.5"),
        (lambda: gaussian_blur(jnp.zeros((1, 0, 4, 3)), jnp.ones(1)), r"\(1, 0, 4, 3\)"),
        (lambda: gaussian_kernels(1.0, 1.0, 0.0, 8), "kernel_size: got 8"),
        (lambda: correlate(x, jnp.ones((2, 3, 5))), r"expected \[2, 5, 5\]"),
        (lambda: correlate(x, jnp.ones((2, 4, 4))), "kernel_size: got 4"),
        (lambda: correlate(x, jnp.ones((1, 3, 3))), r"expected \[2, 3, 3\]"),
    ]:
        with pytest.raises(UserError, match=words):
            call()
