"""Byte ranges of the files of a folder, each known by its checksum, kept here if it is remote.

A remote file has a twin in a cache: a file as long, with holes where nothing was read yet. What is
read there and has the checksum is what it should be: neither holes nor a former version have it.
So the cache needs no list of what is in it, and any number of processes may share it.

The cache has a limit. Once it is full what is in it stays and no more is added: an epoch reads each
record once, in an order that is always another, and nothing else serves more of them.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import shutil
import threading
import time
import zlib

from absl import logging

from unclip_jax.data.shards.folders import Descriptor, Folder

_BLOCK = 4096  # bytes that a disk gives at a time
_MEASURED_EACH = 60.0  # seconds after which all is measured again
_IDLE = 3600.0  # seconds after which a cache of another folder may go
_OPEN_FILES = 256


class Damaged(Exception):
    """A file isn't what was written; the message says in what."""


class Ranges:
    """Reads ranges of a folder's files; any thread may."""

    def __init__(self, folder: Folder, cache: pathlib.Path | None = None, limit: int = 0):
        """Take the folder, the folder of its cache, and the bytes that all caches beside may take.

        Of a folder of this machine nothing is kept.
        """
        self.folder = folder
        self._cache = cache if cache and limit and folder.local is None else None
        self._limit, self._lock = limit, threading.Lock()
        self._twin = functools.lru_cache(_OPEN_FILES)(self._open_twin)
        self._left, self._measured = 0, -_MEASURED_EACH

    def read(self, name: str, start: int, size: int, crc: int) -> bytes:
        """The bytes of a file from `start` on, whose checksum this is.

        Raises:
            Damaged: they have another, or end early.
            StorageError: they can't be had.
        """
        keeps = self._cache is not None
        if keeps and (kept := self._kept(name, start, size)) and zlib.crc32(kept) == crc:
            return kept
        found = self.folder.read(name, start, start + size)
        if len(found) != size:
            raise Damaged(f"{len(found)} bytes at {start}, expected {size}")
        if zlib.crc32(found) != crc:
            raise Damaged(f"the {size} bytes at {start} have another checksum")
        if keeps:
            self._keep(name, start, found)
        return found

    def _kept(self, name: str, start: int, size: int) -> bytes:
        with contextlib.suppress(OSError):
            return os.pread(self._twin(name).number, size, start)
        return b""

    def _keep(self, name: str, start: int, found: bytes) -> None:
        taken = (-(-(start + len(found)) // _BLOCK) - start // _BLOCK) * _BLOCK
        with self._lock:
            if time.monotonic() - self._measured >= _MEASURED_EACH:
                self._measure()
            if self._left < taken:
                return
            self._left -= taken
        try:
            os.pwrite(self._twin(name, True).number, found, start)
        except OSError as error:
            logging.warning("cache_dir: %s: no more is kept there (%s)", self._cache, error)
            self._left = self._limit = 0

    def _open_twin(self, name: str, writable: bool = False) -> Descriptor:
        path = self._cache / name
        if writable:
            path.parent.mkdir(parents=True, exist_ok=True)
        return Descriptor(path, os.O_RDWR | os.O_CREAT if writable else os.O_RDONLY)

    def _measure(self) -> None:
        """See how much room is left, and make some where other folders' caches are idle."""
        self._measured = time.monotonic()
        used = _bytes_in(self._cache)
        with contextlib.suppress(OSError):
            os.utime(self._cache)
        beside = []
        with contextlib.suppress(OSError):
            beside = [p for p in self._cache.parent.iterdir() if p != self._cache and p.is_dir()]
        others = sorted((_used_last(path), _bytes_in(path), path) for path in beside)
        total = used + sum(size for _, size, _ in others)
        for last, size, path in others:
            if total < self._limit or time.time() - last < _IDLE:
                break
            shutil.rmtree(path, ignore_errors=True)
            total -= size
        self._left = max(0, self._limit - total)


def _used_last(path: pathlib.Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _bytes_in(folder: pathlib.Path) -> int:
    """What the files of a folder take on the disk."""
    try:
        with os.scandir(folder) as entries:
            return sum(e.stat(follow_symlinks=False).st_blocks * 512 for e in entries)
    except OSError:
        return 0
