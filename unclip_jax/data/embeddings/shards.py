"""Stored CLIP embeddings as bytes: what a store says of itself, its shards, their records.

A store of N pairs is `meta.json` and S shards, `embeddings-00003-of-00016.array_record`. Shard s
holds the pairs s N // S to (s + 1) N // S - 1 in order, each pair, good or bad, one record: where a
pair lies follows from its number. The last record has a byte for every pair of the shard: whether
it is valid, held out, and the first of its image. `embeddings.entries` has that beside the shards.

A record is, little-endian and without padding:

    index         uint64    the pair's place in the data set
    flags         uint8     VALID | HELDOUT | FIRST
    name bytes    uint32
    caption bytes uint32
    tokens        uint32    how many are kept: the zeros that fill up the context are not
    z_i, z_t      [width] of the store's dtype each; absent where the pair is not valid
    tokens        uint16 each, or uint32 where the vocabulary needs it
    name, caption UTF-8

ArrayRecord keeps a checksum of each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import struct
from collections.abc import Collection, Iterator
from typing import NamedTuple

import ml_dtypes
import numpy as np
from array_record.python import array_record_module as array_record

from unclip_jax.common import checks
from unclip_jax.data.shards.ranges import Damaged
from unclip_jax.errors import UserError, one_line, wrong

FORMAT = 2  # raised when the layout changes
META = "meta.json"
DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

VALID = 1  # the pair could be read, and its embeddings are there
HELDOUT = 2  # `records.is_heldout` of its name
FIRST = 4  # no earlier pair shares its image

_HEADER = struct.Struct("<QBIII")
_CONTENTS = b"contents"  # begins a shard's last record
_WRITE = "group_size:1,uncompressed"  # floats hardly compress, and are read twice as fast so


@dataclasses.dataclass(frozen=True)
class Meta:
    """What a store says of itself.

    Attributes:
        clip_fingerprint: of the CLIP the embeddings were computed with.
        data_fingerprint: of the pairs they were computed from.
        count: N, the number of pairs.
        width: e, CLIP's dimension.
        context_length: of the tokens, CLIP's own.
        vocab_size: of the tokens.
        unit_embeddings: whether the embeddings have length one.
        dtype: of what is stored, one of DTYPES.
        shards: S, the number of shards.
    """

    clip_fingerprint: str
    data_fingerprint: str
    count: int
    width: int
    context_length: int
    vocab_size: int
    unit_embeddings: bool
    dtype: str = "float32"
    shards: int = 1

    def __post_init__(self):
        """Check the numbers: `UserError` for an unknown dtype, or more shards than pairs."""
        checks.choice("dtype", self.dtype, DTYPES)
        checks.count("embeddings: width", self.width)
        checks.count("embeddings: pairs", self.count)
        if checks.count("shards", self.shards) > self.count:
            raise wrong("shards", self.shards, f"1 to {self.count}, the number of pairs")

    def to_json(self) -> str:
        """The text of `meta.json`."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Meta:
        """What `meta.json` says; `UserError` if it is damaged, or of another format."""
        types = {field.name: field.type for field in dataclasses.fields(cls)}
        try:
            found = json.loads(text)
            version = found.pop("format")
            whole = {name: type(value).__name__ for name, value in found.items()} == types
        except (ValueError, KeyError, AttributeError, TypeError):
            version, whole = FORMAT, False
        if version != FORMAT:
            raise UserError(
                f"embeddings: {where}: of format {version!r}, expected {FORMAT}; compute them again"
            )
        if not whole:
            raise UserError(f"embeddings: {where}: {META} is damaged; delete the folder")
        return cls(**found)

    def check(self, where: str, advice: str, **expected: object) -> None:
        """Compare fields; `UserError` names the first that is another and ends in `advice`."""
        for field, value in expected.items():
            if (found := getattr(self, field)) != value:
                raise UserError(
                    f"embeddings: {where}: {field} is {found!r}, expected {value!r}; {advice}"
                )

    def shard_name(self, shard: int) -> str:
        """The file name of a shard."""
        return f"embeddings-{shard:05d}-of-{self.shards:05d}.array_record"

    def shard_pairs(self, shard: int) -> range:
        """The pairs that a shard holds."""
        return range(*(s * self.count // self.shards for s in (shard, shard + 1)))

    def missing(self, names: Collection[str]) -> list[int]:
        """The shards whose files are not among `names`."""
        return [shard for shard in range(self.shards) if self.shard_name(shard) not in names]

    def shard_of(self, index: int) -> int:
        """The shard that holds a pair."""
        return ((index + 1) * self.shards - 1) // self.count


class Pair(NamedTuple):
    """One pair as it is stored.

    Attributes:
        index: its place in the data set.
        flags: VALID | HELDOUT | FIRST.
        name: its image's name in messages.
        caption: empty where it couldn't be read.
        tokens: of the caption, int32 `[l]`.
        z_i: image embedding, float32 `[e]`; None where it isn't valid.
        z_t: text embedding, likewise.
    """

    index: int
    flags: int
    name: str
    caption: str
    tokens: np.ndarray
    z_i: np.ndarray | None
    z_t: np.ndarray | None


def pack(pair: Pair, meta: Meta) -> bytes:
    """The bytes of a pair; its embeddings are rounded to the store's dtype."""
    name, caption = (text.encode("utf-8", "surrogatepass") for text in (pair.name, pair.caption))
    tokens = np.trim_zeros(np.asarray(pair.tokens), "b").astype(_token_dtype(meta))
    header = _HEADER.pack(pair.index, pair.flags, len(name), len(caption), len(tokens))
    z = (pair.z_i, pair.z_t) if pair.flags & VALID else ()
    embeddings = [np.asarray(row).astype(DTYPES[meta.dtype]).tobytes() for row in z]
    return b"".join([header, *embeddings, tokens.tobytes(), name, caption])


def unpack(record: bytes, meta: Meta, index: int) -> Pair:
    """The pair that `pack` made `record` of; `Damaged` if it isn't as `pack` writes `index`."""
    if len(record) < _HEADER.size:
        raise Damaged(f"{len(record)} bytes, less than a header")
    found, flags, *sizes = _HEADER.unpack_from(record)
    if found != index:
        raise Damaged(f"it holds pair {found}")
    name_bytes, caption_bytes, count = sizes
    dtype, token_dtype = DTYPES[meta.dtype], _token_dtype(meta)
    width = meta.width if flags & VALID else 0
    lengths = (width * dtype.itemsize,) * 2 + (
        count * token_dtype.itemsize, name_bytes, caption_bytes,
    )  # fmt: skip
    if count > meta.context_length or _HEADER.size + sum(lengths) != len(record):
        raise Damaged(f"{len(record)} bytes, not those of its header")
    offsets = _HEADER.size + np.cumsum((0, *lengths))
    parts = [record[a:b] for a, b in itertools.pairwise(offsets)]
    z_i, z_t = (np.frombuffer(part, dtype).astype(np.float32) for part in parts[:2])
    tokens = np.zeros(meta.context_length, np.int32)
    tokens[:count] = np.frombuffer(parts[2], token_dtype)
    try:
        name, caption = (part.decode("utf-8", "surrogatepass") for part in parts[3:])
    except UnicodeDecodeError as error:
        raise Damaged("its text is not UTF-8") from error
    return Pair(index, flags, name, caption, tokens, *((z_i, z_t) if width else (None, None)))


def _token_dtype(meta: Meta) -> np.dtype:
    return np.dtype("<u2" if meta.vocab_size <= 2**16 else "<u4")


class ShardWriter:
    """Writes the pairs of one shard to a file; `UserError` where that can't be done.

    Each pair is added, then the shard is finished.
    """

    def __init__(self, path: str | os.PathLike, meta: Meta, shard: int):
        """Open the file."""
        self._path, self._meta, self._pairs = os.fspath(path), meta, meta.shard_pairs(shard)
        self._flags = bytearray()
        with self._checked():
            self._writer = array_record.ArrayRecordWriter(self._path, _WRITE)

    def add(self, pair: Pair) -> None:
        """Append the next pair."""
        if pair.index != self._pairs[len(self._flags)]:
            raise ValueError(f"pair {pair.index} where {self._pairs[len(self._flags)]} belongs")
        self._flags.append(pair.flags)
        with self._checked():
            self._writer.write(pack(pair, self._meta))

    def finish(self) -> None:
        """End the file with its contents, and see that all of it is there."""
        with self._checked():
            self._writer.write(_CONTENTS + bytes(self._flags))
            self._writer.close()
            written = array_record.ArrayRecordReader(self._path).num_records()
            if written != len(self._pairs) + 1:
                raise RuntimeError(f"{written} records of {len(self._pairs) + 1} are there")

    @contextlib.contextmanager
    def _checked(self) -> Iterator[None]:
        """ArrayRecord says in a RuntimeError that a disk is full."""
        try:
            yield
        except RuntimeError as error:
            raise UserError(
                f"embeddings: {self._path}: can't be written ({one_line(error)})"
            ) from error


def flags_of(record: bytes, count: int) -> np.ndarray:
    """The flags of a shard's pairs, uint8 [count], of its last record."""
    if not record.startswith(_CONTENTS) or len(record) != len(_CONTENTS) + count:
        raise Damaged("its last record is not its contents")
    return np.frombuffer(record, np.uint8, offset=len(_CONTENTS))


@contextlib.contextmanager
def damage() -> Iterator[None]:
    """What ArrayRecord says of a damaged file, as `Damaged`."""
    try:
        yield
    except RuntimeError as error:
        raise Damaged(one_line(error)) from error
