"""A data set's fingerprint is of its contents: what changes there changes it, and nothing else."""

import dataclasses
import hashlib
import io
import json
import os
import shutil
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from configs import base
from tests import tiny
from tests.tar_shards import archive
from unclip_jax import stages
from unclip_jax.data import contents
from unclip_jax.data.batches import batches
from unclip_jax.data.datasets import DataConfig, load
from unclip_jax.data.listing import Listing
from unclip_jax.data.records import BadRecord
from unclip_jax.errors import UserError
from unclip_jax.stages.clip import encode_image
from unclip_jax.training import inputs, loop, prepare
from unclip_jax.training.config import TrainConfig
from unclip_jax.training.saved import Saved
from unclip_jax.weights import folder as model_folder
from unclip_jax.weights.trained import load_part

COUNT = 12


def bmp(seed, side=16):
    """Files of one size, whatever is on them."""
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(file, "BMP")
    return file.getvalue()


def write_folder(where, seeds, caption="picture"):
    where.mkdir(exist_ok=True)
    for i, seed in enumerate(seeds):
        (where / f"{i:02}.bmp").write_bytes(bmp(seed))
        (where / f"{i:02}.txt").write_text(f"{caption} {i}")
    return str(where)


def write_tar(where, seeds, caption="picture"):
    where.mkdir(exist_ok=True)
    members = []
    for i, seed in enumerate(seeds):
        members += [(f"{i:02}.bmp", bmp(seed)), (f"{i:02}.txt", f"{caption} {i}".encode())]
    (where / "0.tar").write_bytes(archive(members))
    return f"wds:{where}/*.tar"


def write_parquet(where, seeds, caption="picture"):
    where.mkdir(exist_ok=True)
    rows = {"image": [bmp(s) for s in seeds], "text": [f"{caption} {i}" for i in range(len(seeds))]}
    pq.write_table(pa.table(rows), where / "0.parquet", compression="none", row_group_size=5)
    return f"parquet:{where}/*.parquet"


class IdentityTest(tfds.core.GeneratorBasedBuilder):
    """Pictures that `seeds` are of."""

    VERSION = tfds.core.Version("1.0.0")
    seeds, caption = (), ""

    def _info(self):
        features = {"image": tfds.features.Tensor(shape=(16, 16, 3), dtype=np.uint8)}
        features |= {"caption": tfds.features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, seed in enumerate(self.seeds):
            pixels = np.asarray(Image.open(io.BytesIO(bmp(seed))))
            yield i, {"image": pixels, "caption": f"{self.caption} {i}"}


def write_tfds(where, seeds, caption="picture"):
    shutil.rmtree(where, ignore_errors=True)
    IdentityTest.seeds, IdentityTest.caption = seeds, caption
    builder = IdentityTest(data_dir=str(where), file_format="array_record")
    builder.download_and_prepare()
    return f"tfds:{builder.data_dir}"


WRITERS = [write_folder, write_tar, write_parquet, write_tfds]


def config_of(name, tmp_path):
    split = "train" if name.startswith("tfds:") else "all"
    return DataConfig(name=name, split=split, cache_dir=str(tmp_path / "cache"))


def times(where):
    return {path: path.stat() for path in where.rglob("*") if path.is_file()}


@pytest.mark.parametrize("write", WRITERS, ids=lambda w: w.__name__.removeprefix("write_"))
def test_a_fingerprint_is_of_pictures_and_captions(write, tmp_path):
    """One picture of many, at the same size and the same time, is another data set."""
    where, seeds = tmp_path / "data", list(range(COUNT))
    source = load(config_of(write(where, seeds), tmp_path))
    first, before = source.fingerprint, times(where)

    def again(**change):
        shutil.rmtree(where)
        name = write(where, change.get("seeds", seeds), change.get("caption", "picture"))
        sizes = {path: found.st_size for path, found in times(where).items()}
        if "caption" not in change:
            assert sizes == {path: found.st_size for path, found in before.items()}
        for path, found in before.items():
            if path.exists():
                os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
        return load(config_of(name, tmp_path))

    other = again(seeds=[*seeds[:5], 99, *seeds[6:]])
    assert other.fingerprint != first
    assert other.former == source.former or write is write_tfds  # which counts bytes
    assert again(caption="another").fingerprint != first
    back = again()
    assert back.fingerprint == first and back.former == source.former


@pytest.mark.parametrize("write", WRITERS[:3], ids=lambda w: w.__name__.removeprefix("write_"))
def test_a_copy_is_the_same_data_set(write, tmp_path):
    name = write(tmp_path / "data", range(COUNT))
    first = load(config_of(name, tmp_path)).fingerprint
    shutil.copytree(tmp_path / "data", tmp_path / "copy")  # without its times
    copied = name.replace(f"{tmp_path}/data", f"{tmp_path}/copy")
    assert load(config_of(copied, tmp_path)).fingerprint == first


def test_files_that_have_not_changed_are_not_read_again(tmp_path, monkeypatch):
    name = write_folder(tmp_path / "data", range(COUNT))
    config, read = config_of(name, tmp_path), []
    ours = Listing.read

    def counting(self, name, most=None):
        read.append(name)
        return ours(self, name, most)

    def of(config):
        source = load(config)
        read.clear()  # what a layout looked at
        return source.fingerprint, sorted(read)

    monkeypatch.setattr(Listing, "read", counting)
    monkeypatch.setattr(contents, "_SETTLED", 0)
    everything = [f"{i:02}.bmp" for i in range(COUNT)]
    first, whole = of(config)
    assert whole == everything
    assert of(config) == (first, [])
    os.utime(tmp_path / "data" / "03.bmp")
    assert of(config) == (first, ["03.bmp"])
    assert of(dataclasses.replace(config, split="heldout"))[1] == []
    (tmp_path / "data" / "05.bmp").write_bytes(bmp(99))
    second, changed = of(config)
    assert changed == ["05.bmp"] and second != first
    (cache,) = (tmp_path / "cache" / "contents").iterdir()
    cache.write_bytes(cache.read_bytes()[:100])
    assert of(config) == (second, everything)  # a damaged cache is none
    monkeypatch.setattr(contents, "_SETTLED", 10**15)
    cache.unlink()
    assert of(config) == of(config) == (second, everything)  # too new to be sure of


def test_a_picture_that_changes_while_a_run_reads_is_a_bad_record(tmp_path):
    source = load(config_of(write_folder(tmp_path / "data", range(COUNT)), tmp_path))
    (tmp_path / "data" / "02.bmp").write_bytes(bmp(98))
    assert source[2]["image"] == bmp(98)  # nothing stands on what it was
    source.fingerprint  # noqa: B018
    (tmp_path / "data" / "02.bmp").write_bytes(bmp(99))
    with pytest.raises(BadRecord, match=r"02\.bmp: it has changed since"):
        source[2]


def test_the_former_fingerprint_is_what_it_was(tmp_path):
    """Written out: path, size, caption of every pair."""
    source = load(config_of(write_folder(tmp_path / "data", range(COUNT)), tmp_path))
    digest = hashlib.sha256(b"folder")
    for i in range(COUNT):
        known = [f"{i:02}.bmp", len(bmp(0)), f"picture {i}"]
        digest.update(json.dumps(known).encode())
    assert source.former == digest.hexdigest()[:16] != source.fingerprint


def test_old_positions_in_the_data_go_on(tmp_path):
    config = config_of(write_folder(tmp_path / "data", range(COUNT)), tmp_path)
    stream = batches(load(config), config, seed=0, batch_size=4)
    next(stream)
    state = stream.get_state()
    expected = next(stream)["index"]
    again = batches(load(config), config, seed=0, batch_size=4)
    again.set_state([state | {"data": load(config).former}])
    np.testing.assert_array_equal(next(again)["index"], expected)
    with pytest.raises(UserError, match=r"states\[0\]\.data"):
        again.set_state([state | {"data": "0" * 16}])


# ---------------------------------------------------------------- what stands on a data set


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    out = tmp_path_factory.mktemp("identity") / "clip"
    about = {"stage": stages.describe(tiny.CLIP)}
    model_folder.save_stage(out, params=tiny.params(tiny.CLIP), description=about)
    return out


def prepared(tmp_path, clip, **rest):
    data = config_of(str(tmp_path / "data"), tmp_path)
    train = TrainConfig(batch_size=4, steps=2, eval_every=0, preview_every=0, log_every=1)
    settings = {"heldout_split": "all", "previews": 2, "clip": str(clip), **rest}
    return prepare.prepare(base.make(tiny.PRIOR, data, train, **settings))


def train(run, workdir):
    return loop.train(
        loss_fn=run.loss, init_params=run.init_params, batches=run.batches(), config=run.train,
        workdir=workdir, description=run.description, complete=run.complete, mesh=run.mesh,
    )  # fmt: skip


def true_cosines(run, clip):
    """Of every stored z_i with that of the picture beside it."""
    part, source = load_part(clip, kind="clip"), run.source
    images = [np.asarray(Image.open(io.BytesIO(source[i]["image"]))) for i in range(len(source))]
    z_i = np.asarray(encode_image(part.stage, part.params, np.stack(images)))
    return [float(z_i[i] @ source[i]["z_i"]) for i in range(len(source))]


def test_stored_embeddings_are_never_another_picture_s(tmp_path, clip):
    """Rewritten under the same names, sizes, times and captions."""
    write_folder(tmp_path / "data", range(COUNT))
    before = times(tmp_path / "data")
    run = prepared(tmp_path, clip)
    assert min(true_cosines(run, clip)) > 0.999
    train(run, tmp_path / "run")
    write_folder(tmp_path / "data", range(100, 100 + COUNT))
    for path, found in before.items():
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    other = prepared(tmp_path, clip)
    assert min(true_cosines(other, clip)) > 0.999
    other = dataclasses.replace(other, train=dataclasses.replace(other.train, steps=4))
    with pytest.raises(UserError, match=r"data_fingerprint was .*pictures or captions of the data"):
        train(other, tmp_path / "run")


def test_an_old_run_and_an_old_store_still_load(tmp_path, clip, caplog):
    """Under the fingerprint of names, sizes and captions; pictures are compared by the CLIP."""
    write_folder(tmp_path / "data", range(COUNT))
    run = prepared(tmp_path, clip)
    now, former = run.source.fingerprint, run.source.former
    (cached,) = (tmp_path / "cache" / "embeddings").iterdir()
    store = shutil.copytree(cached, tmp_path / "store")
    meta = json.loads((store / "meta.json").read_text())
    assert meta["data_fingerprint"] == now
    (store / "meta.json").write_text(json.dumps(meta | {"data_fingerprint": former}))
    old = dataclasses.replace(run, description=run.description | {"data_fingerprint": former})
    train(old, tmp_path / "run")
    again = prepared(tmp_path, clip, embeddings=str(store))
    assert "all are as they were" in caplog.text
    again = dataclasses.replace(again, train=dataclasses.replace(again.train, steps=3))
    train(again, tmp_path / "run")
    assert "this run began before fingerprints knew" in caplog.text
    with Saved(tmp_path / "run") as saved:
        assert saved.item(3, "description")["data_fingerprint"] == now
    path = tmp_path / "data" / "07.bmp"
    path.write_bytes(bmp(7)[:54] + bytes([255, 40, 0] * 256))
    with pytest.raises(UserError, match=r"of 12 pictures .* one has a z_i with cosine"):
        prepared(tmp_path, clip, embeddings=str(store))


def test_a_glance_at_a_data_set_reads_no_picture_twice(tmp_path, caplog):
    """Repeated captions are told of in one line; different ones are not."""
    for captions, said in ((3, True), (COUNT, False)):
        folder = tmp_path / f"of_{captions}"
        write_folder(folder, range(COUNT))
        for i in range(COUNT):
            (folder / f"{i:02}.txt").write_text(f"thing {i % captions}")
        caplog.clear()
        inputs.warn_of_repeats(load(config_of(str(folder), tmp_path)))
        assert ("12 of its 12 pairs have 3 different captions" in caplog.text) == said
        assert len(caplog.records) == said


def test_a_cache_is_kept_apart_by_folder(tmp_path):
    cache, now = tmp_path / "cache", time.time_ns() - 10**10
    for where, content in (("/a", b"one"), ("/b", b"two")):
        rows = contents.digests(
            where, ["x"], {"x": (3, now)}, lambda _, c=content: contents.digest([c]), cache
        )
        again = contents.digests(where, ["x"], {"x": (3, now)}, lambda _: b"", cache)
        np.testing.assert_array_equal(rows, again)
        assert rows[0].tobytes() == contents.digest([content])
