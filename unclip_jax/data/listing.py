"""The files of a folder, on this machine or in a bucket, found in one pass."""

from __future__ import annotations

import errno
import itertools
import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from unclip_jax.data.records import progress
from unclip_jax.data.shards.storage import StorageError, StoredFile, ask, filesystem, version
from unclip_jax.errors import UserError

_TEXTS = (".txt", ".json", ".caption")  # beside pictures: their size is of no interest
_READ_AT_ONCE = 64  # files of a bucket
_PART = 2**18  # bytes read at a time


class Listing:
    """The files of a folder and of all folders in it, hidden ones left out.

    A link to a folder is followed, unless that folder is read anyway or leads in a circle.

    Attributes:
        name: what to call the folder in messages.
        files: relative posix path -> (size in bytes, time of its last change in ns), zeros for
            texts; the time is the later one of its content's and its inode's, and 0 in a bucket.
        versions: what a bucket says of each file's content, by the same paths.
        left_out: what can't be read, by its path -> why.
        is_remote: whether it lies in a bucket.
    """

    def __init__(self, name: str):
        """List the folder at a path or URL.

        Raises:
            UserError: there is no such folder, or it can't be reached.
        """
        self.name = name = name.removeprefix("file://")
        self.is_remote = "://" in name
        self.files: dict[str, tuple[int, int]] = {}
        self.versions: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        with progress(f"{name}: listing", " files") as bar:
            if self.is_remote:
                self._find()
            else:
                self._root = os.path.expanduser(name)
                if not os.path.isdir(self._root):
                    raise UserError(f"name: {name}: no such folder; give a folder of images")
                self._scan(bar)

    def keep(self, names: Iterable[str]) -> None:
        """Forget all files but these: of a million each takes some hundred bytes."""
        self.files = {name: self.files[name] for name in names}
        self.versions = {name: self.versions[name] for name in self.files if name in self.versions}

    @property
    def where(self) -> str:
        """Its absolute path, or URL."""
        return self.name if self.is_remote else os.path.realpath(self._root)

    def read(self, name: str, most: int | None = None) -> bytes:
        """A file, or its first `most` bytes; `OSError` if it can't be read."""
        if self.is_remote:
            size = self.files[name][0]
            path = f"{self._root}/{name}"
            file = StoredFile(f"{self.name}/{name}", size, "", self._filesystem, path)
            try:
                return file.read(0, size if most is None else min(most, size))
            except StorageError as error:
                raise OSError(errno.EIO, str(error)) from error
        opened = os.open(os.path.join(self._root, name), os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            parts = [os.read(opened, most or _PART)]
            while most is None and parts[-1]:
                parts.append(os.read(opened, _PART))
            return b"".join(parts)
        finally:
            os.close(opened)

    def read_all(self, names: Iterable[str]) -> Iterator[bytes | OSError]:
        """The files in order, or why one can't be read; many at a time where they are remote."""

        def one(name: str) -> bytes | OSError:
            try:
                return self.read(name)
            except OSError as error:
                return error

        if not self.is_remote:
            yield from map(one, names)
            return
        names = iter(names)
        with ThreadPoolExecutor(_READ_AT_ONCE) as pool:
            while some := list(itertools.islice(names, 16 * _READ_AT_ONCE)):
                yield from pool.map(one, some)

    def _scan(self, bar: tqdm) -> None:
        """One pass over a local tree: no more than one stat a file, links to folders last."""
        folders, links, seen = deque([""]), deque(), set()
        while folders or links:
            folder = folders.popleft() if folders else links.popleft()
            try:
                entries, known = self._entries(folder, seen)
            except OSError as error:
                self.left_out[folder or "."] = f"a folder that can't be read ({error.strerror})"
                continue
            if known:
                self.left_out[folder] = "a link to a folder that is read anyway"
                continue
            for entry in entries:
                name = f"{folder}/{entry.name}" if folder else entry.name
                try:
                    self._enter(entry, name, folders, links)
                except OSError as error:
                    self.left_out[name] = _reason(entry, error)
            bar.update(len(entries))

    def _entries(self, folder: str, seen: set) -> tuple[list[os.DirEntry], bool]:
        """What is in a folder, in order; nothing, and True, where it was seen before."""
        path = os.path.join(self._root, folder)
        here = os.stat(path)
        identity = (here.st_dev, here.st_ino)
        if identity in seen:
            return [], True
        with os.scandir(path) as found:
            entries = [entry for entry in found if not entry.name.startswith(".")]
        seen.add(identity)
        return sorted(entries, key=lambda entry: entry.name), False

    def _enter(self, entry: os.DirEntry, name: str, folders: deque, links: deque) -> None:
        if entry.is_symlink():
            found = entry.stat()
            if stat.S_ISDIR(found.st_mode):
                links.append(name)
            elif stat.S_ISREG(found.st_mode):
                self.files[name] = _state(found)
        elif entry.is_dir():
            folders.append(name)
        elif entry.name.lower().endswith(_TEXTS):
            self.files[name] = (0, 0)
        elif entry.is_file():
            found = entry.stat()
            self.files[name] = _state(found)

    def _find(self) -> None:
        """All files of a bucket's folder, from its listing."""
        self._filesystem = filesystem(self.name, "name")
        if self.name.startswith(("http://", "https://")):
            raise UserError(
                f"name: {self.name}: a web server lists no files; name tar shards, wds:{self.name}"
                "/{000..123}.tar, or copy the folder here"
            )
        self.name = self.name.rstrip("/")
        self._root = self._filesystem._strip_protocol(self.name)
        found = ask(lambda: self._filesystem.find(self._root, detail=True), self.name, "name")
        for path, info in sorted(found.items()):
            name = path.removeprefix(self._root).lstrip("/")
            if name and not any(part.startswith(".") for part in name.split("/")):
                self.files[name] = (int(info.get("size") or 0), 0)
                self.versions[name] = version(info)
        if not self.files:
            raise UserError(f"name: {self.name}: no such folder, or nothing in it")


def _state(found: os.stat_result) -> tuple[int, int]:
    # A copy may be given the time of what it replaces; its inode's time is its own.
    return found.st_size, max(found.st_mtime_ns, found.st_ctime_ns)


def _reason(entry: os.DirEntry, error: OSError) -> str:
    if error.errno == errno.ENOENT and entry.is_symlink():
        return "a broken link"
    if error.errno == errno.ELOOP:
        return "a link that leads in a circle"
    return f"can't be looked at ({error.strerror})"


def parted(name: str) -> tuple[str, str]:
    """A posix path without its suffix, and the suffix in lower case: ("a/b", ".png")."""
    dot = name.rfind(".")
    return (name[:dot], name[dot:].lower()) if dot > name.rfind("/") + 1 else (name, "")


def stem(name: str) -> str:
    """A path without its suffix."""
    return parted(name)[0]


def endings(names: Iterator[str]) -> dict[str, int]:
    """How many of some files have each suffix, the most frequent first; "" for none."""
    counts: dict[str, int] = {}
    for name in names:
        suffix = parted(name)[1]
        counts[suffix] = counts.get(suffix, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))
