"""The prior's own z_i in training: which pair has which, and a cache that is not as it was."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.canvas_runs import config_of, fill, run
from unclip_jax import stages
from unclip_jax.data.embeddings.shards import VALID
from unclip_jax.data.embeddings.store import EmbeddingStore
from unclip_jax.data.records import BadRecord
from unclip_jax.errors import UserError
from unclip_jax.training import prepare, prior_samples
from unclip_jax.weights import folder as model_folder

STAGE, DECODER = tiny.CANVAS, tiny.ON_CANVAS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("canvas")
    fill(folder)
    return folder


def test_each_pair_has_the_priors_samples_of_its_own_caption(folder, monkeypatch):
    monkeypatch.setattr(prior_samples, "PAIRS_PER_PART", 30)
    monkeypatch.setattr(prior_samples, "BATCH", 16)
    flags = {"prior": str(folder / "prior"), "prior_samples": 3}
    given = prepare.prepare(config_of(folder, STAGE, **flags))
    (cached,) = (folder / "cache" / "prior_samples").iterdir()
    parts = sorted(cached.iterdir())
    assert len(parts) == -(-len(given.source) // 30) > 1
    pairs = (0, 1, 29, 30, len(given.source) - 1)
    records = [given.source[i] for i in pairs]
    model = tiny.model()
    for number in range(3):
        keys = jnp.stack(
            [jax.random.fold_in(jax.random.fold_in(jax.random.key(0), i), number) for i in pairs]
        )
        text = jnp.asarray(model.tokens(model.prior, [record["caption"] for record in records]))
        cond = tiny.PRIOR.condition(text, jnp.stack([record["z_t"] for record in records]))
        expected = tiny.call(
            tiny.PRIOR, "sample", model.prior.params, keys, cond,
            guidance_scale=tiny.PRIOR.guidance_scale,
        )  # fmt: skip
        found = [record[prior_samples.NAME][number] for record in records]
        np.testing.assert_allclose(found, expected, atol=1e-5)
    # A part that is missing is drawn again, the same; those that are there are not touched.
    whole, times = np.load(parts[1]), parts[0].stat().st_mtime_ns
    parts[1].unlink()
    prepare.prepare(config_of(folder, STAGE, **flags))
    np.testing.assert_array_equal(np.load(parts[1]), whole)
    assert parts[0].stat().st_mtime_ns == times and sorted(cached.iterdir()) == parts


@pytest.mark.parametrize("damage", ["", "no array", "cut", "an archive", "shape", "dtype"])
def test_a_part_that_is_not_what_was_kept_is_drawn_again(damage, folder):
    config = config_of(folder, STAGE, prior=str(folder / "prior"), prior_samples=1)
    whole = np.copy(prepare.prepare(config).source[3][prior_samples.NAME])
    files = (folder / "cache" / "prior_samples").rglob("*.npy")
    (path,) = (p for p in files if np.load(p).shape[1] == 1)
    kept = path.read_bytes()
    others = {"shape": np.zeros((3, 1, tiny.DIM), np.float32), "dtype": np.load(path).astype("f8")}
    if damage in others:
        np.save(path, others[damage])
    else:
        content = {"cut": kept[:-9], "an archive": b"PK\x03\x04" + kept[4:]}
        path.write_bytes(content.get(damage, damage.encode()))
    np.testing.assert_array_equal(prepare.prepare(config).source[3][prior_samples.NAME], whole)
    assert path.read_bytes() == kept


class Pairs(list):
    """A source and its store at once; what is None in it can't be read."""

    name = where = "some pairs"

    def __init__(self, captions, z_i):
        super().__init__(
            types.SimpleNamespace(caption=caption, z_i=z, flags=VALID, name=caption)
            for caption, z in zip(captions, z_i, strict=True)
        )
        self.store = self

    def __getitem__(self, index):
        if (pair := super().__getitem__(index)) is None:
            raise BadRecord(f"pair {index} of some pairs: damaged")
        return pair


def test_a_pair_that_cannot_be_read_has_no_sample_and_is_named(folder, monkeypatch, caplog):
    at, bad = EmbeddingStore.at, {4, 9}

    def damaged(self, shard, page, row):
        if row in bad:
            raise BadRecord(f"pair {row} of a shard: damaged")
        return at(self, shard, page, row)

    config = config_of(folder, STAGE, prior=str(folder / "prior"), prior_samples=4)
    monkeypatch.setattr(EmbeddingStore, "at", damaged)
    source = prepare.prepare(config).source
    for row in bad:
        assert caplog.text.count(f"skipped pair {row} of a shard: damaged") == 1
    with pytest.raises(BadRecord):
        source[4]
    bad.clear()  # it was the network: then the pair's own z_i is there
    found = {row: source[row] for row in (3, 4)}
    np.testing.assert_array_equal(found[4][prior_samples.NAME], np.tile(found[4]["z_i"], (4, 1)))
    assert not np.any(found[3][prior_samples.NAME] == found[3]["z_i"])


def test_a_store_that_cannot_be_read_at_all_is_no_store_without_samples():
    source = Pairs(["a dog"] * 3 + ["a cat"], np.eye(4, dtype=np.float32))
    alike = prior_samples.Alike(source)
    source[:] = [None] * 4
    with pytest.raises(UserError, match="some pairs: can't be read any more"):
        alike.read(range(4))
    with pytest.raises(UserError, match="some pairs: every one of the 4 records read is bad"):
        prior_samples.Alike(source)


@pytest.mark.parametrize("count", [2, 3, 5, 9])
def test_copies_of_a_picture_all_have_its_samples(count):
    rng = np.random.default_rng(count)
    for _ in range(20):
        z_i, away = rng.standard_normal((2, 24)).astype(np.float32)
        alike = prior_samples.Alike(Pairs(["a flag"] * (count + 1), [*[z_i] * count, -z_i]))
        drawn = np.tile(z_i + away / 3, (count + 1, 1))
        found = alike.own(range(count + 1), drawn)
        np.testing.assert_array_equal(found[:count], drawn[:count])
        np.testing.assert_array_equal(found[count], -z_i)


def test_lengths_of_pictures_are_found_once_and_not_for_every_sample(monkeypatch):
    z_i = np.random.default_rng(0).standard_normal((50, 24)).astype(np.float32)
    alike = prior_samples.Alike(Pairs(["a flag"] * 50, z_i))
    norm, normed = np.linalg.norm, []
    monkeypatch.setattr(np.linalg, "norm", lambda x, **how: normed.append(x) or norm(x, **how))
    drawn = z_i[[0, 7, 2]]
    expected = z_i[:3]  # the second is of another picture
    np.testing.assert_array_equal(alike.own(range(3), drawn), expected)
    assert all(len(x) <= 3 for x in normed)


def test_a_sample_is_of_the_picture_that_it_is_nearest_to():
    said = ["a dog", "a cat", "a dog", "a dog, blob style", "a dog"]
    z_i = np.float32(np.eye(5)) * np.float32([1, 1, 9, 1, 1])[:, None]  # lengths say nothing
    store = source = Pairs(said, z_i)
    store[4].flags = 0  # a bad pair is no picture
    drawn = np.float32(
        [[0.6, 0, 0.5, 0, 0.9], [0, 0, 1, 0, 0], [0.6, 0, 0.5, 0, 0], [1, 0, 0, 0, 0]]
    )
    found = prior_samples.Alike(source).own(range(4), drawn)
    expected = drawn.copy()
    expected[2] = store[2].z_i  # nearer to the first, so that one's alone
    np.testing.assert_array_equal(found, expected)


def test_as_many_rows_as_asked_take_a_sample():
    rows = 1000
    batch = {"z_i": jnp.zeros((rows, 2)), "image": jnp.zeros(rows)}
    batch[prior_samples.NAME] = jnp.broadcast_to(jnp.arange(1.0, 5.0)[None, :, None], (rows, 4, 2))

    def taken(share, seed=0):
        def loss(params, batch, key):
            assert set(batch) == {"z_i", "image"} and params == {} and key == jax.random.key(seed)
            return batch["z_i"], {}

        z_i, _ = prior_samples.Mixed(loss, share)({}, batch, jax.random.key(seed))
        np.testing.assert_array_equal(z_i[:, 0], z_i[:, 1])
        return np.asarray(z_i[:, 0])

    assert not taken(0.0).any() and taken(1.0).all()
    counts = np.bincount(taken(0.6).astype(int), minlength=5) / rows
    np.testing.assert_allclose(counts, [0.4, 0.15, 0.15, 0.15, 0.15], atol=0.05)
    np.testing.assert_array_equal(taken(0.6), taken(0.6))
    assert np.any(taken(0.6) != taken(0.6, seed=1))


def test_a_run_on_the_priors_samples_resumes_bit_for_bit(folder, no_curves):
    flags = {"prior": str(folder / "prior")}
    stage = dataclasses.replace(STAGE, z_i_noise=0.1)
    whole = run(folder, stage, "sampled", **flags)
    run(folder, stage, "sampled_parts", train={"steps": 2}, **flags)
    parts = run(folder, stage, "sampled_parts", **flags)
    assert jax.tree.all(jax.tree.map(np.array_equal, whole.params, parts.params))
    plain = run(folder, stage, "unsampled")
    assert not jax.tree.all(jax.tree.map(np.array_equal, whole.params, plain.params))
    assert whole.description["prior"]["share"] == 0.5
    with pytest.raises(UserError, match="prior"):
        run(folder, stage, "sampled_parts", train={"steps": 6}, prior_share=0.6, **flags)


def test_what_a_run_needs_is_asked_for(folder):
    for stage, changes, message in (
        (STAGE, {"prior": str(folder / "clip")}, "holds a clip, expected a prior"),
        (tiny.PRIOR, {"prior": str(folder / "prior")}, "a prior is not drawn of z_i"),
        (STAGE, {"prior_share": 1.5}, r"config\.prior_share: got 1\.5"),
        (STAGE, {"prior_samples": 0}, r"config\.prior_samples: got 0"),
    ):
        with pytest.raises(UserError, match=message):
            prepare.prepare(config_of(folder, stage, **changes))
    with pytest.raises(UserError, match=r"config\.canvas: empty, expected the folder"):
        prepare.prepare(config_of(folder, DECODER))
    with pytest.raises(UserError, match="holds a clip, expected a canvas"):
        prepare.prepare(config_of(folder, tiny.DECODER, canvas=str(folder / "clip")))
    about = {"stage": stages.describe(STAGE), "clip_fingerprint": "0" * 16}
    model_folder.save_stage(folder / "strange", params=tiny.params(STAGE), description=about)
    with pytest.raises(UserError, match="a clip takes no canvas"):
        prepare.prepare(config_of(folder, tiny.CLIP, canvas=str(folder / "strange")))
    with pytest.raises(UserError, match="was trained with CLIP 0000000000000000, but config"):
        prepare.prepare(config_of(folder, tiny.DECODER, canvas=str(folder / "strange")))
