"""A data set of shards, each with its index, as one source."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from unclip_jax.common import checks
from unclip_jax.data.datasets import DataConfig
from unclip_jax.data.records import (
    SPLITS,
    BadRecord,
    class_names,
    nothing_in,
    shown,
    warn_of_skipped,
)
from unclip_jax.data.shards.index import FINGERPRINTS, Format, Page, catalogue
from unclip_jax.data.shards.pages import Choice, column
from unclip_jax.data.shards.ranges import Damaged
from unclip_jax.data.shards.storage import StorageError, find
from unclip_jax.errors import UserError


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
        self._catalogue = catalogue(
            name, self._files, form, config.shared, config.cache, config.disk_cache_bytes
        )
        self._table = self._catalogue.table
        self._choice = Choice(self._table, split, config.captions)
        self.skipped = self._catalogue.skipped
        warn_of_skipped(name, self.skipped)
        self.classes = ()
        if config.labels:
            told = getattr(form, "class_names", lambda file: ())(self._files[0])
            self.classes = told or class_names(self._catalogue.classes, name)
            labels = map(str, range(len(told))) if told else self.classes
            self._numbers = {label: number for number, label in enumerate(labels)}
        self.image_count = self._table.count(split, "first")
        if not self.image_count:
            there = self._table.count("all", "first")
            why = [f"{name}: {reason}, and so on" for name, reason in self.skipped.items()][:1]
            why = () if there else (*why, "the shards are empty")[:1]
            raise nothing_in(split, f"{there} captioned images of {name}", *why)
        self.fingerprint, self.former = (
            self._catalogue.fingerprints[f"{kind} {split} {config.captions}"]
            for kind in FINGERPRINTS
        )

    def __len__(self) -> int:
        """The number of (image, caption) pairs."""
        return len(self._choice)

    def image_of(self, index: int) -> int:
        """The number of the image of pair `index`, in the order of shards."""
        shard, page, rank = self._find(index)
        _, _, number, _ = self._image(shard, page, rank)
        split, table = self._choice.split, self._table
        before = table.rows[:shard], table.directory(shard)[:page]
        return sum(int(column(rows, split, "first").sum()) for rows in before) + number

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The pair at `index`; `records.BadRecord` if its image can't be read."""
        shard, page, rank = self._find(index)
        file = self._files[shard]
        opened, chosen, number, caption = self._image(shard, page, rank)
        sample = opened.sample(int(chosen[number]))
        name = f"{file.name}/{shown(sample.key)}"
        try:
            encoded = self._form.image(file, sample.place, sample.size)
        except (StorageError, BadRecord) as error:
            raise BadRecord(f"{name}: {error}") from error
        text = sample.captions[caption]
        record = {"image": encoded, "caption": text, "index": index, "name": name}
        if self.classes:
            record["label"] = np.int32(self._numbers[sample.label])
        return record

    def _find(self, index: int) -> tuple[int, int, int]:
        """The shard of a pair, its page there, and its number among the page's pairs."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: pair {index} of {len(self)}")
        with self._index_read():
            return self._choice.find(index)

    def _image(self, shard: int, page: int, rank: int) -> tuple[Page, np.ndarray, int, int]:
        """A page, its images of the split, which of those a pair has, and which caption."""
        with self._index_read():
            opened = self._catalogue.page(shard, page)
        chosen = opened.in_split(self._choice.split)
        if self._choice.captions == "first":
            return opened, chosen, rank, 0
        ends = np.cumsum(opened.images["captions"][chosen])
        number = int(np.searchsorted(ends, rank, "right"))
        return opened, chosen, number, rank - (int(ends[number - 1]) if number else 0)

    @contextlib.contextmanager
    def _index_read(self) -> Iterator[None]:
        try:
            yield
        except (Damaged, StorageError) as error:
            raise UserError(
                f"cache_dir: an index of {self.name} is gone or damaged ({error}); delete it if it"
                " is there, and run again to index its shard anew"
            ) from error
