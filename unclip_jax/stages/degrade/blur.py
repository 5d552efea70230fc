"""Gaussian blurs: a small round one, quickly, and one of any shape and direction."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from unclip_jax.common import checks
from unclip_jax.errors import wrong
from unclip_jax.stages.pixels import check_images

TINY = 1e-6  # a sigma so small that every weight but the centre's is exactly 0


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
    check_images(images)
    checks.shape("sigma", sigma, images.shape[:1])
    scaled = _offsets(kernel_size)[None] / jnp.maximum(sigma.astype(jnp.float32), TINY)[:, None]
    weights = jax.nn.softmax(-0.5 * scaled**2, axis=1)
    blurred = images.astype(jnp.float32)
    for axis in (1, 2):
        blurred = _correlate_along(blurred, weights, axis)
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
        raise wrong("sigma_range", sigma_range, "0 <= low <= high, in pixels")
    checks.number("probability", probability, least=0, most=1)

    def draw(key: jax.Array) -> jax.Array:
        coin, size = jax.random.split(key)
        sigma = jax.random.uniform(size, minval=low, maxval=high)
        return jnp.where(jax.random.bernoulli(coin, probability), sigma, 0.0)

    return gaussian_blur(images, jax.vmap(draw)(keys), kernel_size)


def gaussian_kernels(
    sigma_x: jax.Array,
    sigma_y: jax.Array,
    angle: jax.Array,
    kernel_size: int,
    radius: jax.Array | None = None,
) -> jax.Array:
    """Anisotropic Gaussian kernels: exp(-(u / sigma_x)^2 / 2 - (v / sigma_y)^2 / 2), sum 1.

    (u, v) are the offsets from the centre along the kernel's own axes; the first axis stands at
    `angle` to the image's rows, turning from the columns' direction x to the rows' direction y.

    Args:
        sigma_x: standard deviations along the first axis, in pixels `[...]`, at least 0.
        sigma_y: the same along the second axis `[...]`.
        angle: in radians `[...]`.
        kernel_size: odd width of the kernels in pixels; static.
        radius: kernels are cut to this many pixels on each side of the centre `[...]`; None cuts
            nowhere.

    Returns:
        float32 `[..., kernel_size, kernel_size]`, y before x.

    Raises:
        UserError: an even kernel.
    """
    offsets = _offsets(kernel_size)
    x, y = offsets[None, :], offsets[:, None]
    sigma_x, sigma_y, angle = (
        jnp.asarray(value, jnp.float32)[..., None, None] for value in (sigma_x, sigma_y, angle)
    )
    leading = (1,) * (angle.ndim - 2)
    x, y = x.reshape(*leading, 1, kernel_size), y.reshape(*leading, kernel_size, 1)
    u = jnp.cos(angle) * x + jnp.sin(angle) * y
    v = jnp.cos(angle) * y - jnp.sin(angle) * x
    logits = -0.5 * ((u / jnp.maximum(sigma_x, TINY)) ** 2 + (v / jnp.maximum(sigma_y, TINY)) ** 2)
    if radius is not None:
        inside = jnp.maximum(jnp.abs(x), jnp.abs(y)) <= jnp.asarray(radius)[..., None, None]
        logits = jnp.where(inside, logits, -jnp.inf)
    return jax.nn.softmax(logits, axis=(-2, -1))


def correlate(images: jax.Array, kernels: jax.Array) -> jax.Array:
    """Correlate each image with its own kernel; the border reflects, edge not doubled.

    Correlation does not flip the kernel; for Gaussian kernels it is convolution.

    Args:
        images: float `[b, h, w, c]`.
        kernels: `[b, k, k]`, k odd.

    Returns:
        images of the same shape and dtype, computed in float32.

    Raises:
        UserError: images that are not float `[b, h, w, c]`, or kernels that do not fit them.
    """
    check_images(images)
    b, h, w, _ = images.shape
    k = kernels.shape[-1]
    checks.shape("kernels", kernels, (b, k, k))
    _offsets(k)
    filtered = jax.vmap(lambda image, kernel: correlate_corner(image, kernel, h, w))(
        images.astype(jnp.float32), kernels.astype(jnp.float32)
    )
    return filtered.astype(images.dtype)


def correlate_corner(
    canvas: jax.Array, kernel: jax.Array, height: int | jax.Array, width: int | jax.Array
) -> jax.Array:
    """`correlate` for the image in the top left corner of a canvas; `bsr` says why.

    Sums shifted images times their weights, row by row of the kernel: elementwise, so it fuses
    and shards, and no larger than its kernel's width to compile.

    Args:
        canvas: float32 `[h, w, c]`.
        kernel: float32 `[k, k]`, k odd.
        height: rows of the canvas that are the image; may be traced.
        width: columns of the canvas that are the image; may be traced.

    Returns:
        float32 `[h, w, c]`, without meaning outside the corner.
    """
    h, w, _ = canvas.shape
    k = kernel.shape[0]
    radius = k // 2
    rows = _mirror(jnp.arange(-radius, h + radius), height)
    columns = _mirror(jnp.arange(-radius, w + radius), width)
    padded = canvas[rows][:, columns]

    def add_row(total: jax.Array, row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        shift, weights = row
        strip = jax.lax.dynamic_slice_in_dim(padded, shift, h, axis=0)
        return total + sum(weights[j] * strip[:, j : j + w] for j in range(k)), None

    total, _ = jax.lax.scan(add_row, jnp.zeros_like(canvas), (jnp.arange(k), kernel))
    return total


def _offsets(kernel_size: int) -> jax.Array:
    """Pixels from the centre of an odd kernel, float32 `[kernel_size]`."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise wrong("kernel_size", kernel_size, "an odd number of pixels, such as 3")
    radius = kernel_size // 2
    return jnp.arange(-radius, radius + 1, dtype=jnp.float32)


def _mirror(i: jax.Array, size: int | jax.Array) -> jax.Array:
    """Indices reflected into 0..size-1 about the outermost pixels, however far outside."""
    period = jnp.maximum(2 * (size - 1), 1)
    i = i % period
    return jnp.where(i < size, i, period - i)


def _correlate_along(images: jax.Array, weights: jax.Array, axis: int) -> jax.Array:
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
