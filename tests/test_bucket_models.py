"""Model folders in a bucket: what draws and exports takes their address as it takes a folder."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from tests import object_store, test_app
from unclip_jax.errors import UserError
from unclip_jax.pipeline import UnCLIP
from unclip_jax.pipeline.tasks.command import main as sample
from unclip_jax.weights import hub
from unclip_jax.weights.export.command import main as export
from unclip_jax.weights.known import Known

MODEL = "gs://bucket/models/tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    test_app.model().save(folder)
    Known.of(["cat face, noto style"], ["cat face"]).save(folder)
    return folder


@pytest.fixture
def files(folder, tmp_path, monkeypatch):
    """A bucket that holds the folder."""
    monkeypatch.setenv("UNCLIP_JAX_CACHE", str(tmp_path / "cache"))
    with object_store.bucket(tmp_path / "objects", monkeypatch):
        files = object_store.BucketFileSystem()
        for file in filter(lambda path: path.is_file(), folder.rglob("*")):
            files.pipe_file(f"{MODEL}/{file.relative_to(folder)}", file.read_bytes())
        yield files


def test_a_model_is_loaded_from_its_address(folder, files, tmp_path):
    here, there = UnCLIP.load(folder), UnCLIP.load(MODEL)
    parts = [(m.clip, m.prior, m.decoder, *m.upsamplers) for m in (here, there)]
    for a, b in zip(*parts, strict=True):
        assert a.stage == b.stage
        jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    assert there.known == here.known is not None
    copies = sorted((tmp_path / "cache" / "models").iterdir())
    before = [path.stat().st_ino for path in copies]
    UnCLIP.load(f"{MODEL}/")
    assert len(copies) == 4 and before == [path.stat().st_ino for path in copies]


def test_it_draws_and_exports_what_the_folder_does(folder, files, tmp_path):
    for model, name in (str(folder), "here"), (MODEL, "there"):
        out = str(tmp_path / f"{name}.png")
        sample(["text2im", "--model", model, "--out", out, "--prompt", "a cat face"])
        program = str(tmp_path / f"{name}-program")
        export(["program", "--model", model, "--out", program, "--stage", "clip_text"])
    np.testing.assert_array_equal(*(Image.open(tmp_path / f"{n}.png") for n in ("here", "there")))
    for file in (tmp_path / "here-program").iterdir():
        assert (tmp_path / "there-program" / file.name).stat().st_size == file.stat().st_size


def test_addresses_that_hold_no_model(files):
    with pytest.raises(UserError, match=r"model: 'gs://bucket/models/none' is no folder"):
        UnCLIP.load("gs://bucket/models/none")
    with pytest.raises(UserError, match=r"model: got 'ftp://a/b', expected a path, gs:// or s3://"):
        UnCLIP.load("ftp://a/b")
    files.pipe_file("gs://bucket/karlo/model_index.json", json.dumps({"_class_name": "x"}).encode())
    with pytest.raises(UserError, match=r"model: 'gs://bucket/karlo' is an address; public"):
        UnCLIP.load("gs://bucket/karlo")
    with pytest.raises(UserError, match=r"model: 'gs://bucket/karlo' is an address; public"):
        hub.local_folder("gs://bucket/karlo")
