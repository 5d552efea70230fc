"""Images at the border of the stages: uint8 outside, float in [-1, 1] inside."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.common import checks
from unclip_jax.data.images import CENTRE, Fit, Size, square
from unclip_jax.data.records import BadRecord
from unclip_jax.diffusion import gaussian
from unclip_jax.errors import UserError, wrong


def to_float(images: jax.Array) -> jax.Array:
    """uint8 [b, h, w, c] in 0..255 -> float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(images: jax.Array) -> jax.Array:
    """Float [b, h, w, c], clipped to [-1, 1] -> uint8 in 0..255, rounded to nearest."""
    return jnp.round((jnp.clip(images, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


def resize(images: jax.Array, size: int) -> jax.Array:
    """Bicubic, antialiased resize of [b, h, w, c] to [b, size, size, c]; same size is a no-op."""
    b, h, w, c = images.shape
    if (h, w) == (size, size):
        return images
    return jax.image.resize(images, (b, size, size, c), "cubic", antialias=True)


def squared(images: Sequence[np.ndarray], size: Size, fit: Fit = CENTRE) -> np.ndarray:
    """Pictures of any sizes as squares, or of height and width: uint8 [b, h, w, 3].

    By default it is their centres.

    Raises:
        UserError: no pictures, or one that is none.
    """
    if not len(images):
        raise wrong("images", [], "at least one picture")
    squares = []
    for i, image in enumerate(images):
        try:
            squares.append(square(np.asarray(image), size, fit))
        except BadRecord as error:
            raise UserError(f"images[{i}]: {error}; give uint8 pixels [h, w, 3]") from error
    return np.stack(squares)


def check_images(images: jax.Array, channels: int | None = None) -> None:
    """Raise `UserError` unless `images` is float `[b, h, w, channels]` with a pixel in it."""
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise wrong("images' dtype", images.dtype.name, "floating point", "scale them to [-1, 1]")
    checks.shape("images", images, (None, None, None, channels))
    if 0 in images.shape[1:]:
        raise wrong("images' shape", images.shape, "at least one pixel")


def check_channels(
    out_channels: int,
    diffusion: gaussian.Diffusion,
    path: str,
    channels: int = 3,
    spare: bool = False,
) -> None:
    """A learned variance needs a second set of output channels; a fixed one must not have it.

    Args:
        out_channels: of the network.
        diffusion: what it predicts.
        path: of the network's config, for errors.
        channels: of x_t.
        spare: whether a fixed variance may have the second set all the same, which is not read.

    Raises:
        UserError: out_channels is neither.
    """
    expected = {channels * (2 if diffusion.learned_variance else 1)}
    expected |= {2 * channels} if spare else set()
    if out_channels not in expected:
        numbers = " or ".join(map(str, sorted(expected)))
        what = f"{numbers} with diffusion.variance={diffusion.variance!r}"
        raise wrong(f"{path}.out_channels", out_channels, what)
