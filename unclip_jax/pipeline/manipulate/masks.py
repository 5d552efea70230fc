"""Masks: which part of a picture is to be painted anew, at every size that it is needed at.

White paints, and where a mask has transparency, what is transparent. Whatever the size, a pixel of
which any part is to be painted is painted; and what is kept shows nothing of what is painted over.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from unclip_jax.data.images import CENTRE, Size, both, open_rgb, square
from unclip_jax.errors import UserError, wrong

Box = tuple[float, float, float, float]

_HOW = "give one without transparency, white where to paint and black elsewhere"
_HALF = 128
_VARIES = 5  # levels within which transparency is the same all over
_TOUCHED = 1e-4  # of a pixel: less of it is rounding


def hole_of(rgb: np.ndarray, alpha: np.ndarray | None = None, name: str = "mask") -> np.ndarray:
    """Where to paint, bool [h, w].

    Args:
        rgb: uint8 [h, w, 3], on white where it is transparent.
        alpha: uint8 [h, w], 0 where it is transparent; None for nowhere.
        name: what the user knows the mask by.

    Raises:
        UserError: it is transparent all over, or white where it is not transparent, so that there
            are two readings of it.
    """
    levels = rgb.mean(axis=2)
    if alpha is None:
        return levels >= _HALF
    clear = alpha < _HALF
    # As if it were opaque; what white shows through is taken off again.
    white = ~clear & (255 - (255 - levels) * 255 / np.maximum(alpha, 1) >= _HALF)
    if clear.all():
        raise wrong(name, "transparent all over", "a part that is not", _HOW)
    if int(alpha.max()) - int(alpha.min()) <= _VARIES:
        return white
    if white.any():
        shares = [f"{100 * part.mean():.3g}%" for part in (clear, white)]
        parts = "by transparency {} is to paint, by white {}".format(*shares)
        raise UserError(f"{name}: has two readings: {parts}; {_HOW}")
    return clear


def check_hole(hole: np.ndarray, image: np.ndarray) -> np.ndarray:
    """The hole, bool [h, w].

    Raises:
        UserError: it is something else, or of other proportions than the image.
    """
    hole = np.asarray(hole)
    if hole.dtype.kind in "iu" and np.isin(hole, (0, 1)).all():
        hole = hole.astype(bool)
    if hole.dtype != bool or hole.ndim != 2 or not hole.size:
        given = f"{hole.dtype} of shape {hole.shape}"
        raise wrong("hole", given, "bool [h, w], True where to paint", "write mask >= 128")
    skew = hole.shape[0] * image.shape[1] - hole.shape[1] * image.shape[0]
    if abs(skew) > max(image.shape[:2]):  # more than a pixel of the mask, rounded away
        raise UserError(
            f"mask of {hole.shape[1]} x {hole.shape[0]} pixels: expected the proportions of the"
            f" picture, {image.shape[1]} x {image.shape[0]}"
        )
    return hole


def cover(hole: np.ndarray, image: np.ndarray, size: Size, wider: int = 0) -> np.ndarray:
    """Which pixels of the picture's centre are to be painted, all or in part.

    Args:
        hole: bool [h, w], in the proportions of the image.
        image: the picture.
        size: of the centre that is seen.
        wider: pixels that are painted around.

    Returns:
        bool [h, w, 1].
    """
    height, width = image.shape[:2]
    box = CENTRE.box(width, height, size)
    found = _touched(hole, box, image.shape[:2], both(size))
    for _ in range(wider):
        edged = np.pad(found, 1)
        rows = edged[:-2] | edged[1:-1] | edged[2:]
        found = rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]
    return found[..., None]


def _touched(
    hole: np.ndarray, box: Box, whole: tuple[int, int], shape: tuple[int, int]
) -> np.ndarray:
    """Which pixels of a grid over a box of the whole picture any part of the hole lies in."""

    def ends(first: float, last: float, of: int, held: int, count: int):
        at = np.linspace(first, last, count + 1) * (held / of)
        low = np.floor(at[:-1] + _TOUCHED).astype(int)
        return low, np.maximum(np.ceil(at[1:] - _TOUCHED).astype(int), low + 1)

    left, top, right, bottom = box
    rows, below = ends(top, bottom, whole[0], hole.shape[0], shape[0])
    columns, beside = ends(left, right, whole[1], hole.shape[1], shape[1])
    sums = np.pad(hole.cumsum(0, np.int32).cumsum(1), ((1, 0), (1, 0)))
    counted = sums[below[:, None], beside[None]] - sums[rows[:, None], beside[None]]
    counted += sums[rows[:, None], columns[None]] - sums[below[:, None], columns[None]]
    return counted > 0


def kept(image: np.ndarray, hole: np.ndarray, size: Size) -> np.ndarray:
    """The picture's centre of which the hole had no part, uint8 [h, w, 3].

    Resizing mixes neighbours; next to the hole only those that are kept are mixed here.
    """
    given = square(image, size)
    picture = np.asarray(open_rgb(image, max(both(size))), np.float32)
    height, width = picture.shape[:2]
    keep = ~_touched(hole, (0, 0, width, height), (height, width), (height, width))
    box = CENTRE.box(width, height, size)

    def resized(plane: np.ndarray) -> np.ndarray:
        whole = Image.fromarray(np.ascontiguousarray(plane, np.float32))
        return np.asarray(whole.resize(both(size)[::-1], Image.Resampling.BICUBIC, box))

    share = resized(keep)[..., None]
    mixed = np.stack([resized(picture[..., c] * keep) for c in range(3)], axis=2)
    mixed = np.clip(np.round(mixed / np.maximum(share, 0.05)), 0, 255).astype(np.uint8)
    return np.where((np.abs(share - 1) > 1e-4) & (share > 0.05), mixed, given)


def filled(image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """The picture with the hole in the mean colour of the rest, uint8 [h, w, 3]."""
    picture = np.array(open_rgb(image, 1))
    shape = picture.shape[:2]
    inside = _touched(hole, (0, 0, shape[1], shape[0]), shape, shape)
    rest = picture[~inside]
    colour = rest.mean(axis=0) if len(rest) else np.full(3, 127.5)
    picture[inside] = np.round(colour)
    return picture
