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

import hashlib
import json
import os
from typing import Any

import numpy as np

from unclip_jax.common import checks
from unclip_jax.data.datasets import DataConfig
from unclip_jax.data.layouts import Keys, Reader
from unclip_jax.data.records import SPLITS, BadRecord, nothing_in, warn_of_skipped


def open_source(config: DataConfig, path: str) -> FolderSource:
    """The folder that a config names."""
    keys = Keys(config.key("image"), config.key("caption"), config.key("label"))
    return FolderSource(
        path, config.split, config.captions, config.labels, keys=keys, bare=config.bare
    )


class FolderSource:
    """The pairs of a folder, by the relative paths of the images; see `records.Source`.

    The SHA-256 of its relative path decides an image's split: `train` is about nine tenths,
    `heldout` the rest, `all` everything. Adding an image moves no other. Where tables of captions
    are called train and val (or test), they decide.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        split: str = "all",
        captions: str = "all",
        labels: bool = False,
        *,
        keys: Keys | None = None,
        bare: bool = False,
    ):
        """Read the captions and the names of the images, but no image.

        Sub-folders count, hidden ones don't; links to folders are followed. The other arguments are
        those of `DataConfig`; `folder` may also be a table inside it.

        Raises:
            UserError: there is no such folder or split, nothing usable in it, an image in no
                sub-folder where those are the classes, or a table of captions that can't be read
                or names a file outside the folder.
        """
        self.name = os.fspath(folder)
        checks.choice("split", split, SPLITS)
        reader = Reader(self.name, split, keys or Keys(), labels, bare)
        told = reader.told()
        self._listing, self.skipped = reader.listing, reader.skipped
        # Of all images, whatever the split: a class has one number in every split.
        self.classes = reader.classes(told) if labels else ()
        warn_of_skipped(self.name, self.skipped)
        self._images = sorted(name for name, one in told.items() if reader.takes(name, one))
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
        self.image_count = len(self._images)
        reader.listing.keep(self._images)
        self.fingerprint = self._fingerprint()

    def __len__(self) -> int:
        """The number of (image, caption) pairs."""
        return len(self._pairs)

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
        record = {"image": image, "caption": caption, "index": index, "name": name}
        if self.classes:
            record["label"] = np.int32(self._labels[number])
        return record

    def _fingerprint(self) -> str:
        """Of each pair: the image's relative path and its size in bytes, the caption."""
        digest = hashlib.sha256(b"folder")
        sizes = [self._listing.files[name][0] for name in self._images]
        for number, caption in self._pairs:
            digest.update(json.dumps([self._images[number], sizes[number], caption]).encode())
        return digest.hexdigest()[:16]
