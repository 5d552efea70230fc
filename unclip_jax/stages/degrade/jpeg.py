"""JPEG noise: what a picture loses by being saved and opened again.

Only the lossy half of ITU-T T.81 is here, for entropy coding loses nothing:

    RGB -> YCbCr, 8 bit              JFIF; Cb and Cr averaged over 2 x 2 pixels (4:2:0)
    8 x 8 blocks -> DCT -> round(coefficient / step)      T.81 A.3.3, steps of annex K
    and back                         Cb and Cr interpolated by triangles

It is all done in integers, rounded where the library libjpeg rounds, so the pixels are its own.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.common import checks
from unclip_jax.errors import wrong
from unclip_jax.stages.pixels import check_images

SUBSAMPLINGS = ("4:2:0", "4:4:4")

# T.81 annex K, tables K.1 and K.2: steps of the quantiser at quality 50, rows of rising vertical
# frequency.
LUMA_STEPS = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ],
    np.int32,
)
CHROMA_STEPS = np.full((8, 8), 99, np.int32)
CHROMA_STEPS[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]

# The DCT of T.81 A.3.3 times sqrt(8), in units of 2^-13: row u > 0 holds sqrt(2) cos((2x + 1) u pi
# / 16). Some entries are off by one, for they are what the rounded factors of libjpeg's fast DCT
# (after Loeffler et al. 1989) add up to. Left halves; the right ones mirror them, with the other
# sign in odd rows.
_LEFT = np.array(
    [
        [8192, 8192, 8192, 8192],
        [11363, 9633, 6437, 2260],
        [10703, 4433, -4433, -10703],
        [9633, -2259, -11362, -6436],
        [8192, -8192, -8192, 8192],
        [6437, -11362, 2261, 9633],
        [4433, -10704, 10704, -4433],
        [2260, -6436, 9633, -11363],
    ],
    np.int32,
)
DCT = np.concatenate([_LEFT, _LEFT[:, ::-1] * np.array([[1], [-1]] * 4, np.int32)], axis=1)


def jpeg(images: jax.Array, quality: jax.Array, subsampling: str = "4:2:0") -> jax.Array:
    """Each image as it is after being saved as JPEG and opened again.

    The pixels are those of libjpeg-turbo at its defaults (islow DCT, fancy upsampling).

    Args:
        images: float `[b, h, w, 3]` in [-1, 1], of any size; rounded to 256 levels first.
        quality: integers `[b]` from 1 to 100, as libjpeg scales them; clipped to that.
        subsampling: "4:2:0", Cb and Cr at half of the sides, or "4:4:4"; static.

    Returns:
        images of the same shape and dtype, on the 256 levels of [-1, 1].

    Raises:
        UserError: images that are not float `[b, h, w, 3]`, quality not integer `[b]`, an unknown
            subsampling.
    """
    check_images(images, channels=3)
    checks.shape("quality", quality, images.shape[:1])
    if not jnp.issubdtype(quality.dtype, jnp.integer):
        raise wrong("quality's dtype", quality.dtype.name, "whole numbers from 1 to 100")
    checks.choice("subsampling", subsampling, SUBSAMPLINGS)
    _, h, w, _ = images.shape
    saved = jax.vmap(lambda image, q: jpeg_corner(image, q, h, w, subsampling))(
        images.astype(jnp.float32), quality
    )
    return saved.astype(images.dtype)


def jpeg_corner(
    canvas: jax.Array,
    quality: jax.Array,
    height: int | jax.Array,
    width: int | jax.Array,
    subsampling: str = "4:2:0",
) -> jax.Array:
    """`jpeg` for the image in the top left corner of a canvas; `bsr` says why.

    Args:
        canvas: float32 `[h, w, 3]`, its corner in [-1, 1].
        quality: one integer, 1 to 100; may be traced.
        height: rows of the canvas that are the image; may be traced.
        width: columns of the canvas that are the image; may be traced.
        subsampling: as for `jpeg`.

    Returns:
        float32 `[h, w, 3]`, without meaning outside the corner.
    """
    h, w, _ = canvas.shape
    levels = jnp.round((jnp.clip(canvas, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.int32)
    # Whole blocks: the edge is repeated to the right and below.
    rows, columns = jnp.arange(_round_up(h, 16)), jnp.arange(_round_up(w, 16))
    levels = levels[jnp.minimum(rows, height - 1)][:, jnp.minimum(columns, width - 1)]
    y, cb, cr = _to_ycbcr(levels)
    y = _lose(y, LUMA_STEPS, quality)
    small = (height + 1) // 2, (width + 1) // 2
    if subsampling == "4:2:0":
        cb, cr = (_halve(component, small[0]) for component in (cb, cr))
    cb, cr = (_lose(component, CHROMA_STEPS, quality) for component in (cb, cr))
    if subsampling == "4:2:0":
        cb, cr = (_double(component, *small) for component in (cb, cr))
    return (_to_rgb(y, cb, cr)[:h, :w] - 127.5) / 127.5


def quantiser_steps(table: np.ndarray, quality: jax.Array) -> jax.Array:
    """libjpeg's steps, int32 `[8, 8]` in 1..255, for one quality: halved at 75, doubled at 25."""
    quality = jnp.clip(quality, 1, 100).astype(jnp.int32)
    percent = jnp.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    return jnp.clip((table * percent + 50) // 100, 1, 255)


def _lose(levels: jax.Array, table: np.ndarray, quality: jax.Array) -> jax.Array:
    """One component `[h, w]`, 0..255, through DCT, quantiser and back; sides multiples of 8."""
    steps = quantiser_steps(table, quality)[None, :, None, :]
    h, w = levels.shape
    blocks = (levels - 128).reshape(h // 8, 8, w // 8, 8)
    # Rows first, kept to quarters, then columns: eight times the coefficients.
    rows = _rounded_shift(jnp.einsum("vx,ryqx->ryqv", DCT, blocks), 11)
    eighths = _rounded_shift(jnp.einsum("uy,ryqv->ruqv", DCT, rows), 15)
    quantised = jnp.sign(eighths) * ((jnp.abs(eighths) + 4 * steps) // (8 * steps))
    columns = _rounded_shift(jnp.einsum("uy,ruqv->ryqv", DCT, quantised * steps), 11)
    decoded = _rounded_shift(jnp.einsum("vx,ryqv->ryqx", DCT, columns), 18)
    return jnp.clip(decoded.reshape(h, w) + 128, 0, 255)


def _rounded_shift(x: jax.Array, bits: int) -> jax.Array:
    """x / 2^bits to the nearest integer, halves upwards."""
    return (x + (1 << (bits - 1))) >> bits


def _halve(levels: jax.Array, height: int | jax.Array) -> jax.Array:
    """Averages over 2 x 2; halves are rounded down in even columns and up in odd ones.

    Rows from `height` on, of those that come out, repeat the last one before.
    """
    h, w = levels.shape
    sums = levels.reshape(h // 2, 2, w // 2, 2).sum((1, 3))
    means = (sums + 1 + jnp.arange(w // 2)[None, :] % 2) // 4
    small = means[jnp.minimum(jnp.arange(h // 2), height - 1)]
    return jnp.pad(small, [(0, -side % 8) for side in small.shape], mode="edge")


def _double(levels: jax.Array, height: int | jax.Array, width: int | jax.Array) -> jax.Array:
    """Triangle interpolation to twice the sides: 3/4 of the nearest, 1/4 of the next, each way.

    The image is the corner `[height, width]`, whose edge is repeated. Sixteenths are rounded by
    adding 8 in even columns and 7 in odd ones. Of a component at most 2 wide, libjpeg repeats every
    value instead: the next is then the nearest.
    """
    step = jnp.where(jnp.asarray(width) > 2, 1, 0)

    def nearest_and_next(side: int, inside: int | jax.Array) -> list[jax.Array]:
        i = jnp.arange(2 * side)
        return [jnp.clip(k, 0, inside - 1) for k in (i // 2, i // 2 + (2 * (i % 2) - 1) * step)]

    h, w = levels.shape
    near, far = nearest_and_next(h, height)
    quarters = 3 * levels[near] + levels[far]
    near, far = nearest_and_next(w, width)
    odd = jnp.arange(2 * w)[None, :] % 2
    return (3 * quarters[:, near] + quarters[:, far] + 8 - odd) // 16


def _to_ycbcr(rgb: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """JFIF's RGB -> YCbCr: int32 `[h, w, 3]` -> three `[h, w]`, all 0..255."""
    r, g, b = (rgb[..., k] for k in range(3))
    y = _fixed(0.299) * r + _fixed(0.587) * g + _fixed(0.114) * b
    cb = -_fixed(0.16874) * r - _fixed(0.33126) * g + _fixed(0.5) * b
    cr = _fixed(0.5) * r - _fixed(0.41869) * g - _fixed(0.08131) * b
    middle = (128 << 16) - 1  # libjpeg rounds these halves down
    return tuple(_rounded_shift(component, 16) for component in (y, cb + middle, cr + middle))


def _to_rgb(y: jax.Array, cb: jax.Array, cr: jax.Array) -> jax.Array:
    """JFIF's YCbCr -> RGB: three int32 `[h, w]` -> `[h, w, 3]`, all 0..255."""
    cb, cr = cb - 128, cr - 128
    red = _fixed(1.402) * cr
    green = -_fixed(0.34414) * cb - _fixed(0.71414) * cr
    blue = _fixed(1.772) * cb
    rgb = [y + _rounded_shift(difference, 16) for difference in (red, green, blue)]
    return jnp.clip(jnp.stack(rgb, axis=-1), 0, 255)


def _fixed(x: float) -> int:
    """A factor in units of 2^-16."""
    return round(x * 65536)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
