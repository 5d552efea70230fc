"""Models by the name of their repository, without a network: from a cache that the test makes."""

import jax
import pytest

from unclip_jax import hub
from unclip_jax.errors import UserError
from unclip_jax.pipeline import UnCLIP


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """huggingface_hub's cache, empty, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def snapshot(cache, name):
    """The folder of a repository's snapshot, laid out as huggingface_hub lays out its cache."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123456789abcdef0123456789abcdef01234567")
    folder = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    folder.mkdir(parents=True)
    return folder


def test_a_folder_is_itself(tmp_path):
    assert hub.local_folder(tmp_path) == tmp_path


def test_a_cached_repository_is_found_offline(cache):
    folder = snapshot(cache, "someone/karlo")
    (folder / "model_index.json").write_text("{}")
    assert hub.local_folder("someone/karlo").resolve() == folder.resolve()


def test_a_cached_karlo_is_loaded_by_name(cache, tmp_path):
    karlo_folders = pytest.importorskip("tests.karlo_folders")
    sizes = karlo_folders.SIZES["two levels"]
    pipeline, _ = karlo_folders.pipelines(sizes, tmp_path / "tokenizer")
    pipeline.save_pretrained(snapshot(cache, "someone/karlo"))
    model = UnCLIP.load("someone/karlo")
    assert model.embed_text(["a cat"]).shape == (1, sizes.clip.embed_dim)
    assert isinstance(model.prior.params["network"]["query"], jax.Array)


def test_offline_is_said_in_words(cache):
    with pytest.raises(UserError, match=r"not in the local cache.*cannot be reached"):
        hub.local_folder("someone/unknown")


@pytest.mark.parametrize(
    "name", ["", "no-such-folder", "a/b/c", "../karlo", "who/../where", "/x/y"]
)
def test_what_names_neither(name, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is no folder"):
        hub.local_folder(name)
