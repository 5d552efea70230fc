"""A folder of images with captions as a data set, here or in a bucket.

Captions stand in one of these places, and the first that is there counts:

1. a table at the top: `captions` or `metadata`, with `.jsonl` or `.csv`;
2. a file beside each image: `.txt` or `.caption`, each line of it a caption, or `.json`;
3. such tables in sub-folders, whose paths begin there, as Hugging Face's imagefolder has them, or
   with `.tsv` or `.parquet`;
4. any other table whose rows name images of the folder: COCO's, Flickr8k's, a TSV.

`tables` says what a table may be. Where classes are asked for, they are a table's `label`, or the
first sub-folder on an image's path, which is its caption, too, if it has no other.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from unclip_jax.common import checks
from unclip_jax.data.contents import digest, digests
from unclip_jax.data.datasets import DataConfig
from unclip_jax.data.layouts import Keys, Reader
from unclip_jax.data.records import SPLITS, BadRecord, nothing_in, warn_of_skipped


def open_source(config: DataConfig, path: str) -> FolderSource:
    """The folder that a config names."""
    keys = Keys(config.key("image"), config.key("caption"), config.key("label"))
    return FolderSource(
        path,
        config.split,
        config.captions,
        config.labels,
        keys=keys,
        bare=config.bare,
        cache=config.cache,
    )


class FolderSource:
    """The pairs of a folder, by the relative paths of the images; see `records.Source`.

    Besides, `layout` says where their captions were found.

    The SHA-256 of its relative path decides an image's split: `train` is about nine tenths,
    `heldout` the rest, `all` everything. Adding an image moves no other. Where tables of captions
    are called train and val (or test), they decide.
    """

    _digests: np.ndarray | None = None  # of the images, once the fingerprint was asked for

    def __init__(
        self,
        folder: str | os.PathLike,
        split: str = "all",
        captions: str = "all",
        labels: bool = False,
        *,
        keys: Keys | None = None,
        bare: bool = False,
        cache: pathlib.Path | None = None,
    ):
        """Read the captions and the names of the images, but no image.

        Sub-folders count, hidden ones don't; links to folders are followed. The other arguments are
        those of `DataConfig`; `folder` may also be a table inside it, and `cache` is where the
        digests of images are kept.

        Raises:
            UserError: there is no such folder or split, nothing usable in it, an image in no
                sub-folder where those are the classes, or a table of captions that can't be read
                or names a file outside the folder.
        """
        self.name = os.fspath(folder)
        checks.choice("split", split, SPLITS)
        reader = Reader(self.name, split, keys or Keys(), labels, bare)
        told = reader.told()
        self._listing, self.skipped, self.layout = reader.listing, reader.skipped, reader.layout
        # Of all images, whatever the split: a class has one number in every split.
        self.classes = reader.classes(told) if labels else ()
        warn_of_skipped(self.name, self.skipped)
        self._images = sorted(name for name, one in told.items() if reader.takes(name, one.split))
        if not self._images:
            raise nothing_in(split, f"{len(told)} images of {self.name}")
        kept = None if captions == "all" else 1
        self._pairs = [
            (number, caption)
            for number, name in enumerate(self._images)
            for caption in told[name].captions[:kept]
        ]
        numbers = {label: number for number, label in enumerate(self.classes)}
        self._labels = [numbers[told[name].label] for name in self._images] if labels else []
        self.image_count, self._cache = len(self._images), cache
        reader.listing.keep(self._images)

    def __len__(self) -> int:
        """The number of (image, caption) pairs."""
        return len(self._pairs)

    @property
    def captions(self) -> list[str]:
        """The caption of every pair."""
        return [caption for _, caption in self._pairs]

    def image_of(self, index: int) -> int:
        """The number of the image of pair `index`, in the order of paths."""
        return self._pairs[index][0]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The pair at `index`; `records.BadRecord` if its file can't be read."""
        number, caption = self._pairs[index]
        name = self._images[number]
        try:
            image = self._listing.read(name)
        except OSError as error:
            raise BadRecord(f"{name}: can't be read ({error.strerror})") from error
        if self._digests is not None and digest([image]) != self._digests[number].tobytes():
            raise BadRecord(f"{name}: it has changed since the data set was opened")
        record = {"image": image, "caption": caption, "index": index, "name": name}
        if self.classes:
            record["label"] = np.int32(self._labels[number])
        return record

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of each pair: the image's relative path and its content, the caption.

        Images that are not in the cache, as they are now, are read for it.
        """
        told = self._listing.versions
        if told and all(told[name] for name in self._images):  # a bucket's word for the content
            return self._of_pairs("folder 2", [told[name] for name in self._images])
        self._digests = digests(
            self._listing.where,
            self._images,
            self._listing.files,
            lambda name: digest([self._listing.read(name)]),
            self._cache,
        )
        return self._of_pairs("folder 2", [row.tobytes().hex() for row in self._digests])

    @functools.cached_property
    def former(self) -> str:
        """The fingerprint as it was when it knew sizes and no contents."""
        return self._of_pairs("folder", [self._listing.files[name][0] for name in self._images])

    def _of_pairs(self, kind: str, contents: Sequence[Any]) -> str:
        found = hashlib.sha256(kind.encode())
        for number, caption in self._pairs:
            found.update(json.dumps([self._images[number], contents[number], caption]).encode())
        return found.hexdigest()[:16]
