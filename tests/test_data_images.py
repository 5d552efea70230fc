"""Pictures in every mode, range and colour space become the same 8-bit sRGB."""

import io
import struct
import threading
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from unclip_jax.data import images
from unclip_jax.data.memory import Budget
from unclip_jax.data.records import BadRecord


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pixels(data):
    return np.asarray(images.open_rgb(data, 8))[0].tolist()


# --- ranges ---------------------------------------------------------------------------


def tiff(bits, data, samples=1, photometric=1):
    """Two grey pixels, of integers (samples 1), signed ones (2) or floats (3)."""
    tags = {256: 2, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1,
            279: len(data), 339: samples}  # fmt: skip
    data += b"\0" * (-len(data) % 2)
    entries = b"".join(struct.pack("<HHLHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    head = struct.pack("<2sHL", b"II", 42, 8 + len(data))
    return head + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def png(kind, bits, row, transparent=b""):
    """Two pixels of 16 bits a channel, which Pillow doesn't write."""

    def chunk(name, data):
        return (
            struct.pack(">L", len(data)) + name + data + struct.pack(">L", zlib.crc32(name + data))
        )

    head = chunk(b"IHDR", struct.pack(">LLBBBBB", 2, 1, bits, kind, 0, 0, 0))
    clear = chunk(b"tRNS", transparent) if transparent else b""
    body = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + head + clear + body + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "left", "right"),
    [
        (tiff(12, b"\x40\x0f\xff"), 64, 255),  # 1024 and 4095 of 4095
        (tiff(16, struct.pack("<2H", 257 * 40, 65535)), 40, 255),
        (tiff(16, struct.pack("<2H", 0, 65535), photometric=0), 255, 0),  # white is zero
        (b"P5 2 1 1023\n" + struct.pack(">2H", 0, 1023), 0, 255),
        (png(0, 16, struct.pack(">2H", 100, 257 * 9), struct.pack(">H", 100)), 255, 9),
        (encoded(Image.fromarray(np.uint16([[257 * 3, 65535]]))), 3, 255),
        (np.uint16([[257 * 3, 65535]]), 3, 255),
    ],
)
def test_grey_is_scaled_by_its_own_range(data, left, right):
    assert pixels(data) == [[left] * 3, [right] * 3]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png(2, 16, struct.pack(">6H", 65535, 0, 0, 0, 0, 65535)), [[255, 0, 0], [0, 0, 255]]),
        (
            png(6, 16, struct.pack(">8H", 65535, 0, 0, 65535, 0, 0, 65535, 0)),
            [[255, 0, 0], [255] * 3],
        ),
        (png(4, 16, struct.pack(">4H", 0, 65535, 0, 0)), [[0] * 3, [255] * 3]),
    ],
)
def test_channels_of_16_bits_keep_their_high_ones(data, expected):
    assert pixels(data) == expected


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (tiff(16, struct.pack("<2h", 0, 99), samples=2), "signed or 32-bit integer"),
        (tiff(32, struct.pack("<2L", 0, 2**32 - 1)), "signed or 32-bit integer"),
        (encoded(Image.fromarray(np.int32([[0, 70000]])), "TIFF"), "signed or 32-bit integer"),
        (tiff(32, struct.pack("<2f", 0, 1), samples=3), "floating-point"),
    ],
)
def test_numbers_without_a_range_are_refused(data, why):
    with pytest.raises(BadRecord, match=why):
        images.open_rgb(data, 8)


def test_a_picture_is_known_by_its_bytes():
    plain = Image.new("RGB", (16, 16), (200, 100, 50))
    for kind in (
        "PNG",
        "WEBP",
        "BMP",
        "TIFF",
        "PPM",
        "JPEG2000",
        "ICO",
        "QOI",
        "SGI",
        "PCX",
        "TGA",
    ):
        data = encoded(plain, kind, **({"lossless": True} if kind == "WEBP" else {}))
        assert pixels(data)[0] == [200, 100, 50]
        assert images.is_picture(data[: images.HEAD]) or kind in images._UNMARKED
    for other in (b"", b"II", b"just some text that is long enough", b"\0" * 32, b"PK\3\4" * 8):
        assert not images.is_picture(other)


# --- colour ---------------------------------------------------------------------------

# Display P3's primaries as columns, adapted to D50 (from its own ICC profile).
P3 = np.array([[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]])
SRGB = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])
WHITE = (0.9642, 1.0, 0.8249)


def s15(number):
    return struct.pack(">l", round(number * 65536))


def profile(space, gamma, primaries=None):
    """An ICC profile of a gamma, and of three primaries, or of grey."""
    xyz = {b"wtpt": WHITE}
    curves = [b"kTRC"] if primaries is None else [b"rTRC", b"gTRC", b"bTRC"]
    if primaries is not None:
        xyz |= dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries.T, strict=True))
    curve = b"curv" + bytes(4) + struct.pack(">LH", 1, round(gamma * 256)) + bytes(2)
    text = b"desc" + bytes(4) + struct.pack(">L", 5) + b"test\0" + bytes(78)
    tags = {b"desc": text + bytes(-len(text) % 4), b"cprt": b"text" + bytes(4) + b"none\0\0\0\0"}
    tags |= {n: b"XYZ " + bytes(4) + b"".join(map(s15, v)) for n, v in xyz.items()}
    tags |= dict.fromkeys(curves, curve)
    start, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += name + struct.pack(">LL", start + len(body), len(data))
        body += data
    head = struct.pack(
        ">L4sL4s4s4s", start + len(body), b"lcms", 0x02400000, b"mntr", space, b"XYZ "
    )
    head += bytes(12) + b"acsp" + bytes(28) + b"".join(map(s15, WHITE)) + bytes(48)
    return head + struct.pack(">L", len(tags)) + table + body


def to_srgb(levels, gamma, primaries):
    """The same conversion from the formulas, float."""
    linear = np.linalg.inv(SRGB) @ primaries @ (np.float64(levels) / 255) ** gamma
    linear = linear.clip(0, 1)
    curved = np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return 255 * curved


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("gamma", [1.8, 2.2])
def test_an_embedded_profile_is_applied(format, gamma):
    icc = profile(b"RGB ", gamma, P3)
    options = {"lossless": True} if format == "WEBP" else {}
    for colour in ((200, 100, 50), (90, 160, 90), (255, 255, 255), (0, 0, 0), (30, 60, 120)):
        data = encoded(Image.new("RGB", (2, 1), colour), format, icc_profile=icc, **options)
        np.testing.assert_allclose(pixels(data)[0], to_srgb(colour, gamma, P3), atol=1.5)


def test_profiles_of_other_modes():
    icc = profile(b"RGB ", 1.0, SRGB)
    half = to_srgb((64, 64, 64), 1.0, SRGB)  # linear light: 64 is no dark grey
    assert half[0] > 130
    see_through = Image.new("RGBA", (2, 1), (64, 64, 64, 255))
    see_through.putpixel((1, 0), (64, 64, 64, 0))
    left, right = pixels(encoded(see_through, icc_profile=icc))
    np.testing.assert_allclose(left, half, atol=1.5)
    assert right == [255, 255, 255]  # the white behind has no profile
    palette = Image.new("P", (2, 1))
    palette.putpalette([64, 64, 64])
    np.testing.assert_allclose(pixels(encoded(palette, icc_profile=icc))[0], half, atol=1.5)
    grey = Image.new("L", (2, 1), 64)
    for said in (icc, profile(b"GRAY", 1.0)):
        np.testing.assert_allclose(pixels(encoded(grey, icc_profile=said))[0], half, atol=1.5)
    deep = encoded(Image.fromarray(np.uint16([[64 * 257, 0]])), icc_profile=profile(b"GRAY", 1.0))
    np.testing.assert_allclose(pixels(deep)[0], half, atol=1.5)


def test_srgb_changes_nothing_and_a_damaged_profile_is_named(caplog):
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for icc in (srgb, b"nonsense" * 20):
        data = encoded(Image.fromarray(noise), icc_profile=icc)
        np.testing.assert_array_equal(np.asarray(images.open_rgb(data, 8)), noise)
    assert "a damaged ICC profile is left out" in caplog.text


# --- memory ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "CMYK", "I;16"])
def test_strips_are_the_whole_picture(monkeypatch, mode):
    rng = np.random.default_rng(0)
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 65536, (50, 40), np.uint16))
    else:
        image = Image.fromarray(rng.integers(0, 256, (50, 40, 4), np.uint8), "RGBA").convert(mode)
    data = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    whole = np.asarray(images.open_rgb(data, 8))
    monkeypatch.setattr(images, "_STRIP", 40 * 7)  # seven rows a strip, one in the last
    np.testing.assert_array_equal(np.asarray(images.open_rgb(data, 8)), whole)


def test_threads_hold_no_more_than_the_budget_together():
    budget, held, most, lock = Budget(10), [0], [0], threading.Lock()

    def use(amount):
        for _ in range(50):
            with budget.holding(amount):
                with lock:
                    held[0] += amount
                    most[0] = max(most[0], held[0])
                with lock:
                    held[0] -= amount

    threads = [threading.Thread(target=use, args=(n,)) for n in (3, 4, 5, 9, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] <= 10
    with budget.holding(25):  # more than all: alone
        pass


def test_large_pictures_wait_for_each_other(monkeypatch):
    asked = []
    budget = Budget(10**9)
    holding = budget.holding
    monkeypatch.setattr(budget, "holding", lambda n: (asked.append(n), holding(n))[1])
    monkeypatch.setattr(images, "_decoding", budget)
    images.square(encoded(Image.new("RGBA", (300, 200))), 8)
    images.square(encoded(Image.new("RGB", (1600, 1200)), "JPEG"), 8)
    assert asked == [300 * 200, 200 * 150]  # a JPEG is decoded at an eighth


# --- shapes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "box"),
    [((20, 40), (0, 0, 120, 60)), ((40, 20), (45, 0, 75, 60)), ((30, 30), (30, 0, 90, 60)),
     (30, (30, 0, 90, 60))],
)  # fmt: skip
def test_the_centre_has_the_proportions_that_are_asked_for(size, box):
    picture = np.random.default_rng(0).integers(0, 256, (60, 120, 3), np.uint8)
    height, width = images.both(size)
    expected = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC, box)
    np.testing.assert_array_equal(images.square(picture, size), np.asarray(expected))


def test_a_whole_picture_fits_between_bars_of_any_shape():
    picture = np.full((60, 120, 3), 200, np.uint8)
    fit = images.Fit(resize_mode="longest", fill=7)
    found = images.square(picture, (40, 40), fit)
    assert (found[10:30] == 200).all() and (found[:10] == 7).all() and (found[30:] == 7).all()
    tall = images.square(picture, (40, 20), fit)
    assert tall.shape == (40, 20, 3) and (tall[15:25] == 200).all() and (tall[:15] == 7).all()
