"""Where a store of embeddings lies: a folder of this machine, or one that fsspec reaches.

Files come whole or not at all. In a local folder a file is written under another name and moved
into its place; a remote one is written on this machine and then uploaded, and object stores (GCS,
S3) show no half uploads. Remote files are read from copies, made in a cache when first asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import secrets
import tempfile
from collections.abc import Iterator

import fsspec

from unclip_jax.errors import UserError


def open_folder(where: str | os.PathLike, cache_dir: str | os.PathLike) -> Local | Remote:
    """The folder at a path or URL, which need not exist.

    Args:
      where: a path, or a URL of fsspec's: gs://, s3://, memory://, file:// ...
      cache_dir: where copies of remote files are kept.

    Raises:
      UserError: if it is empty, or what speaks the URL's protocol isn't installed.
    """
    text = os.fspath(where)
    if not text:
        raise UserError("embeddings: '': expected the folder of a store, a path or a URL")
    if text.startswith("file://"):
        return Local(text.removeprefix("file://"))
    return Remote(text, cache_dir) if "://" in text else Local(text)


class Local:
    """A folder of this machine."""

    def __init__(self, path: str | os.PathLike):
        """Names the folder; `str` of this object is its path."""
        self._path = pathlib.Path(path).expanduser()

    def __str__(self) -> str:
        """The path."""
        return str(self._path)

    def names(self) -> set[str]:
        """Of the files in it; none where there is no such folder."""
        try:
            return set(os.listdir(self._path))
        except FileNotFoundError:
            return set()
        except OSError as error:
            raise UserError(f"embeddings: {self}: can't be read ({error.strerror})") from error

    def read_text(self, name: str) -> str:
        """A small file."""
        try:
            return (self._path / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"embeddings: {self}: can't read {name} ({error})") from error

    def file(self, name: str) -> pathlib.Path:
        """The path of a file."""
        return self._path / name

    def tidy(self, name: str) -> None:
        """Removes what killed attempts at writing `name` left, while nobody writes it."""
        with _os_errors(self, name):
            for left in self._path.glob(f".{name}.*"):
                left.unlink(missing_ok=True)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[pathlib.Path]:
        """A path to write to; when that ends well, its file becomes `name`."""
        temporary = self._path / f".{name}.{secrets.token_hex(4)}"
        with _os_errors(self, name):
            self._path.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with _os_errors(self, name):
                with open(temporary, "rb") as written:
                    os.fsync(written.fileno())  # or a power cut leaves the name without the data
                os.replace(temporary, self._path / name)
        finally:
            temporary.unlink(missing_ok=True)


class Remote:
    """A folder that fsspec reaches by a URL."""

    def __init__(self, url: str, cache_dir: str | os.PathLike):
        """Names the folder; `str` of this object is its URL."""
        self._url = url.rstrip("/")
        digest = hashlib.sha256(self._url.encode()).hexdigest()[:16]
        self._cache = pathlib.Path(cache_dir).expanduser() / "remote_embeddings" / digest
        with self._reaching():
            self._files, self._path = fsspec.core.url_to_fs(self._url)

    def __str__(self) -> str:
        """The URL."""
        return self._url

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        """Each protocol has errors of its own."""
        try:
            yield
        except ImportError as error:
            raise UserError(
                f"embeddings: {self}: {error}; for gs:// pip install 'unclip_jax[gcs]', for s3://"
                " 'unclip_jax[s3]'"
            ) from error
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UserError(f"embeddings: {self}: can't be reached ({reason})") from error

    def names(self) -> set[str]:
        """Of the files in it; none where there is no such folder."""
        with self._reaching():
            self._files.invalidate_cache(self._path)
            try:
                paths = self._files.ls(self._path, detail=False)
            except FileNotFoundError:
                return set()
        return {path.rstrip("/").rsplit("/", 1)[-1] for path in paths}

    def read_text(self, name: str) -> str:
        """A small file."""
        with self._reaching():
            return self._files.cat_file(f"{self._path}/{name}").decode("utf-8")

    def file(self, name: str) -> pathlib.Path:
        """The path of a copy of a file; of another one when the file has changed."""
        path = f"{self._path}/{name}"
        with self._reaching():
            state = hashlib.sha256(str(self._files.ukey(path)).encode()).hexdigest()[:16]
            copy = self._cache / f"{state}-{name}"
            if not copy.exists():
                self._cache.mkdir(parents=True, exist_ok=True)
                temporary = self._cache / f".{name}.{secrets.token_hex(4)}"
                try:
                    self._files.get_file(path, str(temporary))
                    os.replace(temporary, copy)
                finally:
                    temporary.unlink(missing_ok=True)
        return copy

    def tidy(self, name: str) -> None:
        """Nothing: what is not whole was never uploaded."""

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[pathlib.Path]:
        """A path to write to; when that ends well, its file is uploaded as `name`."""
        with tempfile.TemporaryDirectory(prefix="unclip_jax-") as folder:
            path = pathlib.Path(folder) / name
            yield path
            with self._reaching():
                self._files.makedirs(self._path, exist_ok=True)
                self._files.put_file(str(path), f"{self._path}/{name}")


Folder = Local | Remote


@contextlib.contextmanager
def _os_errors(where: object, name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"embeddings: {where}: can't write {name} ({error})") from error
