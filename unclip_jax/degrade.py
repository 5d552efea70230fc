"""Corruptions of the low-resolution images that upsamplers are conditioned on.

An upsampler trained on clean small images fails on the slightly wrong ones that a decoder makes,
so training blurs them (unCLIP section 2.3, after Saharia et al. 2021, arXiv 2104.07636). All of it
is jittable, and each example has its own key and its own strength.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from unclip_jax.errors import UserError


def gaussian_blur(images: jax.Array, sigma: jax.Array, kernel_size: int = 3) -> jax.Array:
    """Blur each image with its own separable Gaussian; the border reflects, edge not doubled.

    Args:
        images: float `[b, h, w, c]`.
        sigma: standard deviations in pixels `[b]`, at least 0; 0 leaves the image as it is.
        kernel_size: odd width of the kernel in pixels; static.

    Returns:
        images of the same shape and dtype, computed in float32.

    Raises:
        UserError: images that are not float `[b, h, w, c]`, sigma not `[b]`, an even kernel.
    """
    _check_images(images)
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise UserError(f"kernel_size={kernel_size}: expected an odd number of pixels, such as 3")
    if sigma.shape != images.shape[:1]:
        raise UserError(f"sigma of shape {sigma.shape}: expected one per image {images.shape[:1]}")
    radius = kernel_size // 2
    offsets = jnp.arange(-radius, radius + 1, dtype=jnp.float32)
    tiny = 1e-6  # so narrow that every weight but the centre's is exactly 0
    scaled = offsets[None] / jnp.maximum(sigma.astype(jnp.float32), tiny)[:, None]
    weights = jax.nn.softmax(-0.5 * scaled**2, axis=1)
    blurred = images.astype(jnp.float32)
    for axis in (1, 2):
        blurred = _correlate(blurred, weights, axis)
    return blurred.astype(images.dtype)


def random_gaussian_blur(
    keys: jax.Array,
    images: jax.Array,
    sigma_range: tuple[float, float] = (0.4, 0.6),
    probability: float = 0.5,
    kernel_size: int = 3,
) -> jax.Array:
    """Blur each image with the given probability and a uniformly random sigma.

    Args:
        keys: typed keys `[b]`, one per image.
        images: float `[b, h, w, c]`.
        sigma_range: least and largest standard deviation, in pixels.
        probability: of being blurred at all.
        kernel_size: see `gaussian_blur`.

    Returns:
        images of the same shape and dtype.

    Raises:
        UserError: an impossible range or probability, or what `gaussian_blur` raises.
    """
    low, high = sigma_range
    if not 0 <= low <= high:
        raise UserError(f"sigma_range={sigma_range}: expected 0 <= low <= high, in pixels")
    if not 0 <= probability <= 1:
        raise UserError(f"probability={probability}: expected a number from 0 to 1")

    def draw(key: jax.Array) -> jax.Array:
        coin, size = jax.random.split(key)
        sigma = jax.random.uniform(size, minval=low, maxval=high)
        return jnp.where(jax.random.bernoulli(coin, probability), sigma, 0.0)

    return gaussian_blur(images, jax.vmap(draw)(keys), kernel_size)


def upsample(images: jax.Array, size: int | tuple[int, int]) -> jax.Array:
    """Bicubic, antialiased resize of float `[b, h, w, c]` to `size` (a side, or height and width).

    Raises:
        UserError: images that are not float `[b, h, w, c]`, or a size below 1.
    """
    _check_images(images)
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise UserError(f"size={size}: expected at least 1 pixel")
    b, _, _, c = images.shape
    return jax.image.resize(images, (b, height, width, c), "cubic", antialias=True)


def _correlate(images: jax.Array, weights: jax.Array, axis: int) -> jax.Array:
    """Sum of shifted images times their weights `[b, k]`: elementwise, so it fuses and shards."""
    radius = weights.shape[1] // 2
    padding = [(0, 0)] * images.ndim
    padding[axis] = (radius, radius)
    padded = jnp.pad(images, padding, mode="reflect")
    size = images.shape[axis]
    return sum(
        weights[:, k, None, None, None] * jax.lax.slice_in_dim(padded, k, k + size, axis=axis)
        for k in range(weights.shape[1])
    )


def _check_images(images: jax.Array) -> None:
    if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(
            f"images of shape {images.shape} and dtype {images.dtype}: expected floating point "
            "[b, h, w, c]"
        )
