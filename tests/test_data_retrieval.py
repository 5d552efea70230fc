"""Embeddings as clip-retrieval lays them out, as a data set."""

import numpy as np
import pytest

from configs import base
from tests import tiny
from unclip_jax import stages
from unclip_jax.data.batches import batches
from unclip_jax.data.datasets import DataConfig, load
from unclip_jax.data.embeddings.store import EmbeddingStore
from unclip_jax.data.records import is_heldout
from unclip_jax.errors import UserError
from unclip_jax.stages.clip import encode_text
from unclip_jax.training import inputs, prepare
from unclip_jax.training.config import TrainConfig
from unclip_jax.weights import folder as model_folder
from unclip_jax.weights import trained

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
WIDTH = 8


def rows(count, seed, width=WIDTH):
    found = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def write(folder, sizes=(30, 20), dtype=np.float16, **columns):
    """Parts of these sizes; part n's embeddings are `rows` of seeds 2 n and 2 n + 1."""
    for part, size in enumerate(sizes):
        names = [f"{part}/{n // 2}.jpg" for n in range(size)]  # two captions an image
        table = {"image_path": names, "caption": [f"caption {n} of {part}" for n in range(size)]}
        table |= {name: make(size) for name, make in columns.items()}
        for kind, seed in (("img_emb", 2 * part), ("text_emb", 2 * part + 1)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            np.save(folder / kind / f"{kind}_{part}.npy", rows(size, seed).astype(dtype))
        (folder / "metadata").mkdir(exist_ok=True)
        pq.write_table(pa.table(table), folder / "metadata" / f"metadata_{part}.parquet")
    return folder


def source(folder, **options):
    options = {"split": "all", "cache_dir": str(folder / "cache"), **options}
    return load(DataConfig(name=f"embeddings:{folder}", **options), needs_images=False)


def test_the_layout_is_a_data_set_without_pictures(tmp_path):
    data = source(write(tmp_path))
    assert (len(data), data.image_count) == (50, 25)
    for index, (part, row) in {0: (0, 0), 29: (0, 29), 30: (1, 0), 49: (1, 19)}.items():
        record = data[index]
        assert record["caption"] == f"caption {row} of {part}"
        assert record["name"] == f"{part}/{row // 2}.jpg"
        np.testing.assert_allclose(record["z_i"], rows(30 - 10 * part, 2 * part)[row], atol=1e-3)
        np.testing.assert_allclose(
            record["z_t"], rows(30 - 10 * part, 2 * part + 1)[row], atol=1e-3
        )
    z_i, z_t = (np.concatenate(parts) for parts in zip(*data.chunks(), strict=True))
    np.testing.assert_array_equal(z_i, [data[i]["z_i"] for i in range(50)])
    np.testing.assert_array_equal(z_t, [data[i]["z_t"] for i in range(50)])
    held = source(tmp_path, split="heldout")
    expected = [data[i]["caption"] for i in range(50) if is_heldout(data[i]["name"])]
    assert [held[i]["caption"] for i in range(len(held))] == expected
    assert len(held) + len(source(tmp_path, split="train")) == 50
    assert len(source(tmp_path, captions="first")) == 25
    config = DataConfig(name=f"embeddings:{tmp_path}", context_length=12, vocab_size=514)
    stream = batches(data, config, seed=0, batch_size=10, epochs=1)
    met = np.concatenate([batch["index"] for batch in stream])
    assert sorted(met.tolist()) == list(range(50))


def test_the_fingerprint_is_of_captions_and_embeddings(tmp_path):
    one = source(write(tmp_path / "a"))
    assert source(write(tmp_path / "b")).fingerprint == one.fingerprint
    other = write(tmp_path / "c")
    changed = rows(30, 0)[::-1].astype(np.float16)
    np.save(other / "img_emb" / "img_emb_0.npy", changed)
    assert source(other).fingerprint != one.fingerprint
    changed = rows(3000, 0).astype(np.float16)  # one row of many counts
    many = source(write(tmp_path / "many", sizes=(3000,))).fingerprint
    changed[1234] = changed[7]
    np.save(tmp_path / "many" / "img_emb" / "img_emb_0.npy", changed)
    assert source(tmp_path / "many").fingerprint != many
    assert source(write(tmp_path / "d", dtype=np.float32)).fingerprint != one.fingerprint


def test_another_column_and_rows_without_a_caption(tmp_path):
    folder = write(tmp_path, alt=lambda size: ["", None, *[f"alt {n}" for n in range(size - 2)]])
    data = source(folder, caption_key="alt")
    assert data[2]["caption"] == "alt 0"
    stream = batches(data, DataConfig(name="x"), seed=0, batch_size=46, epochs=1)
    assert len(next(stream)["index"]) == 46  # of 50, four have no caption


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda f: (f / "text_emb" / "text_emb_1.npy").unlink(),
            "2 files in img_emb and 1 in text",
        ),
        (lambda f: np.save(f / "img_emb" / "img_emb_1.npy", rows(19, 0)), "not of the same pairs"),
        (lambda f: np.save(f / "img_emb" / "img_emb_1.npy", np.zeros(3)), "expected float16"),
        (lambda f: (f / "img_emb" / "img_emb_1.npy").write_bytes(b"x"), "not readable as .npy"),
        (lambda f: (f / "metadata" / "metadata_1.parquet").write_bytes(b"x"), "as parquet"),
    ],
)
def test_parts_that_do_not_fit_are_named(tmp_path, break_it, message):
    write(tmp_path)
    break_it(tmp_path)
    with pytest.raises(UserError, match=message):
        source(tmp_path)


def test_what_it_cannot_be_used_for_is_refused(tmp_path):
    write(tmp_path)
    with pytest.raises(UserError, match=r"clip-retrieval's layout.*data\.name=embeddings:"):
        EmbeddingStore.open(tmp_path, cache_dir=tmp_path)
    with pytest.raises(UserError, match=r"caption_key: got 'gone'.*image_path, caption"):
        source(tmp_path, caption_key="gone")
    with pytest.raises(UserError, match="image_key: got 'png'"):
        source(tmp_path, image_key="png")


def test_the_clip_must_be_the_one_that_made_them(tmp_path):
    stage, params = tiny.CLIP, tiny.params(tiny.CLIP)
    clip = trained.Part(stage, params, {})
    texts = [f"caption {n} of 0" for n in range(30)]
    z_t = np.asarray(encode_text(stage, params, trained.tokenizer(clip).encode(texts)))
    write(tmp_path, sizes=(30,))
    width = z_t.shape[1]
    np.save(tmp_path / "text_emb" / "text_emb_0.npy", z_t.astype(np.float32))
    np.save(tmp_path / "img_emb" / "img_emb_0.npy", rows(30, 0, width))
    data = source(tmp_path)
    inputs.check_made_by(clip, data)
    with pytest.raises(UserError, match=r"config\.clip: .*give the CLIP that made"):
        inputs.check_made_by(clip._replace(params=tiny.params(tiny.CLIP, 1)), data)


def test_a_prior_learns_from_it(tmp_path):
    stage, params = tiny.CLIP, tiny.params(tiny.CLIP)
    about = {"stage": stages.describe(stage)}
    model_folder.save_stage(tmp_path / "clip", params=params, description=about)
    tokens = trained.tokenizer(trained.Part(stage, params, {}))
    z_t = encode_text(stage, params, tokens.encode([f"caption {n} of 0" for n in range(30)]))
    folder = write(tmp_path / "pairs", sizes=(30,))
    np.save(folder / "text_emb" / "text_emb_0.npy", np.float32(z_t))
    np.save(folder / "img_emb" / "img_emb_0.npy", rows(30, 0, z_t.shape[1]))
    data = DataConfig(name=f"embeddings:{folder}", split="all", cache_dir=str(tmp_path / "cache"))
    train = TrainConfig(batch_size=8, steps=3, eval_every=0, preview_every=0)
    settings = {"heldout_split": "all", "previews": 2, "clip": str(tmp_path / "clip")}
    run = prepare.prepare(base.make(tiny.PRIOR, data, train, **settings))
    batch = next(run.batches())
    np.testing.assert_allclose(batch["z_t"], np.asarray(z_t)[batch["index"]], atol=1e-6)
    expected = tokens.encode([f"caption {n} of 0" for n in batch["index"]])
    np.testing.assert_array_equal(batch["tokens"], expected)
