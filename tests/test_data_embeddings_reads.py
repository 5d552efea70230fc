"""What reading a pair of stored embeddings takes: one record, and nothing else."""

import os
import tracemalloc

import fsspec
import numpy as np
import pytest

from tests.test_data_batches import CACHED, SIZE, Pictures, take
from tests.test_data_embeddings import (
    BAD,
    WIDTH,
    all_pairs,
    as_data,
    assert_same,
    encode,
    in_memory,
    make,
    plan,
    shard,
)
from unclip_jax.data.batches import batches
from unclip_jax.data.datasets import load
from unclip_jax.data.embeddings import entries
from unclip_jax.data.embeddings import shards as embedding_shards
from unclip_jax.data.embeddings.shards import FIRST, VALID, Pair, unpack
from unclip_jax.data.embeddings.store import EmbeddingStore
from unclip_jax.data.embeddings.writer import compute
from unclip_jax.data.records import BadRecord
from unclip_jax.data.shards import pages
from unclip_jax.errors import UserError

bucket = pytest.fixture(in_memory)


class Counting:
    """A store in memory, and what is asked of it."""

    def __init__(self, monkeypatch):
        files = fsspec.filesystem("memory")
        self.bytes, self.copies, read = 0, [], files.cat_file

        def cat_file(path, start=None, end=None, **options):
            found = read(path, start=start, end=end, **options)
            self.bytes += len(found)
            return found

        monkeypatch.setattr(files, "cat_file", cat_file)
        monkeypatch.setattr(files, "get_file", lambda path, here: self.copies.append(path))

    def since(self):
        """Bytes read since it was last asked."""
        found, self.bytes = self.bytes, 0
        return found


def in_bucket(bucket, source, **changes):
    compute(
        source, encode, bucket, plan(source, **changes), image_size=SIZE, batch_size=64, threads=2
    )


def as_source(where, cache, **changes):
    return load(as_data(where, cache_dir=str(cache), **changes), needs_images=False)


def wide(images, tokens):
    """Embeddings of 6 kB a pair, whose first coordinate is the picture's level."""
    rows = np.repeat(images[:, 0, 0, :1].astype(np.float32), 768, axis=1)
    return rows, rows + 1


def test_a_pair_of_a_remote_store_takes_its_own_bytes(tmp_path, bucket, monkeypatch):
    source = Pictures(160)
    compute(
        source, wide, bucket, plan(source, width=768, shards=16), image_size=SIZE, batch_size=64,
        threads=2,
    )  # fmt: skip
    whole = fsspec.filesystem("memory").du("/bucket/store")
    counting = Counting(monkeypatch)
    stored = as_source(bucket, tmp_path)
    assert len(stored) == 160 and counting.since() < 5000  # meta.json and the directory
    assert not list(tmp_path.rglob("*.*"))
    stream = batches(stored, CACHED, seed=0, batch_size=16)
    for batch in take(stream, 2):
        np.testing.assert_array_equal(batch["z_i"][:, 5], batch["index"])
    assert 32 * 6144 < counting.since() < 32 * 7000 < whole // 4
    again = as_source(bucket, tmp_path)
    counting.since()
    for batch in take(batches(again, CACHED, seed=0, batch_size=16), 2):
        np.testing.assert_array_equal(batch["z_i"][:, 5], batch["index"])
    assert counting.since() == 0  # they are in the cache
    assert counting.copies == []


@pytest.mark.parametrize("limit", [0, 50_000])
def test_what_is_kept_of_remote_stores_has_a_limit(tmp_path, bucket, limit):
    source = Pictures(100)
    compute(
        source, wide, bucket, plan(source, width=768), image_size=SIZE, batch_size=64, threads=2
    )
    stored = as_source(bucket, tmp_path, disk_cache_bytes=limit)
    for _ in range(2):
        for index in range(100):
            assert stored[index]["z_i"][0] == index
    taken = sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("*.*"))
    assert taken <= limit and (taken > limit // 2 or not limit)


def test_a_cache_that_lies_idle_makes_room(tmp_path, bucket):
    for name in ("one", "two"):
        in_bucket(f"{bucket}-{name}", Pictures(40))
    caches = tmp_path / "remote_embeddings"
    EmbeddingStore.open(f"{bucket}-one", cache_dir=tmp_path)[0]
    (one,) = caches.iterdir()
    (one / "more").write_bytes(bytes(200_000))
    limit = {"cache_dir": tmp_path, "disk_cache_bytes": 150_000}
    EmbeddingStore.open(f"{bucket}-two", **limit)[0]
    assert [*caches.iterdir()] == [one]  # it was in use lately, and there is no room beside it
    os.utime(one, (0, 0))
    EmbeddingStore.open(f"{bucket}-two", **limit)[0]
    assert one not in caches.iterdir() and len([*caches.iterdir()]) == 1


def test_bits_that_flip_in_a_bucket_or_in_its_cache_are_seen(tmp_path, bucket):
    in_bucket(bucket, Pictures(20, bad=BAD))
    store = EmbeddingStore.open(bucket, cache_dir=tmp_path)
    assert store[17].caption == "caption 17"
    (twin,) = tmp_path.rglob("*2-of-00003.array_record")
    content = twin.read_bytes()
    twin.write_bytes(content.replace(b"caption 17", b"Caption 17"))
    assert EmbeddingStore.open(bucket, cache_dir=tmp_path)[17].caption == "caption 17"
    remote, name = (
        fsspec.filesystem("memory"),
        "/bucket/store/embeddings-00002-of-00003.array_record",
    )
    remote.pipe_file(name, remote.cat_file(name).replace(b"caption 16", b"Caption 16"))
    with pytest.raises(BadRecord, match=r"pair 16 of memory://.*00002-of-00003.*damaged.*checksum"):
        store[16]
    with pytest.raises(UserError, match=r"00002-of-00003.*damaged"):
        list(store.chunks())


def test_a_store_that_a_former_version_wrote_is_read_through_once(tmp_path, bucket, caplog):
    new = make(tmp_path / "new")
    for where in (str(tmp_path / "old"), bucket):
        in_bucket(where, Pictures(20, bad=BAD))
        files = fsspec.filesystem("memory" if where == bucket else "file")
        for path in files.glob(f"{where}/*contents"):
            files.rm(path)
        for _ in range(2):
            store = EmbeddingStore.open(where, cache_dir=tmp_path / "cache")
            told = "3 of 3 shards lack what lets single records be read" in caplog.text
            assert told == (where == bucket), "a disk is read fast"
            assert_same(all_pairs(store), all_pairs(new))
            assert store.flags.tolist() == new.flags.tolist()
        assert not files.glob(f"{where}/*contents")
        in_bucket(where, Pictures(20, bad=BAD))  # the same embed adds it
        assert len(files.glob(f"{where}/*contents")) == 4
        caplog.clear()
        assert_same(all_pairs(EmbeddingStore.open(where, cache_dir=tmp_path)), all_pairs(new))
        assert not caplog.text


def test_a_directory_that_lacks_is_made_of_the_side_files(tmp_path):
    new = make(tmp_path / "store")
    (tmp_path / "store" / "contents").unlink()
    store = EmbeddingStore.open(tmp_path / "store", cache_dir=tmp_path)
    assert_same(all_pairs(store), all_pairs(new))
    (tmp_path / "store" / "contents").write_bytes(b"no directory")
    with pytest.raises(UserError, match=r"store/contents: damaged \(no directory at its end"):
        EmbeddingStore.open(tmp_path / "store", cache_dir=tmp_path)
    side = shard(tmp_path / "store", 1).with_suffix(".contents")
    (tmp_path / "store" / "contents").unlink()
    side.write_bytes(side.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"00001-of-00003\.contents: damaged .* delete that file"):
        EmbeddingStore.open(tmp_path / "store", cache_dir=tmp_path)
    side.unlink()
    make(tmp_path / "store")
    assert_same(
        all_pairs(EmbeddingStore.open(tmp_path / "store", cache_dir=tmp_path)), all_pairs(new)
    )


def test_records_of_any_size_are_where_array_record_has_them(tmp_path):
    """Those that end at a block's end, span several blocks, or are nearly nothing."""
    rng = np.random.default_rng(0)
    lengths = [0, 1, 127, 128, 16383, 16384, 65400, 65512, 65536, 200_000]
    lengths += rng.integers(0, 90_000, 30).tolist() + [65512 - 107 - n for n in range(40)]
    meta = plan(Pictures(len(lengths)), shards=1)
    writer = embedding_shards.ShardWriter(tmp_path / "shard", meta, 0)
    z, tokens = np.ones(WIDTH, np.float32), np.zeros(8, np.int32)
    pairs = [
        Pair(i, VALID | FIRST, "", "".join(map(chr, rng.integers(97, 123, n))), tokens, z, z)
        for i, n in enumerate(lengths)
    ]
    for pair in pairs:
        writer.add(pair)
    writer.finish()
    for verify in (True, False):
        side = entries.of_shard(tmp_path / "shard", meta, 0, verify=verify)
        rows, _, _ = pages.read_end(lambda a, b, side=side: side[a:b], len(side))
        found = np.concatenate(
            [entries.entries_in(side[r["offset"] : r["offset"] + r["size"]]) for r in rows]
        )
        content = (tmp_path / "shard").read_bytes()
        for pair, (offset, size, _, _) in zip(pairs, found.tolist(), strict=True):
            record = entries.record_of(content[offset : offset + size], offset)
            assert_same([unpack(record, meta, pair.index)], [pair])


def test_images_that_span_shards_are_counted_once(tmp_path):
    for per_image in (1, 2, 3, 9, 20):
        source = Pictures(20, per_image=per_image)
        folder = tmp_path / str(per_image)
        make(folder, source, shards=7)
        store = EmbeddingStore.open(folder, cache_dir=tmp_path)
        number = np.cumsum(store.flags & FIRST > 0)
        for split in ("all", "train", "heldout"):
            expected = len(np.unique(number[entries.in_split(store.flags, split)]))
            assert store.images[split] == expected
            stored = as_source(folder, tmp_path, split=split)
            chosen = np.flatnonzero(entries.in_split(store.flags, split))
            assert [stored.image_of(i) for i in range(len(stored))] == number[chosen].tolist()
            assert stored.image_count == expected


def test_what_a_source_holds_does_not_grow_with_its_pairs(tmp_path):
    def held(count):
        folder, meta = tmp_path / str(count), plan(Pictures(count), width=1, shards=2)
        z, tokens = np.ones(1, np.float32), np.zeros(8, np.int32)
        for number in range(2):
            path = folder / meta.shard_name(number)
            folder.mkdir(exist_ok=True)
            writer = embedding_shards.ShardWriter(path, meta, number)
            for i in meta.shard_pairs(number):
                writer.add(Pair(i, VALID | FIRST, str(i), "", tokens, z, z))
            writer.finish()
            side = entries.of_shard(path, meta, number, verify=False)
            path.with_suffix(".contents").write_bytes(side)
        (folder / "meta.json").write_text(meta.to_json())
        tracemalloc.start()
        stored = as_source(folder, tmp_path, split="train")
        order = np.random.default_rng(0).integers(0, len(stored), 4)
        assert all(len(stored[int(i)]["z_i"]) == 1 for i in order)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    held(100)  # what is imported and compiled the first time
    few, many = held(1_000), held(12_000)
    assert many - few < 5 * 11_000  # bytes; it was 81 a pair
