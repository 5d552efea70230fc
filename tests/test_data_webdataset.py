"""Tar shards as a source: samples, splits, captions, classes, damage, and their indices."""

import collections
import io
import itertools
import json
import os
import tarfile
import threading
import tracemalloc

import fsspec
import numpy as np
import pytest

from tests.tar_shards import archive, fill, jpeg, shard, source
from unclip_jax.data.batches import batches
from unclip_jax.data.datasets import DataConfig
from unclip_jax.data.records import is_heldout
from unclip_jax.data.shards import webdataset
from unclip_jax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    return fill(tmp_path)


def of(folder, content, **options):
    """The source of one shard with this content, the last of the folder to be made."""
    path = folder / f"{len(list(folder.iterdir()))}-one.tar"
    path.write_bytes(content)
    return source(folder, path.name, **options)


def pairs(data):
    return [(data[i]["name"].split("/", 1)[1], data[i]["caption"]) for i in range(len(data))]


# --- samples --------------------------------------------------------------------------


def test_records_are_the_members_of_the_shards(folder):
    data = source(folder, "{00000..00002}.tar")
    assert (len(data), data.image_count, data.skipped, data.classes) == (30, 30, {}, ())
    for index in (17, 0, 29):
        assert data[index] == {
            "image": jpeg(index),
            "caption": f"picture {index}",
            "index": index,
            "name": f"0000{index // 10}.tar/{index:06d}",
        }
        assert data.image_of(index) == index
    for outside in (-1, 30):
        with pytest.raises(IndexError):
            data[outside]


def test_splits_part_by_key_alone(folder):
    (folder / "many.tar").write_bytes(shard(range(300)))
    everything, train, heldout = (
        [key for key, _ in pairs(source(folder, "many.tar", split=split))]
        for split in ("all", "train", "heldout")
    )
    assert heldout == [key for key in everything if is_heldout(key)]
    assert train == [key for key in everything if not is_heldout(key)]
    assert 10 < len(heldout) < 60
    with pytest.raises(UserError, match="split: got 'test'"):
        source(folder, split="test")
    with pytest.raises(UserError, match="split: 'heldout': none of the 1"):
        of(folder, shard([0]), split="heldout")


def test_the_fingerprint_is_of_keys_contents_and_captions(folder, tmp_path_factory):
    def of_members(*members, **options):
        return of(tmp_path_factory.mktemp("shards"), archive(members), **options).fingerprint

    image, text = ("k.jpg", jpeg(0)), ("k.txt", b"one")
    same = of_members(image, text)
    assert same == of_members(text, ("k.jpg", jpeg(0)), ("k.nothing", b"."))
    others = {
        of_members(("l.jpg", jpeg(0)), ("l.txt", b"one")),
        of_members(("k.jpg", jpeg(0) + b"."), text),
        of_members(("k.jpg", jpeg(0)[::-1]), text),
        of_members(image, ("k.txt", b"two")),
        of_members(image, text, captions="first"),
    }
    assert len({same, *others}) == 6


def test_captions_come_from_the_text_or_the_json(folder):
    def found(*members, **options):
        members = [("k.jpg", jpeg(0)), *members]
        return [caption for _, caption in pairs(of(folder, archive(members), **options))]

    fields = {
        "caption": " from json ", "text": "t", "alt": ["one", "", "two "], "none": None, "width": 3,
        "deep": {"er": "inside"},
    }  # fmt: skip
    described = ("k.json", json.dumps(fields).encode())
    assert found(("k.txt", "\u00fcber\n".encode("utf-16")), described) == ["\u00fcber"]
    assert found(described, ("k.txt", b"  ")) == ["from json"]
    assert found(("k.json", b'{"text": "t"}')) == ["t"]
    assert found(described, ("k.txt", b"not this"), caption_key="alt") == ["one", "two"]
    assert found(described, caption_key="alt", captions="first") == ["one"]
    assert found(described, caption_key="deep/er") == ["inside"]
    assert found(("k.tags", b"a tag"), ("k.txt", b"t"), caption_key=".tags") == ["a tag"]
    for useless, why in (
        (b"", "no JSON"), (b"[1]", "no caption"), (b"{", "no JSON"), (b"[" * 100_000, "no JSON"),
        (b'{"caption": 5}', "int '5', which is no text"), (b"\xff", "not UTF-8"),
        (b"9" * 9999, "no JSON"), (b'{"caption": "\\ud800 x"}', "not UTF-8"),
        (b'{"alt": "x"}', "no caption in .jpg, .json; its .json has 'alt'"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=why):
            found(("k.json", useless))
    for text in ("\u00fcber".encode("latin-1"), "no mark".encode("utf-16-le")):
        with pytest.raises(UserError, match="save it as UTF-8"):
            found(("k.txt", text))
    with pytest.raises(
        UserError, match=r"no 'none', the caption_key.*'caption', 'text', 'alt', 'deep/er'"
    ):
        found(described, caption_key="none")
    with pytest.raises(UserError, match="int '3', which is no text"):
        found(described, caption_key="width")


def test_several_captions_share_an_image(folder):
    members = []
    for number in range(4):
        texts = [f"{number}/{k}" for k in range(number + 1)]
        members += [
            (f"{number}.jpg", jpeg(number)),
            (f"{number}.json", json.dumps({"text": texts})),
        ]
    data = of(folder, archive([(n, c if isinstance(c, bytes) else c.encode()) for n, c in members]))
    assert [caption for _, caption in pairs(data)] == [
        f"{n}/{k}" for n in range(4) for k in range(n + 1)
    ]
    assert [data.image_of(i) for i in range(10)] == [0, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    assert data.image_count == 4


def test_the_image_is_found_by_its_suffix(folder):
    members = [("k.json", b"{}"), ("k.seg.png", b"mask"), ("k.JPG", b"photo"), ("k.txt", b"y")]
    assert of(folder, archive(members))[0]["image"] == b"photo"
    assert of(folder, archive(members), image_key="seg.png")[0]["image"] == b"mask"
    with pytest.raises(UserError, match=r"no image among \.json, \.seg\.png"):
        of(folder, archive(members), image_key="webp")


def test_classes_are_numbers_or_names_of_all_shards(folder):
    def shards(*classes):
        for number, (label, text) in enumerate(classes):
            members = [("k.jpg", jpeg(0)), ("k.cls", label)]
            members += [("k.txt", text)] if text else []
            (folder / f"c{number}.tar").write_bytes(archive(members))
        return source(folder, f"c{{0..{len(classes) - 1}}}.tar", labels=True)

    numbered = shards((b"3", b"x"), (b"0\n", None))
    assert numbered.classes == ("0", "1", "2", "3")
    assert [numbered[i]["label"] for i in (0, 1)] == [3, 0]
    assert numbered[0]["label"].dtype == np.int32
    assert [caption for _, caption in pairs(numbered)] == ["x", "0"]
    named = shards((b"dog", None), (b"cat", None), (b"dog", b"a dog"))
    assert named.classes == ("cat", "dog")
    assert [named[i]["label"] for i in range(3)] == [1, 0, 1]
    assert "label" not in source(folder, "c2.tar")[0]
    with pytest.raises(UserError, match="class: got 99999999999999999999"):
        shards((b"9" * 30, None))
    with pytest.raises(UserError, match=r"no \.cls"):
        of(folder, shard([0]), labels=True)
    with pytest.raises(UserError, match="long text"):
        shards((b"x" * 1000, None))


def test_hostile_names_are_keys_and_nothing_else(folder):
    long = "long/" * 150_000 + "name"
    names = ["../../etc/passwd", "/abs/olute", "a\0b", "dot.dir/k", "sur\udc80", "k\nk", long]
    file = io.BytesIO()
    with tarfile.open(
        fileobj=file, mode="w", format=tarfile.PAX_FORMAT, errors="surrogateescape"
    ) as opened:
        for name in names:
            for suffix, content in (("png", b"image"), ("txt", b"caption")):
                info = tarfile.TarInfo("what the pax header says")
                info.size, info.pax_headers = len(content), {"path": f"{name}.{suffix}"}
                opened.addfile(info, io.BytesIO(content))
    before = sorted(path.name for path in folder.iterdir())
    data = of(folder, file.getvalue())
    assert [data[i]["image"] for i in range(len(data))] == [b"image"] * len(names)
    shown = [data[i]["name"].split("/", 1)[1] for i in range(len(data))]
    assert shown[:6] == [
        "../../etc/passwd", "/abs/olute", r"a\x00b", "dot.dir/k", r"sur\udc80", r"k\nk"
    ]  # fmt: skip
    assert shown[6] == long[:200]
    assert sorted(p.name for p in folder.iterdir()) == sorted([*before, "3-one.tar", "cache"])


def test_what_is_no_sample_is_left_out_and_named(folder, caplog):
    members = [
        (".hidden", b"x"), ("README", b"x"), ("d/.x.jpg", b"x"), ("d/trailing.", b"x"),
        ("empty.jpg", b""), ("empty.txt", b"no picture"),
        ("alone.txt", b"no picture"),
        ("mute.jpg", jpeg(0)),
        ("twice.jpg", jpeg(1)), ("twice.txt", b"one"),
        ("twice.jpg", jpeg(2)), ("twice.txt", b"two"),
        ("huge.jpg", jpeg(3)), ("huge.txt", b"x" * (2**24 + 1)),
        ("good.jpg", jpeg(4)), ("good.txt", b"w" * 10**6),
    ]  # fmt: skip
    data = of(folder, archive(members))
    assert [key for key, _ in pairs(data)] == ["twice", "twice", "good"]
    assert [data[i]["image"] for i in range(3)] == [jpeg(1), jpeg(2), jpeg(4)]
    reasons = collections.Counter(reason for reason in data.skipped.values())
    assert reasons == {
        "an image of 0 bytes": 1, "no image among .txt": 1, "no caption in .jpg": 1,
        "no caption in .jpg, .txt": 1,
    }  # fmt: skip
    assert any("empty (byte " in message and "0 bytes" in message for message in caplog.messages)
    stream = batches(data, DataConfig(image_size=8), seed=0, batch_size=3)
    assert next(stream)["tokens"].shape == (3, 77)
    assert (stream.skipped, stream.truncated) == (4, 1)


def test_a_shard_cut_short_gives_what_it_has(folder, caplog):
    content = shard(range(10))
    cut = content.index(b"000007.jpg") + 512 + 10
    data = of(folder, content[:cut])
    assert [caption for _, caption in pairs(data)] == [f"picture {n}" for n in range(7)]
    assert list(data.skipped.values()) == [f"ends inside '000007.jpg' at byte {cut - 10 - 512}"]
    assert sum("ends inside '000007.jpg'" in message for message in caplog.messages) == 1


def test_what_is_no_shard_is_refused(folder):
    for content in (b"", b"<html>" * 200, b"\x1f\x8b" + bytes(1000)):
        with pytest.raises(UserError, match=r"one\.tar: .* at byte 0; expected an uncompressed"):
            of(folder, content)
    with pytest.raises(UserError, match="the shards are empty"):
        of(folder, archive([]))
    with pytest.raises(UserError, match=r"ends inside '000000\.jpg'"):
        of(folder, shard([0])[:600])


# --- indices --------------------------------------------------------------------------


def counted(monkeypatch):
    """Names of shards, as they are indexed."""
    seen, original = [], webdataset.TarShards.samples

    def counting(self, file, *rest):
        seen.append(file.name)
        return original(self, file, *rest)

    monkeypatch.setattr(webdataset.TarShards, "samples", counting)
    return seen


def test_a_shard_is_indexed_once_and_again_when_it_changes(folder, monkeypatch):
    seen = counted(monkeypatch)
    first = source(folder)
    assert sorted(seen) == ["00000.tar", "00001.tar", "00002.tar"]
    assert source(folder).fingerprint == first.fingerprint
    assert source(folder, "{00000..00001}.tar", split="train").name
    assert len(seen) == 3
    (folder / "00001.tar").write_bytes(shard(range(50, 60)))  # as large as before
    os.utime(folder / "00001.tar", (1, 1))
    changed = source(folder)
    assert seen[3:] == ["00001.tar"]
    assert changed[10]["caption"] == "picture 50"
    assert changed.fingerprint != first.fingerprint
    indices = sorted((folder / "cache" / "shards").iterdir())
    assert len(indices) == 4
    assert all(path.suffix == ".index" for path in indices)


@pytest.mark.parametrize("damage", [b"", b"\xff" * 100, b"\x05" + bytes(7) + b"{}   ", None])
def test_a_damaged_index_is_made_anew(folder, damage):
    expected = source(folder)
    for path in (folder / "cache" / "shards").iterdir():
        path.write_bytes(path.read_bytes()[:-1] if damage is None else damage)
    assert source(folder).fingerprint == expected.fingerprint
    for path in (folder / "cache" / "shards").iterdir():
        path.unlink()
    lost = source(folder)
    for path in (folder / "cache" / "shards").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="gone or damaged"):
        lost[0]


def test_hosts_share_an_index_that_lies_in_a_bucket(folder, monkeypatch):
    files, shared = fsspec.filesystem("memory"), "memory://bucket/known"
    seen = counted(monkeypatch)
    expected = source(folder)
    del seen[:]
    one = source(folder, shared_dir=shared, cache_dir=str(folder / "one"))
    assert sorted(seen) == ["00000.tar", "00001.tar", "00002.tar"]
    assert not (folder / "one").exists()
    read, asked = files.cat_file, []

    def cat_file(path, *span, **options):
        asked.append(path)
        return read(path, *span, **options)

    monkeypatch.setattr(files, "cat_file", cat_file)
    other = source(folder, shared_dir=shared, cache_dir=str(folder / "other"))
    assert len(seen) == 3 and [path.rpartition(".")[2] for path in asked] == ["catalogue"]
    assert one.fingerprint == other.fingerprint == expected.fingerprint
    assert pairs(one) == pairs(other) == pairs(expected)
    del asked[:]
    assert pairs(source(folder, shared_dir=shared, cache_dir=str(folder / "other")))
    assert len(asked) == 1  # the pages are in the cache
    files.store.clear()


def test_a_page_of_an_index_that_changed_is_seen(folder):
    expected = source(folder)
    path = next((folder / "cache" / "shards").iterdir())
    path.write_bytes(path.read_bytes().replace(b"picture", b"Picture", 1))
    with pytest.raises(UserError, match=r"cache_dir: an index of wds:.* is gone or damaged"):
        pairs(source(folder))
    path.unlink()
    assert pairs(source(folder)) == pairs(expected)


def test_what_a_source_holds_does_not_grow_with_its_images(tmp_path):
    def held(count):
        members = [(f"{n:06d}.{s}", b"a text") for n in range(count) for s in ("jpg", "txt")]
        (tmp_path / f"{count}.tar").write_bytes(archive(members))
        source(tmp_path, f"{count}.tar")
        tracemalloc.start()
        data = source(tmp_path, f"{count}.tar", split="train")
        assert {data[i * len(data) // 4]["caption"] for i in range(4)} == {"a text"}
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    held(50)
    few, many = held(300), held(3000)
    assert many - few < 10 * 2700  # bytes; they were 124 an image


def test_processes_with_one_cache_share_the_work(folder, monkeypatch):
    for number in range(3, 40):
        (folder / f"{number:05d}.tar").write_bytes(shard([number]))
    seen = counted(monkeypatch)
    threads = [threading.Thread(target=source, args=(folder,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(seen) == {f"{number:05d}.tar" for number in range(40)}
    assert len(seen) < 4 * 40
    shards = folder / "cache" / "shards"
    assert len(list(shards.iterdir())) == 40


def test_an_unwritable_cache_is_named(folder):
    (folder / "file").write_text("")
    with pytest.raises(UserError, match=r"cache_dir: .*file/shards: can't be written"):
        source(folder, cache_dir=str(folder / "file"))


def test_processes_over_one_stream_see_each_picture_once_an_epoch(folder):
    config = DataConfig(image_size=8, cache_bytes=0, context_length=8)
    data, seen = source(folder), collections.Counter()
    for process in range(3):
        stream = batches(data, config, seed=4, batch_size=5, process_index=process, process_count=3)
        for batch in itertools.islice(stream, 4):
            seen.update(batch["index"].tolist())
            np.testing.assert_allclose(batch["image"][:, 4, 4, 0], batch["index"], atol=1)
    assert seen == {index: 2 for index in range(30)}


def test_a_shard_without_an_end_mark_or_with_bytes_behind_it_says_so(folder):
    content = shard(range(4))
    last = content.rindex(b"ustar") - 257  # the last member's header
    size = int(content[last + 124 : last + 135], 8)
    cut = last + 512 + -(-size // 512) * 512
    for other, why in (
        (content[:cut], "without an end mark"),
        (content * 2, "follow its end mark"),
    ):
        data = of(folder, other)
        assert [caption for _, caption in pairs(data)] == [f"picture {n}" for n in range(4)]
        assert [why in reason for reason in data.skipped.values()] == [True]
    assert of(folder, content).skipped == {}


def test_an_image_of_another_suffix_is_known_by_its_bytes(folder):
    data = of(folder, archive([("k.jfif", jpeg(0)), ("k.txt", b"one"), ("k.npy", jpeg(1))]))
    assert (data[0]["image"], data[0]["caption"]) == (jpeg(0), "one")
    with pytest.raises(UserError, match=r"a key ends at its first dot; image_key"):
        of(folder, archive([("k.v2.jpg", jpeg(0)), ("k.v2.txt", b"one")]))


def test_pictures_alone_where_no_captions_are_needed(folder):
    members = [("a.jpg", jpeg(0)), ("b.jpg", jpeg(1)), ("b.txt", b"two"), ("c.jpg", jpeg(2)),
               ("c.txt", b"\xfc")]  # fmt: skip
    assert [caption for _, caption in pairs(of(folder, archive(members)))] == ["two"]
    assert [c for _, c in pairs(of(folder, archive(members), bare=True))] == ["", "two", ""]


def test_classes_may_be_a_field_of_the_json(folder):
    members = [("0.jpg", jpeg(0)), ("0.json", b'{"kind": "dog"}')]
    members += [("1.jpg", jpeg(1)), ("1.json", b'{"kind": "cat"}')]
    data = of(folder, archive(members), labels=True, label_key="kind")
    assert (data.classes, [data[i]["label"] for i in (0, 1)]) == (("cat", "dog"), [1, 0])
    with pytest.raises(UserError, match="no 'gone' among"):
        of(folder, archive(members), labels=True, label_key="gone")
