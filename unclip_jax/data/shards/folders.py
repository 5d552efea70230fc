"""A folder of this machine, or one that fsspec reaches.

Files come whole or not at all. A remote one is written on this machine and then uploaded: object
stores (GCS, S3) show no half uploads.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import TypeVar

from unclip_jax.common.files import replacing
from unclip_jax.data.shards.storage import ask, filesystem, is_local, patiently
from unclip_jax.errors import UserError, wrong

T = TypeVar("T")

_OPEN_FILES = 256


class Descriptor:
    """A file of this machine that any thread may use at any place, closed once nobody does.

    Attributes:
        number: its file descriptor.
    """

    def __init__(self, path: pathlib.Path, flags: int = os.O_RDONLY):
        """Open it; OSError if that can't be done."""
        self.number = -1
        self.number = os.open(path, flags, 0o666)

    def __del__(self) -> None:
        """Close it."""
        if self.number >= 0:
            os.close(self.number)


class Folder:
    """The folder at a path or URL, which need not exist; any thread may use it.

    A `UserError` says where it can't be reached or written.

    Attributes:
        local: its path, if it is one of this machine.
    """

    def __init__(self, where: str | os.PathLike, field: str):
        """Name the folder; `str` of this object is its path or URL.

        Args:
            where: a path, or a URL of fsspec's: gs://, s3://, memory://, file:// ...
            field: the setting that messages begin with.
        """
        text = os.fspath(where).removeprefix("file://")
        if not text:
            raise wrong(field, os.fspath(where), "the folder of a store, a path or a URL")
        self._field, self._files = field, filesystem(text, field)
        self.local = pathlib.Path(text).expanduser() if is_local(self._files) else None
        self._where = str(self.local or text.rstrip("/"))
        self._path = self._files._strip_protocol(self._where)
        self._opened = functools.lru_cache(_OPEN_FILES)(self._open)

    def __str__(self) -> str:
        """The path or URL."""
        return self._where

    def _ask(self, question: Callable[[], T]) -> T:
        return ask(question, self._where, self._field)

    def sizes(self) -> dict[str, int]:
        """Of the files in it, in bytes; none where there is no such folder."""

        def listed() -> list[dict]:
            self._files.invalidate_cache(self._path)
            try:
                return self._files.ls(self._path, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return []

        found = self._ask(listed)
        return {f["name"].rstrip("/").rsplit("/", 1)[-1]: int(f["size"] or 0) for f in found}

    def size(self, name: str) -> int | None:
        """Of a file, in bytes; None where there is none."""

        def asked() -> int | None:
            self._files.invalidate_cache(self._path)
            try:
                return int(self._files.size(f"{self._path}/{name}"))
            except (FileNotFoundError, NotADirectoryError):
                return None

        return self._ask(asked)

    def names(self) -> set[str]:
        """Of the files and folders in it."""
        return {*self.sizes()}

    def state(self, name: str) -> str:
        """What differs where the content of a file does, as far as its store tells."""
        return self._ask(lambda: str(self._files.ukey(f"{self._path}/{name}")))

    def read_text(self, name: str) -> str:
        """A small file."""
        return self._ask(lambda: self._files.cat_file(f"{self._path}/{name}").decode("utf-8"))

    def read(self, name: str, start: int, stop: int) -> bytes:
        """The bytes of a file from `start` up to `stop`, fewer where it ends before.

        Raises:
            StorageError: it can't be read, or isn't there.
        """
        path = f"{self._path}/{name}"
        if self.local is None:
            return patiently(lambda: self._files.cat_file(path, start, stop), f"{self}/{name}")
        return patiently(lambda: _pread(self._opened(name), start, stop), f"{self}/{name}")

    def forget(self) -> None:
        """Close the files that are open."""
        self._opened.cache_clear()

    def _open(self, name: str) -> Descriptor:
        return Descriptor(self.local / name)

    def fetch(self, name: str, path: pathlib.Path) -> None:
        """Copy a file to a path of this machine."""
        self._ask(lambda: self._files.get_file(f"{self._path}/{name}", str(path)))

    def tidy(self, name: str) -> None:
        """Remove what killed attempts at writing `name` left, while nobody writes it."""
        if self.local:
            with self._writable(name):
                for left in self.local.glob(f".{name}.*"):
                    left.unlink(missing_ok=True)

    def write(self, name: str, content: bytes) -> None:
        """Make `name` a file with this content."""
        with self.writing(name) as path:
            path.write_bytes(content)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[pathlib.Path]:
        """A path to write to; when that ends well, its file becomes `name`."""
        if self.local:
            with self._writable(name), replacing(self.local / name, durable=True) as path:
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
            raise UserError(f"{self._field}: {self}: can't be written ({error})") from error


def _pread(file: Descriptor, start: int, stop: int) -> bytes:
    return os.pread(file.number, stop - start, start)
