"""What is in a shard of embeddings and where, in a side file: what lets records be read alone.

Beside `embeddings-00003-of-00016.array_record` lies `embeddings-00003-of-00016.contents`, a paged
file (`shards.pages`) whose pages have an `ENTRY` for each of 256 pairs: where its record lies in
the shard, its checksum, and its flags. `contents` of the whole store is the directory of those:
opening a store reads that one file, and a pair takes its page and its record.

A shard is an ArrayRecord with a chunk for each record, which is Riegeli's format: blocks of 64 KiB
that begin with a header of 24 bytes, and in between chunks of a header of 40 bytes and data.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import pathlib
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from array_record.python import array_record_module as array_record

from unclip_jax.data.embeddings.shards import FIRST, HELDOUT, Meta, damage, flags_of
from unclip_jax.data.records import SPLITS
from unclip_jax.data.shards import folders, pages
from unclip_jax.data.shards.ranges import Damaged
from unclip_jax.data.shards.storage import StorageError
from unclip_jax.errors import UserError

NAME = "contents"  # of the store's directory
PAIRS = 256  # of a page
ENTRY = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc", "<u4"), ("flags", "u1")])

Among = np.ndarray | Callable[[np.ndarray], np.ndarray]  # which pairs count
Chunks = Iterator[tuple[np.ndarray, np.ndarray]]  # z_i and z_t, a part at a time

_BLOCK, _BLOCK_HEADER = 2**16, 24
_CHUNK = struct.Struct("<8xQ8xQ8x")  # a chunk's header: bytes of its data, type and records
_ONE_RECORD = ord("r") | 1 << 8
_READ_TOGETHER = 1024  # records
_READ_AT_ONCE = 32  # ends of files


def name_of(meta: Meta, shard: int) -> str:
    """The name of a shard's side file."""
    return pathlib.PurePath(meta.shard_name(shard)).with_suffix(".contents").name


def record_of(raw: bytes, offset: int) -> bytes:
    """The record in a chunk whose bytes, block headers among them, begin at `offset` of the file.

    Raises:
        Damaged: it is no chunk of one record, uncompressed.
    """
    chunk = _without_headers(raw, offset)
    length, kind = _CHUNK.unpack_from(chunk) if len(chunk) > _CHUNK.size else (0, 0)
    data = chunk[_CHUNK.size :]
    if kind != _ONE_RECORD or len(data) != length or data[0]:
        raise Damaged("no chunk of one record")
    # Its compression, none; the length of its sizes; its size; the record.
    size, shift, at = 0, 0, 2
    for at in range(2, 2 + data[1]):
        size |= (data[at] & 0x7F) << shift
        shift += 7
    if at + 1 + size != len(data):
        raise Damaged("a record of another size than its chunk says")
    return data[at + 1 :]


def _without_headers(raw: bytes, offset: int) -> bytes:
    first = -offset % _BLOCK
    if first >= len(raw):
        return raw
    starts = range(first, len(raw), _BLOCK)
    return raw[:first] + b"".join(raw[s + _BLOCK_HEADER : s + _BLOCK] for s in starts)


def _found(path: str, count: int) -> np.ndarray:
    """Where the first `count` records of a shard lie, ENTRY [count] without flags."""
    entries, ends, sums = np.zeros(count, ENTRY), [], []
    first = start = _end(0, _CHUNK.size)  # a chunk of no records begins every file
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as content,
    ):
        for n in range(count):
            length, kind = _chunk(content, start)
            stop = start + _CHUNK.size + length
            if start // _BLOCK != (stop - 1) // _BLOCK or not start % _BLOCK:
                stop = _end(start, _CHUNK.size + length)
            if kind != _ONE_RECORD or stop > len(content):
                raise Damaged(f"record {n} is no chunk of its own")
            sums.append(zlib.crc32(content[start:stop]))
            ends.append(stop)
            start = stop
    entries["offset"] = [first, *ends[:-1]]
    entries["size"], entries["crc"] = np.array(ends, np.uint64) - entries["offset"], sums
    return entries


def _chunk(content: memoryview, start: int) -> tuple[int, int]:
    """The bytes of a chunk's data, its type and number of records; (0, 0) behind the end."""
    if start % _BLOCK and start % _BLOCK + _CHUNK.size <= _BLOCK:
        return _CHUNK.unpack_from(content, start) if start + _CHUNK.size <= len(content) else (0, 0)
    header = bytes(content[start : start + _CHUNK.size + _BLOCK_HEADER])
    header = _without_headers(header, start)[: _CHUNK.size]
    return _CHUNK.unpack(header) if len(header) == _CHUNK.size else (0, 0)


def _end(start: int, length: int) -> int:
    """Where so many bytes end that begin at `start`, block headers left out."""
    room = _BLOCK - _BLOCK_HEADER
    before = start - -(-start // _BLOCK) * _BLOCK_HEADER + length
    return before + -(-before // room) * _BLOCK_HEADER


def of_shard(path: str | os.PathLike, meta: Meta, shard: int, *, verify: bool) -> bytes:
    """The side file of a shard that is here.

    Args:
        path: of the shard.
        meta: of its store.
        shard: its number.
        verify: read all of it first, by ArrayRecord's own checksums.

    Raises:
        Damaged: it is none, or not what was written.
    """
    path, count = os.fspath(path), len(meta.shard_pairs(shard))
    with damage():
        reader = array_record.ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0")
        found = reader.num_records() if reader.ok() else 0
        if found != count + 1:
            raise Damaged(f"{found} records, expected {count + 1}")
        for start in range(0, count if verify else 0, _READ_TOGETHER):
            reader.read(start, min(start + _READ_TOGETHER, count))
        (told,) = reader.read([count])
    entries = _found(path, count)
    entries["flags"] = flags_of(told, count)
    return _packed(entries, os.path.getsize(path))


def of_flags(flags: np.ndarray) -> bytes:
    """The side file of pairs of which only the flags, uint8 [n], are told."""
    entries = np.zeros(len(flags), ENTRY)
    entries["flags"] = flags
    return _packed(entries, 0)


def _packed(entries: np.ndarray, size: int) -> bytes:
    parts = (entries[start : start + PAIRS] for start in range(0, len(entries), PAIRS))
    made = ((part.tobytes(), _counts(part["flags"])) for part in parts)
    return pages.packed(made, _images(entries["flags"]) | {"bytes": size})


def _counts(flags: np.ndarray) -> dict[str, int]:
    first, heldout = flags & FIRST > 0, flags & HELDOUT > 0
    found = (np.ones(len(flags), bool), heldout, first, first & heldout)
    return {name: int(of.sum()) for name, of in zip(pages.COUNTS, found, strict=True)}


def _images(flags: np.ndarray) -> pages.Header:
    """How many images of each split there are, and what joins them with the shards beside."""
    number = np.cumsum(flags & FIRST > 0)
    told: dict[str, Any] = {"joined": not flags[0] & FIRST, "one": int(number[-1]) == 0}
    for split in SPLITS:
        theirs = number[in_split(flags, split)]
        told[split] = [
            len(np.unique(theirs)),
            bool((theirs == number[0]).any()),
            bool((theirs == number[-1]).any()),
        ]
    return told


def images(headers: Iterable[pages.Header]) -> dict[str, int]:
    """How many images of each split a store has, of the headers of all its shards in order."""
    total, open_ = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, False)
    for told in headers:
        for split in SPLITS:
            count, in_first, in_last = told[split]
            goes_on = told["joined"] and open_[split]
            total[split] += count - (goes_on and in_first)
            open_[split] = in_last or (goes_on and told["one"])
    return total


def in_split(flags: np.ndarray, split: str) -> np.ndarray:
    """Which pairs are in a split, bool [n]."""
    if split == "all":
        return np.ones(len(flags), bool)
    return (flags & HELDOUT > 0) == (split == "heldout")


def chosen(flags: np.ndarray, split: str, captions: str) -> np.ndarray:
    """Which pairs are in a split, and the first of their image where only those count."""
    return in_split(flags, split) & ((flags & FIRST > 0) | (captions != "first"))


def read_ends(
    folder: folders.Folder, sides: Sequence[str], sizes: Mapping[str, int]
) -> list[pages.End]:
    """The ends of side files, in order; `UserError` if one is damaged or can't be read."""

    def end(side: str) -> pages.End:
        with told_of_damage(folder, side):
            return pages.read_end(functools.partial(folder.read, side), sizes[side])

    with ThreadPoolExecutor(_READ_AT_ONCE) as pool:
        return list(pool.map(end, sides))


def joined(ends: Iterable[pages.End]) -> bytes:
    """The directory of a store, of the ends of its side files in order."""
    _, headers, rows = zip(*ends, strict=True)
    return pages.directory(
        np.stack(rows), {"images": images(headers), "bytes": [told["bytes"] for told in headers]}
    )


@contextlib.contextmanager
def told_of_damage(folder: object, name: str) -> Iterator[None]:
    """Whatever is damaged, or can't be read, in a `UserError`."""
    try:
        yield
    except Damaged as error:
        raise UserError(
            f"embeddings: {folder}/{name}: damaged ({error}); delete that file and run the"
            " same unclip embed again (or delete the folder, if it is a cache)"
        ) from error
    except StorageError as error:
        raise UserError(f"embeddings: can't reach {error}; check the address") from error


def entries_in(page: bytes) -> np.ndarray:
    """The entries of a page, ENTRY [n]."""
    return np.frombuffer(page, ENTRY)


def spans(entries: np.ndarray, limit: int) -> Iterator[slice]:
    """Neighbours in rows of at most so many bytes, but at least one each."""
    start = 0
    ends = entries["offset"] + entries["size"]
    while start < len(entries):
        reach = int(np.searchsorted(ends, entries["offset"][start] + np.uint64(limit), "right"))
        stop = max(start + 1, reach)
        yield slice(start, stop)
        start = stop
