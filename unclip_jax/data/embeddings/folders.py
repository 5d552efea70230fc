"""Where a store of embeddings lies: a folder of this machine, or one that fsspec reaches.

Files come whole or not at all. A remote one is written on this machine and then uploaded: object
stores (GCS, S3) show no half uploads. Remote files are read from copies, made in a cache when
first asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import TypeVar

from unclip_jax.common.files import replacing
from unclip_jax.data.shards.storage import ask, filesystem, is_local
from unclip_jax.errors import UserError, wrong

T = TypeVar("T")


class Folder:
    """The folder at a path or URL, which need not exist.

    A `UserError` says where it can't be reached or written.
    """

    def __init__(self, where: str | os.PathLike, cache_dir: str | os.PathLike):
        """Name the folder; `str` of this object is its path or URL.

        Args:
            where: a path, or a URL of fsspec's: gs://, s3://, memory://, file:// ...
            cache_dir: where copies of remote files are kept.
        """
        text = os.fspath(where).removeprefix("file://")
        if not text:
            raise wrong("embeddings", os.fspath(where), "the folder of a store, a path or a URL")
        self._files = filesystem(text, "embeddings")
        self._local = pathlib.Path(text).expanduser() if is_local(self._files) else None
        self._where = str(self._local or text.rstrip("/"))
        self._path = self._files._strip_protocol(self._where)
        digest = hashlib.sha256(self._where.encode()).hexdigest()[:16]
        self._cache = pathlib.Path(cache_dir).expanduser() / "remote_embeddings" / digest

    def __str__(self) -> str:
        """The path or URL."""
        return self._where

    def _ask(self, question: Callable[[], T]) -> T:
        return ask(question, self._where, "embeddings")

    def names(self) -> set[str]:
        """Of the files in it; none where there is no such folder."""

        def listed() -> list[str]:
            self._files.invalidate_cache(self._path)
            try:
                return self._files.ls(self._path, detail=False)
            except FileNotFoundError:
                return []

        return {path.rstrip("/").rsplit("/", 1)[-1] for path in self._ask(listed)}

    def read_text(self, name: str) -> str:
        """A small file."""
        return self._ask(lambda: self._files.cat_file(f"{self._path}/{name}").decode("utf-8"))

    def file(self, name: str) -> pathlib.Path:
        """The path of a file here, or of a copy, another one when the remote file has changed."""
        if self._local:
            return self._local / name
        path = f"{self._path}/{name}"
        state = self._ask(lambda: str(self._files.ukey(path)))
        copy = self._cache / f"{hashlib.sha256(state.encode()).hexdigest()[:16]}-{name}"
        if not copy.exists():
            with replacing(copy) as temporary:
                self._ask(lambda: self._files.get_file(path, str(temporary)))
        return copy

    def tidy(self, name: str) -> None:
        """Remove what killed attempts at writing `name` left, while nobody writes it."""
        if self._local:
            with self._writable(name):
                for left in self._local.glob(f".{name}.*"):
                    left.unlink(missing_ok=True)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[pathlib.Path]:
        """A path to write to; when that ends well, its file becomes `name`."""
        if self._local:
            with self._writable(name), replacing(self._local / name, durable=True) as path:
                yield path
            return
        with tempfile.TemporaryDirectory(prefix="unclip_jax-") as folder:
            path = pathlib.Path(folder) / name
            yield path
            self._ask(lambda: self._files.makedirs(self._path, exist_ok=True))
            self._ask(lambda: self._files.put_file(str(path), f"{self._path}/{name}"))

    @contextlib.contextmanager
    def _writable(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"embeddings: {self}: can't write {name} ({error})") from error
