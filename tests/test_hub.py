"""Models by the name of their repository, without a network: from a cache that the test makes."""

import http.server
import json
import subprocess
import sys
import threading

import jax
import pytest

from tests.toy_run import environment
from unclip_jax.errors import UserError
from unclip_jax.pipeline.unclip import UnCLIP
from unclip_jax.weights import hub


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


# A hub that lies


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does, for a repository with the two files in `names`."""

    commit = "0123456789abcdef0123456789abcdef01234567"
    names = ()

    def do_GET(self):
        about = {
            "id": "someone/karlo",
            "sha": self.commit,
            "siblings": [{"rfilename": name} for name in self.names],
        }
        tree = [{"type": "file", "path": n, "size": 2, "oid": "f" * 40} for n in self.names]
        found = tree if "/tree/" in self.path else about if self.path.startswith("/api/") else {}
        body = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"abc"')
        self.send_header("X-Repo-Commit", self.commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_):
        """Nothing."""


@pytest.fixture
def served():
    """The address of a server that is `Hub`, and `Hub`."""
    handler = type("Served", (Hub,), {})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()


@pytest.mark.parametrize("second", ["config.json", "../../../../../out.json", "{root}/out.json"])
def test_a_download_writes_nothing_outside_the_cache(served, tmp_path, second):
    address, hub_of = served
    hub_of.names = ("model_index.json", second.format(root=tmp_path))
    script = (
        "from unclip_jax import errors\nfrom unclip_jax.weights import hub\n"
        "errors.run_command(lambda _: print(hub.local_folder('someone/karlo')), [])"
    )
    env = environment(HF_ENDPOINT=address, HF_HOME=str(tmp_path / "home"), NO_PROXY="127.0.0.1")
    env = {name: value for name, value in env.items() if name not in ("HF_HUB_CACHE", "HF_TOKEN")}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False
    )
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert not list((tmp_path / "home").rglob("out.json"))
    if second == "config.json":
        assert (done.returncode, (tmp_path / "home").is_dir()) == (0, True), done.stderr
        assert hub_of.commit in done.stdout
    else:
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "on the Hugging Face hub is refused" in done.stderr.splitlines()[-1]
