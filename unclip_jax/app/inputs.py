"""What people type and upload, checked: anything may come, for anyone can speak HTTP."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from unclip_jax.common import checks
from unclip_jax.data import images
from unclip_jax.errors import UserError, wrong
from unclip_jax.pipeline.tasks.inputs import read_image

MAX_BYTES = 20 * 2**20  # of an upload
MAX_PIXELS = 40_000_000
MAX_CHARACTERS = 1000  # of a caption; CLIP reads some 300 of them
MAX_SEED = 2**53 - 1  # the largest whole number that a browser holds exactly

FORMATS = "PNG, JPEG, WebP, GIF, BMP, TIFF, PPM or AVIF"


def text(name: str, value: object, *, empty: bool = False) -> str:
    """A caption.

    Raises:
        UserError: it is empty and must not be, too long, or no text.
    """
    if value is None and empty:  # a field that was never opened
        return ""
    if not isinstance(value, str):
        raise UserError(f"{name}: expected some words")
    if not value.strip() and not empty:
        raise UserError(f"{name}: is empty; type some words")
    if len(value) > MAX_CHARACTERS:
        raise UserError(
            f"{name}: has {len(value):,} characters, more than {MAX_CHARACTERS:,}; shorten it"
        )
    return value


def lines(name: str, value: object, *, least: int, most: int) -> list[str]:
    """Captions, one a line.

    Raises:
        UserError: too few, too many, or one that is too long.
    """
    found = str(value or "").splitlines()
    found = [text(name, line.strip()) for line in found if line.strip()]
    if not least <= len(found) <= most:
        raise UserError(f"{name}: got {len(found)} lines, expected {least} to {most}")
    return found


def scale(name: str, value: object) -> float | None:
    """A guidance scale; None where the field is left empty."""
    return None if value is None else checks.number(name, value, 0, 30)


def numbers(name: str, value: object, count: int) -> list[float] | None:
    """So many numbers, apart by spaces or commas; None where the field is left empty.

    Raises:
        UserError: another number of them, or something else.
    """
    words = text(name, value or "", empty=True).replace(",", " ").split()
    try:
        found = [checks.number(name, float(word), -100, 100) for word in words]
    except ValueError:
        raise wrong(name, value, "numbers apart by spaces") from None
    if found and len(found) != count:
        raise wrong(name, value, f"{count} numbers, one for each picture and prompt")
    return found or None


def whole(name: str, value: object, low: int, high: int) -> int:
    """A whole number in a range, which browsers may send as a float.

    Raises:
        UserError: it is none, or out of range.
    """
    found = checks.number(name, value, low, high)
    if found != int(found):
        raise wrong(name, value, f"a whole number, {low} to {high}")
    return int(value)


def choice(name: str, value: object, choices: Sequence[int]) -> int:
    """One of a few numbers: each makes a program of its own, so there cannot be any.

    Raises:
        UserError: another one.
    """
    if isinstance(value, bool):
        raise wrong(name, value, f"one of {', '.join(map(str, choices))}")
    return int(checks.choice(name, value, choices))


def picture(name: str, path: object) -> np.ndarray:
    """An uploaded file of any mode as uint8 [h, w, 3]; transparency goes on white.

    Raises:
        UserError: none was uploaded, it is too large in bytes or in pixels, or no picture.
    """
    if not isinstance(path, str) or not path:
        raise UserError(f"{name}: there is none; upload one")
    file = Path(path)
    try:
        size = os.path.getsize(file)
    except OSError:
        raise UserError(f"{name}: it was deleted meanwhile; upload it again") from None
    if size > MAX_BYTES:
        raise UserError(
            f"{name}: {size / 2**20:.0f} MB, at most {MAX_BYTES >> 20} are taken; shrink it"
        )
    kind, width, height = _header(name, file)
    if kind not in images.formats():
        raise UserError(f"{name}: is a {kind} file; give {FORMATS}")
    if width * height > MAX_PIXELS:
        raise UserError(
            f"{name}: {width} x {height} pixels, at most {MAX_PIXELS // 10**6} million are"
            " taken; shrink it"
        )
    try:
        return read_image(path, name)
    except UserError as error:  # which names the server's file
        raise UserError(str(error).replace(f" {path!r}", "")) from error


def _header(name: str, file: Path) -> tuple[str, int, int]:
    """Format, width and height, as the file itself says; nothing is decoded."""
    try:
        with Image.open(file) as opened:
            return opened.format or "nameless", *opened.size
    except Image.DecompressionBombError:
        raise UserError(
            f"{name}: more than {MAX_PIXELS // 10**6} million pixels; shrink it"
        ) from None
    except Exception:  # Pillow's readers raise whatever a broken file leads them to
        raise UserError(f"{name}: is no picture, or a broken one; give {FORMATS}") from None
