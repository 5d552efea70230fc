"""Files on this machine or in a bucket, found by pattern and read by byte ranges.

Whatever fsspec knows is read: a path, `gs://`, `s3://`, `http(s)://` and others. A failure
that may pass (a cut connection, a busy server) is tried again after a while.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import fsspec

from unclip_jax.errors import UserError

MAX_FILES = 1_000_000
WAITS = (0.5, 1.0, 2.0, 4.0)  # seconds before each further attempt
_ASKED_AT_ONCE = 32  # files whose size and version are asked for at a time
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3", "http": "http", "https": "http"}
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")
# What says that a file is no longer the one it was, by what the various stores call it.
_VERSIONS = ("ETag", "etag", "generation", "md5Hash", "mtime", "LastModified", "Last-Modified")

T = TypeVar("T")


class StorageError(Exception):
    """A file can't be read; the message names it and says why."""


@dataclasses.dataclass(frozen=True)
class StoredFile:
    """A file of which byte ranges can be read, from any thread.

    Attributes:
      url: its address, or absolute path.
      size: in bytes.
      version: differs where the content does, as far as its store tells.
    """

    url: str
    size: int
    version: str
    _filesystem: fsspec.AbstractFileSystem = dataclasses.field(repr=False)
    _path: str = dataclasses.field(repr=False)

    @property
    def name(self) -> str:
        """The last part of its address."""
        return self.url.rsplit("/", 1)[-1]

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from `start` up to `stop`, and no others.

        Raises:
          StorageError: if they can't be had, after a few attempts, or aren't all there.
        """
        if not 0 <= start <= stop <= self.size:
            raise StorageError(f"{self.url}: no bytes {start}..{stop} in its {self.size}")
        if start == stop:
            return b""
        found = _patiently(lambda: self._filesystem.cat_file(self._path, start, stop), self.url)
        if len(found) != stop - start:
            raise StorageError(
                f"{self.url}: {len(found)} bytes came for {stop - start}: it has changed, or its "
                "server knows no ranges"
            )
        return found


class Forward:
    """Reads a file from front to back in large blocks, but skips what nobody asks for."""

    def __init__(self, file: StoredFile, block: int):
        """At least `block` bytes are read at a time, where there are as many."""
        self._file, self._block = file, block
        self._start, self._bytes = 0, b""

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from `start` up to `stop`; `StorageError` as `StoredFile.read`."""
        if not self._start <= start <= stop <= self._start + len(self._bytes):
            end = min(max(stop, start + self._block), self._file.size)
            self._start, self._bytes = start, self._file.read(start, end)
        return self._bytes[start - self._start : stop - self._start]


class Seekable(io.RawIOBase):
    """A stored file as a Python file object; it belongs to one thread."""

    def __init__(self, file: StoredFile):
        """At the beginning of the file."""
        super().__init__()
        self._file, self._place = file, 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The place of the next byte."""
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Goes to a place and returns it."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._file.size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def readinto(self, buffer: Any) -> int:
        """Fills a buffer; fewer bytes only at the end."""
        start = min(self._place, self._file.size)
        found = self._file.read(start, min(start + len(buffer), self._file.size))
        buffer[: len(found)] = found
        self._place = start + len(found)
        return len(found)


def is_remote(pattern: str) -> bool:
    """Whether reading takes a network; a data set's kind, "wds:", may stand before."""
    return _protocol(pattern) not in ("file", "local", "memory")


def find(pattern: str) -> list[StoredFile]:
    """The files that a pattern names: in the order of its braces, then of their paths.

    Args:
      pattern: a path or address. `{00000..00123}` and `{a,b}` stand for each of their
        values; `*`, `?` and `[...]` for what is there, except on a web server, which
        can't be asked.

    Raises:
      UserError: if it names nothing, or a file that isn't there, can't be looked up or is
        a folder.
    """
    filesystem = _filesystem(pattern)
    web = _protocol(pattern) in ("http", "https")
    if web and "*" in pattern:
        raise UserError(f"name: {pattern}: a web server lists no files; use a range, {{000..123}}")
    found: dict[str, dict[str, Any] | None] = {}  # None: still to be asked for
    for url in expand(pattern):
        path = filesystem._strip_protocol(url if "://" in url else os.path.expanduser(url))
        if web or not any(mark in url for mark in "*?["):
            found[path] = None
            continue
        matches = _look(lambda path=path: filesystem.glob(path, detail=True), url)
        for match, info in sorted(matches.items()):
            if info["type"] == "file" or info.get("islink"):  # which says nothing of its target
                found[match] = None if info.get("islink") else info
    unknown = [path for path, info in found.items() if info is None]
    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        infos = pool.map(lambda path: _look(lambda: filesystem.info(path), path), unknown)
        found |= zip(unknown, infos, strict=True)
    if not found:
        raise UserError(f"name: {pattern}: no file matches it; check the path")
    return [_stored(filesystem, path, info) for path, info in found.items()]


def expand(pattern: str) -> Iterator[str]:
    """The patterns that one with braces stands for.

    Raises:
      UserError: if braces hold no range and no list, or stand for more than `MAX_FILES`.
    """
    pieces = _BRACES.split(pattern)
    choices = [_choices(inside, pattern) for inside in pieces[1::2]]
    if any(mark in piece for piece in pieces[::2] for mark in "{}"):
        raise UserError(f"name: {pattern}: braces in braces, or one without the other")
    if (count := math.prod(map(len, choices))) > MAX_FILES:
        raise UserError(f"name: {pattern}: stands for {count} files, more than {MAX_FILES}")
    for chosen in itertools.product(*choices):
        rest = itertools.chain.from_iterable(zip(chosen, pieces[2::2], strict=True))
        yield pieces[0] + "".join(rest)


class _Numbers:
    """The numbers of a range as texts, `width` digits or more."""

    def __init__(self, first: int, last: int, width: int):
        self._range, self._width = range(first, last + 1), width

    def __len__(self) -> int:
        return len(self._range)

    def __iter__(self) -> Iterator[str]:
        return (f"{number:0{self._width}d}" for number in self._range)


def _choices(inside: str, pattern: str) -> list[str] | _Numbers:
    if ends := _RANGE.fullmatch(inside):
        first, last = ends.groups()
        if int(first) > int(last):
            raise UserError(f"name: {pattern}: {{{inside}}} is empty; write the smaller one first")
        padded = any(len(end) > 1 and end[0] == "0" for end in (first, last))
        return _Numbers(int(first), int(last), max(len(first), len(last)) if padded else 1)
    if "," not in inside:
        raise UserError(f"name: {pattern}: expected {{000..123}} or {{a,b}}, not {{{inside}}}")
    return inside.split(",")


def _protocol(pattern: str) -> str:
    return pattern.partition("://")[0].rpartition(":")[2].lower() if "://" in pattern else "file"


def _filesystem(pattern: str) -> fsspec.AbstractFileSystem:
    protocol = _protocol(pattern)
    try:
        return fsspec.filesystem(protocol)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        how = f"pip install 'unclip_jax[{extra}]'" if extra else " ".join(str(error).split())
        raise UserError(f"name: {pattern}: reading {protocol}:// needs a package: {how}") from error
    except ValueError as error:
        raise UserError(
            f"name: {pattern}: unknown protocol {protocol!r}; expected a path, gs://, s3:// or "
            "http(s)://"
        ) from error


def _stored(filesystem: fsspec.AbstractFileSystem, path: str, info: dict[str, Any]) -> StoredFile:
    protocol = filesystem.protocol
    local = "file" in ((protocol,) if isinstance(protocol, str) else protocol)
    url = path if local else filesystem.unstrip_protocol(path)
    if info["type"] != "file":
        raise UserError(f"name: {url}: a folder; name the files in it, {url.rstrip('/')}/*.tar")
    if info.get("size") is None:
        raise UserError(f"name: {url}: its server doesn't say how large it is; copy it elsewhere")
    known = (info[key] for key in (*_VERSIONS, "created") if info.get(key) is not None)
    return StoredFile(url, int(info["size"]), str(next(known, "")), filesystem, path)


def _look(question: Callable[[], T], url: str) -> T:
    try:
        return _patiently(question, url)
    except StorageError as error:
        raise UserError(f"name: {error}; check the address") from error


def _patiently(attempt: Callable[[], T], url: str) -> T:
    """What `attempt` returns, tried again where its failure may pass."""
    for wait in (*WAITS, None):
        try:
            return attempt()
        except Exception as error:  # each store has its own
            if wait is None or not _may_pass(error):
                raise StorageError(f"{url}: {_reason(error)}") from error
        time.sleep(wait * random.uniform(0.5, 1.5))  # so that hosts don't come back as one
    raise AssertionError("unreachable")


def _may_pass(error: Exception) -> bool:
    lasting = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
    if isinstance(error, (*lasting, ValueError, TypeError, NotImplementedError)):
        return False
    status = getattr(error, "status", None) or vars(error).get("code")  # aiohttp's, gcsfs's
    return not (isinstance(status, int) and 400 <= status < 500 and status not in (408, 429))


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
