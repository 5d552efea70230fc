"""Stored CLIP embeddings: right rows, each once, whole or absent, and never another model's."""

import dataclasses
import json
import threading
import types

import fsspec
import ml_dtypes
import numpy as np
import pytest

from tests.test_data_batches import CACHED, READ_AGAIN, SIZE, Pictures, take
from unclip_jax.data.batches import batches
from unclip_jax.data.datasets import DataConfig, load
from unclip_jax.data.embeddings import folders
from unclip_jax.data.embeddings import shards as embedding_shards
from unclip_jax.data.embeddings.shards import FIRST, VALID, Damaged, Meta, Pair, pack, unpack
from unclip_jax.data.embeddings.store import EmbeddingStore, WithEmbeddings
from unclip_jax.data.embeddings.writer import compute, compute_whole, default_shards, missing_shards
from unclip_jax.data.records import BadRecord, is_heldout
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.errors import UserError

BAD = (0, 5, 18)
WIDTH = 3


def encode(images, tokens):
    """z_i knows the picture's level, z_t the caption's tokens."""
    assert images.shape[1:] == (SIZE, SIZE, 3)
    level = images[:, 0, 0, :1].astype(np.float64)
    z_i = np.concatenate([level, level**2, np.ones_like(level)], axis=-1)
    z_t = np.repeat(tokens.sum(-1, keepdims=True), WIDTH, axis=-1)
    return z_i, z_t


def plan(source, **changes):
    return Meta(
        **{
            "clip_fingerprint": "clip-1", "data_fingerprint": source.fingerprint,
            "count": len(source), "width": WIDTH, "context_length": 8, "vocab_size": 514,
            "unit_embeddings": True, "shards": 3, **changes,
        }
    )  # fmt: skip


def make(folder, source=None, encode=encode, *, process=(0, 1), **changes):
    """Computes a store, or one process's share of it, and opens it if it is complete."""
    source = source or Pictures(20, bad=BAD)
    compute(
        source, encode, folder, plan(source, **changes), image_size=SIZE, batch_size=6, threads=3,
        process_index=process[0], process_count=process[1],
    )  # fmt: skip
    if missing_shards(folder, plan(source, **changes)):
        return None
    return EmbeddingStore.open(folder, cache_dir=folder)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def shard(folder, number, of=3):
    return folder / f"embeddings-{number:05d}-of-{of:05d}.array_record"


def all_pairs(store):
    return [store[i] for i in range(len(store))]


def assert_same(some, others):
    for one, other in zip(some, others, strict=True):
        assert one[:4] == other[:4]
        for a, b in zip(one[4:], other[4:], strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                np.testing.assert_array_equal(a, b)


# ---------------------------------------------------------------- what is in a store


@pytest.mark.filterwarnings("ignore:.*were cut")
def test_record_i_is_pair_i_and_bad_ones_are_marked(tmp_path):
    store = make(tmp_path / "store")
    assert len(store) == 20
    for i, pair in enumerate(all_pairs(store)):
        assert (pair.index, pair.name) == (i, f"picture {i}")
        assert pair.caption == f"caption {i}"
        np.testing.assert_array_equal(pair.tokens, Tokenizer(8, 514).encode([pair.caption])[0])
        assert bool(pair.flags & VALID) == (i not in BAD)
        if i not in BAD:
            assert pair.z_i.dtype == pair.z_t.dtype == np.float32
            assert pair.z_i.tolist() == [i, i**2, 1]
            assert pair.z_t.tolist() == [pair.tokens.sum()] * WIDTH
        else:
            assert pair.z_i is None and pair.z_t is None
    assert [pair.flags for pair in all_pairs(store)] == store.flags.tolist()


def test_shards_part_the_pairs_evenly_whatever_their_number():
    for count in (1, 2, 7, 20, 1001):
        for shards in {1, min(2, count), count // 3 or 1, count}:
            meta = plan(Pictures(count), shards=shards)
            ranges = [meta.shard_pairs(s) for s in range(shards)]
            assert [i for r in ranges for i in r] == list(range(count))
            assert max(map(len, ranges)) - min(map(len, ranges)) <= 1
            assert all(meta.shard_of(i) == s for s, r in enumerate(ranges) for i in r)
    assert [default_shards(n) for n in (1, 65536, 65537, 200_000)] == [1, 1, 2, 4]


@pytest.mark.parametrize("vocab_size", [514, 2**17])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_packed_comes_back(dtype, vocab_size):
    meta = plan(Pictures(9), dtype=dtype, vocab_size=vocab_size)
    rng = np.random.default_rng(0)
    z_i, z_t = rng.normal(size=(2, WIDTH)).astype(np.float32)
    tokens = np.zeros(8, np.int32)
    tokens[:3] = vocab_size - 2, 0, vocab_size - 1
    texts = ("", "a", "ein Stück 🍎\n\0", "\ud800 lone", "a" * 10**6, "caf\udce9.png")
    for name in texts:
        for pair in (
            Pair(4, VALID | FIRST, name, name[::-1], tokens, z_i, z_t),
            Pair(4, FIRST, name, "", np.zeros(8, np.int32), None, None),
        ):
            found = unpack(pack(pair, meta), meta, 4)
            kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
            rounded = [None if z is None else z.astype(kind).astype(np.float32) for z in pair[5:]]
            assert_same([found], [pair._replace(z_i=rounded[0], z_t=rounded[1])])


def test_no_other_bytes_are_a_record():
    meta = plan(Pictures(9))
    z = np.ones(WIDTH, np.float32)
    record = pack(Pair(4, VALID, "name", "a caption", np.arange(8), z, z), meta)
    with pytest.raises(Damaged, match="holds pair 4"):
        unpack(record, meta, 5)
    for length in range(len(record)):
        with pytest.raises(Damaged):
            unpack(record[:length], meta, 4)
    with pytest.raises(Damaged):
        unpack(record + b"\0", meta, 4)
    with pytest.raises(Damaged, match="not UTF-8"):
        unpack(record[:-1] + b"\xff", meta, 4)
    longer = dataclasses.replace(meta, context_length=4)
    with pytest.raises(Damaged):
        unpack(record, longer, 4)


def test_threads_share_a_store(tmp_path):
    store = make(tmp_path / "store", Pictures(200), shards=7)
    wrong = []

    def read(seed):
        for i in np.random.default_rng(seed).integers(0, 200, 300):
            if store[int(i)].z_i[0] != i:
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_chunks_are_all_valid_pairs_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr("unclip_jax.data.embeddings.store._READ_TOGETHER", 4)
    store = make(tmp_path / "store")
    good = [i for i in range(20) if i not in BAD]
    for among in (None, np.arange(20) % 3 == 0, np.zeros(20, bool)):
        expected = [i for i in good if among is None or among[i]]
        chunks = list(store.chunks(among))
        assert [int(z) for z_i, _ in chunks for z in z_i[:, 0]] == expected
        assert all(len(z_i) == len(z_t) <= 4 for z_i, z_t in chunks)


# ---------------------------------------------------------------- how it comes to be


def test_the_encoder_always_sees_full_batches(tmp_path):
    shapes = []

    def spy(images, tokens):
        shapes.append((images.shape, tokens.shape))
        return encode(images, tokens)

    make(tmp_path / "store", encode=spy)  # 20 pairs in batches of 6, across the ends of shards
    assert shapes == [((6, SIZE, SIZE, 3), (6, 8))] * 4


@pytest.mark.parametrize("count", [2, 3, 5])
def test_any_number_of_processes_writes_the_same_bytes(tmp_path, count):
    make(tmp_path / "one")
    for process in reversed(range(count)):
        source = Pictures(20, bad=BAD)
        store = make(tmp_path / "many", source, process=(process, count))
        mine = [s for s in range(3) if s % count == process]
        assert source.reads == sum(len(plan(source).shard_pairs(s)) for s in mine)
        assert (store is None) == (process > 0)
    assert files(tmp_path / "many") == files(tmp_path / "one")


@pytest.mark.parametrize("then", [1, 2])
def test_what_is_interrupted_goes_on_and_has_each_pair_once(tmp_path, then):
    make(tmp_path / "whole")
    calls = []

    def fails(images, tokens):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("preempted")
        return encode(images, tokens)

    with pytest.raises(RuntimeError, match="preempted"):
        make(tmp_path / "cut", encode=fails)
    first = shard(tmp_path, 0)
    names = [first.name, first.with_suffix(".contents").name, "meta.json"]
    assert sorted(files(tmp_path / "cut")) == names
    with pytest.raises(UserError, match="2 of 3 shards are missing; run the same"):
        EmbeddingStore.open(tmp_path / "cut", cache_dir=tmp_path)
    (tmp_path / "cut" / f".{shard(tmp_path, 1).name}.0bad").write_bytes(b"what kill -9 leaves")

    source = Pictures(20, bad=BAD)
    for process in range(then):
        make(tmp_path / "cut", source, process=(process, then))
    assert source.reads == 14  # the first shard is not read again
    assert files(tmp_path / "cut") == files(tmp_path / "whole")

    def never(images, tokens):
        raise AssertionError("computed again")

    make(tmp_path / "cut", encode=never)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_fingerprint": "clip-2"}, "clip_fingerprint is 'clip-1', expected 'clip-2'"),
        ({"unit_embeddings": False}, "unit_embeddings is True, expected False"),
        ({"dtype": "bfloat16"}, "dtype is 'float32', expected 'bfloat16'"),
        ({"shards": 4}, "shards is 3, expected 4"),
        ({"vocab_size": 600}, "vocab_size is 514, expected 600"),
        ({"data_fingerprint": "other"}, "data_fingerprint is '20-1', expected 'other'"),
    ],
)
def test_a_plan_that_differs_is_refused(tmp_path, change, message):
    make(tmp_path / "store")
    with pytest.raises(UserError, match=message):
        make(tmp_path / "store", **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shards": 0}, "shards: got 0, expected an integer, 1 or more"),
        ({"shards": 21}, "shards: got 21, expected 1 to 20"),
        ({"dtype": "int8"}, "dtype: got 'int8', expected one of float32"),
        ({"count": 0}, "pairs: got 0"),
    ],
)
def test_a_plan_without_meaning_is_named(change, message):
    with pytest.raises(UserError, match=message):
        plan(Pictures(20), **change)


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't"):
        make(tmp_path / "file" / "store")
    (tmp_path / "stray").mkdir()
    (tmp_path / "stray" / shard(tmp_path, 0).name).write_text("")
    with pytest.raises(UserError, match=r"shards, but no meta\.json"):
        make(tmp_path / "stray")
    tokens, z = np.zeros(8, np.int32), np.zeros(WIDTH, np.float32)
    with pytest.raises(UserError, match=r"no/such.*can't be written"):
        writer = embedding_shards.ShardWriter(tmp_path / "no" / "such", plan(Pictures(20)), 0)
        for i in range(6):
            writer.add(Pair(i, VALID, "", "", tokens, z, z))
        writer.finish()


def test_nothing_of_no_use_is_stored(tmp_path):
    with pytest.raises(UserError, match="picture 1, pair 1 of pictures, are not finite"):
        make(tmp_path / "nan", encode=lambda i, t: tuple(z * np.nan for z in encode(i, t)))
    with pytest.raises(UserError, match="every one of the 5"):
        make(tmp_path / "bad", Pictures(5, bad=range(5)), shards=1)
    for folder in ("nan", "bad"):
        assert list(files(tmp_path / folder)) == ["meta.json"]


def test_bad_records_and_cut_captions_are_named(tmp_path, caplog):
    make(tmp_path / "store", Pictures(20, bad=(3,), unreadable=(7,)))
    text = "\n".join(caplog.messages)
    assert "picture 3: not a readable image" in text and "picture 7: gone" in text
    assert text.count("cut the caption") == 5 and "no further ones are named" in text


def test_a_cache_appears_whole_or_not_at_all(tmp_path):
    def fill(encode=encode):
        source = Pictures(20, bad=BAD)
        compute_whole(
            source, encode, tmp_path / "cache", plan(source), image_size=SIZE, batch_size=6,
            threads=2,
        )  # fmt: skip

    with pytest.raises(RuntimeError):
        fill(lambda images, tokens: (_ for _ in ()).throw(RuntimeError("out of memory")))
    assert list(tmp_path.iterdir()) == []

    def meanwhile(images, tokens):
        if not (tmp_path / "cache").exists():
            fill()
        return encode(images, tokens)

    fill(meanwhile)  # another process is first: its folder stays
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    fill(lambda images, tokens: pytest.fail("computed again"))
    assert len(EmbeddingStore.open(tmp_path / "cache", cache_dir=tmp_path)) == 20


# ---------------------------------------------------------------- damage


def test_damaged_shards_are_named_and_can_be_computed_again(tmp_path):
    folder = tmp_path / "store"
    make(folder)
    whole = files(folder)
    second = shard(folder, 1)
    for damaged in (b"", b"no shard", whole[second.name][:-1000], whole[shard(folder, 0).name]):
        second.write_bytes(damaged)
        store = EmbeddingStore.open(folder, cache_dir=tmp_path)
        for read in (lambda s=store: s[8], lambda s=store: list(s.chunks())):
            with pytest.raises((UserError, BadRecord), match=r"00001-of-00003.*damaged"):
                read()
        assert store[0].index == 0  # the others serve
    second.unlink()
    with pytest.raises(UserError, match="1 of 3 shards are missing"):
        EmbeddingStore.open(folder, cache_dir=tmp_path)
    make(folder)
    assert files(folder) == whole


def test_a_flipped_bit_is_seen(tmp_path):
    folder = tmp_path / "store"
    make(folder)
    whole = shard(folder, 2).read_bytes()
    where = whole.index(b"caption 17")
    shard(folder, 2).write_bytes(whole[:where] + b"C" + whole[where + 1 :])
    store = EmbeddingStore.open(folder, cache_dir=tmp_path)
    assert store[16].index == 16
    with pytest.raises(BadRecord, match=r"pair 17 of .*00002-of-00003.*damaged"):
        store[17]
    with pytest.raises(UserError, match=r"00002-of-00003.*damaged"):
        list(store.chunks())


def test_damaged_meta_is_named(tmp_path):
    make(tmp_path / "store")
    path = tmp_path / "store" / "meta.json"
    meta = json.loads(path.read_text())
    for text in ("{", "[]", "3", json.dumps({**meta, "shards": "3"}), json.dumps({**meta, "x": 1})):
        path.write_text(text)
        with pytest.raises(UserError, match=r"meta\.json is damaged"):
            EmbeddingStore.open(tmp_path / "store", cache_dir=tmp_path)
    path.write_text(json.dumps({**meta, "format": 1}))
    with pytest.raises(UserError, match="of format 1, expected 2"):
        EmbeddingStore.open(tmp_path / "store", cache_dir=tmp_path)
    path.unlink()
    for folder in ("store", "nowhere"):
        with pytest.raises(UserError, match="no stored embeddings; compute them with"):
            EmbeddingStore.open(tmp_path / folder, cache_dir=tmp_path)


# ---------------------------------------------------------------- in a bucket


def in_memory():
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield "memory://bucket/store"
    files.store.clear()


bucket = pytest.fixture(in_memory)


def test_a_store_may_be_remote(tmp_path, bucket):
    local = make(tmp_path / "local")
    with pytest.raises(UserError, match="no stored embeddings"):
        EmbeddingStore.open(bucket, cache_dir=tmp_path / "cache")
    for process in (0, 1):
        source = Pictures(20, bad=BAD)
        compute(
            source, encode, bucket, plan(source), image_size=SIZE, batch_size=6, threads=2,
            process_index=process, process_count=2,
        )  # fmt: skip
    remote = fsspec.filesystem("memory")
    paths = remote.ls("/bucket/store", detail=False)
    there = {path.rsplit("/", 1)[-1]: remote.cat_file(path) for path in paths}
    assert there == files(tmp_path / "local")

    store = EmbeddingStore.open(bucket, cache_dir=tmp_path / "cache", clip_fingerprint="clip-1")
    assert store[0].index == 0
    assert len(list((tmp_path / "cache").rglob("*.array_record"))) == 1  # only what is read
    assert_same(all_pairs(store), all_pairs(local))
    remote.rm("/bucket/store", recursive=True)  # from now on the copies serve
    np.testing.assert_array_equal(store.flags, local.flags)
    with pytest.raises(UserError, match="no stored embeddings"):
        EmbeddingStore.open(bucket, cache_dir=tmp_path / "cache")


def test_a_copy_of_what_has_changed_is_not_used(tmp_path, bucket):
    sources = Pictures(20), Pictures(20, bad=BAD)
    for source in sources:
        compute(source, encode, bucket, plan(source), image_size=SIZE, batch_size=6, threads=2)
        store = EmbeddingStore.open(bucket, cache_dir=tmp_path)
        assert bool(store[5].flags & VALID) == (source is sources[0])
        fsspec.filesystem("memory").rm("/bucket/store", recursive=True)


def test_file_urls_are_paths_and_unknown_protocols_are_named(tmp_path):
    make(f"file://{tmp_path}/store")
    assert len(EmbeddingStore.open(tmp_path / "store", cache_dir=tmp_path)) == 20
    with pytest.raises(UserError, match="expected the folder of a store"):
        load(as_data(""), needs_images=False)
    for url in ("nonsense://x/y", "gs:/x://y"):
        with pytest.raises(UserError, match="is an unknown protocol"):
            folders.Folder(url, tmp_path)


# ---------------------------------------------------------------- joined to pictures


@pytest.mark.parametrize("config", [CACHED, READ_AGAIN])
def test_batches_carry_the_embeddings_of_their_pairs(tmp_path, config):
    source = Pictures(20, bad=BAD)
    joined = WithEmbeddings(source, make(tmp_path / "store", source))
    augmented = DataConfig(**{**vars(config), "augment": 0.2})
    for settings in (config, augmented):
        stream = batches(joined, settings, seed=0, batch_size=4)
        for batch in take(stream, 12):
            np.testing.assert_array_equal(batch["z_i"][:, 0], batch["index"])
            assert batch["z_t"].shape == (4, WIDTH)
            assert batch["z_t"].dtype == np.float32
        assert stream.skipped == len(BAD)


def test_what_was_bad_then_is_skipped_though_it_be_mended(tmp_path):
    store = make(tmp_path / "store")
    mended = WithEmbeddings(Pictures(20), store)
    stream = batches(mended, CACHED, seed=0, batch_size=4)
    seen = np.concatenate([batch["index"] for batch in take(stream, 20)])
    assert set(seen.tolist()) == set(range(20)) - set(BAD)


def test_other_data_are_refused(tmp_path):
    store = make(tmp_path / "store")
    with pytest.raises(UserError, match="computed from other data"):
        WithEmbeddings(Pictures(21), store)
    with pytest.raises(UserError, match="clip_fingerprint is 'clip-1', expected 'clip-2'"):
        EmbeddingStore.open(tmp_path / "store", cache_dir=tmp_path, clip_fingerprint="clip-2")


# ---------------------------------------------------------------- as a data set


def as_data(folder, **changes):
    whole = dataclasses.replace(CACHED, name=f"embeddings:{folder}", split="all")
    return dataclasses.replace(whole, **changes)


def test_embeddings_are_a_data_set_without_pictures(tmp_path):
    pictures = Pictures(20, bad=BAD)
    joined = WithEmbeddings(pictures, make(tmp_path / "store", pictures))
    config = as_data(tmp_path / "store")
    stored = load(config, needs_images=False)
    assert (len(stored), stored.image_count) == (20, 20)
    theirs = batches(joined, CACHED, seed=3, batch_size=4)
    ours = batches(stored, config, seed=3, batch_size=4)
    for one, other in zip(take(theirs, 9), take(ours, 9), strict=True):
        assert other.keys() == {"tokens", "index", "z_i", "z_t"}
        for key in other:
            np.testing.assert_array_equal(one[key], other[key])
            assert one[key].dtype == other[key].dtype
    assert ours.skipped == theirs.skipped == len(BAD)
    for one, other in zip(joined.chunks(), stored.chunks(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_other_tokens_than_those_stored_are_made_anew(tmp_path):
    make(tmp_path / "store")
    config = as_data(tmp_path / "store", context_length=20)
    batch = next(batches(load(config, needs_images=False), config, seed=0, batch_size=4))
    captions = [f"caption {i}" for i in batch["index"]]
    np.testing.assert_array_equal(batch["tokens"], Tokenizer(20, 514).encode(captions))
    config = as_data(tmp_path / "store")
    stored = load(config, needs_images=False)
    encoder = types.SimpleNamespace(tokenizer=Tokenizer(20, 514), states=lambda ids: {"ids": ids})
    batch = next(batches(stored, config, seed=0, batch_size=4, encoder=encoder))
    assert batch["tokens"].shape == (4, 20) and batch["ids"] is batch["tokens"]


def test_splits_part_the_images_by_name(tmp_path):
    make(tmp_path / "store", Pictures(100, per_image=2))
    found = {}
    for split in ("train", "heldout", "all"):
        for captions in ("all", "first"):
            config = as_data(tmp_path / "store", captions=captions)
            source = load(dataclasses.replace(config, split=split), needs_images=False)
            records = [source[i] for i in range(len(source))]
            assert [record["index"] for record in records] == list(range(len(source)))
            found[split, captions] = [record["name"] for record in records]
    names = [f"picture {i}" for i in range(200)]
    assert found["all", "all"] == names
    assert found["heldout", "all"] == [name for name in names if is_heldout(name)]
    assert sorted(found["train", "all"] + found["heldout", "all"]) == sorted(names)
    assert found["all", "first"] == names[::2]
    assert set(found["train", "first"]) == set(names[::2]) & set(found["train", "all"])
    sources = [
        load(as_data(tmp_path / "store", split=split, captions=captions), needs_images=False)
        for split, captions in found
    ]
    assert len({source.fingerprint for source in sources}) == 6


def test_pairs_of_an_image_share_it(tmp_path):
    make(tmp_path / "store", Pictures(10, per_image=3))
    source = load(as_data(tmp_path / "store"), needs_images=False)
    numbers = [source.image_of(i) for i in range(30)]
    assert numbers == sorted(numbers) and len(set(numbers)) == source.image_count == 10


def test_where_pictures_are_needed_embeddings_are_refused(tmp_path):
    make(tmp_path / "store")
    config = as_data(tmp_path / "store")
    with pytest.raises(UserError, match="hold no pictures, which are needed here"):
        load(config)
    with pytest.raises(UserError, match=r"augment: got 0\.1, expected 0"):
        load(dataclasses.replace(config, augment=0.1), needs_images=False)
    with pytest.raises(UserError, match="split: got 'test', expected one of train, heldout"):
        load(dataclasses.replace(config, split="test"), needs_images=False)
