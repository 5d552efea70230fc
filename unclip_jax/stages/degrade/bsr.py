"""BSR degradation: a picture made small the way pictures on the web were, each in its own way.

Zhang et al. 2021 (BSRGAN, arXiv 2103.14006, section 3) shuffle simple corruptions:

    blur, blur, shrink by a random factor, shrink to the final size, noise, JPEG     in any order,
    then JPEG once more,

each with random kernels and strengths. Rombach et al. 2022 (arXiv 2112.10752) found the original
strengths too much for training an upsampler, and use milder ones; those are `BSR`'s defaults.
Their camera sensor noise is left out, as both do when they have no camera model at hand.

**Fixed shapes.** In between, each example of a batch has a size of its own, and a compiled program
has none to spare. So an image is the top left corner, of a traced side, of a canvas that never
changes its shape; every step reads the corner alone, its own rule continuing it beyond the edge
(mirrored for blurs, repeated for JPEG), and whatever stands outside is never looked at.

**Random order.** The steps are a loop over an array of step numbers, which is shuffled. Under
`vmap` each turn computes every kind of step and keeps the one due: four times the work, for one
compilation and examples that need nothing of each other.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from unclip_jax.common import checks
from unclip_jax.diffusion.states import many_keys
from unclip_jax.errors import wrong
from unclip_jax.stages.degrade.blur import correlate_corner, gaussian_kernels
from unclip_jax.stages.degrade.jpeg import jpeg_corner
from unclip_jax.stages.degrade.resample import BILINEAR, NEAREST, resize_corner, resize_matrix
from unclip_jax.stages.pixels import check_images

BLUR, SHRINK, NOISE, JPEG = range(4)
STEPS = (BLUR, BLUR, SHRINK, SHRINK, NOISE, JPEG)  # in random order; the last SHRINK is the final

NOISE_KINDS = (0.4, 0.4, 0.2)  # how often noise is coloured, grey, or correlated at random
LEVEL = 2 / 255  # from one of 256 levels to the next, in [-1, 1]


@dataclasses.dataclass(frozen=True)
class BSR:
    """Ranges, low and high, that `bsr` draws from uniformly, for each example and each step.

    The defaults are the milder ones of Rombach et al. for a factor of 4; `BSRGAN` has Zhang et
    al.'s.

    Attributes:
        isotropic_probability: how often a blur is round; if not, it has two sigmas and an angle.
        isotropic_sigma: of a round blur, in pixels of the image as it is then.
        anisotropic_sigma: of each axis of a blur that is not round.
        blur_radius: whole pixels on each side of the kernel's centre; 3 is a kernel of 7 x 7.
        noise_level: standard deviation of the noise, in levels of 256.
        jpeg_probability: how often the shuffled JPEG step is taken; the last is always.
        jpeg_quality: whole numbers from 1 to 100.
    """

    isotropic_probability: float = 0.5
    isotropic_sigma: tuple[float, float] = (0.0, 0.7)
    anisotropic_sigma: tuple[float, float] = (0.0, 2.0)
    blur_radius: tuple[int, int] = (3, 10)
    noise_level: tuple[float, float] = (1.0, 2.0)
    jpeg_probability: float = 0.9
    jpeg_quality: tuple[int, int] = (80, 95)

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("isotropic_probability", "jpeg_probability"):
            checks.number(f"BSR.{name}", getattr(self, name), least=0, most=1)
        limits = {
            "isotropic_sigma": (0, 100),
            "anisotropic_sigma": (0, 100),
            "blur_radius": (1, 50),
            "noise_level": (0, 255),
            "jpeg_quality": (1, 100),
        }
        for name, (least, most) in limits.items():
            low, high = getattr(self, name)
            if not least <= low <= high <= most:
                raise wrong(f"BSR.{name}", (low, high), f"{least} <= low <= high <= {most}")
        for name in ("blur_radius", "jpeg_quality"):
            for end in getattr(self, name):
                checks.count(f"BSR.{name}", end)


BSRGAN = BSR(
    isotropic_sigma=(0.1, 2.8),
    anisotropic_sigma=(0.5, 8.0),
    noise_level=(1.0, 25.0),
    jpeg_probability=0.75,
    jpeg_quality=(30, 95),
)
"""The original, stronger ranges, for a factor of 4 (arXiv 2103.14006, section 3)."""


def bsr(keys: jax.Array, images: jax.Array, low_size: int, settings: BSR = BSR()) -> jax.Array:
    """Images degraded and made small, each by its own key alone.

    Args:
        keys: typed keys `[b]`, one per image.
        images: float `[b, size, size, 3]` in [-1, 1].
        low_size: side of what comes out, in pixels, at most `size`; static.
        settings: ranges of all that is random; static.

    Returns:
        `[b, low_size, low_size, 3]` of the images' dtype, on the 256 levels of [-1, 1].

    Raises:
        UserError: images that are not square float RGB, keys not `[b]`, an impossible size.
    """
    check_images(images, channels=3)
    size = images.shape[1]
    if size != images.shape[2]:
        raise wrong("images' shape", images.shape, "squares", "crop them first")
    if not 1 <= low_size <= size:
        raise wrong("low_size", low_size, f"1 to the images' own {size} pixels")
    keys = many_keys(keys)
    checks.shape("keys", keys, images.shape[:1])
    degrade = functools.partial(_degrade, low_size=low_size, settings=settings)
    return jax.vmap(degrade)(keys, images.astype(jnp.float32)).astype(images.dtype)


def _degrade(key: jax.Array, image: jax.Array, low_size: int, settings: BSR) -> jax.Array:
    """One image `[size, size, 3]` -> `[low_size, low_size, 3]`."""
    plan_key, last_key, *step_keys = jax.random.split(key, 2 + len(STEPS))
    size = image.shape[0]
    order, sides = plan(plan_key, size, low_size)

    def take(state: tuple[jax.Array, jax.Array], step: tuple) -> tuple[tuple, None]:
        canvas, side = state
        kind, new_side, step_key = step
        number_key, noise_key = jax.random.split(step_key)
        numbers = jax.random.uniform(number_key, (6,))  # all that the kind of step due draws
        branches = [
            lambda: _blur(numbers, canvas, side, settings),
            lambda: _shrink(numbers, canvas, side, new_side),
            lambda: _noise(numbers, noise_key, canvas, settings),
            lambda: _jpeg(numbers, canvas, side, settings),
        ]
        canvas = jnp.clip(jax.lax.switch(kind, branches), -1.0, 1.0)
        return (canvas, new_side), None

    start = image, jnp.asarray(size)
    (canvas, _), _ = jax.lax.scan(take, start, (order, sides, jnp.stack(step_keys)))
    quality = _whole(jax.random.uniform(last_key), settings.jpeg_quality)
    return jpeg_corner(canvas[:low_size, :low_size], quality, low_size, low_size)


def plan(key: jax.Array, size: int, low_size: int) -> tuple[jax.Array, jax.Array]:
    """The order of `STEPS` for one example, and the side in pixels after each: int32 `[6]` both.

    The first shrinking is by a factor uniform in [1, 2 size / low_size], so it may go too far; the
    second leads to `low_size`.
    """
    *ranks, number = jax.random.uniform(key, (len(STEPS) + 1,))
    order = jnp.asarray(STEPS)[jnp.argsort(jnp.stack(ranks))]
    factor = _between(number, (1.0, 2 * size / low_size))
    first = jnp.maximum(jnp.round(size / factor).astype(jnp.int32), 1)
    shrunk = jnp.cumsum(order == SHRINK)
    return order, jnp.stack([jnp.asarray(size), first, jnp.asarray(low_size)])[shrunk]


def noise_mixing(kind: int | jax.Array, columns: jax.Array) -> jax.Array:
    """What makes three channels of white noise unit noise of a kind: noise @ mixing, `[3, 3]`.

    Kind 0 leaves the channels independent, 1 gives all of them the same noise (grey), 2 mixes them
    by the normalised `columns` `[3, 3]`. All have columns of length 1, so each channel's variance
    stays what it was.
    """
    grey = jnp.zeros((3, 3)).at[0].set(1.0)
    mixed = columns / jnp.linalg.norm(columns, axis=0, keepdims=True)
    return jnp.stack([jnp.eye(3), grey, mixed])[kind]


def _blur(numbers: jax.Array, canvas: jax.Array, side: jax.Array, settings: BSR) -> jax.Array:
    coin, both, first, second, turn, reach = numbers
    is_round = coin < settings.isotropic_probability
    both = _between(both, settings.isotropic_sigma)
    sigma_x = jnp.where(is_round, both, _between(first, settings.anisotropic_sigma))
    sigma_y = jnp.where(is_round, both, _between(second, settings.anisotropic_sigma))
    radius = _whole(reach, settings.blur_radius)
    kernel_size = 2 * settings.blur_radius[1] + 1
    kernel = gaussian_kernels(sigma_x, sigma_y, jnp.pi * turn, kernel_size, radius)
    return correlate_corner(canvas, kernel, side, side)


def _shrink(numbers: jax.Array, canvas: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    """By any kernel; the blur before NEAREST has a sigma of 0.1 to 0.6 new pixels."""
    kind = _whole(numbers[0], (BILINEAR, NEAREST))
    sigma = _between(numbers[1], (0.1, 0.6)) * old / new
    return resize_corner(canvas, resize_matrix(kind, old, new, sigma, canvas.shape[0]))


def _noise(numbers: jax.Array, noise_key: jax.Array, canvas: jax.Array, settings: BSR) -> jax.Array:
    h, w, c = canvas.shape
    level = LEVEL * _between(numbers[0], settings.noise_level)
    kind = jnp.sum(numbers[1] >= jnp.cumsum(jnp.asarray(NOISE_KINDS[:-1])))
    columns, white = jnp.split(jax.random.normal(noise_key, (c + h * w, c)), [c])
    mixing, precision = noise_mixing(kind, columns), jax.lax.Precision.HIGHEST
    return canvas + level * jnp.matmul(white, mixing, precision=precision).reshape(h, w, c)


def _jpeg(numbers: jax.Array, canvas: jax.Array, side: jax.Array, settings: BSR) -> jax.Array:
    saved = jpeg_corner(canvas, _whole(numbers[1], settings.jpeg_quality), side, side)
    return jnp.where(numbers[0] < settings.jpeg_probability, saved, canvas)


def _between(number: jax.Array, ends: tuple[float, float]) -> jax.Array:
    """A number of [0, 1) as one between the ends."""
    return ends[0] + number * (ends[1] - ends[0])


def _whole(number: jax.Array, ends: tuple[int, int]) -> jax.Array:
    """A number of [0, 1) as a whole one from the first end to the last, both included."""
    floor = jnp.floor(_between(number, (ends[0], ends[1] + 1))).astype(jnp.int32)
    return jnp.minimum(floor, ends[1])
