"""Captioned grids of pictures, and PNG files that say how they were made."""

from __future__ import annotations

import bisect
import functools
import math
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError

from unclip_jax.common import checks
from unclip_jax.common.files import replacing
from unclip_jax.errors import UserError, wrong

FONTS = Path(__file__).parent / "fonts"

_INK = (32, 32, 32)
_PAPER = (255, 255, 255)
_MAX_LINES = 4


def captioned_grid(
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    *,
    columns: int | None = None,
    title: str | None = None,
    min_side: int = 128,
    font_size: int = 13,
) -> Image.Image:
    """Pictures in equal cells on white, each with its caption wrapped underneath.

    Args:
        images: uint8 arrays [h, w, 3] (or [h, w, 1], grey), of any sizes; each is centred in its
            cell.
        captions: one per picture, any Unicode. A character that the font lacks shows as a box;
            a caption longer than four lines ends in an ellipsis.
        columns: pictures per row; by default about as many as there are rows.
        title: a line, wrapped if need be, above the grid.
        min_side: small pictures are enlarged by a whole factor, pixel for pixel, until the
            longest side among them reaches this.
        font_size: of the captions, in pixels.

    Returns:
        An RGB image.

    Raises:
        UserError: no pictures, another number of captions, or an array of another kind.
    """
    if len(images) != len(captions) or not len(images):
        raise UserError(
            f"grid: got {len(images)} images and {len(captions)} captions, expected one caption"
            " for each of at least one image"
        )
    if columns is not None:
        checks.count("grid columns", columns)
    pictures = _enlarge([_picture(image, i) for i, image in enumerate(images)], min_side)
    columns = min(columns or math.ceil(math.sqrt(len(pictures))), len(pictures))
    rows = math.ceil(len(pictures) / columns)

    font, title_font = _font(font_size), _font(round(font_size * 1.4))
    gap, line_height = font_size, round(font_size * 1.35)
    width = max(picture.width for picture in pictures)
    height = max(picture.height for picture in pictures)
    texts = [_wrap(caption, font, width, _MAX_LINES) for caption in captions]
    cell_height = height + gap // 2 + line_height * max(len(lines) for lines in texts)

    total_width = gap + columns * (width + gap)
    heading = _wrap(title, title_font, total_width - 2 * gap, _MAX_LINES) if title else []
    heading_line = round(line_height * 1.4)
    top = gap + (len(heading) * heading_line + gap // 2 if heading else 0)

    grid = Image.new("RGB", (total_width, top + rows * (cell_height + gap)), _PAPER)
    draw = ImageDraw.Draw(grid)
    for i, line in enumerate(heading):
        draw.text((gap, gap + i * heading_line), line, fill=_INK, font=title_font)
    for i, (picture, lines) in enumerate(zip(pictures, texts, strict=True)):
        row, column = divmod(i, columns)
        left, upper = gap + column * (width + gap), top + row * (cell_height + gap)
        centre = left + (width - picture.width) // 2, upper + (height - picture.height) // 2
        grid.paste(picture, centre)
        for j, line in enumerate(lines):
            at = left + width // 2, upper + height + gap // 2 + j * line_height
            draw.text(at, line, fill=_INK, font=font, anchor="ma")
    return grid


def _picture(image: np.ndarray, index: int) -> Image.Image:
    image = np.asarray(image)
    if (
        image.dtype != np.uint8
        or image.ndim != 3
        or image.shape[2] not in (1, 3)
        or 0 in image.shape
    ):
        found = f"{image.dtype.name}{list(image.shape)}"
        do = "convert floats in [-1, 1] first"
        raise wrong(f"grid image {index}", found, "uint8[h, w, 3]", do)
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3))))


def _enlarge(pictures: list[Image.Image], min_side: int) -> list[Image.Image]:
    longest = max(max(picture.size) for picture in pictures)
    factor = math.ceil(min_side / longest)
    if factor <= 1:
        return pictures
    return [
        picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
        for picture in pictures
    ]


@functools.lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans: Latin, Greek, Cyrillic, Arabic, some emoji; Pillow's own knows ASCII only."""
    return ImageFont.truetype(FONTS / "DejaVuSans.ttf", size)


def printable(text: str) -> str:
    """The text on one line, without control characters and lone surrogates."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return "".join(c for c in " ".join(text.split()) if unicodedata.category(c) != "Cc")


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, max_lines: int) -> list[str]:
    """Lines of at most `width` pixels, broken at spaces, or inside a word that is too wide."""
    lines: list[str] = []
    line = ""
    for word in printable(text).split():
        candidate = f"{line} {word}" if line else word
        if font.getlength(candidate) <= width:
            line = candidate
            continue
        if line:
            lines.append(line)
        while font.getlength(word) > width and len(word) > 1 and len(lines) <= max_lines:
            fits = bisect.bisect_right(
                range(2, len(word)), width, key=lambda n, word=word: font.getlength(word[:n])
            )
            lines.append(word[: fits + 1])
            word = word[fits + 1 :]
        line = word
        if len(lines) > max_lines:
            break
    if line:
        lines.append(line)
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: max_lines - 1], last.rstrip() + "…"]
    return lines


def save_png(image: Image.Image, path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write a PNG, whole or not at all, with one Unicode text chunk (iTXt) per entry."""
    chunks = PngImagePlugin.PngInfo()
    for key, value in metadata.items():
        if not 1 <= len(key) <= 79 or not key.isprintable() or max(map(ord, key)) > 255:
            raise wrong("PNG metadata key", key, "1 to 79 printable Latin-1 characters")
        chunks.add_itxt(key, value.replace("\0", "").encode("utf-8", "replace").decode("utf-8"))
    with replacing(Path(path)) as temporary:
        image.save(temporary, format="PNG", pnginfo=chunks)


def read_png_metadata(path: str | Path) -> dict[str, str]:
    """The text chunks of a PNG file; `UserError` if it is none, or not a whole one."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            return {key: str(value) for key, value in image.text.items()}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a PNG") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: not a whole PNG file ({error})") from error
