"""From image files, in any mode, to small square RGB arrays."""

from __future__ import annotations

import dataclasses
import functools
import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from unclip_jax.common import checks
from unclip_jax.data.records import BadRecord

MAX_PIXELS = 80_000_000  # larger pictures are taken for decompression bombs

RESIZE_MODES = ("shortest", "squash", "longest")
INTERPOLATIONS = ("bicubic", "bilinear")

# Formats that Pillow decodes by itself; for others it may start programs (Ghostscript for EPS).
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF")


@functools.cache
def formats() -> tuple[str, ...]:
    """The names of the formats that are read here: this Pillow may lack some."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def open_rgb(image: bytes | np.ndarray, size: int) -> Image.Image:
    """An image, from a file's bytes or from pixels, as 8-bit RGB.

    Transparency goes on white, EXIF rotation is applied, 16-bit grey is scaled to 8, and of an
    animation the first frame is taken.

    Args:
        image: an image file's bytes, or uint8 `[h, w]` or `[h, w, 1 | 3 | 4]`.
        size: the side wanted later: a JPEG may be decoded at a fraction of its size that is still
            at least twice this.

    Raises:
        BadRecord: it isn't an image, is truncated, or has more than `MAX_PIXELS`.
    """
    try:
        opened = _from_pixels(image) if isinstance(image, np.ndarray) else _from_file(image, size)
        return _to_rgb(opened)
    except (BadRecord, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise BadRecord("not a readable image (of no known format)") from error
    except Exception as error:  # Pillow's decoders raise whatever a broken file leads them to
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadRecord(f"not a readable image ({reason})") from error


def open_alpha(data: bytes) -> np.ndarray | None:
    """The opacity of an image file that `open_rgb` reads, uint8 `[h, w]`; None for a whole one."""
    opened = ImageOps.exif_transpose(Image.open(io.BytesIO(data), formats=formats()))
    if not opened.has_transparency_data:
        return None
    return np.asarray(opened.convert("RGBA").getchannel("A"))


def _from_pixels(pixels: np.ndarray) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
        raise BadRecord(
            f"pixels of shape {pixels.shape} and type {pixels.dtype}: expected uint8 [h, w, c]"
        )
    is_grey = pixels.ndim == 3 and pixels.shape[-1] == 1
    return Image.fromarray(pixels[..., 0] if is_grey else pixels)


def _from_file(data: bytes, size: int) -> Image.Image:
    opened = Image.open(io.BytesIO(data), formats=formats())
    if opened.width * opened.height > MAX_PIXELS:
        raise BadRecord(
            f"{opened.width}x{opened.height} pixels: more than the {MAX_PIXELS:,} that are "
            "decoded; shrink it"
        )
    opened.draft(None, (2 * size, 2 * size))
    return ImageOps.exif_transpose(opened)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BadRecord("floating-point pixels: their range is unknown; save it with 8 bits")
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip rather than scale
        levels = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    opaque = Image.new("RGBA", image.size, "white")
    opaque.alpha_composite(image.convert("RGBA"))
    return opaque.convert("RGB")


@dataclasses.dataclass(frozen=True)
class Fit:
    """How a picture of any shape becomes a square one of some size, as public processors do it.

    Attributes:
        resize_mode: "shortest" resizes the shorter side to `resize_to`, "squash" both sides, and
            both cut out the centre; "longest" resizes the longer side and puts `fill` around.
        resize_to: pixels, the square's size or more; 0 stands for its size.
        interpolation: "bicubic" or "bilinear", both antialiased.
        fill: grey around the picture for "longest", 0 (black) to 255.

    Raises:
        UserError: a field is out of its range.
    """

    resize_mode: str = "shortest"
    resize_to: int = 0
    interpolation: str = "bicubic"
    fill: int = 0

    def __post_init__(self) -> None:
        """Check every field."""
        checks.choice("fit.resize_mode", self.resize_mode, RESIZE_MODES)
        checks.choice("fit.interpolation", self.interpolation, INTERPOLATIONS)
        checks.count("fit.resize_to", self.resize_to, 0)
        checks.number("fit.fill", self.fill, 0, 255)

    def sides(self, width: int, height: int, size: int) -> tuple[int, int]:
        """Width and height of a picture when it is resized, before the cut."""
        if self.resize_mode == "squash":
            return (self.resize_to or size,) * 2
        if self.resize_mode == "longest":  # rounded as OpenCLIP does
            return tuple(max(1, round(s * size / max(width, height))) for s in (width, height))
        return tuple((self.resize_to or size) * s // min(width, height) for s in (width, height))

    def box(self, width: int, height: int, size: int) -> tuple[float, float, float, float]:
        """What a square of `size` pixels shows of a picture: left, top, right, bottom.

        The cut is at whole pixels of the resized picture, as in transformers' CLIPImageProcessor.
        """
        sides = self.sides(width, height, size)
        (x, across), (y, down) = ((max(0, s - size) // 2, min(size, s)) for s in sides)
        wide, high = width / sides[0], height / sides[1]
        right, bottom = min((x + across) * wide, width), min((y + down) * high, height)
        return x * wide, y * high, right, bottom


CENTRE = Fit()


def square(image: bytes | np.ndarray, size: int, fit: Fit = CENTRE) -> np.ndarray:
    """A picture as a square: uint8 `[size, size, 3]`; by default its centre, resized (bicubic).

    What it may be, and when it is a `BadRecord`, `open_rgb` says.
    """
    rgb = open_rgb(image, max(size, fit.resize_to))
    shown = [min(size, side) for side in fit.sides(*rgb.size, size)]
    how = Image.Resampling[fit.interpolation.upper()]
    resized = rgb.resize(shown, how, fit.box(*rgb.size, size))
    if resized.size != (size, size):
        canvas = Image.new("RGB", (size, size), (fit.fill,) * 3)
        canvas.paste(resized, tuple((size - side) // 2 for side in shown))
        resized = canvas
    return np.asarray(resized)


def jitter(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """A randomly scaled and shifted copy, uint8 `[s, s, 3]`; white fills what it uncovers.

    The picture is seen through a square window whose side is uniform in `1 - strength .. 1 +
    strength` times the image's and whose centre is off by up to `strength / 2` of it, in x and y.

    Args:
        image: uint8 `[s, s, 3]`.
        strength: from 0 (an unchanged image) to below 1.
        rng: where the three random numbers come from.
    """
    size = image.shape[0]
    if strength == 0.0:
        return image
    zoom, shift_x, shift_y = rng.uniform(-1.0, 1.0, 3) * strength
    margin = int(np.ceil(size * strength)) + 1  # as far as the window can reach
    canvas = ImageOps.expand(Image.fromarray(image), margin, "white")
    side = size * (1.0 + zoom)
    left = margin + (size * (1.0 + shift_x) - side) / 2
    top = margin + (size * (1.0 + shift_y) - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(canvas.resize((size, size), Image.Resampling.BICUBIC, box=box))
