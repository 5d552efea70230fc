"""Folders as people have them: where captions may stand, what is left out, what a refusal says."""

import io
import json
import os
import sys

import pytest
from PIL import Image

from unclip_jax.data import listing, records
from unclip_jax.data.datasets import DataConfig, load
from unclip_jax.errors import UserError


def picture(kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, kind)
    return file.getvalue()


def fill(folder, files):
    """Write files: text, bytes, an object as JSON, None for a picture."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict | list):
            content = json.dumps(content)
        content = picture() if content is None else content
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def source(folder, **options):
    return load(DataConfig(name=str(folder), **{"split": "all", **options}))


def pairs(folder, **options):
    data = source(folder, **options)
    return [(data[i]["name"], data[i]["caption"]) for i in range(len(data))]


def refused(folder, **options):
    with pytest.raises(UserError) as caught:
        source(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


COCO = {"images": [{"id": 1, "file_name": "1.jpg"}]}
NOTES = [{"image_id": 1, "id": n, "caption": f"note {n}"} for n in range(2)]
TWO = [("x/1.jpg", "note 0"), ("x/1.jpg", "note 1")]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        # Flickr8k as Kaggle has it, as its authors do, and Flickr30k.
        ({"x/1.jpg": None, "captions.txt": "image,caption\n1.jpg,note 0\n1.jpg,note 1\n"}, TWO),
        ({"x/1.jpg": None, "F.token.txt": "1.jpg#0\tnote 0\n1.jpg#1\tnote 1\n"}, TWO),
        (
            {"x/1.jpg": None,
             "r.csv": "image_name| comment_number| comment\n1.jpg| 0| note 0\n1.jpg| 1| note 1\n"},
            TWO,
        ),
        ({"x/1.jpg": None, "a.csv": 'raw,filename\n"[""note 0"", ""note 1""]",1.jpg\n'}, TWO),
        # COCO, with annotations of another kind beside, and Karpathy's splits of it.
        (
            {"x/1.jpg": None, "annotations/captions_train2017.json": COCO | {"annotations": NOTES},
             "annotations/instances_train2017.json": COCO | {"annotations": [{"image_id": 1}]}},
            TWO,
        ),
        (
            {"x/1.jpg": None, "dataset_coco.json": {"images": [
                {"filepath": "x", "filename": "1.jpg",
                 "sentences": [{"raw": "note 0", "tokens": []}, {"raw": "note 1", "tokens": []}]}
            ]}},
            TWO,
        ),
        # Tables of any separator, with a header or without.
        ({"1.jpg": None, "p.csv": 'filepath\ttitle\n1.jpg\ta "b", c\n'}, [("1.jpg", 'a "b", c')]),
        ({"1.jpg": None, "captions.csv": 'sep=;\nFile;Text\n1.jpg;"a; b"\n'}, [("1.jpg", "a; b")]),
        ({"1.jpg": None, "pairs.tsv": "1.jpg\tone\n"}, [("1.jpg", "one")]),
        ({"1.jpg": None, "pairs.tsv": 'file\tcaption\n1.jpg\t"a ""b"""\n'}, [("1.jpg", 'a "b"')]),
        ({"1.jpg": None, "metadata.json": {"1.jpg": ["one", "two"]}},
         [("1.jpg", "one"), ("1.jpg", "two")]),
        ({"1.jpg": None, "m.json": [{"image": "1.jpg", "text": "one"}]}, [("1.jpg", "one")]),
        # Beside an image.
        ({"1.jpg": None, "1.caption": "one"}, [("1.jpg", "one")]),
        ({"1.jpg": None, "1.json": {"caption": "one", "width": 3}}, [("1.jpg", "one")]),
        ({"1.jpg": None, "1.jpg.txt": "one"}, [("1.jpg", "one")]),
        ({"1.jpg": None, "1.TXT": "one\r\ntwo"}, [("1.jpg", "one"), ("1.jpg", "two")]),
        # By its bytes, whatever it is called.
        ({"a1b2": None, "captions.csv": "file,caption\na1b2,one\n"}, [("a1b2", "one")]),
        ({"a.jfif": picture("JPEG"), "a.txt": "one"}, [("a.jfif", "one")]),
        ({"a.dat": None, "a.txt": "one"}, [("a.dat", "one")]),
    ],
)  # fmt: skip
def test_layouts_people_have(tmp_path, files, expected):
    assert pairs(fill(tmp_path, files)) == expected


def test_tables_of_several_splits_say_which_is_which(tmp_path):
    hf = fill(tmp_path / "hf", {
        "train/a.png": None, "train/b.png": None, "validation/a.png": None, "test/a.png": None,
        "train/metadata.jsonl": '{"file_name": "a.png", "text": "one"}\n'
                                '{"file_name": "b.png", "text": "two"}',
        "validation/metadata.csv": "file_name,text\na.png,three\n",
        "test/metadata.csv": "file_name,text\na.png,four\n",
    })  # fmt: skip
    assert [c for _, c in pairs(hf, split="train")] == ["one", "two"]
    assert [c for _, c in pairs(hf, split="heldout")] == ["three"]
    assert sorted(c for _, c in pairs(hf)) == ["four", "one", "three", "two"]
    notes = {"annotations": NOTES}
    coco = fill(tmp_path / "coco", {
        "train2017/1.jpg": None, "val2017/2.jpg": None,
        "annotations/captions_train2017.json": COCO | notes,
        "annotations/captions_val2017.json":
            {"images": [{"id": 1, "file_name": "2.jpg"}]} | notes,
    })  # fmt: skip
    assert {n for n, _ in pairs(coco, split="train")} == {"train2017/1.jpg"}
    assert {n for n, _ in pairs(coco, split="heldout")} == {"val2017/2.jpg"}
    one = pairs(coco / "annotations" / "captions_val2017.json")  # the table itself, by name
    assert one == [("val2017/2.jpg", "note 0"), ("val2017/2.jpg", "note 1")]


def test_a_table_may_name_absolute_paths_inside_the_folder(tmp_path):
    fill(tmp_path, {"x/a.png": None, "captions.csv": f"file,caption\n{tmp_path}/x/a.png,one\n"})
    assert pairs(tmp_path) == [("x/a.png", "one")]


def test_a_table_in_parquet(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    fill(tmp_path, {"a.png": None})
    pq.write_table(
        pa.table({"file_name": ["a.png"], "text": ["one"]}), tmp_path / "metadata.parquet"
    )
    assert pairs(tmp_path) == [("a.png", "one")]


# --- rows -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "content", "message"),
    [
        (
            "captions.csv",
            "file,caption\na.jpg,A black dog, running , on snow\n",
            "line 2: 4 fields",
        ),
        ("captions.csv", "file,caption\nb.jpg,x\na.jpg\n", "line 3: 1 fields where"),
        ("captions.csv", 'file,caption\na.jpg,"A dog\nb.jpg,cat\n', "line 2: not CSV: a quote"),
        ("captions.csv", 'file,caption\nb.jpg,x\na.jpg,"A dog\nb.jpg,"cat"\n', "line 3: not CSV"),
        ("captions.csv", 'file,caption\na.jpg,"A dog\nb.jpg,cat"\n', "line 2: a quote .* swallow"),
        ("captions.tsv", 'file\tcaption\na.jpg\t"A dog\n', "line 2: a quote .* never closed"),
        ("captions.tsv", "file\tcaption\na.jpg\tx\ty\n", "line 2: 3 fields where"),
        ("captions.csv", "a.jpg,one\n", "line 1: got .* expected the names of the fields"),
        ("captions.csv", "url,caption\nhttp://x/a.jpg,x\n", "addresses of pictures.*img2dataset"),
        ("cc3m.tsv", "a bus\thttp://x/a.jpg\n", "addresses of pictures.*img2dataset"),
        (
            "captions.json",
            {"images": [], "annotations": [{"image_id": 3}]},
            "captions.json has no rows",
        ),
        ("captions.jsonl", '{"file": "a.jpg", "caption": {"en": "x"}}', "caption_key='caption/en'"),
        (
            "captions.jsonl",
            '{"file": "a.jpg", "caption": [1]}',
            "expected text, or a list of texts",
        ),
    ],
)
def test_a_broken_row_is_named_by_its_line(tmp_path, table, content, message):
    fill(tmp_path, {"a.jpg": None, "b.jpg": None, table: content})
    with pytest.raises(UserError, match=message):
        source(tmp_path)


def test_text_is_utf8_or_says_what_it_is(tmp_path):
    files = {
        "8.txt": "über", "mark.txt": "über".encode("utf-8-sig"), "16.txt": "über".encode("utf-16"),
        "32.txt": "über".encode("utf-32"), "latin.txt": "über".encode("latin-1"),
        "bare16.txt": "over".encode("utf-16-le"),
    }  # fmt: skip
    fill(tmp_path / "beside", files | {f"{n[:-4]}.png": None for n in files})
    data = source(tmp_path / "beside")
    assert [data[i]["caption"] for i in range(len(data))] == ["über"] * 4
    assert set(data.skipped) == {"latin.png", "bare16.png"}
    assert all("save it as UTF-8" in reason for reason in data.skipped.values())
    rows = "file,caption\na.png,über\n"
    for number, encoding in enumerate(("utf-8", "utf-16", "latin-1")):
        content = rows.encode(encoding) + (b"b.png,ok\n" if encoding == "latin-1" else b"")
        folder = fill(
            tmp_path / str(number), {"a.png": None, "b.png": None, "captions.csv": content}
        )
        told = source(folder)
        assert told[0]["caption"] == ("ok" if encoding == "latin-1" else "über")
        assert len(told) == 1


def test_keys_are_honoured_or_refused(tmp_path):
    row = {"file_name": "a.png", "text": "short", "long": "a long one", "photo": "b.png", "id": 7}
    files = {"a.png": None, "b.png": None, "metadata.jsonl": json.dumps(row)}
    folder = fill(tmp_path / "table", files)
    assert pairs(folder, caption_key="long") == [("a.png", "a long one")]
    assert pairs(folder, image_key="photo") == [("b.png", "short")]
    assert "caption_key: got 'gone'" in refused(folder, caption_key="gone")
    assert "'long'" in refused(folder, caption_key="gone")
    assert "image_key: got 'gone'" in refused(folder, image_key="gone")
    assert "caption_key may be 'file_name', 'text', 'long'" in refused(folder, caption_key="id")
    beside = fill(
        tmp_path / "beside",
        {"a.png": None, "a.jpg": None, "a.txt": "t", "a.json": {"alt": "j", "deep": {"er": "d"}}},
    )
    assert pairs(beside, caption_key="alt", image_key="jpg") == [("a.jpg", "j")]
    assert pairs(beside, caption_key="deep/er", image_key="jpg") == [("a.jpg", "d")]
    assert pairs(beside, caption_key="txt", image_key="jpg") == [("a.jpg", "t")]
    assert "caption_key may be 'alt', 'deep/er'" in refused(beside, caption_key="gone")
    assert "image_key: got 'webp'" in refused(beside, image_key="webp")
    assert "image_key: got 'webp'" in refused(fill(tmp_path / "c", {"a.png": None}),
                                             image_key="webp", bare=True)  # fmt: skip
    labelled = fill(
        tmp_path / "d",
        {"x/a.png": None, "b.png": None, "metadata.csv": "file,kind\nx/a.png,cat\nb.png,ant\n"},
    )
    data = source(labelled, labels=True, label_key="kind")
    assert (data.classes, [int(data[i]["label"]) for i in (0, 1)]) == (("ant", "cat"), [0, 1])
    assert "label_key: got 'gone'" in refused(labelled, labels=True, label_key="gone")
    for name, key in (
        ("emoji", "caption_key"),
        ("emoji_styles", "label_key"),
        ("emoji", "image_key"),
    ):
        with pytest.raises(UserError, match=f"{key}: got 'gone'"):
            load(DataConfig(name=name, **{key: "gone"}))
    with pytest.raises(UserError, match="skin_tones: got True"):
        source(folder, skin_tones=True)


# --- what a refusal says --------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("img\\a.png", "img\\b.png"), "written with / for \\, 2 of them would match"),
        (("IMG/A.PNG", "img/B.png"), "written in another case, 2 of them would match"),
        (("a", "b"), "written with a suffix, 2 of them would match"),
        (("x.png", "y.png"), "none of them is there"),
        (
            ("far/a.png", "far/b.png"),
            "written with the path from the folder, 2 of them would match",
        ),
    ],
)
def test_names_that_match_no_image_are_shown_beside_those_there(tmp_path, names, said):
    rows = "".join(f"{name},text\n" for name in names)
    fill(tmp_path, {"img/a.png": None, "img/b.png": None, "captions.csv": "file,caption\n" + rows})
    message = refused(tmp_path)
    assert f"captions.csv names 2 files, such as {names[0]!r}" in message
    assert "'img/a.png'" in message
    assert said in message
    assert "write captions.jsonl" not in message  # there is a table


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"0.tar": b"x", "1.tar": b"x"}, "--config.data.name=wds:{}/*.tar"),
        ({"data/0.parquet": b"x"}, "--config.data.name=parquet:{}/data/*.parquet"),
        ({"img_emb/img_emb_0.npy": b"x"}, "--config.data.name=embeddings:{}"),
        ({"dataset_info.json": b"x"}, "--config.data.name=tfds:{}"),
        (
            {"a.heic": b"x" * 40, "a.txt": "x"},
            "left out a.heic: no picture that is read here (.heic)",
        ),
        ({"notes.md": b"x"}, "it has 1 .md"),
    ],
)
def test_a_folder_of_something_else_says_what_reads_it(tmp_path, files, said):
    assert said.format(tmp_path) in refused(fill(tmp_path, files))


def test_what_tells_no_captions_hides_no_other_that_does(tmp_path):
    takeout = {"a.png": None, "a.png.json": {"title": "a.png", "geo": {"x": 1}}}
    assert "none of its 1 images has a caption" in refused(fill(tmp_path / "takeout", takeout))
    table = {"all.tsv": "a.png\tone\n", "metadata.json": {"name": "mine", "licence": "MIT"}}
    assert pairs(fill(tmp_path / "takeout", table)) == [("a.png", "one")]
    beside = {"a.png": None, "a.txt": "one", "metadata.json": {"name": "mine"}}
    assert pairs(fill(tmp_path / "beside", beside)) == [("a.png", "one")]


def test_what_may_mean_two_things_is_refused(tmp_path):
    same = {"x/a.png": None, "y/a.png": None, "captions.csv": "file,caption\na.png,which\n"}
    assert "may be x/a.png or y/a.png" in refused(fill(tmp_path / "same", same))
    two = {
        "a.png": None,
        "one.csv": "file,caption\na.png,x\n",
        "two.csv": "file,caption\na.png,y\n",
    }
    folder = fill(tmp_path / "two", two)
    assert f"name one: --config.data.name={folder}/" in refused(folder)
    assert pairs(folder / "two.csv") == [("a.png", "y")]


# --- listing --------------------------------------------------------------------------


def test_links_are_followed_and_what_is_left_out_is_counted_by_reason(tmp_path, caplog):
    files = {f"{n}.png": None for n in range(9)} | {f"{n}.txt": f"text {n}" for n in range(20)}
    folder = fill(tmp_path / "photos", files)
    other = fill(tmp_path / "other", {"far.png": None, "far.txt": "far"})
    fill(folder, {f"{n}.heic": b"\0\0\0\x18ftypheic" + b"\0" * 40 for n in range(9, 14)})
    fill(folder, {"15.png": b""})
    os.symlink(other, folder / "linked")
    os.symlink(folder, folder / "loop")
    os.symlink(folder / "me", folder / "me")
    for n in range(16, 20):
        os.symlink("/nowhere.png", folder / f"{n}.png")
    data = source(folder)
    assert (len(data), data.image_count) == (10, 10)
    assert "linked/far.png" in [data[i]["name"] for i in range(10)]
    said = records.summary(data, "all")
    start = f"{folder}, split all: 10 pairs of 10 images; captions in the file beside it; left out"
    assert said.startswith(f"{start} 12 (")
    for reason in (
        "no picture that is read here (.heic): 5, such as", "a broken link: 4", "an empty file: 1",
        "a link that leads in a circle: 1", "a link to a folder that is read anyway: 1",
    ):  # fmt: skip
        assert reason in said
    assert sum("left out 12" in message for message in caplog.messages) == 1


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    folder = fill(
        tmp_path, {"a.png": None, "a.txt": "x", "secret/b.png": None, "secret/b.txt": "y"}
    )
    scandir = os.scandir

    def forbidding(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(listing.os, "scandir", forbidding)
    assert source(folder).skipped == {"secret": "a folder that can't be read (Permission denied)"}


@pytest.mark.skipif(sys.platform != "linux", reason="counts the calls that Linux sees")
def test_a_file_is_looked_at_once(tmp_path, monkeypatch):
    """One scan of each folder, one open of each text, and no stat of a path but the folders'."""
    files = {f"{n % 3}/{n}.png": None for n in range(30)}
    fill(tmp_path, files | {f"{name[:-4]}.txt": "text" for name in files})
    counts = {"scandir": 0, "stat": 0, "open": 0, "lstat": 0}
    for name in counts:
        real = getattr(os, name)

        def counting(*args, name=name, real=real, **named):
            counts[name] += 1
            return real(*args, **named)

        monkeypatch.setattr(os, name, counting)
    assert len(source(tmp_path)) == 30
    assert counts["scandir"] == 4
    assert counts["open"] == 30
    assert counts["stat"] + counts["lstat"] <= 10  # the root and its folders


def test_pictures_alone_where_no_captions_are_needed(tmp_path):
    assert "none of its 2 images has a caption" in refused(
        fill(tmp_path, {"a.png": None, "b/c.png": None})
    )
    assert pairs(tmp_path, bare=True) == [("a.png", ""), ("b/c.png", "")]
    fill(tmp_path, {"a.txt": "one\ntwo"})
    assert pairs(tmp_path, bare=True) == [("a.png", "one"), ("a.png", "two"), ("b/c.png", "")]
    whole = fill(tmp_path / "b", {"c.txt": "three"}).parent
    assert source(whole, bare=True).fingerprint == source(whole).fingerprint


def test_a_folder_in_a_bucket(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    files = fsspec.filesystem("memory")
    content = {"a.png": picture(), "a.txt": b"one", "sub/b.png": picture(), "sub/b.txt": b"two",
               ".hidden/c.png": picture()}  # fmt: skip
    for name, data in content.items():
        files.pipe(f"/photos/{name}", data)
    local = fill(tmp_path, {n: d for n, d in content.items() if n[0] != "."})
    data = source("memory://photos")
    assert [(data[i]["name"], data[i]["caption"]) for i in (0, 1)] == pairs(local)
    assert data[1]["image"] == content["sub/b.png"]
    assert "no such folder" in refused("memory://nothing")
    assert "a web server lists no files" in refused("https://example.org/photos")
