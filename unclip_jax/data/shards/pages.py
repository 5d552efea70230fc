"""Tables of pairs that are too long to be held: pages, and behind them a directory.

A paged file is its pages one after another, a directory with a row for each page, a header in JSON,
and a tail that says how long those two are. A row says where the page lies, its checksum, and how
many pairs and images it has, in all and held out. So the k-th pair of a split is found by a search
in sums, and one page is read.

The files of a data set have a directory of their own, likewise, with a row for each file: where
that one's directory lies. It is all that is ever held of them.
"""

from __future__ import annotations

import functools
import json
import struct
import zlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from unclip_jax.data.shards.ranges import Damaged

COUNTS = ("pairs", "heldout_pairs", "images", "heldout_images")
ROW = np.dtype(
    [("offset", "<u8"), ("size", "<u4"), ("crc", "<u4"), *((name, "<u4") for name in COUNTS)]
)
_TAIL = struct.Struct("<8sQQI4x")  # magic, bytes of the directory, of the header, their checksum
_MAGIC = b"unclip 1"
_DIRECTORIES, _PAGES = 256, 256  # that are held
_GUESS = 2**15  # bytes of an end, mostly

Header = dict[str, Any]
End = tuple[np.ndarray, Header, np.ndarray]


def column(rows: np.ndarray, split: str, captions: str) -> np.ndarray:
    """How many pairs of a choice each row has, int64 [n].

    Args:
        rows: ROW [n].
        split: "all", "train" or "heldout".
        captions: "all", or "first" for one pair an image.
    """
    name = "images" if captions == "first" else "pairs"
    heldout = rows[f"heldout_{name}"].astype(np.int64)
    if split == "heldout":
        return heldout
    return rows[name].astype(np.int64) - (heldout if split == "train" else 0)


def packed(pages: Iterable[tuple[bytes, dict[str, int]]], header: Header) -> bytes:
    """The content of a paged file: of each page its bytes and its `COUNTS`."""
    blobs, rows, offset = [], [], 0
    for blob, counts in pages:
        rows.append((offset, len(blob), zlib.crc32(blob), *(counts[name] for name in COUNTS)))
        blobs.append(blob)
        offset += len(blob)
    return b"".join(blobs) + directory(np.array(rows, ROW), header)


def directory(rows: np.ndarray, header: Header) -> bytes:
    """The end of a paged file: its directory, its header and its tail."""
    told = json.dumps(header).encode()
    both = rows.tobytes() + told
    return both + _TAIL.pack(_MAGIC, len(both) - len(told), len(told), zlib.crc32(both))


def read_end(read: Callable[[int, int], bytes], size: int) -> End:
    """The directory and the header of a paged file, and its row in the directory of a data set.

    Args:
        read: the bytes from .. up to ..
        size: of the file, in bytes.

    Raises:
        Damaged: it is none, or not what was written.
    """
    end = read(max(0, size - _GUESS), size)
    if len(end) < _TAIL.size:
        raise Damaged("no directory at its end")
    magic, length, told, crc = _TAIL.unpack(end[-_TAIL.size :])
    start = size - _TAIL.size - length - told
    if magic != _MAGIC or start < 0 or length % ROW.itemsize:
        raise Damaged("no directory at its end")
    both = end[: -_TAIL.size]
    if len(both) < length + told:
        both = read(start, size - _TAIL.size)
    both = both[-(length + told) :]
    if zlib.crc32(both) != crc:
        raise Damaged("its directory has another checksum")
    rows = np.frombuffer(both, ROW, length // ROW.itemsize)
    mine = np.zeros((), ROW)
    mine["offset"], mine["size"], mine["crc"] = start, length, zlib.crc32(both[:length])
    for name in COUNTS:
        mine[name] = rows[name].sum()
    return rows, json.loads(both[length:]), mine


class Found(NamedTuple):
    """A pair's place.

    Attributes:
        file: the number of its file.
        page: of its page there.
        rank: how many pairs of the choice come before it in that page.
    """

    file: int
    page: int
    rank: int


class Table:
    """The pages of a data set's files, of which a few are held; for any threads.

    Attributes:
        rows: the directory of the data set, ROW [files].
    """

    def __init__(self, rows: np.ndarray, read: Callable[[int, int, int, int], bytes]):
        """Take the directory, and what reads `size` bytes of checksum `crc` at `offset` of a file.

        `read(file, offset, size, crc)` may raise `Damaged`.
        """
        self.rows, self._read = rows, read
        self.directory = functools.lru_cache(_DIRECTORIES)(self._directory)
        self.page = functools.lru_cache(_PAGES)(self._page)

    def _directory(self, file: int) -> np.ndarray:
        return np.frombuffer(self._read(file, *_place(self.rows[file])), ROW)

    def _page(self, file: int, page: int) -> bytes:
        return self._read(file, *_place(self.directory(file)[page]))

    def count(self, split: str, captions: str) -> int:
        """How many pairs a choice has."""
        return int(column(self.rows, split, captions).sum())

    def forget(self) -> None:
        """Hold nothing any more."""
        self.directory.cache_clear()
        self.page.cache_clear()


class Choice:
    """The pairs of a split, in order, of all captions or the first of each image."""

    def __init__(self, table: Table, split: str, captions: str):
        """Sum up what each file has."""
        self._table, self.split, self.captions = table, split, captions
        self._ends = np.cumsum(column(table.rows, split, captions))
        self._page_ends = functools.lru_cache(_DIRECTORIES)(self._sums)

    def __len__(self) -> int:
        """How many there are."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def find(self, index: int) -> Found:
        """Where the pair at `index` is; it must be one of them."""
        file = int(np.searchsorted(self._ends, index, "right"))
        index -= int(self._ends[file - 1]) if file else 0
        ends = self._page_ends(file)
        page = int(np.searchsorted(ends, index, "right"))
        return Found(file, page, index - (int(ends[page - 1]) if page else 0))

    def _sums(self, file: int) -> np.ndarray:
        return np.cumsum(column(self._table.directory(file), self.split, self.captions))


def _place(row: np.void) -> tuple[int, int, int]:
    return int(row["offset"]), int(row["size"]), int(row["crc"])
