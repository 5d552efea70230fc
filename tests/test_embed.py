"""The command that embeds a data set, and what trains on its store."""

import dataclasses
import functools
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from configs import base
from tests import tiny
from tests.xla_flags import xla_flags
from unclip_jax import stages
from unclip_jax.common import grids
from unclip_jax.common.params import fingerprint
from unclip_jax.data.datasets import DataConfig, load
from unclip_jax.data.embeddings.shards import VALID
from unclip_jax.data.embeddings.store import EmbeddingStore
from unclip_jax.data.records import is_heldout
from unclip_jax.errors import UserError
from unclip_jax.training import embed, prepare
from unclip_jax.training.config import TrainConfig
from unclip_jax.weights import folder as model_folder

ROOT = Path(__file__).parent.parent
COUNT, BROKEN = 60, 37


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Folders of a tiny CLIP, of one with other weights, and of one that does not normalise."""
    folder = tmp_path_factory.mktemp("clips")
    params = tiny.params(tiny.CLIP)
    raw = dataclasses.replace(tiny.CLIP, unit_embeddings=False)
    for name, stage, scale in (("clip", tiny.CLIP, 1), ("other", tiny.CLIP, 1.01), ("raw", raw, 1)):
        scaled = jax.tree.map(lambda x, scale=scale: np.asarray(x) * np.float32(scale), params)
        about = {"stage": stages.describe(stage)}
        model_folder.save_stage(folder / name, params=scaled, description=about)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of pictures of noise, one of them broken, some with two captions."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
        captions = [f"picture {i}", f"the same {i}"][: 2 - i % 2]
        (folder / f"{i:02d}.txt").write_text("\n".join(captions))
    (folder / f"{BROKEN:02d}.png").write_bytes(b"no picture")
    heldout = [f"{i:02d}.png" for i in range(COUNT) if is_heldout(f"{i:02d}.png")]
    assert 2 <= len(heldout) < 20 and f"{BROKEN:02d}.png" not in heldout
    return folder


def command(clip, pictures, out, **flags):
    flags = {"split": "all", "shards": 7, "batch_size": 8, "distributed": "off", **flags}
    given = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    return ["--clip", str(clip), "--data", str(pictures), "--out", str(out), *given]


def open_store(folder):
    return EmbeddingStore.open(folder, cache_dir=folder)


@pytest.fixture(scope="module")
def store(clip, pictures, tmp_path_factory):
    """The folder of the embeddings of all pictures."""
    folder = tmp_path_factory.mktemp("stores") / "all"
    embed.main(command(clip / "clip", pictures, folder))
    return folder


# ---------------------------------------------------------------- the command


def test_the_store_holds_what_the_stage_says_of_each_pair(store, pictures, clip, capsys):
    found = open_store(store)
    params = tiny.params(tiny.CLIP)
    context = dict(zip(("context_length", "vocab_size"), tiny.CLIP.context, strict=True))
    source = load(DataConfig(name=str(pictures), split="all", image_size=16, **context))
    assert found.meta.clip_fingerprint == fingerprint(params)
    assert len(found) == len(source) == 90
    broken = [i for i in range(90) if not found[i].flags & VALID]
    assert [found[i].name for i in broken] == [f"{BROKEN}.png"]
    for start in (0, 60):
        pairs = [found[i] for i in range(start, start + 10)]
        with Image.open(pictures / pairs[3].name) as image:
            pixels = np.asarray(image, np.float32)[None] / 127.5 - 1
        z_i = tiny.call(tiny.CLIP, "encode_image", params, pixels)
        np.testing.assert_allclose(pairs[3].z_i, z_i[0], atol=1e-6)
        tokens = np.stack([pair.tokens for pair in pairs])
        z_t, _ = tiny.call(tiny.CLIP, "encode_text", params, tokens)
        np.testing.assert_allclose([pair.z_t for pair in pairs], z_t, atol=1e-6)
        assert [pair.caption for pair in pairs] == [
            source[i]["caption"] for i in range(start, start + 10)
        ]


def test_bfloat16_is_the_same_rounded(store, pictures, clip, tmp_path, capsys):
    embed.main(command(clip / "clip", pictures, tmp_path / "half", dtype="bfloat16", shards=2))
    assert "complete, 90 pairs" in capsys.readouterr().out
    whole, half = (np.concatenate([z for z, _ in open_store(f).chunks()])
                   for f in (store, tmp_path / "half"))  # fmt: skip
    assert half.dtype == np.float32 and (half != whole).any()
    np.testing.assert_allclose(half, whole, rtol=2**-8)


KILLED = """
import os, signal, sys
from unclip_jax.data.embeddings import writer
from unclip_jax.training import embed
add = writer.ShardWriter.add
def dies(self, pair):
    if pair.index == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, pair)
writer.ShardWriter.add = dies
embed.main(sys.argv[2:])
"""


def start(*arguments, devices=1):
    """A Python process in the checkout."""
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices)}, text=True,
    )  # fmt: skip


def test_killed_on_four_devices_and_run_again_by_two_processes_each_pair_is_there_once(
    store, pictures, clip, tmp_path
):
    killed = start(
        "-c", KILLED, "40", *command(clip / "clip", pictures, tmp_path / "cut"), devices=4
    )
    _, errors = killed.communicate(timeout=300)
    assert killed.returncode == -9, errors
    left = sorted(path.name for path in (tmp_path / "cut").iterdir())
    assert len([name for name in left if name.endswith(".array_record")]) == 3  # 90 * 3 // 7 = 38
    assert any(name.startswith(".embeddings-00003-of-00007") for name in left)

    with socket.socket() as free:
        free.bind(("localhost", 0))
        together = {"distributed": "auto", "num_processes": 2}
        together["coordinator_address"] = f"localhost:{free.getsockname()[1]}"
    processes = [
        start(
            "-m", "unclip_jax", "embed",
            *command(clip / "clip", pictures, tmp_path / "cut", process_id=i, **together), devices=2
        )
        for i in range(2)
    ]  # fmt: skip
    written = []
    for process in processes:
        said, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        written.append(int(re.search(r"complete, 90 pairs; .* wrote (\d+) of them", said)[1]))
    assert written == [26, 26]  # of 90, 38 were there; shards 3 and 5, shards 4 and 6

    assert {path.name for path in (tmp_path / "cut").iterdir()} == {
        path.name for path in store.iterdir()
    }
    whole, again = open_store(store), open_store(tmp_path / "cut")
    for i in range(90):
        one, other = whole[i], again[i]
        assert one[:4] == other[:4]
        if one.flags & VALID:
            np.testing.assert_allclose(one.z_i, other.z_i, atol=1e-6)
            np.testing.assert_allclose(one.z_t, other.z_t, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float16"}, "dtype is 'float32', expected 'float16'"),
        ({"shards": 8}, "shards is 7, expected 8"),
        ({"captions": "first"}, "data_fingerprint is"),
        ({"split": "train"}, "data_fingerprint is"),
        ({"batch_size": 0}, "--batch_size: got 0, expected a multiple of 1"),
        ({"shards": 1000}, "shards: got 1000, expected 1 to 90"),
    ],
)
def test_another_plan_or_none_is_refused(changes, message, store, pictures, clip):
    with pytest.raises(UserError, match=message):
        embed.main(command(clip / "clip", pictures, store, **changes))


def test_another_clip_or_no_pictures_are_refused(store, pictures, clip, tmp_path):
    with pytest.raises(UserError, match="clip_fingerprint is"):
        embed.main(command(clip / "other", pictures, store))
    with pytest.raises(UserError, match="unit_embeddings is True, expected False"):
        embed.main(command(clip / "raw", pictures, store))
    with pytest.raises(UserError, match="hold no pictures"):
        embed.main(command(clip / "clip", f"embeddings:{store}", tmp_path / "x"))
    with pytest.raises(UserError, match="no such folder"):
        embed.main(command(clip / "none", pictures, tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_an_error_is_one_line(store, pictures, clip):
    process = start("-m", "unclip_jax", "embed", *command(clip / "clip", pictures, store, shards=3))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("error: embeddings: ")


# ---------------------------------------------------------------- what trains on it


def config_of(stage, data, clip, **rest):
    train = TrainConfig(batch_size=8, steps=3, eval_every=0, preview_every=0)
    settings = {"heldout_split": "heldout", "previews": 2, "clip": str(clip), **rest}
    return base.make(stage, data, train, **settings)


@pytest.fixture
def data(pictures, tmp_path):
    return DataConfig(name=str(pictures), split="train", cache_dir=str(tmp_path / "cache"))


def first_params(run):
    """Random ones, with the run's own normalisation."""
    return tiny.params(run.stage) | run.stage.fit_constants("whiten", run.source.chunks)


@functools.partial(jax.jit, static_argnames="stage")
def gradient(stage, params, batch, key):
    def loss(network):
        return stage.loss(params | {"network": network}, batch, key)[0]

    return jax.value_and_grad(loss)(params["network"])


def losses(run):
    """Of the first steps of gradient descent on a run's own batches."""
    params, found = first_params(run), []
    for step, batch in zip(range(3), run.batches(), strict=False):
        arrays = {name: batch[name] for name in ("tokens", "z_i", "z_t")}
        loss, slope = gradient(run.stage, params, arrays, jax.random.key(step))
        params |= {"network": jax.tree.map(lambda p, g: p - 0.1 * g, params["network"], slope)}
        found.append(float(loss))
    return found


def test_a_prior_learns_the_same_from_stored_embeddings_as_from_pictures(store, clip, data):
    """A folder and a store of all of it have the same splits, pairs, order and tokens."""
    stored = dataclasses.replace(data, name=f"embeddings:{store}")
    one, other = (prepare.prepare(config_of(tiny.PRIOR, d, clip / "clip")) for d in (data, stored))
    assert len(one.source) == len(other.source) < 90
    stats = [first_params(run)["normalisation"] for run in (one, other)]
    for name in ("mean", "std"):
        np.testing.assert_allclose(stats[0][name], stats[1][name], rtol=1e-5, atol=1e-6)
    assert losses(one) == pytest.approx(losses(other), rel=1e-4)
    assert one.description["clip_fingerprint"] == other.description["clip_fingerprint"]
    assert one.description["data_fingerprint"] != other.description["data_fingerprint"]


def test_a_prior_without_pictures_shows_the_captions_it_finds(store, clip, data):
    stored = dataclasses.replace(data, name=f"embeddings:{store}")
    run = prepare.prepare(config_of(tiny.PRIOR, stored, clip / "clip"))
    params = first_params(run)
    assert np.isfinite(list(run.evaluate(params, 0).values())).all()
    images, captions = zip(*run.preview(params, 0), strict=True)
    assert len(captions) == 2 and all(" → " in caption for caption in captions)
    assert grids.captioned_grid(images, captions).height < 200


def test_embeddings_of_another_clip_stop_training(store, clip, data):
    stored = dataclasses.replace(data, name=f"embeddings:{store}")
    for name, message in (("other", "clip_fingerprint is"), ("raw", "unit_embeddings is True")):
        with pytest.raises(UserError, match=message):
            prepare.prepare(config_of(tiny.PRIOR, stored, clip / name))


@pytest.mark.parametrize("stage", [tiny.CLIP, tiny.DECODER, tiny.UPSAMPLER])
def test_a_stage_that_needs_pictures_refuses_embeddings(stage, store, clip, data):
    stored = dataclasses.replace(data, name=f"embeddings:{store}")
    with pytest.raises(UserError, match="hold no pictures, which are needed here"):
        prepare.prepare(config_of(stage, stored, clip / "clip"))


def test_a_decoder_reads_stored_embeddings_beside_its_pictures(pictures, clip, data, tmp_path):
    embed.main(command(clip / "clip", pictures, tmp_path / "train", split="train", shards=2))
    config = config_of(tiny.DECODER, data, clip / "clip", embeddings=str(tmp_path / "train"))
    run = prepare.prepare(config)
    cached = prepare.prepare(config_of(tiny.DECODER, data, clip / "clip"))
    one, other = next(run.batches()), next(cached.batches())
    assert one["image"].shape == (8, 16, 16, 3)
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=1e-6)
    names = {path.name for path in (tmp_path / "cache" / "embeddings").iterdir()}
    assert len(names) == 2  # of the held-out pairs, and of the training set when not named


def test_stored_embeddings_must_be_of_the_training_set(store, clip, data):
    config = config_of(tiny.DECODER, data, clip / "clip", embeddings=str(store))
    with pytest.raises(UserError, match="computed from other data"):
        prepare.prepare(config)
    everything = dataclasses.replace(data, split="all")
    config = config_of(tiny.DECODER, everything, clip / "other", embeddings=str(store))
    with pytest.raises(UserError, match="clip_fingerprint is"):
        prepare.prepare(config)
    with pytest.raises(UserError, match="this upsampler reads none"):
        prepare.prepare(config_of(tiny.UPSAMPLER, data, "", embeddings=str(store)))
    twice = dataclasses.replace(data, name=f"embeddings:{store}")
    with pytest.raises(UserError, match="give one of them"):
        prepare.prepare(config_of(tiny.PRIOR, twice, clip / "clip", embeddings=str(store)))


def test_a_cache_is_of_one_kind_of_embeddings(clip, data):
    """The same weights give unit embeddings or raw ones; neither is taken for the other."""
    lengths = []
    for name in ("clip", "raw"):
        run = prepare.prepare(config_of(tiny.PRIOR, data, clip / name))
        lengths.append(np.linalg.norm(next(run.batches())["z_i"], axis=1))
    np.testing.assert_allclose(lengths[0], 1.0, rtol=1e-5)
    assert abs(lengths[1] - 1.0).max() > 0.1


def test_the_description_is_plain(store, clip, data):
    stored = dataclasses.replace(data, name=f"embeddings:{store}")
    run = prepare.prepare(config_of(tiny.PRIOR, stored, clip / "clip"))
    assert json.loads(json.dumps(run.description))["data"]["name"] == f"embeddings:{store}"


# ---------------------------------------------------------------- pictures without captions


@pytest.fixture
def bare(tmp_path):
    """Twelve pictures of noise, two of them captioned."""
    rng = np.random.default_rng(1)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "3.txt").write_text("three")
    (tmp_path / "4.txt").write_text("four")
    return tmp_path


def z_i_alone():
    """A decoder that reads no captions."""
    model = dataclasses.replace(tiny.DECODER.model, text=None)
    return dataclasses.replace(tiny.DECODER, model=model)


def test_a_stage_without_captions_learns_from_bare_pictures(bare, clip, data, tmp_path, capsys):
    data = dataclasses.replace(data, name=str(bare), split="all")
    for stage in (tiny.UPSAMPLER, z_i_alone()):
        run = prepare.prepare(config_of(stage, data, clip / "clip", heldout_split="all"))
        assert len(run.source) == run.source.image_count == 12
        assert "split all: 12 pairs of 12 images" in capsys.readouterr().out
        assert "bare" not in run.description["data"]
        met = np.concatenate([next(run.batches())["index"]])
        assert len(set(met.tolist())) == 8
    store = tmp_path / "store"
    embed.main([*command(clip / "clip", bare, store, shards=1), "--bare"])
    given = config_of(z_i_alone(), data, clip / "clip", heldout_split="all", embeddings=str(store))
    batch = next(prepare.prepare(given).batches())
    pixels = np.float32(batch["image"]) / 127.5 - 1
    z_i = tiny.call(tiny.CLIP, "encode_image", tiny.params(tiny.CLIP), pixels)
    np.testing.assert_allclose(batch["z_i"], z_i, atol=1e-5)
    for stage in (tiny.DECODER, tiny.PRIOR):
        run = prepare.prepare(config_of(stage, data, clip / "clip", heldout_split="all"))
        assert len(run.source) == 2


def test_a_missing_heldout_split_is_named_as_what_it_is(bare, clip, data):
    data = dataclasses.replace(data, name=str(bare), split="all")
    with pytest.raises(
        UserError, match=r"^config\.heldout_split: got 'gone', expected one of train"
    ):
        prepare.prepare(config_of(tiny.UPSAMPLER, data, clip / "clip", heldout_split="gone"))
