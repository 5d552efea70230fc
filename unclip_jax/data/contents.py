"""What files hold, in sixteen bytes each, without reading again those that have not changed.

A file's size and the time of its last change are looked at first. Where they are what they were
when it was last read, its digest is taken from a cache; else its bytes are read. So a folder of any
size is read whole once, and afterwards only what is new in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from absl import logging

from unclip_jax.common.files import replacing
from unclip_jax.data.records import progress

SIZE = 16  # bytes of a digest
_FORMAT = 1  # of the cache; raised when its layout changes
_AT_ONCE = 8
_SAVED_EACH = 20_000  # files; of a run that is killed so much is done again
# A file that changed so shortly before it was read may change again within one tick of its clock.
_SETTLED = 2 * 10**9  # ns

_PART = 2**22  # bytes of a file read at a time

State = tuple[int, int]  # size in bytes, time of the last change in ns


def digest(parts: Iterable[bytes]) -> bytes:
    """Of a file's bytes, which come in parts."""
    whole = hashlib.blake2b(digest_size=SIZE)
    for part in parts:
        whole.update(part)
    return whole.digest()


def digests(
    where: str,
    names: Sequence[str],
    states: Mapping[str, State],
    of: Callable[[str], bytes],
    cache: Path | None,
) -> np.ndarray:
    """The digest of each of some files, uint8 [n, SIZE]; one that can't be read has zeros.

    Args:
        where: the folder they are in, its absolute path or URL; each has a cache of its own.
        names: of the files, their paths in that folder.
        states: their sizes and times of change, of every name; a time of 0 is not known, and such a
            file is always read.
        of: reads a file and returns its `digest`; may raise OSError.
        cache: the folder of caches; None keeps nothing.
    """
    path = None
    if cache is not None:
        name = hashlib.sha256(where.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        path = Path(cache).expanduser() / "contents" / f"{name}.npz"
    known = _load(path) if path else {}
    found = np.zeros((len(names), SIZE), np.uint8)
    unread = []
    for i, name in enumerate(names):
        state, content = known.get(name, ((0, 0), b""))
        if content and states[name][1] and state == states[name]:
            found[i] = np.frombuffer(content, np.uint8)
        else:
            unread.append(i)

    def one(i: int) -> bytes:
        try:
            return of(names[i])
        except OSError:
            return bytes(SIZE)  # whoever reads it as a record says so

    bar = progress(f"{where}: reading what is new", " files", len(unread))
    with bar, ThreadPoolExecutor(_AT_ONCE) as pool:
        for start in range(0, len(unread), _SAVED_EACH):
            part, began = unread[start : start + _SAVED_EACH], time.time_ns()
            for i, content in zip(part, pool.map(one, part), strict=True):
                found[i] = np.frombuffer(content, np.uint8)
                if any(content) and 0 < states[names[i]][1] < began - _SETTLED:
                    known[names[i]] = (states[names[i]], content)
                bar.update()
            if path:
                _save(path, known)
    return found


def of_files(where: str, paths: Sequence[str], cache: Path | None) -> np.ndarray:
    """`digests` of files of this machine, of any size."""
    found = {path: os.stat(path) for path in paths}
    states = {p: (s.st_size, max(s.st_mtime_ns, s.st_ctime_ns)) for p, s in found.items()}
    return digests(where, paths, states, _of_file, cache)


def _of_file(path: str) -> bytes:
    with open(path, "rb") as file:
        return digest(iter(lambda: file.read(_PART), b""))


def _load(path: Path) -> dict[str, tuple[State, bytes]]:
    """A cache; nothing where there is none, or it is damaged."""
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            if int(file["format"]) != _FORMAT:
                return {}
            names = json.loads(file["names"].tobytes())
            states, contents = file["states"].tolist(), file["contents"]
        rows = zip(names, states, contents, strict=True)
        return {name: (tuple(state), row.tobytes()) for name, state, row in rows}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return {}


def _save(path: Path, known: Mapping[str, tuple[State, bytes]]) -> None:
    states = np.array([state for state, _ in known.values()], np.int64).reshape(-1, 2)
    contents = np.frombuffer(b"".join(c for _, c in known.values()), np.uint8).reshape(-1, SIZE)
    names = np.frombuffer(json.dumps(list(known)).encode(), np.uint8)
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, format=_FORMAT, names=names, states=states, contents=contents)
    except OSError as error:  # the digests are right all the same
        logging.warning("%s: can't be written (%s); files will be read again", path, error.strerror)
