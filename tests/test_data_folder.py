"""Folders of images with captions, and images in every mode."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from unclip_jax.data import images
from unclip_jax.data.datasets import DataConfig, load
from unclip_jax.data.folder import FolderSource
from unclip_jax.data.images import jitter, square
from unclip_jax.data.records import BadRecord
from unclip_jax.errors import UserError


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def paint(path, level=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(Image.new("RGB", (8, 8), (level, level, level))))


def pairs(source):
    return [(source[i]["name"], source[i]["caption"]) for i in range(len(source))]


# --- images ---------------------------------------------------------------------------


def halves(mode, left, right):
    """An image 16 by 8: left half, right half."""
    image = Image.new(mode, (16, 8), left)
    image.paste(right, (8, 0, 16, 8))
    return image


PALETTE = halves("RGB", (255, 0, 0), (0, 0, 255)).quantize(4)
ADOBE_CMYK = halves("CMYK", (0, 255, 255, 0), (255, 255, 0, 0))


@pytest.mark.parametrize(
    ("data", "left", "right"),
    [
        (encoded(halves("1", 0, 1)), (0, 0, 0), (255, 255, 255)),
        (encoded(halves("L", 10, 200)), (10,) * 3, (200,) * 3),
        (encoded(halves("LA", (10, 255), (10, 0))), (10,) * 3, (255,) * 3),
        (encoded(PALETTE), (255, 0, 0), (0, 0, 255)),
        (encoded(halves("RGBA", (0, 0, 0, 0), (0, 0, 0, 255))), (255,) * 3, (0,) * 3),
        (encoded(halves("RGBA", (0, 0, 0, 51), (0, 0, 0, 255))), (204,) * 3, (0,) * 3),
        (encoded(ADOBE_CMYK, "TIFF"), (255, 0, 0), (0, 0, 255)),
        (encoded(halves("I;16", 0, 65535)), (0,) * 3, (255,) * 3),
        (encoded(halves("I;16", 257 * 100, 257 * 7)), (100,) * 3, (7,) * 3),
        (encoded(halves("L", 9, 90), transparency=9), (255,) * 3, (90,) * 3),
        (encoded(halves("RGB", (1, 2, 3), (4, 5, 6)), "BMP"), (1, 2, 3), (4, 5, 6)),
    ],
)
def test_every_mode_becomes_rgb_on_white(data, left, right):
    rgb = np.asarray(images.open_rgb(data, 8))
    assert rgb.shape == (8, 16, 3)
    np.testing.assert_array_equal(rgb[:, :8], np.broadcast_to(np.uint8(left), (8, 8, 3)))
    np.testing.assert_array_equal(rgb[:, 8:], np.broadcast_to(np.uint8(right), (8, 8, 3)))


def test_exif_rotation_is_honoured():
    image = halves("RGB", (255, 0, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: what is left comes to the top
    rgb = np.asarray(images.open_rgb(encoded(image, exif=exif), 8))
    assert rgb.shape == (16, 8, 3)
    assert (rgb[:8, :, 0] == 255).all()
    assert (rgb[8:, :, 2] == 255).all()


def test_an_animation_is_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (square(data, 4) == np.uint8([[[255, 0, 0]]])).all()


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "not a readable image"),
        (b"just text", "not a readable image"),
        (encoded(Image.new("RGB", (64, 64)), "JPEG")[:300], "not a readable image"),
        (encoded(Image.effect_noise((64, 64), 50))[:2000], "not a readable image"),
        (encoded(Image.new("1", (9000, 9000))), "9000x9000 pixels"),
        (encoded(Image.new("1", (20000, 20000))), "not a readable image"),  # Pillow's own refusal
        (encoded(Image.new("F", (4, 4)), "TIFF"), "floating-point"),
        (np.zeros((4, 4, 3), np.float32), "expected uint8"),
        (np.zeros((4, 4, 7), np.uint8), "not a readable image"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_no_usable_image_is_a_bad_record(data, why):
    with pytest.raises(BadRecord, match=why):
        square(data, 8)


def test_a_square_is_the_centre_and_keeps_the_mean():
    wide = Image.new("RGB", (32, 8), "black")
    wide.paste((255, 255, 255), (12, 0, 20, 8))
    assert (square(encoded(wide), 8) == 255).all()
    assert (square(encoded(wide.rotate(90, expand=True)), 8) == 255).all()
    noise = Image.effect_noise((64, 64), 40)
    small = square(encoded(noise), 4)
    assert abs(small.mean() - np.asarray(noise).mean()) < 2  # antialiased: nothing is left out
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(square(pixels, 8), pixels)
    np.testing.assert_array_equal(square(pixels[..., :1], 8), pixels[..., [0, 0, 0]])


def test_jitter_moves_the_picture_by_what_it_promises():
    size, strength = 40, 0.2
    image = np.full((size, size, 3), 255, np.uint8)
    image[15:25, 15:25] = 0
    rng = np.random.default_rng(0)
    centres, sides = [], []
    for _ in range(200):
        dark = 255 - jitter(image, strength, rng)[..., 0].astype(float)
        centres.append(np.average(np.arange(size), weights=dark.sum(0)) - (size - 1) / 2)
        sides.append(np.sqrt(dark.sum() / 255))
    # Seen through a window of side 0.8..1.2, a side of 10 becomes 10/1.2..10/0.8, and a centre
    # off by at most 0.1 of 40 pixels is off by at most 4/0.8.
    assert 10 / 1.2 - 0.3 < min(sides) < 8.9
    assert 11.8 < max(sides) < 10 / 0.8 + 0.3
    assert 3 < max(np.abs(centres)) < 5.2
    assert abs(np.mean(centres)) < 0.7
    np.testing.assert_array_equal(jitter(image, 0.0, rng), image)


# --- folders --------------------------------------------------------------------------


def test_texts_beside_images_in_sorted_order(tmp_path):
    for name in ("b.png", "a/z.PNG", "a/.hidden.png", ".git/x.png", "c.jpeg"):
        paint(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f"caption of {name}\n\n second \n")
    (tmp_path / "notes.md").write_text("no image")
    source = FolderSource(tmp_path)
    names = ["a/z.PNG", "b.png", "c.jpeg"]
    assert pairs(source) == [(n, c) for n in names for c in (f"caption of {n}", "second")]
    assert (len(source), source.image_count) == (6, 3)
    first = FolderSource(tmp_path, captions="first")
    assert pairs(first) == [(n, f"caption of {n}") for n in names]
    assert first.fingerprint != source.fingerprint


def test_a_jsonl_and_a_csv_table_say_the_same(tmp_path):
    rows = [
        ("b.png", 'a "quoted", comma'),
        ("a.png", "naïve café 日本"),
        ("b.png", "line\nbreak"),
        ("./sub/../sub/c.png", "dotted path"),
    ]
    sources = []
    for kind in ("jsonl", "csv"):
        folder = tmp_path / kind
        for name in ("a.png", "b.png", "sub/c.png"):
            paint(folder / name)
        if kind == "jsonl":
            lines = [json.dumps({"image": n, "caption": c}) for n, c in rows]
            (folder / "captions.jsonl").write_text("\n".join(lines))
        else:
            quoted = ['"' + c.replace('"', '""') + '"' for _, c in rows]
            lines = [f"{n},{c}" for (n, _), c in zip(rows, quoted, strict=True)]
            text = "\r\n".join(["file_name,text", *lines])
            (folder / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
        sources.append(FolderSource(folder))
    expected = [("a.png", rows[1][1]), ("b.png", rows[0][1]), ("b.png", rows[2][1]),
                ("sub/c.png", "dotted path")]  # fmt: skip
    assert pairs(sources[0]) == expected
    assert pairs(sources[1]) == expected
    assert sources[0].fingerprint == sources[1].fingerprint


def test_missing_and_empty_captions_are_named_and_left_out(tmp_path, caplog):
    for name in ("good.png", "silent.png", "blank.png"):
        paint(tmp_path / name)
    (tmp_path / "captions.jsonl").write_text(
        '{"file": "good.png", "caption": ["one", " ", "two"]}\n'
        '{"file": "blank.png", "caption": "  "}\n'
        '{"file": "gone.png", "caption": "where"}\n'
    )
    source = FolderSource(tmp_path)
    assert pairs(source) == [("good.png", "one"), ("good.png", "two")]
    assert set(source.skipped) == {"silent.png", "blank.png", "gone.png"}
    assert all(name in caplog.text for name in source.skipped)


def test_splits_part_the_images_whatever_else_is_there(tmp_path):
    for n in range(60):
        paint(tmp_path / f"{n}.png")
        (tmp_path / f"{n}.txt").write_text("one\ntwo")
    config = DataConfig(name=str(tmp_path))
    before = {
        s: set(pairs(load(DataConfig(name=str(tmp_path), split=s))))
        for s in ("train", "heldout", "all")
    }
    assert load(config).fingerprint != load(DataConfig(name=str(tmp_path), split="all")).fingerprint
    assert before["train"] | before["heldout"] == before["all"]
    assert not before["train"] & before["heldout"]
    assert 0 < len(before["heldout"]) < 40
    paint(tmp_path / "000.png")
    (tmp_path / "000.txt").write_text("new")
    assert set(pairs(load(config))) >= before["train"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no images in it"),
        ({"a.png": None}, "none of its 1 images has a caption.*a.txt beside a.png"),
        ({"a.png": None, "captions.jsonl": "{"}, "line 1: not JSON"),
        ({"a.png": None, "captions.jsonl": "[1]"}, "line 1: expected"),
        (
            {"a.png": None, "captions.jsonl": '{"fil": "a.png"}'},
            "has 'fil'; expected one of 'file'",
        ),
        ({"a.png": None, "captions.jsonl": '{"file": "a.png"}'}, "expected one of 'caption'"),
        ({"a.png": None, "captions.jsonl": '{"file": "a.png", "caption": 3}'}, "caption: got 3"),
        ({"a.png": None, "captions.jsonl": '{"file": 3, "caption": "x"}'}, "file: got 3"),
        (
            {"a.png": None, "captions.jsonl": b"\xff\xfe"},
            "captions.jsonl has none that can be read",
        ),
        ({"a.png": None, "captions.jsonl": b"{\0}"}, "can't be read as UTF-8 text .*zero bytes"),
        ({"a.png": None, "captions.csv": "a.png,x"}, "line 1: got .*names of the fields: file,cap"),
        ({"a.png": None, "captions.csv": "", "captions.jsonl": ""}, "keep one of them"),
    ],
)
def test_unusable_folders_are_explained(tmp_path, files, message):
    for name, content in files.items():
        if content is None:
            paint(tmp_path / name)
        else:
            (tmp_path / name).write_bytes(
                content if isinstance(content, bytes) else content.encode()
            )
    with pytest.raises(UserError, match=message) as caught:
        FolderSource(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "path", ["../x.png", "/etc/x.png", "a/../../x.png", "..", "../inner-evil/x.png"]
)
@pytest.mark.parametrize("table", ["captions.jsonl", "captions.csv"])
def test_no_table_leads_out_of_the_folder(tmp_path, path, table):
    folder = tmp_path / "inner"
    paint(folder / "a.png")
    paint(tmp_path / "x.png")
    row = (
        json.dumps({"file": path, "caption": "c"}) if "json" in table else f"file,caption\n{path},c"
    )
    (folder / table).write_text(row)
    with pytest.raises(UserError, match="leads out of the folder"):
        FolderSource(folder)


def test_a_folder_that_is_none_and_a_split_that_is_none(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load(DataConfig(name=str(tmp_path / "gone")))
    paint(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="split: got 'test'"):
        load(DataConfig(name=str(tmp_path), split="test"))
    empty = {s for s in ("train", "heldout") if not _loads(tmp_path, s)}
    assert len(empty) == 1  # one image is on one side, and the other says so


def _loads(folder, split):
    try:
        return len(load(DataConfig(name=str(folder), split=split)))
    except UserError as error:
        assert "use split 'all'" in str(error)
        return 0


def test_a_file_that_goes_missing_is_a_bad_record(tmp_path):
    paint(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("x")
    source = FolderSource(tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(BadRecord, match=r"a\.png: can't be read"):
        source[0]
