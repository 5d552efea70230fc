"""A bucket on this machine: what Google Cloud Storage's JSON API does, over a folder.

TensorStore speaks to it by HTTP, as it does to the real one; fsspec's `gs://` is a file system that
reads and writes the same folder. An object is one file whose name is the object's, quoted: there
are no folders, and nothing is renamed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

import fsspec
from fsspec.registry import _registry as registered
from fsspec.spec import AbstractFileSystem

FOLDER = "TEST_BUCKETS"  # of the environment: where the objects lie
_lock = threading.Lock()


def _file(root: Path, bucket: str, name: str) -> Path:
    return root / quote(f"{bucket}/{name}", safe="")


def _objects(root: Path, prefix: str) -> dict[str, Path]:
    """Objects by BUCKET/NAME."""
    found = {unquote(path.name): path for path in root.iterdir() if not path.name.startswith(".")}
    return {name: found[name] for name in sorted(found) if name.startswith(prefix)}


def _put(file: Path, content: bytes) -> None:
    temporary = file.with_name(f".{threading.get_ident()}-{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(file)


def _generation(file: Path) -> str:
    return str(file.stat().st_mtime_ns)


class _Handler(BaseHTTPRequestHandler):
    """Answers for `server.root`, the folder of the objects.

    `server.fails` is how many writes are refused from now on, `server.slow` how many seconds each
    takes.
    """

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _answer(self, status, content=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def _asked(self):
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        parts = url.path.split("/b/", 1)[-1].split("/o", 1)
        name = unquote(parts[1].lstrip("/")) if len(parts) > 1 else ""
        return parts[0], name, query

    def _matches(self, file, query):
        if "ifGenerationMatch" not in query:
            return True
        there = _generation(file) if file.exists() else "0"
        return query["ifGenerationMatch"] == there

    def _about(self, bucket, name, file):
        size = str(file.stat().st_size)
        return {"name": name, "bucket": bucket, "generation": _generation(file), "size": size}

    def do_GET(self):
        bucket, name, query = self._asked()
        root = self.server.root
        if "/b/" not in self.path:
            self._answer(404)
        elif not name:
            start, end = query.get("startOffset", ""), query.get("endOffset")
            found = {
                full.removeprefix(f"{bucket}/"): file
                for full, file in _objects(root, f"{bucket}/{query.get('prefix', '')}").items()
            }
            items = [
                self._about(bucket, name, file)
                for name, file in found.items()
                if name >= start and (end is None or name < end)
            ]
            self._answer(200, json.dumps({"items": items}).encode())
        else:
            file = _file(root, bucket, name)
            try:
                content, generation = file.read_bytes(), _generation(file)
            except FileNotFoundError:
                return self._answer(404)
            if query.get("alt") != "media":
                about = json.dumps(self._about(bucket, name, file)).encode()
                return self._answer(200, about)
            if query.get("ifGenerationNotMatch") == generation:
                return self._answer(304, x_goog_generation=generation)
            if query.get("ifGenerationMatch", generation) != generation:
                return self._answer(412)
            headers = {"x_goog_generation": generation}
            status, asked = 200, self.headers.get("Range")
            if asked:
                first, last = asked.removeprefix("bytes=").split("-")
                whole = len(content)
                if first == "":
                    start, stop = whole - int(last), whole
                else:
                    start, stop = int(first), min(int(last) + 1 if last else whole, whole)
                if start >= whole and whole:
                    return self._answer(416)
                status, content = 206, content[start:stop]
                headers["Content_Range"] = f"bytes {start}-{stop - 1}/{whole}"
            self._answer(status, content, **headers)
        return None

    def do_POST(self):
        bucket, _, query = self._asked()
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        time.sleep(self.server.slow)
        if self.server.fails > 0:
            self.server.fails -= 1
            return self._answer(503, b"busy")
        name = query["name"]
        file = _file(self.server.root, bucket, name)
        with _lock:
            if not self._matches(file, query):
                return self._answer(412)
            _put(file, content)
            about = json.dumps(self._about(bucket, name, file)).encode()
        return self._answer(200, about)

    def do_DELETE(self):
        bucket, name, query = self._asked()
        file = _file(self.server.root, bucket, name)
        with _lock:
            if not self._matches(file, query):
                return self._answer(412)
            if not file.exists():
                return self._answer(404)
            file.unlink()
        return self._answer(204)


class BucketFileSystem(AbstractFileSystem):
    """fsspec's view of the same folder."""

    protocol = ("gs", "gcs")
    cachable = False
    fails = 0  # how many writes are refused from now on

    @property
    def root(self):
        return Path(os.environ[FOLDER])

    @classmethod
    def _strip_protocol(cls, path):
        path = os.fspath(path)
        for scheme in ("gs://", "gcs://"):
            path = path.removeprefix(scheme)
        return path.rstrip("/")

    def ls(self, path, detail=True, **kwargs):
        path = self._strip_protocol(path)
        file = self.root / quote(path, safe="")
        if file.exists():
            found = {path: {"name": path, "type": "file", "size": file.stat().st_size}}
        else:
            found = {}
            for name, file in _objects(self.root, f"{path}/").items():
                rest = name.removeprefix(f"{path}/")
                if "/" in rest:
                    folder = f"{path}/{rest.split('/')[0]}"
                    found[folder] = {"name": folder, "type": "directory", "size": 0}
                else:
                    found[name] = {"name": name, "type": "file", "size": file.stat().st_size}
            if not found:
                raise FileNotFoundError(path)
        return list(found.values()) if detail else sorted(found)

    def info(self, path, **kwargs):
        path = self._strip_protocol(path)
        found = self.ls(path)
        if [one["name"] for one in found] == [path]:
            return found[0]
        return {"name": path, "type": "directory", "size": 0}

    def mkdir(self, path, create_parents=True, **kwargs):
        pass

    def makedirs(self, path, exist_ok=False):
        pass

    def rmdir(self, path):
        pass

    def rm(self, path, recursive=False, maxdepth=None):
        path = self._strip_protocol(path)
        found = _objects(self.root, f"{path}/") if recursive else {}
        if (file := self.root / quote(path, safe="")).exists():
            found[path] = file
        if not found:
            raise FileNotFoundError(path)
        for one in found.values():
            one.unlink()

    def rm_file(self, path):
        (self.root / quote(self._strip_protocol(path), safe="")).unlink()

    _rm = rm_file

    def cp_file(self, path1, path2, **kwargs):
        self.pipe_file(path2, self.cat_file(path1))

    def cat_file(self, path, start=None, end=None, **kwargs):
        content = (self.root / quote(self._strip_protocol(path), safe="")).read_bytes()
        return content[slice(start, end)]

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        if BucketFileSystem.fails > 0:
            BucketFileSystem.fails -= 1
            raise OSError("503, the backend is busy\nsecond line")
        _put(self.root / quote(self._strip_protocol(path), safe=""), value)

    def _open(self, path, mode="rb", **kwargs):
        if "r" in mode:
            return io.BytesIO(self.cat_file(path))
        return _Writer(self, path)


class _Writer(io.BytesIO):
    """What is written becomes an object when it is closed."""

    def __init__(self, files, path):
        super().__init__()
        self._files, self._path = files, path

    def close(self):
        if not self.closed:
            self._files.pipe_file(self._path, self.getvalue())
        super().close()


@contextlib.contextmanager
def serving(root: Path):
    """A server of the objects in `root`; yields the environment of whoever is to use it."""
    root.mkdir(parents=True, exist_ok=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.root, server.fails, server.slow, server.daemon_threads = root, 0, 0.0, True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    environment = {
        FOLDER: str(root),
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
    }
    try:
        yield environment, server
    finally:
        server.shutdown()
        server.server_close()


def use() -> None:
    """Make `gs://` this process's bucket, if the environment names one."""
    if FOLDER not in os.environ:
        return
    for name in ("gs", "gcs"):
        fsspec.register_implementation(name, BucketFileSystem, clobber=True)
    # Orbax asks whether a bucket has real folders before it deletes from it.
    storage = types.ModuleType("google.cloud.storage")
    storage.Client = lambda: types.SimpleNamespace(get_bucket=lambda name: object())
    cloud = types.ModuleType("google.cloud")
    cloud.storage = storage
    sys.modules.setdefault("google.cloud", cloud)
    sys.modules.setdefault("google.cloud.storage", storage)


@contextlib.contextmanager
def bucket(root: Path, monkeypatch):
    """`serving`, with `gs://` there for this process and for those that it starts; the server."""
    with serving(root) as (variables, server):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        use()
        yield server
    for name in BucketFileSystem.protocol:
        registered.pop(name, None)
