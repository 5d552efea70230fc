"""CLIP embeddings of a data set, stored once and read by the number of their pair.

A store is a folder, here or remote: see `embeddings.shards` for what is in it and
`embeddings.writer` for how it comes to be. It serves in two ways: `WithEmbeddings` joins it to the
pictures it was computed from, and `EmbeddingSource` is a data set of its own, without pictures.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from unclip_jax.common import checks
from unclip_jax.data.datasets import DISK_CACHE_BYTES, DataConfig
from unclip_jax.data.embeddings import entries, retrieval
from unclip_jax.data.embeddings.folders import Folder
from unclip_jax.data.embeddings.shards import FIRST, META, VALID, Meta, Pair, unpack
from unclip_jax.data.embeddings.sides import Sides
from unclip_jax.data.records import (
    SPLITS,
    BadRecord,
    Source,
    fingerprint_of,
    fingerprints,
    nothing_in,
)
from unclip_jax.data.shards import pages
from unclip_jax.data.shards.ranges import Damaged, Ranges
from unclip_jax.data.shards.storage import StorageError, is_remote
from unclip_jax.errors import UserError

_READ_TOGETHER = 8192  # pairs of a chunk
_SPAN = 2**25  # bytes of a chunk that are read in one go


def open_source(config: DataConfig, where: str) -> EmbeddingSource:
    """The stored embeddings that a config names."""
    return EmbeddingSource(config, where)


class EmbeddingStore:
    """Stored embeddings of N pairs, of which nothing is read before it is asked for.

    Any thread may use it. What it holds does not grow with N.

    Attributes:
        where: its path or URL.
        meta: what it says of itself.
        table: where its pairs are; see `shards.pages`.
        images: how many images each split has.
        remote: whether reading takes a network.
    """

    def __init__(self, folder: Folder, meta: Meta, sides: Sides, ranges: Ranges):
        """Use `open`."""
        self.where, self.meta, self.remote = str(folder), meta, is_remote(str(folder))
        self.table, self.images = pages.Table(sides.rows, sides.read), sides.images
        self._ranges, self._cut = ranges, sides.cut

    @classmethod
    def open(
        cls,
        where: str | os.PathLike,
        *,
        cache_dir: str | os.PathLike,
        disk_cache_bytes: int = DISK_CACHE_BYTES,
        **expected: Any,
    ) -> EmbeddingStore:
        """Open a store for reading.

        Args:
            where: its folder, a path or a URL of fsspec's.
            cache_dir: where what was read of a remote store is kept.
            disk_cache_bytes: that this may take.
            **expected: what fields of its `meta` must be.

        Raises:
            UserError: there is none, it is damaged or not complete, or a field is another.
        """
        folder = Folder(where, cache_dir)
        sizes = folder.sizes()
        if META not in sizes:
            what = "no stored embeddings; compute them with unclip embed"
            if sizes.keys() & set(retrieval.FOLDERS):
                what = (
                    "clip-retrieval's layout, which doesn't say of which pictures it is; only"
                    f" --config.data.name=embeddings:{folder} reads it; for others use unclip embed"
                )
            raise UserError(f"embeddings: {folder}: {what}")
        meta = Meta.from_json(folder.read_text(META), str(folder))
        check(meta, str(folder), **expected)
        if missing := meta.missing(sizes):
            raise UserError(
                f"embeddings: {folder}: {len(missing)} of {meta.shards} shards are missing; run the"
                " same unclip embed again, which goes on where it stopped"
            )
        ranges = Ranges(folder, folder.cache, disk_cache_bytes)
        return cls(folder, meta, Sides(folder, meta, sizes, ranges), ranges)

    def check(self, **expected: Any) -> None:
        """Compare fields of `meta`; `UserError` names the first that is another."""
        check(self.meta, self.where, **expected)

    def __len__(self) -> int:
        """The number of pairs."""
        return self.meta.count

    def __getitem__(self, index: int) -> Pair:
        """The pair at `index`, valid or not; `records.BadRecord` if its record is damaged."""
        shard = self.meta.shard_of(index)
        page, row = divmod(index - self.meta.shard_pairs(shard).start, entries.PAIRS)
        return self.at(shard, page, row)

    def at(self, shard: int, page: int, row: int) -> Pair:
        """The pair that has a place, as `__getitem__`."""
        index = self.meta.shard_pairs(shard).start + entries.PAIRS * page + row
        try:
            self._check_length(shard)
            entry = self._entries(shard, page)[row]
            place = int(entry["offset"]), int(entry["size"])
            raw = self._ranges.read(self.meta.shard_name(shard), *place, int(entry["crc"]))
            return unpack(entries.record_of(raw, place[0]), self.meta, index)
        except Damaged as error:
            raise BadRecord(f"pair {index} of {self._name(shard)}: damaged ({error})") from error
        except StorageError as error:
            raise BadRecord(f"pair {index} of {error}") from error

    def valid(self, index: int) -> Pair:
        """The pair at `index`; `records.BadRecord` if it has no embeddings, too."""
        return with_embeddings(self[index])

    def flags_of(self, shard: int, page: int) -> np.ndarray:
        """What `embeddings.shards` says of each pair of a page in a byte, uint8 `[n]`."""
        return self._entries(shard, page)["flags"]

    @property
    def flags(self) -> np.ndarray:
        """The flags of all pairs, uint8 `[N]`, read anew.

        Raises:
            UserError: a shard's contents are damaged or can't be read.
        """
        shards = range(self.meta.shards)
        return np.concatenate([self._entries_of(shard)["flags"] for shard in shards])

    def chunks(
        self, among: entries.Among | None = None, part: tuple[int, int] = (0, 1)
    ) -> entries.Chunks:
        """All valid (z_i, z_t), each float32 `[n, e]`, some thousands at a time, in order.

        Args:
            among: which pairs count: bool `[N]`, or what makes that of flags; None for all.
            part: (i, n) for the shards i, i + n, i + 2 n ... alone.

        Raises:
            UserError: a shard is damaged or can't be read.
        """
        for shard in range(part[0], self.meta.shards, part[1]):
            every, first = self._entries_of(shard), self.meta.shard_pairs(shard).start
            counts = every["flags"] & VALID > 0
            if callable(among):
                counts &= among(every["flags"])
            elif among is not None:
                counts &= among[first : first + len(every)]
            for start in range(0, len(every), _READ_TOGETHER):
                rows = start + np.flatnonzero(counts[start : start + _READ_TOGETHER])
                with entries.told_of_damage(self.where, self.meta.shard_name(shard)):
                    read = [*self._together(shard, every[rows], rows + first)]
                if read:
                    yield np.stack([p.z_i for p in read]), np.stack([p.z_t for p in read])

    def _together(self, shard: int, chosen: np.ndarray, indices: np.ndarray) -> Iterator[Pair]:
        """The pairs of some entries of a shard, in rising order, read in a few long ranges."""
        self._check_length(shard)
        for part in entries.spans(chosen, _SPAN):
            start, last = int(chosen[part][0]["offset"]), chosen[part][-1]
            stop = int(last["offset"]) + int(last["size"])
            content = self._ranges.folder.read(self.meta.shard_name(shard), start, stop)
            for entry, index in zip(chosen[part], indices[part].tolist(), strict=True):
                offset = int(entry["offset"])
                raw = content[offset - start : offset - start + int(entry["size"])]
                if zlib.crc32(raw) != entry["crc"]:
                    raise Damaged(f"pair {index} has another checksum")
                yield unpack(entries.record_of(raw, offset), self.meta, index)

    def _entries(self, shard: int, page: int) -> np.ndarray:
        return entries.entries_in(self.table.page(shard, page))

    def _entries_of(self, shard: int) -> np.ndarray:
        with entries.told_of_damage(self.where, entries.name_of(self.meta, shard)):
            count = len(self.table.directory(shard))
            return np.concatenate([self._entries(shard, page) for page in range(count)])

    def _check_length(self, shard: int) -> None:
        if shard in self._cut:
            raise Damaged(self._cut[shard])

    def _name(self, shard: int) -> str:
        return f"{self.where}/{self.meta.shard_name(shard)}"


def check(meta: Meta, where: str, **expected: Any) -> None:
    """Compare fields of a store's `meta`; `UserError` names the first that is another."""
    advice = "compute them again, into another folder, or give the CLIP and data they are of"
    meta.check(where, advice, **expected)


def with_embeddings(pair: Pair) -> Pair:
    """The pair; `records.BadRecord` if it has no embeddings."""
    if not pair.flags & VALID:
        raise BadRecord(f"{pair.name}: no embeddings, as it was bad when they were made")
    return pair


class WithEmbeddings:
    """A source whose records also carry `z_i` and `z_t`, float32 `[e]`.

    A pair without valid embeddings is a bad record. See `records.Source` for the attributes;
    besides, `store` is the `EmbeddingStore`.
    """

    def __init__(self, source: Source, store: EmbeddingStore):
        """Join a source, at any image size, to its embeddings; `UserError` if it has others."""
        of = (store.meta.data_fingerprint, len(store))
        if of[0] not in fingerprints(source) or of[1] != len(source):
            raise UserError(
                f"embeddings: {store.where}: computed from other data ({of[0]}, {of[1]} pairs) than"
                f" {source.name} ({source.fingerprint}, {len(source)} pairs): pictures or captions"
                " are others, or another split; compute them from this data set, split and captions"
            )
        self.name, (self.fingerprint, self.former) = source.name, fingerprints(source)
        self.image_count, self.skipped = source.image_count, source.skipped
        self.image_of = source.image_of
        self._source, self.store, self.remote = source, store, store.remote

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the source's classes."""
        return self._source.classes

    def __len__(self) -> int:
        """The number of pairs."""
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The pair at `index`, with its embeddings."""
        pair = self.store.valid(index)
        return {**self._source[index], "z_i": pair.z_i, "z_t": pair.z_t}

    def chunks(self, part: tuple[int, int] = (0, 1)) -> entries.Chunks:
        """All valid (z_i, z_t), each float32 `[n, e]`, some at a time; or one part of n."""
        return self.store.chunks(part=part)


class EmbeddingSource:
    """Stored embeddings as a data set of their own: records hold no `image`.

    They hold `caption`, `z_i`, `z_t` and, where those that are stored fit, `tokens`. The SHA-256 of
    its name decides an image's split, as `records.is_heldout` says: a store of a whole folder has
    the folder's own splits. See `records.Source` for the attributes; besides, `store` is the
    `EmbeddingStore`, or a `retrieval.RetrievalStore`.
    """

    classes: tuple[str, ...] = ()

    def __init__(self, config: DataConfig, where: str):
        """Open a store and see how many of its pairs are in the config's split, but read no pair.

        Args:
            config: gives split, captions, the context of the tokens that are wanted, and the cache
                where what was read of a remote store is kept.
            where: the store's path or URL.

        Raises:
            UserError: there is no such store or split, nothing in the split, or the store is
                damaged or not complete.
        """
        split, captions = checks.choice("split", config.split, SPLITS), config.captions
        self.name = f"embeddings:{where}"
        if retrieval.is_layout(where, config.cache):
            key = config.key("caption")
            self.store = retrieval.RetrievalStore(where, config.cache, key)
        else:
            config.refuse(f"{self.name}, which `unclip embed` made,", "caption_key")
            self.store = EmbeddingStore.open(
                where, cache_dir=config.cache, disk_cache_bytes=config.disk_cache_bytes
            )
        self.skipped: dict[str, str] = {}
        meta, self.remote = self.store.meta, self.store.remote
        self._choice = pages.Choice(self.store.table, split, captions)
        if not len(self._choice):
            raise nothing_in(split, f"{meta.count} pairs of {self.name}")
        self.image_count = len(self) if captions == "first" else self.store.images[split]
        wanted = (config.context_length, config.vocab_size)
        self._has_tokens = (meta.context_length, meta.vocab_size) == wanted
        known = [meta.clip_fingerprint, meta.data_fingerprint, split, captions]
        self.fingerprint = fingerprint_of(known)

    def __len__(self) -> int:
        """The number of pairs in the split."""
        return len(self._choice)

    def image_of(self, index: int) -> int:
        """A number that the pairs of one image share."""
        shard, page, row = self._place(index)
        table, flags = self.store.table, self.store.flags_of(shard, page)
        before = table.rows["images"][:shard], table.directory(shard)["images"][:page]
        return sum(int(of.sum()) for of in before) + int(np.sum(flags[: row + 1] & FIRST > 0))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The pair at `index`; `records.BadRecord` if it has no embeddings."""
        try:
            pair = with_embeddings(self.store.at(*self._place(index)))
        except (Damaged, StorageError) as error:  # of what says where it is
            raise BadRecord(f"pair {index} of {self.name}: {error}") from error
        record = {"caption": pair.caption, "index": index, "name": pair.name}
        tokens = {"tokens": pair.tokens} if self._has_tokens else {}
        return record | tokens | {"z_i": pair.z_i, "z_t": pair.z_t}

    def chunks(self, part: tuple[int, int] = (0, 1)) -> entries.Chunks:
        """All valid (z_i, z_t) of the split, float32 `[n, e]`, some at a time; or one part of n."""
        return self.store.chunks(self._chosen, part)

    def _place(self, index: int) -> tuple[int, int, int]:
        """Shard, page and row of the pair at `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: pair {index} of {len(self)}")
        shard, page, rank = self._choice.find(index)
        among = np.flatnonzero(self._chosen(self.store.flags_of(shard, page)))
        return shard, page, int(among[rank])

    def _chosen(self, flags: np.ndarray) -> np.ndarray:
        return entries.chosen(flags, self._choice.split, self._choice.captions)
