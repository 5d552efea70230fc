"""Stored CLIP embeddings: right rows, whole or absent, and never another model's."""

import json

import numpy as np
import pytest

from tests.test_data_batches import CACHED, READ_AGAIN, SIZE, Pictures, take
from unclip_jax.data.batches import batches
from unclip_jax.data.datasets import DataConfig
from unclip_jax.data.embeddings import EmbeddingStore, WithEmbeddings, compute
from unclip_jax.errors import UserError

BAD = (0, 5, 18)


def encode(images, tokens):
    """z_i knows the picture's level, z_t the caption's length."""
    assert images.shape[1:] == (SIZE, SIZE, 3)
    level = images[:, 0, 0, :1].astype(np.float64)
    z_i = np.concatenate([level, level**2, np.ones_like(level)], axis=-1)
    z_t = np.repeat(tokens.sum(-1, keepdims=True), 3, axis=-1)
    return z_i, z_t


def make(folder, source=None, encode=encode, **options):
    source = source or Pictures(20, bad=BAD)
    options = {"clip_fingerprint": "clip-1", "batch_size": 6, "progress": False, **options}
    return compute(source, CACHED, encode, folder, **options)


def test_row_i_is_pair_i_and_bad_rows_are_marked(tmp_path):
    store = make(tmp_path / "store")
    levels = np.arange(20, dtype=np.float32)
    levels[list(BAD)] = 0
    assert store.z_i.dtype == store.z_t.dtype == np.float32
    np.testing.assert_array_equal(store.z_i[:, 0], levels)
    np.testing.assert_array_equal(store.z_i[:, 1], levels**2)
    assert np.flatnonzero(~store.valid).tolist() == list(BAD)
    assert not store.z_i[~store.valid].any()
    assert isinstance(store.z_i, np.memmap)


def test_the_encoder_always_sees_full_batches(tmp_path):
    shapes = set()

    def spy(images, tokens):
        shapes.add((images.shape, tokens.shape))
        return encode(images, tokens)

    make(tmp_path / "store", encode=spy)  # 17 good pairs in batches of 6
    assert shapes == {((6, SIZE, SIZE, 3), (6, 8))}


@pytest.mark.parametrize("config", [CACHED, READ_AGAIN])
def test_batches_carry_the_embeddings_of_their_pairs(tmp_path, config):
    source = Pictures(20, bad=BAD)
    joined = WithEmbeddings(source, make(tmp_path / "store", source))
    augmented = DataConfig(**{**vars(config), "augment": 0.2})
    for settings in (config, augmented):
        stream = batches(joined, settings, seed=0, batch_size=4)
        for batch in take(stream, 12):
            np.testing.assert_array_equal(batch["z_i"][:, 0], batch["index"])
            assert batch["z_t"].shape == (4, 3)
            assert batch["z_t"].dtype == np.float32
        assert stream.skipped == len(BAD)


def test_what_was_bad_then_is_skipped_though_it_be_mended(tmp_path):
    store = make(tmp_path / "store")
    mended = WithEmbeddings(Pictures(20), store)
    stream = batches(mended, CACHED, seed=0, batch_size=4)
    seen = np.concatenate([batch["index"] for batch in take(stream, 20)])
    assert set(seen.tolist()) == set(range(20)) - set(BAD)


def test_stored_embeddings_are_used_again(tmp_path):
    first = make(tmp_path / "store")

    def never(images, tokens):
        raise AssertionError("computed again")

    again = make(tmp_path / "store", encode=never)
    np.testing.assert_array_equal(first.z_i, again.z_i)


def test_another_model_or_other_data_are_refused(tmp_path):
    make(tmp_path / "store")
    with pytest.raises(UserError, match="clip_fingerprint is 'clip-1', expected 'clip-2'"):
        make(tmp_path / "store", clip_fingerprint="clip-2")
    with pytest.raises(UserError, match="data_fingerprint is '20-1', expected '21-1'"):
        make(tmp_path / "store", Pictures(21))
    with pytest.raises(UserError, match="computed from other data"):
        WithEmbeddings(Pictures(21), make(tmp_path / "store"))


def test_a_failure_leaves_nothing_behind(tmp_path):
    calls = []

    def fails(images, tokens):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return encode(images, tokens)

    with pytest.raises(RuntimeError):
        make(tmp_path / "store", encode=fails)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="not finite"):
        make(tmp_path / "store", encode=lambda i, t: tuple(z * np.nan for z in encode(i, t)))
    with pytest.raises(UserError, match="every one"):
        make(tmp_path / "store", Pictures(5, bad=range(5)))
    assert list(tmp_path.iterdir()) == []


def test_damage_is_seen(tmp_path):
    folder = tmp_path / "store"
    make(folder)
    of = {"clip_fingerprint": "clip-1", "data_fingerprint": "20-1"}
    assert len(EmbeddingStore.open(folder, **of)) == 20
    whole = (folder / "z_t.npy").read_bytes()
    (folder / "z_t.npy").write_bytes(whole[:-8])
    with pytest.raises(UserError, match="damaged"):
        EmbeddingStore.open(folder, **of)
    (folder / "z_t.npy").write_bytes(whole)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "count": 19}))
    with pytest.raises(UserError, match="damaged"):
        EmbeddingStore.open(folder, **of)
    (folder / "meta.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        EmbeddingStore.open(folder, **of)
    (folder / "meta.json").unlink()
    with pytest.raises(UserError, match="no stored embeddings"):
        EmbeddingStore.open(folder, **of)


def test_a_store_is_never_written_over(tmp_path):
    make(tmp_path / "store")
    of = {"clip_fingerprint": "c", "data_fingerprint": "d", "count": 1, "width": 1}
    with (
        pytest.raises(UserError, match="exists"),
        EmbeddingStore.create(tmp_path / "store", **of),
    ):
        raise AssertionError("the block must not run")
