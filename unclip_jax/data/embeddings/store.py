"""CLIP embeddings of a data set, stored once and read by the number of their pair.

A store is a folder, here or remote: see `embeddings.shards` for what is in it and
`embeddings.writer` for how it comes to be. It serves in two ways: `WithEmbeddings` joins it to the
pictures it was computed from, and `EmbeddingSource` is a data set of its own, without pictures.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from unclip_jax.common import checks
from unclip_jax.data.datasets import DataConfig
from unclip_jax.data.embeddings import retrieval
from unclip_jax.data.embeddings.folders import Folder
from unclip_jax.data.embeddings.shards import (
    FIRST,
    HELDOUT,
    META,
    VALID,
    Damaged,
    Meta,
    Pair,
    ShardReader,
)
from unclip_jax.data.records import (
    SPLITS,
    BadRecord,
    Source,
    fingerprint_of,
    fingerprints,
    nothing_in,
)
from unclip_jax.errors import UserError

_READ_TOGETHER = 8192  # pairs of a chunk


def open_source(config: DataConfig, where: str) -> EmbeddingSource:
    """The stored embeddings that a config names."""
    return EmbeddingSource(config, where)


class EmbeddingStore:
    """Stored embeddings of N pairs, whose shards are opened when first read; for any threads.

    Attributes:
        where: its path or URL.
        meta: what it says of itself.
    """

    def __init__(self, folder: Folder, meta: Meta):
        """Use `open`."""
        self.where, self.meta = str(folder), meta
        self._folder = folder
        self._shards: dict[int, ShardReader] = {}
        self._opening = threading.Lock()

    @classmethod
    def open(
        cls, where: str | os.PathLike, *, cache_dir: str | os.PathLike, **expected: Any
    ) -> EmbeddingStore:
        """Open a store for reading.

        Args:
            where: its folder, a path or a URL of fsspec's.
            cache_dir: where copies of a remote store's shards are kept.
            **expected: what fields of its `meta` must be.

        Raises:
            UserError: there is none, it is damaged or not complete, or a field is another.
        """
        folder = Folder(where, cache_dir)
        names = folder.names()
        if META not in names:
            what = "no stored embeddings; compute them with unclip embed"
            if names & set(retrieval.FOLDERS):
                what = (
                    "clip-retrieval's layout, which doesn't say of which pictures it is; only"
                    f" --config.data.name=embeddings:{folder} reads it; for others use unclip embed"
                )
            raise UserError(f"embeddings: {folder}: {what}")
        meta = Meta.from_json(folder.read_text(META), str(folder))
        store = cls(folder, meta)
        store.check(**expected)
        if missing := meta.missing(names):
            raise UserError(
                f"embeddings: {folder}: {len(missing)} of {meta.shards} shards are missing; run the"
                " same unclip embed again, which goes on where it stopped"
            )
        return store

    def check(self, **expected: Any) -> None:
        """Compare fields of `meta`; `UserError` names the first that is another."""
        advice = "compute them again, into another folder, or give the CLIP and data they are of"
        self.meta.check(self.where, advice, **expected)

    def __len__(self) -> int:
        """The number of pairs."""
        return self.meta.count

    def __getitem__(self, index: int) -> Pair:
        """The pair at `index`, valid or not; `records.BadRecord` if its record is damaged."""
        shard = self.meta.shard_of(index)
        try:
            (pair,) = self._shard(shard).read(index, index + 1)
        except Damaged as error:
            raise BadRecord(f"pair {index} of {self._name(shard)}: damaged ({error})") from error
        return pair

    def valid(self, index: int) -> Pair:
        """The pair at `index`; `records.BadRecord` if it has no embeddings, too."""
        pair = self[index]
        if not pair.flags & VALID:
            raise BadRecord(f"{pair.name}: no embeddings, as it was bad when they were made")
        return pair

    @functools.cached_property
    def flags(self) -> np.ndarray:
        """What `embeddings.shards` says of each pair in a byte, uint8 `[N]`; opens every shard.

        Raises:
            UserError: a shard is damaged or can't be read.
        """
        parts = []
        for shard in range(self.meta.shards):
            with self._use_of(shard):
                parts.append(self._shard(shard).flags())
        return np.concatenate(parts)

    def chunks(self, among: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All valid (z_i, z_t), each float32 `[n, e]`, some thousands at a time, in order.

        Args:
            among: bool `[N]`, which pairs count; None for all.

        Raises:
            UserError: a shard is damaged or can't be read.
        """
        for shard in range(self.meta.shards):
            pairs = self.meta.shard_pairs(shard)
            for start in range(pairs.start, pairs.stop, _READ_TOGETHER):
                stop = min(start + _READ_TOGETHER, pairs.stop)
                with self._use_of(shard):
                    read = self._shard(shard).read(start, stop)
                counts = [p for p in read if p.flags & VALID and (among is None or among[p.index])]
                if counts:
                    yield np.stack([p.z_i for p in counts]), np.stack([p.z_t for p in counts])

    def _shard(self, shard: int) -> ShardReader:
        if shard not in self._shards:
            with self._opening:
                if shard not in self._shards:
                    path = self._folder.file(self.meta.shard_name(shard))
                    with self._use_of(shard):
                        self._shards[shard] = ShardReader(path, self.meta, shard)
        return self._shards[shard]

    def _name(self, shard: int) -> str:
        return f"{self.where}/{self.meta.shard_name(shard)}"

    @contextlib.contextmanager
    def _use_of(self, shard: int) -> Iterator[None]:
        """Whatever is damaged, in a `UserError`."""
        try:
            yield
        except Damaged as error:
            raise UserError(
                f"embeddings: {self._name(shard)}: damaged ({error}); delete that file and run the"
                " same unclip embed again (or delete the folder, if it is a cache)"
            ) from error


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
        self._source, self.store = source, store

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

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All valid (z_i, z_t), each float32 `[n, e]`, a part at a time."""
        return self.store.chunks()


class EmbeddingSource:
    """Stored embeddings as a data set of their own: records hold no `image`.

    They hold `caption`, `z_i`, `z_t` and, where those that are stored fit, `tokens`. The SHA-256 of
    its name decides an image's split, as `records.is_heldout` says: a store of a whole folder has
    the folder's own splits. See `records.Source` for the attributes; besides, `store` is the
    `EmbeddingStore`, or a `retrieval.RetrievalStore`.
    """

    classes: tuple[str, ...] = ()

    def __init__(self, config: DataConfig, where: str):
        """Open a store and read which of its pairs are in the config's split, but no pair.

        Args:
            config: gives split, captions, the context of the tokens that are wanted, and the cache
                where copies of a remote store's shards are kept.
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
            self.store = EmbeddingStore.open(where, cache_dir=config.cache)
        self.skipped: dict[str, str] = {}
        meta, flags = self.store.meta, self.store.flags
        self._among = np.ones(len(flags), bool)
        if split != "all":
            self._among &= (flags & HELDOUT > 0) == (split == "heldout")
        if captions == "first":
            self._among &= flags & FIRST > 0
        self._pairs = np.flatnonzero(self._among)
        if not len(self._pairs):
            raise nothing_in(split, f"{len(flags)} pairs of {self.name}")
        self._images = np.cumsum(flags & FIRST > 0)
        self.image_count = len(np.unique(self._images[self._pairs]))
        wanted = (config.context_length, config.vocab_size)
        self._has_tokens = (meta.context_length, meta.vocab_size) == wanted
        known = [meta.clip_fingerprint, meta.data_fingerprint, split, captions]
        self.fingerprint = fingerprint_of(known)

    def __len__(self) -> int:
        """The number of pairs in the split."""
        return len(self._pairs)

    def image_of(self, index: int) -> int:
        """A number that the pairs of one image share."""
        return int(self._images[self._pairs[index]])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The pair at `index`; `records.BadRecord` if it has no embeddings."""
        pair = self.store.valid(int(self._pairs[index]))
        record = {"caption": pair.caption, "index": index, "name": pair.name}
        tokens = {"tokens": pair.tokens} if self._has_tokens else {}
        return record | tokens | {"z_i": pair.z_i, "z_t": pair.z_t}

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All valid (z_i, z_t) of the split, each float32 `[n, e]`, a part at a time."""
        return self.store.chunks(self._among)
