"""Parquet files with images in them: the rows that pyarrow finds, in any order."""

import contextlib
import io
import json
import sys
import threading

import fsspec
import numpy as np
import pytest
from PIL import Image

from unclip_jax.data.batches import batches
from unclip_jax.data.datasets import DataConfig, load
from unclip_jax.data.records import BadRecord, is_heldout
from unclip_jax.data.shards import parquet, storage
from unclip_jax.errors import UserError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def png(level):
    file = io.BytesIO()
    Image.new("L", (8, 8), level % 256).save(file, "PNG")
    return file.getvalue()


def columns(count, first=0):
    """As img2dataset writes them."""
    rows = range(first, first + count)
    return {
        "key": [f"{row:08d}" for row in rows],
        "jpg": [png(row) for row in rows],
        "caption": [f"picture {row}" for row in rows],
        "width": list(rows),
    }


def write(path, columns, **options):
    pq.write_table(pa.table(columns), path, **options)


def source(folder, pattern="*.parquet", **options):
    options = {"split": "all", "cache_dir": str(folder / "cache"), **options}
    name = pattern if "://" in pattern else f"{folder}/{pattern}"
    return load(DataConfig(name=f"parquet:{name}", **options))


def of(folder, columns, **options):
    """The source of one file with these columns."""
    path = folder / f"{len(list(folder.iterdir()))}-one.parquet"
    write(path, columns)
    return source(folder, path.name, **options)


def test_records_are_the_rows_of_the_files(tmp_path):
    write(tmp_path / "0.parquet", columns(23), row_group_size=5)
    write(tmp_path / "1.parquet", columns(9, first=23), row_group_size=100)
    data = source(tmp_path)
    assert (len(data), data.image_count, data.skipped, data.classes) == (32, 32, {}, ())
    for index in np.random.default_rng(0).permutation(32).tolist():
        assert data[index] == {
            "image": png(index),
            "caption": f"picture {index}",
            "index": index,
            "name": f"{int(index > 22)}.parquet/{index:08d}",
        }
    again = source(tmp_path, "{0,1}.parquet")
    assert again.fingerprint == data.fingerprint
    write(tmp_path / "1.parquet", columns(9, first=24))
    assert source(tmp_path).fingerprint != data.fingerprint


def test_splits_part_by_key_or_by_file_and_row(tmp_path):
    write(tmp_path / "a.parquet", columns(200))
    without = {name: values for name, values in columns(200).items() if name != "key"}
    write(tmp_path / "b.parquet", without)
    for name, key in (("a.parquet", "{:08d}"), ("b.parquet", "b.parquet#{}")):
        data = source(tmp_path, name, split="heldout")
        found = [int(data[i]["caption"].split()[1]) for i in range(len(data))]
        assert found == [row for row in range(200) if is_heldout(key.format(row))]
        assert len(data) + len(source(tmp_path, name, split="train")) == 200


@pytest.mark.parametrize(
    ("images", "options"),
    [
        ({"png": [png(1)]}, {}),
        ({"image": [{"bytes": png(1), "path": "x.png"}]}, {}),
        ({"image_bytes": pa.array([png(1)], pa.large_binary())}, {}),
        ({"photo": [png(1)], "jpg": [b"not this"]}, {"image_key": "photo"}),
        ({"image": [png(1)], "jpg": [b"not this"]}, {}),
    ],
)
def test_images_are_in_any_usual_column_or_in_the_one_named(tmp_path, images, options):
    data = of(tmp_path, {**images, "text": ["words"]}, **options)
    assert (data[0]["image"], data[0]["caption"]) == (png(1), "words")


def test_captions_are_texts_or_lists_of_texts(tmp_path):
    texts = [["one", " two "], [], None, ["", "three"]]
    rows = {"jpg": [png(n) for n in range(4)], "caption": texts, "TEXT": ["a", "b", None, " d"]}
    data = of(tmp_path, rows)
    assert [data[i]["caption"] for i in range(len(data))] == ["one", "two", "three"]
    assert [data.image_of(i) for i in range(3)] == [0, 0, 1]
    assert data[2]["image"] == png(3)
    assert [name.split(": ")[1] for name in data.skipped] == ["row 1", "row 2"]
    assert len(of(tmp_path, rows, captions="first")) == 2
    named = of(tmp_path, rows, caption_key="TEXT")
    assert [named[i]["caption"] for i in range(len(named))] == ["a", "b", "d"]


def test_a_text_that_is_no_utf8_spoils_no_other(tmp_path):
    texts = pa.Array.from_buffers(
        pa.string(),
        2,
        [None, pa.py_buffer(np.int32([0, 3, 5]).tobytes()), pa.py_buffer(b"a\xffbok")],
    )
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), texts)
    for column in (texts, lists):
        data = of(tmp_path, {"jpg": [png(0), png(1)], "text": column})
        assert [data[i]["caption"] for i in range(len(data))] == ["ok"]
        assert list(data.skipped.values()) == ["text that is not UTF-8; save it as UTF-8"]


def test_captions_may_lie_inside_or_be_names_of_classes(tmp_path):
    rows = {"jpg": [png(0), png(1)], "notes": [[{"id": 1, "text": "one"}], []]}
    data = of(tmp_path, rows, caption_key="notes/text")
    assert [data[i]["caption"] for i in range(len(data))] == ["one"]
    said = {"info": {"features": {"label": {"names": ["cat", "ant"], "_type": "ClassLabel"}}}}
    table = pa.table({"jpg": [png(0), png(1), png(2)], "label": [1, 0, -1]})
    pq.write_table(
        table.replace_schema_metadata({"huggingface": json.dumps(said)}), tmp_path / "hf.parquet"
    )
    data = source(tmp_path, "hf.parquet", caption_key="label")
    assert [data[i]["caption"] for i in range(len(data))] == ["ant", "cat"]
    data = source(tmp_path, "hf.parquet", labels=True)
    assert data.classes == ("cat", "ant")  # in the order of their numbers
    assert [(data[i]["label"], data[i]["caption"]) for i in (0, 1)] == [(1, "ant"), (0, "cat")]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_text_is_text_in_any_of_its_types(tmp_path, kind):
    data = of(tmp_path, {"jpg": [png(0)], "text": pa.array(["words"]).cast(kind)})
    assert data[0]["caption"] == "words"
    data = of(tmp_path, {"jpg": [png(0)], "text": ['["one", "two"]']})
    assert [data[i]["caption"] for i in (0, 1)] == ["one", "two"]


def test_pictures_alone_where_no_captions_are_needed(tmp_path):
    bare = of(tmp_path, {"jpg": [png(0), png(1)]}, bare=True)
    assert [bare[i]["caption"] for i in (0, 1)] == ["", ""]
    mixed = of(tmp_path, {"jpg": [png(0), png(1)], "text": ["words", None]}, bare=True)
    assert [mixed[i]["caption"] for i in (0, 1)] == ["words", ""]


def test_classes_are_a_column(tmp_path):
    rows = {"jpg": [png(n) for n in range(3)], "label": [2, 0, None], "kind": ["b", "a", "b"]}
    data = of(tmp_path, rows, labels=True)
    assert data.classes == ("0", "1", "2")
    assert [(data[i]["label"], data[i]["caption"]) for i in range(2)] == [(2, "2"), (0, "0")]
    assert list(data.skipped.values()) == ["nothing under 'label'"]
    named = of(tmp_path, rows, labels=True, label_key="kind")
    assert named.classes == ("a", "b")
    assert [named[i]["label"] for i in range(3)] == [1, 0, 1]


def test_rows_without_an_image_are_bad_records(tmp_path):
    rows = columns(4)
    rows["jpg"][1:3] = [None, b""]
    data = of(tmp_path, rows)
    for row in (1, 2):
        with pytest.raises(BadRecord, match=f"row {row}: no image in it"):
            data[row]
    stream = batches(data, DataConfig(image_size=8), seed=0, batch_size=4)
    assert set(next(stream)["index"].tolist()) == {0, 3}
    # img2dataset says so itself, and keeps the rows of what it could not download.
    more = rows | {"url": ["u"] * 4, "status": ["success", "failed_to_download"] * 2}
    told = of(tmp_path, more)
    assert [told[i]["caption"] for i in range(len(told)) if i != 1] == ["picture 0"]
    assert list(told.skipped.values()) == ["not downloaded (failed_to_download)"] * 2


@pytest.mark.parametrize(
    ("rows", "options", "why"),
    [
        ({"url": ["u"], "caption": ["c"]}, {}, "download them with img2dataset.*wds:PATTERN"),
        ({"URL": ["u"], "image": ["path.jpg"], "TEXT": ["c"]}, {}, "img2dataset"),
        ({"image": ["path.jpg"], "text": ["c"]}, {}, "image_key: 'image': .* has string there"),
        ({"pixels": [b"x"], "text": ["c"]}, {}, "name one of: pixels, text"),
        ({"jpg": [b"x"], "words": ["c"]}, {}, "has none of caption, text, TEXT.*jpg, words"),
        ({"jpg": [b"x"], "text": ["c"]}, {"image_key": "png"}, "image_key: got 'png'"),
        (
            {"jpg": [b"x"], "text": ["c"]},
            {"caption_key": "alt"},
            "caption_key: got 'alt'.*jpg, text",
        ),
        ({"jpg": [b"x"], "text": ["c"]}, {"labels": True}, "label_key: got 'label'"),
        ({"jpg": [b"x"], "text": [None]}, {}, "none of the 0 .*nothing under 'text'"),
        ({"jpg": [b"x"], "text": [7]}, {}, "'text', expected text, which int64 is not"),
        (
            {"jpg": [b"x"], "caption": [[{"id": 1, "text": "c"}]], "alt": ["c"]},
            {},
            "list<.* is not; .* has 'caption/text', 'alt'",
        ),
        ({"jpg": [b"x"], "text": ["c"]}, {"label_key": "kind"}, "label_key: got 'kind'"),
    ],
)
def test_files_without_what_is_needed_are_refused(tmp_path, rows, options, why):
    with pytest.raises(UserError, match=why):
        of(tmp_path, rows, **options)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1", bytes(2000)])
def test_what_is_no_parquet_is_refused(tmp_path, content):
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.parquet: not readable as parquet"):
        source(tmp_path)


def test_any_damage_is_an_error_of_ours_and_no_crash(tmp_path):
    write(tmp_path / "0.parquet", columns(12), row_group_size=4)
    content = bytearray((tmp_path / "0.parquet").read_bytes())
    rng = np.random.default_rng(0)
    for number in range(60):
        damaged = content.copy()
        place = int(rng.integers(4, len(content) - 8))
        damaged[place : place + 4] = rng.bytes(4)
        (tmp_path / "damaged.parquet").write_bytes(damaged)
        with contextlib.suppress(UserError):
            data = source(tmp_path, "damaged.parquet", cache_dir=str(tmp_path / str(number)))
            for index in range(len(data)):
                with contextlib.suppress(BadRecord):
                    assert isinstance(data[index]["image"], bytes)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"needs pyarrow.*pip install .*\[parquet\]"):
        parquet.ParquetShards(DataConfig())


def test_a_row_group_is_decoded_once_whoever_asks(tmp_path, monkeypatch):
    write(tmp_path / "0.parquet", columns(60), row_group_size=20)
    data, decoded = source(tmp_path), []
    decode = parquet.ParquetShards._decode

    def counting(self, file, metadata, column, group):
        decoded.append((column, group))
        return decode(self, file, metadata, column, group)

    monkeypatch.setattr(parquet.ParquetShards, "_decode", counting)
    found = {}

    def read(rows):
        found.update({row: data[row]["image"] for row in rows})

    threads = [threading.Thread(target=read, args=(range(n, 60, 8),)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {row: png(row) for row in range(60)}
    assert sorted(decoded) == [("jpg", 0), ("jpg", 1), ("jpg", 2)]


def test_only_so_many_row_groups_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "_KEPT", 1)
    monkeypatch.setattr(parquet, "_LARGE_GROUP", 1)
    write(tmp_path / "0.parquet", columns(60), row_group_size=20)
    data = source(tmp_path)
    for row in (0, 59, 1, 58, 30):
        assert data[row]["image"] == png(row)
        assert len(data._form._groups._made) == 1


def test_a_large_row_group_is_warned_of_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(parquet, "_LARGE_GROUP", 1000)
    for number in range(2):
        write(tmp_path / f"{number}.parquet", columns(60))
    data = source(tmp_path)
    assert data[0]["image"] == data[60]["image"] == png(0)
    assert sum("row_group_size=100" in message for message in caplog.messages) == 1
    monkeypatch.setattr(parquet, "_MAX_GROUP", 1000)
    with pytest.raises(UserError, match="bytes in a row group"):
        source(tmp_path, cache_dir=str(tmp_path / "other"))


def test_files_in_a_bucket_and_only_the_columns_needed(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    rows = columns(40) | {"ballast": [rng.bytes(50_000) for _ in range(40)]}
    write(tmp_path / "0.parquet", rows, row_group_size=10)
    bucket, read = fsspec.filesystem("memory"), []
    bucket.pipe("/parquet/0.parquet", (tmp_path / "0.parquet").read_bytes())
    original = storage.StoredFile.read

    def counting(self, start, stop):
        read.append(stop - start)
        return original(self, start, stop)

    monkeypatch.setattr(storage.StoredFile, "read", counting)
    data = source(tmp_path, "memory://parquet/*.parquet")
    assert data[33]["image"] == png(33)
    assert data.fingerprint == source(tmp_path).fingerprint
    assert sum(read) < 400_000 < (tmp_path / "0.parquet").stat().st_size
    bucket.rm("/parquet/0.parquet")
    assert data[30]["image"] == png(30)  # of the same row group
    with pytest.raises(BadRecord, match="no such file"):
        data[0]


def test_processes_over_one_stream_see_each_row_once(tmp_path):
    write(tmp_path / "0.parquet", columns(30), row_group_size=7)
    config, data = DataConfig(image_size=8, cache_bytes=0), source(tmp_path)
    seen = []
    for process in range(2):
        stream = batches(data, config, seed=1, batch_size=5, process_index=process, process_count=2)
        for batch in (next(stream) for _ in range(3)):
            np.testing.assert_array_equal(batch["image"][:, 2, 3, 0], batch["index"])
            seen += batch["index"].tolist()
    assert sorted(seen) == list(range(30))
