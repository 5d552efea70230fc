"""Files on this machine or in a bucket, found by pattern and read by byte ranges.

Whatever fsspec knows is read: a path, `gs://`, `s3://`, `http(s)://` and others. A failure that
may pass (a cut connection, a busy server) is tried again after a while.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from unclip_jax.common import extras
from unclip_jax.errors import UserError, one_line, wrong

MAX_FILES = 1_000_000
WAITS = (0.5, 1.0, 2.0, 4.0)  # seconds before each further attempt
_ASKED_AT_ONCE = 32  # files whose size and version are asked for at a time
_BLOCK = 64 << 20  # bytes copied at a time
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3", "http": "http", "https": "http"}
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")
# What says that a file is no longer the one it was, by what the various stores call it.
_VERSIONS = (
    "ETag", "etag", "generation", "md5Hash", "mtime", "LastModified", "Last-Modified", "created",
)  # fmt: skip

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
    _filesystem: Any = dataclasses.field(repr=False)
    _path: str = dataclasses.field(repr=False)

    @property
    def name(self) -> str:
        """The last part of its address."""
        return self.url.rsplit("/", 1)[-1]

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from `start` up to `stop`, and no others.

        Raises:
            StorageError: they can't be had, after a few attempts, or aren't all there.
        """
        if not 0 <= start <= stop <= self.size:
            raise StorageError(f"{self.url}: no bytes {start}..{stop} in its {self.size}")
        if start == stop:
            return b""
        found = patiently(lambda: self._filesystem.cat_file(self._path, start, stop), self.url)
        if len(found) != stop - start:
            raise StorageError(
                f"{self.url}: {len(found)} bytes came for {stop - start}: it has changed, or its "
                "server knows no ranges"
            )
        return found

    def forward(self, block: int) -> Callable[[int, int], bytes]:
        """`read` for one who goes from front to back: it reads `block` bytes ahead, in one go.

        What nobody asks for and lies farther ahead is not read.
        """
        from fsspec.caching import ReadAheadCache

        return ReadAheadCache(block, self.read, self.size)._fetch

    def open(self) -> Any:
        """It as a Python file object, which belongs to one thread and keeps nothing."""
        from fsspec.caching import BaseCache
        from fsspec.spec import AbstractBufferedFile

        file = AbstractBufferedFile(self._filesystem, self._path, size=self.size)
        file.cache = BaseCache(0, self.read, self.size)
        return file


def is_remote(pattern: str) -> bool:
    """Whether reading takes a network; a data set's kind, "wds:", may stand before."""
    return _protocol(pattern) not in ("file", "local", "memory")


def find(pattern: str) -> list[StoredFile]:
    """The files that a pattern names: in the order of its braces, then of their paths.

    Args:
        pattern: a path or address. `{00000..00123}` and `{a,b}` stand for each of their values;
            `*`, `?` and `[...]` for what is there, except on a web server, which can't be asked.

    Raises:
        UserError: it names nothing, or a file that isn't there, can't be looked up or is a folder.
    """
    files = filesystem(pattern, "name")
    web = _protocol(pattern) in ("http", "https")
    if web and "*" in pattern:
        raise UserError(f"name: {pattern}: a web server lists no files; use a range, {{000..123}}")
    found: dict[str, dict[str, Any] | None] = {}  # None: still to be asked for
    for url in expand(pattern):
        path = files._strip_protocol(url if "://" in url else os.path.expanduser(url))
        if web or not any(mark in url for mark in "*?["):
            found[path] = None
            continue
        matches = ask(lambda path=path: files.glob(path, detail=True), url, "name")
        for match, info in sorted(matches.items()):
            if info["type"] == "file" or info.get("islink"):  # which says nothing of its target
                found[match] = None if info.get("islink") else info
    unknown = [path for path, info in found.items() if info is None]
    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        infos = pool.map(lambda path: ask(lambda: files.info(path), path, "name"), unknown)
        found |= zip(unknown, infos, strict=True)
    if not found:
        raise UserError(f"name: {pattern}: no file matches it; check the path")
    return [_stored(files, path, info) for path, info in found.items()]


def expand(pattern: str) -> Iterator[str]:
    """The patterns that one with braces stands for.

    Raises:
        UserError: braces hold no range and no list, don't match, or stand for more than
            `MAX_FILES`.
    """
    pieces = _BRACES.split(pattern)
    choices = [_choices(inside, pattern) for inside in pieces[1::2]]
    if any(mark in piece for piece in pieces[::2] for mark in "{}"):
        raise UserError(f"name: {pattern}: braces in braces, or one without the other")
    _check_count(math.prod(map(len, choices)), pattern)
    for chosen in itertools.product(*choices):
        rest = itertools.chain.from_iterable(zip(chosen, pieces[2::2], strict=True))
        yield pieces[0] + "".join(rest)


def _choices(inside: str, pattern: str) -> list[str]:
    if ends := _RANGE.fullmatch(inside):
        first, last = ends.groups()
        if int(first) > int(last):
            raise UserError(f"name: {pattern}: {{{inside}}} is empty; write the smaller one first")
        _check_count(int(last) - int(first) + 1, pattern)
        padded = any(len(end) > 1 and end[0] == "0" for end in (first, last))
        width = max(len(first), len(last)) if padded else 1
        return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    if "," not in inside:
        raise UserError(f"name: {pattern}: expected {{000..123}} or {{a,b}}, not {{{inside}}}")
    return inside.split(",")


def _check_count(count: int, pattern: str) -> None:
    if count > MAX_FILES:
        raise UserError(f"name: {pattern}: stands for {count} files, more than {MAX_FILES}")


def _protocol(pattern: str) -> str:
    return pattern.partition("://")[0].rpartition(":")[2].lower() if "://" in pattern else "file"


def filesystem(pattern: str, field: str) -> Any:
    """The `fsspec.AbstractFileSystem` of a path or URL; `UserError`, with `field`, if none is."""
    protocol = _protocol(pattern)
    fsspec = extras.load("fsspec", "train", f"{field}: {pattern}")
    try:
        return fsspec.filesystem(protocol)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        how = extras.how(extra) if extra else one_line(error)
        raise UserError(
            f"{field}: {pattern}: reading {protocol}:// needs a package: {how}"
        ) from error
    except ValueError as error:
        known = "a path, gs://, s3:// or http(s)://"
        raise wrong(field, pattern, known, f"{protocol}:// is an unknown protocol") from error


def is_address(place: str | Path) -> bool:
    """Whether it is an address, and no path."""
    return "://" in str(place)


def place(path: str | Path, field: str) -> Path:
    """A path, or the address of a folder in a bucket as what can be asked like a path.

    `UserError`, with `field`, if the address is of no bucket, what reads it lacks, or the store
    can't be reached.
    """
    if not is_address(path):
        return Path(path)
    if _protocol(str(path)) not in ("gs", "s3"):
        do = "copy it here, or mount its store as a folder"
        raise wrong(field, str(path), "a path, gs:// or s3://", do)
    files = filesystem(str(path), field)

    def reach() -> None:
        with contextlib.suppress(FileNotFoundError):
            files.info(str(path))

    ask(reach, str(path), field)
    from etils import epath

    return epath.Path(str(path))


def copy(url: str, path: Path) -> None:
    """Write what a file holds, here or in a bucket, to `path`; `UserError` if it can't be had."""
    (found,) = find(url)
    try:
        with path.open("wb") as file:
            for start in range(0, found.size, _BLOCK):
                file.write(found.read(start, min(start + _BLOCK, found.size)))
    except StorageError as error:
        raise UserError(f"can't reach {error}; check the address") from error


def _stored(files: Any, path: str, info: dict[str, Any]) -> StoredFile:
    url = path if is_local(files) else files.unstrip_protocol(path)
    if info["type"] != "file":
        raise UserError(f"name: {url}: a folder; name the files in it, {url.rstrip('/')}/*.tar")
    if info.get("size") is None:
        raise UserError(f"name: {url}: its server doesn't say how large it is; copy it elsewhere")
    return StoredFile(url, int(info["size"]), version(info), files, path)


def version(info: dict[str, Any]) -> str:
    """What a store says that differs where a file's content does; "" if nothing."""
    known = [str(info[key]) for key in _VERSIONS if info.get(key) is not None]
    # Of a local file both times: a copy may be given the time of what it replaces.
    return " ".join(known if "ino" in info else known[:1])


def is_local(files: Any) -> bool:
    """Whether fsspec's filesystem is this machine's."""
    return "file" in ((files.protocol,) if isinstance(files.protocol, str) else files.protocol)


def ask(question: Callable[[], T], url: str, field: str) -> T:
    """What `question` returns, asked several times if need be; `UserError` if it fails for good."""
    try:
        return patiently(question, url)
    except StorageError as error:
        raise UserError(f"{field}: can't reach {error}; check the address") from error


def patiently(attempt: Callable[[], T], url: str) -> T:
    """What `attempt` returns; `StorageError` if it fails for good, or five times in a row."""
    for wait in (*WAITS, None):
        try:
            return attempt()
        except Exception as error:  # each store has its own
            if wait is None or not _may_pass(error):
                missing = isinstance(error, FileNotFoundError)
                why = "no such file" if missing else f"{type(error).__name__}: {one_line(error)}"
                raise StorageError(f"{url}: {why}") from error
        time.sleep(wait * random.uniform(0.5, 1.5))  # so that hosts don't come back as one
    raise AssertionError("unreachable")


def _may_pass(error: Exception) -> bool:
    lasting = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
    if isinstance(error, (*lasting, ValueError, TypeError, NotImplementedError)):
        return False
    status = getattr(error, "status", None) or vars(error).get("code")  # aiohttp's, gcsfs's
    return not (isinstance(status, int) and 400 <= status < 500 and status not in (408, 429))
