"""Data sets of TensorFlow Datasets, read without TensorFlow."""

from __future__ import annotations

import functools
import operator
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from tensorflow_datasets.core import read_only_builder

from unclip_jax.data.datasets import DataConfig
from unclip_jax.data.records import BadRecord, fingerprint_of
from unclip_jax.errors import UserError, one_line, wrong


def open_source(config: DataConfig, name: str) -> TfdsSource:
    """The data set of TFDS that a config names."""
    return TfdsSource(
        prepared_builder(name, config.cache_dir or None),
        config.split,
        image_key=config.image_key,
        caption_key=config.caption_key,
        captions=config.captions,
        label_key=config.label_key if config.labels else None,
    )


class TfdsSource:
    """The pairs of a prepared TFDS data set; see `records.Source` for the attributes.

    Where a record has a list of captions, they are read once when the source is made: a pass over
    the whole data set.
    """

    def __init__(
        self,
        builder: Any,
        split: str,
        *,
        image_key: str,
        caption_key: str,
        captions: str = "all",
        name_key: str | None = None,
        label_key: str | None = None,
        classes: tuple[str, ...] = (),
    ):
        """Open a data set.

        Args:
            builder: a `tfds.core.DatasetBuilder` whose data are prepared.
            split: a split as TFDS writes them: "train", "all", "train[:10%]".
            image_key: the feature with the image; "a/b" for a nested one, here and below.
            caption_key: the feature with the text, or list of texts.
            captions: "all", or "first" for one pair a record.
            name_key: a text feature that names a record in messages; else its row does.
            label_key: the feature with the class of a record, its `label`. Where there is no
                feature `caption_key`, the class's name is the caption.
            classes: what that feature says of each class, if it is a text.

        Raises:
            UserError: the data aren't prepared for random access, or lack the split or a key.
        """
        self.name = f"tfds:{builder.info.full_name}"
        leaves = dict(_leaves(builder.info.features))
        caption_key = label_key if label_key and caption_key not in leaves else caption_key
        self._image_key, self._caption_key, self._name_key = image_key, caption_key, name_key
        keys = {"label_key": label_key, "image_key": image_key, "caption_key": caption_key}
        for field, key in keys.items():
            if key is not None and key not in leaves:
                raise wrong(field, key, f"a feature of {self.name}: {', '.join(leaves)}")
        if leaves[image_key].several:
            raise UserError(f"image_key: {image_key!r}: {self.name} has several there; name one")
        self._label_key, self.classes = label_key, ()
        if label_key:
            self.classes = classes or tuple(getattr(leaves[label_key].feature, "names", ()))
            if not self.classes:
                raise wrong("label_key", label_key, f"a ClassLabel of {self.name} that has names")
        self._rows = _open(builder, split, self.name, image_key, leaves[image_key].feature)
        self.image_count = len(self._rows)
        self.skipped: dict[str, str] = {}
        self._pairs = self._all_pairs(captions) if leaves[caption_key].several else None
        if len(self) == 0:
            raise UserError(f"split: {split!r}: {self.name} has no captioned record in it")
        self.fingerprint = self._fingerprint(builder, split)

    def __len__(self) -> int:
        """The number of (image, caption) pairs."""
        return self.image_count if self._pairs is None else len(self._pairs)

    def image_of(self, index: int) -> int:
        """The row of pair `index`."""
        return index if self._pairs is None else self._pairs[index][0]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The pair at `index`; `records.BadRecord` if it has no caption or no image."""
        row = self.image_of(index)
        example = self._example(row)
        name = self._name_of(example, row)
        label = self._label_of(example, name) if self._label_key else None
        if self._pairs is not None:
            caption = self._pairs[index][1]
        elif self._caption_key == self._label_key:
            caption = self.classes[label]
        else:
            caption = _text(_lookup(example, self._caption_key))
        image = _lookup(example, self._image_key)
        if not caption:
            raise BadRecord(f"{name}: an empty caption")
        record = {"image": image, "caption": caption, "index": index, "name": name}
        return record if label is None else record | {"label": label}

    def _label_of(self, example: dict, name: str) -> np.int32:
        """The number of a record's class; TFDS says -1 where it knows none."""
        found = _lookup(example, self._label_key)
        if isinstance(found, bytes | str):
            found = self.classes.index(text) if (text := _text(found)) in self.classes else -1
        if not 0 <= found < len(self.classes):
            raise BadRecord(f"{name}: of no known class")
        return np.int32(found)

    def _example(self, row: int) -> dict[str, Any]:
        try:
            return self._rows[row]
        except RuntimeError as error:  # what ArrayRecord raises on damaged files
            raise BadRecord(f"{self.name} row {row}: can't be read ({one_line(error)})") from error

    def _name_of(self, example: dict, row: int) -> str:
        return _text(example[self._name_key]) if self._name_key else f"{self.name} row {row}"

    def _all_pairs(self, captions: str) -> list[tuple[int, str]]:
        pairs = []
        for row in range(self.image_count):
            try:
                example = self._example(row)
            except BadRecord as error:
                self._skip(f"{self.name} row {row}", str(error))
                continue
            texts = [_text(text) for text in _lookup(example, self._caption_key)]
            texts = [text for text in texts if text][: None if captions == "all" else 1]
            if not texts:
                self._skip(self._name_of(example, row), "no caption")
            pairs.extend((row, text) for text in texts)
        return pairs

    def _skip(self, name: str, reason: str) -> None:
        self.skipped[name] = reason
        logging.warning("%s: skipped %s: %s", self.name, name, reason)

    def _fingerprint(self, builder: Any, split: str) -> str:
        """Of each pair where all are known, else of what TFDS says of the data."""
        known = [builder.name, split, self._image_key, self._caption_key]
        if self._pairs is None:
            sizes = {name: info.num_bytes for name, info in builder.info.splits.items()}
            known += [builder.info.full_name, len(self), sizes]
        else:
            known += self._pairs
        return fingerprint_of(known)


def prepared_builder(name: str, data_dir: str | os.PathLike | None) -> Any:
    """A TFDS builder whose data are on this machine, read without the code that made them.

    Args:
        name: a data set as TFDS names it, "coco_captions/2014:1.1.0", or the path of a prepared
            data set's version directory.
        data_dir: TFDS's directory; None for its own default.

    Raises:
        UserError: there is no such data set, it isn't prepared, or TFDS can't open it.
    """
    try:
        if pathlib.Path(name, "dataset_info.json").is_file():
            return tfds.builder_from_directory(name)
        return read_only_builder.builder_from_files(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        where = data_dir or "TFDS's own data_dir"
        given = f", data_dir={os.fspath(data_dir)!r}" if data_dir else ""
        raise UserError(
            f"name: tfds:{name}: not prepared in {where}; check the name "
            "and cache_dir, or prepare it (most need TensorFlow for that) with: python "
            f'-c "import tensorflow_datasets as tfds; tfds.builder({name!r}{given}, '
            "file_format='array_record').download_and_prepare()\""
        ) from error
    except (ValueError, AssertionError, ImportError) as error:
        raise UserError(f"name: tfds:{name}: TFDS can't open it ({one_line(error)})") from error


def _open(builder: Any, split: str, name: str, image_key: str, image: Any) -> Any:
    """TFDS's data source of a split, images left encoded."""
    decoders = None
    if isinstance(image, tfds.features.Image):
        decoders = tfds.decode.SkipDecoding()
        for part in reversed(image_key.split("/")):
            decoders = {part: decoders}
    anew = f"delete {builder.data_dir} to prepare it anew"
    if not builder.info.splits:
        raise UserError(f"name: {name}: nothing in {builder.data_dir}; {anew}")
    try:
        rows = builder.as_data_source(split, decoders=decoders)
        if len(rows):
            rows[0]  # files are opened at the first read
        return rows
    except NotImplementedError as error:
        raise UserError(
            f"name: {name}: prepared in the format {builder.info.file_format.value}, which has no "
            "random access; prepare it again in another data_dir with file_format='array_record'"
        ) from error
    except RuntimeError as error:
        raise UserError(f"name: {name}: damaged ({one_line(error)}); {anew}") from error
    except (ValueError, KeyError, AssertionError) as error:
        there = ", ".join([*builder.info.splits, "all"])
        raise wrong("split", split, f"one that {name} has: {there}", one_line(error)) from error


class _Leaf(NamedTuple):
    feature: Any
    several: bool  # whether it is a list, or lies inside one


def _leaves(features: Any, prefix: str = "", several: bool = False) -> Iterator[tuple[str, _Leaf]]:
    """The path "a/b" of every feature, and what is there."""
    for key, value in features.items():
        inner = getattr(value, "feature", value)
        leaf = _Leaf(inner, several or inner is not value)
        if hasattr(inner, "items"):
            yield from _leaves(inner, f"{prefix}{key}/", leaf.several)
        else:
            yield f"{prefix}{key}", leaf


def _lookup(example: dict, key: str) -> Any:
    """What an example has at "a/b"."""
    return functools.reduce(operator.getitem, key.split("/"), example)


def _text(value: Any) -> str:
    """A TFDS text, which comes as bytes."""
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return text.strip()
