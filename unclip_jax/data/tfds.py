"""Data sets of TensorFlow Datasets, read without TensorFlow."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from tensorflow_datasets.core import read_only_builder

from unclip_jax.data.datasets import DataConfig
from unclip_jax.data.records import BadRecord
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
            image_key: the feature with the image; "a/b" for a nested one.
            caption_key: the feature with the text, or list of texts; likewise.
            captions: "all", or "first" for one pair a record.
            name_key: a text feature that names a record in messages; else its row does.
            label_key: the feature with the class of a record, "a/b" likewise, that records then
                carry as `label`. Where there is no feature `caption_key`, the class's name is the
                caption.
            classes: what that feature says of each class, if it is a text.

        Raises:
            UserError: the data aren't prepared for random access, or lack the split or a key.
        """
        self.name = f"tfds:{builder.info.full_name}"
        self._image_key, self._caption_key, self._name_key = image_key, caption_key, name_key
        features = builder.info.features
        self._label_key = label_key
        self.classes = _classes(features, label_key, classes, self.name) if label_key else ()
        if label_key and _lookup(features, caption_key) is None:
            self._caption_key = label_key
        self._rows = _open(builder, split, self.name, image_key, self._caption_key)
        self.image_count = len(self._rows)
        self.skipped: dict[str, str] = {}
        several = _is_list(features, self._caption_key)
        self._pairs = self._all_pairs(captions) if several else None
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
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]


def prepared_builder(name: str, data_dir: str | os.PathLike | None) -> Any:
    """A TFDS builder whose data are on this machine, read without the code that made them.

    Args:
        name: a data set as TFDS names it, "coco_captions/2014:1.1.0", or the path of a prepared
            data set's version directory.
        data_dir: TFDS's directory; None for its own default.

    Raises:
        UserError: there is no such data set, or it isn't prepared.
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


def _open(builder: Any, split: str, name: str, image_key: str, caption_key: str) -> Any:
    """TFDS's data source of a split, images left encoded."""
    features = builder.info.features
    for field, key in (("image_key", image_key), ("caption_key", caption_key)):
        _check_feature(features, field, key, name)
    if _is_list(features, image_key):
        raise UserError(f"image_key: {image_key!r}: {name} has several images there; name one")
    decoders = None
    if isinstance(_lookup(features, image_key), tfds.features.Image):
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


def _check_feature(features: Any, field: str, key: str, name: str) -> None:
    if _lookup(features, key) is None:
        raise wrong(field, key, f"a feature of {name}: {', '.join(_leaves(features))}")


def _classes(features: Any, label_key: str, given: tuple[str, ...], name: str) -> tuple[str, ...]:
    """The names of the classes: what a ClassLabel says, or those given for a text."""
    _check_feature(features, "label_key", label_key, name)
    found = given or tuple(getattr(_lookup(features, label_key), "names", ()))
    if not found:
        raise wrong("label_key", label_key, f"a ClassLabel of {name} that has names")
    return found


def _lookup(nested: Any, key: str) -> Any:
    """The part of nested features, or of a nested example, at "a/b"; None if there is none."""
    for part in key.split("/"):
        nested = getattr(nested, "feature", nested)  # a Sequence of a dict
        if part not in nested:
            return None
        nested = nested[part]
    return nested


def _is_list(features: Any, key: str) -> bool:
    """Whether the feature at "a/b" is a list, or lies inside one."""
    path = key.split("/")
    along = ["/".join(path[: depth + 1]) for depth in range(len(path))]
    return any(hasattr(_lookup(features, part), "feature") for part in along)


def _leaves(features: Any, prefix: str = "") -> Iterable[str]:
    for key, value in features.items():
        inner = getattr(value, "feature", value)
        if hasattr(inner, "items"):
            yield from _leaves(inner, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}"


def _text(value: Any) -> str:
    """A TFDS text, which comes as bytes."""
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return text.strip()
