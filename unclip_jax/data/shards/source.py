"""A data set of shards, each with its index, as one source."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from unclip_jax.common import checks
from unclip_jax.data.datasets import DataConfig
from unclip_jax.data.records import (
    SPLITS,
    BadRecord,
    class_names,
    fingerprint_of,
    nothing_in,
    shown,
    warn_of_skipped,
)
from unclip_jax.data.shards.index import Format, ShardIndex, indexed
from unclip_jax.data.shards.storage import StorageError, find
from unclip_jax.errors import UserError

_OPEN_INDICES = 512


class ShardedSource:
    """The pairs of shards, in the order of the shards and of the images in them.

    The SHA-256 of its key decides an image's split: `train` is about nine tenths, `heldout` the
    rest, `all` everything. A shard more moves no other image. See `records.Source`.
    """

    def __init__(self, config: DataConfig, pattern: str, form: Format):
        """Open shards, indexing those that weren't before.

        Args:
            config: its name, split, captions and labels; its cache, where indices are kept, may be
                shared by many processes.
            pattern: what files they are, see `storage.find`.
            form: their format.

        Raises:
            UserError: there are no such files, a shard is none or can't be read, or there is no
                such split or nothing in it.
        """
        name, split = config.name, checks.choice("split", config.split, SPLITS)
        self.name, self._files, self._form = name, find(pattern), form
        self._split, self._first_only = split, config.captions == "first"
        self._indices = indexed(name, self._files, form, config.cache)
        self._part = functools.lru_cache(_OPEN_INDICES)(self._open)
        headers = [ShardIndex.open(path).header for path in self._indices]
        self.skipped = self._named_skipped(headers)
        self.classes = ()
        if config.labels:
            met = {label for header in headers for label in header["classes"]}
            told = getattr(form, "class_names", lambda file: ())(self._files[0])
            self.classes = told or class_names(met, name)
            labels = map(str, range(len(told))) if told else self.classes
            self._numbers = {label: number for number, label in enumerate(labels)}
        counts = np.array([header["counts"][split] for header in headers]).reshape(-1, 2)
        self._image_ends = np.cumsum(counts[:, 0])
        self._pair_ends = np.cumsum(counts[:, 0 if self._first_only else 1])
        self.image_count = int(self._image_ends[-1])
        if not self.image_count:
            there = sum(header["images"] for header in headers)
            why = [f"{name}: {reason}, and so on" for name, reason in self.skipped.items()][:1]
            why = () if there else (*why, "the shards are empty")[:1]
            raise nothing_in(split, f"{there} captioned images of {name}", *why)
        self.fingerprint, self.former = (
            fingerprint_of([kind, split, config.captions, [header[of] for header in headers]])
            for kind, of in (("shards 2", "content"), ("shards", "digest"))
        )

    def __len__(self) -> int:
        """The number of (image, caption) pairs."""
        return int(self._pair_ends[-1])

    def image_of(self, index: int) -> int:
        """The number of the image of pair `index`, in the order of shards."""
        shard, local = self._find(index)
        before = int(self._image_ends[shard - 1]) if shard else 0
        return before + self._part(shard).image_of(local)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The pair at `index`; `records.BadRecord` if its image can't be read."""
        shard, local = self._find(index)
        file, part = self._files[shard], self._part(shard)
        number = part.image_of(local)
        first = int(part.pair_ends[number - 1]) if number else 0
        sample = part.index.sample(int(part.images[number]))
        name = f"{file.name}/{shown(sample.key)}"
        try:
            encoded = self._form.image(file, sample.place, sample.size)
        except (StorageError, BadRecord) as error:
            raise BadRecord(f"{name}: {error}") from error
        caption = sample.captions[local - first]
        record = {"image": encoded, "caption": caption, "index": index, "name": name}
        if self.classes:
            record["label"] = np.int32(self._numbers[sample.label])
        return record

    def _find(self, index: int) -> tuple[int, int]:
        """The shard of a pair, and its number among that shard's."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: pair {index} of {len(self)}")
        shard = int(np.searchsorted(self._pair_ends, index, "right"))
        return shard, index - (int(self._pair_ends[shard - 1]) if shard else 0)

    def _open(self, shard: int) -> _Part:
        try:
            index = ShardIndex.open(self._indices[shard])
        except (OSError, ValueError) as error:
            raise UserError(
                f"cache_dir: {self._indices[shard]}: gone or damaged ({error}); run again to index "
                f"{self._files[shard].url} anew"
            ) from error
        wanted = index.heldout == (self._split == "heldout")
        images = np.flatnonzero(wanted | (self._split == "all"))
        captions = np.ones(len(images), int) if self._first_only else index.captions_of[images]
        return _Part(index, images, np.cumsum(captions))

    def _named_skipped(self, headers: Sequence[dict[str, Any]]) -> dict[str, str]:
        skipped = {
            f"{file.url}: {name}": reason
            for file, header in zip(self._files, headers, strict=True)
            for name, reason in header["skipped"].items()
        }
        warn_of_skipped(self.name, skipped)
        return skipped


class _Part(NamedTuple):
    """What a split has of a shard."""

    index: ShardIndex  # of the whole shard
    images: np.ndarray  # which of its images, int64 [n]
    pair_ends: np.ndarray  # how many pairs the images have up to and with this one, int64 [n]

    def image_of(self, pair: int) -> int:
        """The place in `images` of a pair of this part."""
        return int(np.searchsorted(self.pair_ends, pair, "right"))
