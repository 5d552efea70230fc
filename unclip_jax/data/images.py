"""From image files, in any mode and colour space, to small RGB arrays of one shape.

Every source and every command that is given a picture reads it here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
from collections.abc import Iterator

import numpy as np
from absl import logging
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from unclip_jax.common import checks
from unclip_jax.data.memory import Budget
from unclip_jax.data.records import BadRecord

MAX_PIXELS = 80_000_000  # larger pictures are taken for decompression bombs
HEAD = 32  # bytes that tell the format of a picture

RESIZE_MODES = ("shortest", "squash", "longest")
INTERPOLATIONS = ("bicubic", "bilinear")

# Formats that Pillow decodes by itself; for others it may start programs (Ghostscript for EPS).
# HEIF is there where pillow-heif is installed. TGA comes last: nothing marks it.
_FORMATS = (
    "PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "HEIF",
    "ICO", "PCX", "QOI", "SGI", "PSD", "TGA",
)  # fmt: skip
_UNMARKED = ("DIB", "PCX", "TGA")  # too little tells these formats from any other bytes
_AT_ONCE = 100_000_000  # pixels being decoded at a time, by all threads
_STRIP = 2**20  # pixels converted at a time
_BITS, _WHITE_IS, _SAMPLES = 258, 262, 339  # tags of TIFF
_NEARLY = 2  # levels by which a profile may differ from sRGB and count as it


@functools.cache
def formats() -> tuple[str, ...]:
    """The names of the formats that are read here: this Pillow may lack some."""
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@functools.cache
def suffixes() -> tuple[str, ...]:
    """How files in those formats are usually called: ".png", ".jpg" and so on."""
    known = set(formats())
    return tuple(suffix for suffix, kind in Image.EXTENSION.items() if kind in known)


def is_picture(head: bytes) -> bool:
    """Whether a file that begins with these `HEAD` bytes is in a format that is read here."""
    tests = (Image.OPEN[name][1] for name in formats() if name not in _UNMARKED)
    return len(head) >= HEAD // 2 and any(test is not None and test(head) is True for test in tests)


_decoding = Budget(_AT_ONCE)

Size = int | tuple[int, int]  # of a picture in pixels: the side of a square, or height and width


def both(size: Size) -> tuple[int, int]:
    """Height and width."""
    return size if isinstance(size, tuple) else (size, size)


def open_rgb(image: bytes | np.ndarray, size: int) -> Image.Image:
    """An image, from a file's bytes or from pixels, as 8-bit sRGB.

    An embedded ICC profile is applied. Transparency goes on white, EXIF rotation is applied, grey
    of 12 or 16 bits is scaled to 8 by its own range, and of an animation the first frame is taken.

    Args:
        image: an image file's bytes, or uint8 or uint16 `[h, w]` or `[h, w, 1 | 3 | 4]`.
        size: the side wanted later: a JPEG may be decoded at a fraction of its size that is still
            at least twice this.

    Raises:
        BadRecord: it isn't an image, is truncated, has more than `MAX_PIXELS`, or its numbers have
            no known range: floats, signed integers and those of 32 bits.
    """
    with _reading(image, size) as rgb:
        return rgb


@contextlib.contextmanager
def _reading(image: bytes | np.ndarray, size: int) -> Iterator[Image.Image]:
    """What `open_rgb` returns. Few large pictures at a time are here, 8 bytes a pixel each."""
    try:
        opened = _from_pixels(image) if isinstance(image, np.ndarray) else _from_file(image, size)
        with _decoding.holding(opened.width * opened.height):
            # In place: neither makes a copy of an image that stays as it is.
            ImageOps.exif_transpose(opened, in_place=True)
            yield _to_rgb(opened)
    except (BadRecord, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise BadRecord("not a readable image (of no known format)") from error
    except Exception as error:  # Pillow's decoders raise whatever a broken file leads them to
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadRecord(f"not a readable image ({reason})") from error


def open_alpha(data: bytes) -> np.ndarray | None:
    """The opacity of an image file that `open_rgb` reads, uint8 `[h, w]`; None for a whole one."""
    opened = _from_file(data, MAX_PIXELS)  # a size that no JPEG is decoded at a fraction for
    ImageOps.exif_transpose(opened, in_place=True)
    if not opened.has_transparency_data:
        return None
    if opened.mode[0] == "I":
        opened = _grey(opened, *_range_of(opened))
    return np.asarray(opened.convert("RGBA").getchannel("A"))


def _from_pixels(pixels: np.ndarray) -> Image.Image:
    if pixels.dtype == np.uint16:
        pixels = _to_8_bits(pixels, 65535)
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
    return opened


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit sRGB of any mode: in strips, so that a large picture is there twice, not four times."""
    image.load()
    profile = image.info.get("icc_profile") or b""
    if image.mode == "RGB" and not profile and not image.has_transparency_data:
        return image
    levels = _range_of(image) if image.mode[0] in "IF" else (0, 0)
    rows = max(1, _STRIP // image.width)
    if rows >= image.height:
        return _strip_to_rgb(image, levels, profile)
    rgb = Image.new("RGB", image.size)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        rgb.paste(_strip_to_rgb(strip, levels, profile), (0, top))
    return rgb


def _range_of(image: Image.Image) -> tuple[int, int]:
    """The levels of black and of white of a grey image of more than 8 bits."""
    tags = getattr(image, "tag_v2", {})
    bits = 16 if image.mode.startswith("I;16") else 0
    if image.format == "PPM" and image.mode == "I":  # which Pillow has scaled to 16 bits
        bits = 16
    elif tags:
        bits = tags.get(_BITS, (16,))[0] if tags.get(_SAMPLES, (1,))[0] == 1 else 0
    if image.mode == "F" or not 8 < bits <= 16:
        kind = "floating-point" if image.mode == "F" else "signed or 32-bit integer"
        raise BadRecord(f"{kind} pixels: their range is unknown; save it with 8 or 16 bits")
    white = 2**bits - 1
    return (white, 0) if tags.get(_WHITE_IS) == 0 else (0, white)


def _to_8_bits(levels: np.ndarray, white: int) -> np.ndarray:
    """Levels 0 .. `white` as the nearest of 0 .. 255."""
    levels = np.minimum(levels, white).astype(np.uint32)
    return ((levels * 255 + white // 2) // white).astype(np.uint8)


def _strip_to_rgb(image: Image.Image, levels: tuple[int, int], profile: bytes) -> Image.Image:
    if image.mode[0] == "I":
        image = _grey(image, *levels)
    if image.has_transparency_data:
        image = image.convert("RGBA") if image.mode not in ("LA", "RGBA") else image
        alpha, image = image.getchannel("A"), image.convert(image.mode[:-1])
        colour = _to_srgb(image, profile)
        white = Image.new("RGBA", image.size, "white")
        colour.putalpha(alpha)
        white.alpha_composite(colour)
        return white.convert("RGB")
    return _to_srgb(image, profile)


def _grey(image: Image.Image, black: int, white: int) -> Image.Image:
    """Grey of 8 bits, with an alpha where one level stands for transparency."""
    levels = np.asarray(image)
    grey = _to_8_bits(levels, max(black, white))
    made = Image.fromarray(255 - grey if black > white else grey)
    if (clear := image.info.get("transparency")) is not None:
        made.putalpha(Image.fromarray(np.uint8(255) * (levels != clear)))
    return made


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """RGB of an image without alpha, by its profile if it has one of its own colour space."""
    if not profile:
        return image.convert("RGB")
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    transform = _transform(profile, image.mode)
    if transform is None and image.mode == "L":  # grey that is stored with a profile for colours
        image = image.convert("RGB")
        transform = _transform(profile, "RGB")
    return image.convert("RGB") if transform is None else transform.apply(image)


@functools.lru_cache(64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What makes sRGB of an image of this mode; None where that is what it is, or nothing fits."""
    srgb = ImageCms.createProfile("sRGB")
    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if given.profile.xcolor_space.strip() != {"L": "GRAY"}.get(mode, mode):
            return None
        transform = ImageCms.buildTransform(given, srgb, mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        logging.warning("a damaged ICC profile is left out: %s", " ".join(str(error).split()))
        return None
    if mode == "CMYK":
        return transform
    ramp = np.linspace(0, 255, 9).round().astype(np.uint8)
    cube = np.stack(np.meshgrid(ramp, ramp, ramp), axis=-1).reshape(27, 27, 3)
    probe = Image.fromarray(cube if mode == "RGB" else cube[..., 0])
    plain = np.asarray(probe.convert("RGB"), np.int16)
    off = np.abs(np.asarray(transform.apply(probe), np.int16) - plain).max()
    return None if off <= _NEARLY else transform


@dataclasses.dataclass(frozen=True)
class Fit:
    """How a picture of any shape becomes one of a given size, as public processors make squares.

    Attributes:
        resize_mode: "shortest" resizes the shorter side to `resize_to`, "squash" both sides, and
            both cut out the centre; "longest" resizes the longer side and puts `fill` around. Of a
            size that is no square, the shorter side is the one that would be filled last.
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

    def sides(self, width: int, height: int, size: Size) -> tuple[int, int]:
        """Width and height of a picture when it is resized, before the cut."""
        high, wide = both(size)
        if self.resize_mode == "squash":
            return self.resize_to or wide, self.resize_to or high
        # Side by side with the size, the picture is the narrower or the wider one.
        narrower = width * high <= height * wide
        if self.resize_mode == "longest":  # rounded as OpenCLIP does
            to, of = (high, height) if narrower else (wide, width)
            return tuple(max(1, round(s * to / of)) for s in (width, height))
        to, of = (wide, width) if narrower else (high, height)
        return tuple((self.resize_to or to) * s // of for s in (width, height))

    def box(self, width: int, height: int, size: Size) -> tuple[float, float, float, float]:
        """What is shown of a picture in `size` pixels: left, top, right, bottom.

        The cut is at whole pixels of the resized picture, as in transformers' CLIPImageProcessor.
        """
        sides = self.sides(width, height, size)
        shown = both(size)[::-1]
        (x, across), (y, down) = (
            (max(0, s - to) // 2, min(to, s)) for s, to in zip(sides, shown, strict=True)
        )
        wide, high = width / sides[0], height / sides[1]
        right, bottom = min((x + across) * wide, width), min((y + down) * high, height)
        return x * wide, y * high, right, bottom


CENTRE = Fit()


def square(image: bytes | np.ndarray, size: Size, fit: Fit = CENTRE) -> np.ndarray:
    """A picture as a square, or of height and width: uint8 `[h, w, 3]`.

    By default it is the centre, resized (bicubic). What a picture may be, and when it is a
    `BadRecord`, `open_rgb` says.
    """
    wanted = both(size)[::-1]
    with _reading(image, max(*wanted, fit.resize_to)) as rgb:
        shown = [min(pair) for pair in zip(wanted, fit.sides(*rgb.size, size), strict=True)]
        how = Image.Resampling[fit.interpolation.upper()]
        resized = rgb.resize(shown, how, fit.box(*rgb.size, size))
        if resized.size != wanted:
            canvas = Image.new("RGB", wanted, (fit.fill,) * 3)
            around = zip(wanted, shown, strict=True)
            canvas.paste(resized, tuple((whole - side) // 2 for whole, side in around))
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
