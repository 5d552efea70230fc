"""Data sets of TensorFlow Datasets, read without TensorFlow."""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import read_only_builder

from unclip_jax.data import contents, texts
from unclip_jax.data.datasets import DataConfig
from unclip_jax.data.records import BadRecord, fingerprint_of, warn_of_skipped
from unclip_jax.errors import UserError, one_line, wrong


def open_source(config: DataConfig, name: str) -> TfdsSource:
    """The data set of TFDS that a config names."""
    return TfdsSource(
        prepared_builder(name, config.cache_dir or None),
        config.split,
        image_key=config.image_key,
        caption_key=config.caption_key,
        captions=config.captions,
        label_key=config.label_key if config.labels or config.key("label") else None,
        labels=config.labels,
        bare=config.bare,
        cache=config.cache,
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
        labels: bool = True,
        classes: tuple[str, ...] = (),
        bare: bool = False,
        cache: pathlib.Path | None = None,
    ):
        """Open a data set.

        Args:
            builder: a `tfds.core.DatasetBuilder` whose data are prepared.
            split: a split as TFDS writes them: "train", "all", "train[:10%]".
            image_key: the feature with the image; "a/b" for a nested one, here and below.
            caption_key: the feature with the text, or list of texts; or with a class, whose name is
                the caption.
            captions: "all", or "first" for one pair a record.
            name_key: a text feature that names a record in messages; else its row does.
            label_key: the feature with the class of a record, its `label`. Where there is no
                feature "caption", the class's name is the caption.
            labels: whether records carry that `label`.
            classes: what that feature says of each class, if it is a text.
            bare: whether records without a caption, or a data set without any, will do.
            cache: where digests of its files are kept; None for data whose pictures are what
                captions and code say, at any size, so that files don't count.

        Raises:
            UserError: the data aren't prepared for random access, or lack the split or a key.
        """
        self.name = f"tfds:{builder.info.full_name}"
        leaves = dict(_leaves(builder.info.features))
        if caption_key == "caption" and caption_key not in leaves and (label_key or bare):
            caption_key = label_key if labels else None
        self._image_key, self._caption_key, self._name_key = image_key, caption_key, name_key
        for field, key, what, fits in (
            ("label_key", label_key, "classes that have names", lambda f: classes or _names(f)),
            ("image_key", image_key, "pictures", _is_image),
            ("caption_key", caption_key, "text", _is_caption),
        ):
            if key is not None and not (key in leaves and fits(leaves[key].feature)):
                there = [name for name, leaf in leaves.items() if fits(leaf.feature)]
                expected = f"a feature of {self.name} with {what}"
                raise wrong(field, key, expected, f"it has {', '.join(there) or f'no {what}'}")
        if leaves[image_key].several:
            raise UserError(f"image_key: {image_key!r}: {self.name} has several there; name one")
        self._bare, self._label_key, self.classes = bare, label_key if labels else None, ()
        if label_key and labels:
            self.classes = classes or _names(leaves[label_key].feature)
        self._names = _names(leaves[caption_key].feature) if caption_key else ()
        self._rows = _open(builder, split, self.name, image_key, leaves[image_key].feature)
        self.image_count = len(self._rows)
        self.skipped: dict[str, str] = {}
        several = bool(caption_key) and (leaves[caption_key].several or self._lists())
        self._pairs = self._all_pairs(captions) if several else None
        if len(self) == 0:
            raise UserError(f"split: {split!r}: {self.name} has no captioned record in it")
        self._builder, self._split, self._cache = builder, split, cache

    def __len__(self) -> int:
        """The number of (image, caption) pairs."""
        return self.image_count if self._pairs is None else len(self._pairs)

    @property
    def captions(self) -> list[str] | None:
        """The caption of every pair, where several to a picture made them known."""
        return self._pairs and [caption for _, caption in self._pairs]

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
        elif label is not None and self._caption_key == self._label_key:
            caption = self.classes[label]
        else:
            caption = next(iter(self._captions(example, name)), "")
        image = texts.lookup(example, self._image_key)
        if not caption and not self._bare:
            raise BadRecord(f"{name}: an empty caption")
        record = {"image": image, "caption": caption, "index": index, "name": name}
        return record if label is None else record | {"label": label}

    def _captions(self, example: dict, name: str) -> tuple[str, ...]:
        """The captions of a record; `BadRecord` if they are no text."""
        found = texts.lookup(example, self._caption_key) if self._caption_key else None
        if self._names:  # of the classes that numbers stand for
            numbers = np.ravel(found).tolist()
            found = [self._names[n] for n in numbers if 0 <= n < len(self._names)]
        try:
            return texts.captions(found.tolist() if isinstance(found, np.ndarray) else found)
        except texts.NotText as error:
            if self._bare:
                return ()
            raise BadRecord(f"{name}: its caption is {error}") from error

    def _lists(self) -> bool:
        """Whether captions are texts that are lists of texts, going by the first record."""
        try:
            return bool(self.image_count) and len(self._captions(self._example(0), "")) > 1
        except BadRecord:
            return False

    def _label_of(self, example: dict, name: str) -> np.int32:
        """The number of a record's class; TFDS says -1 where it knows none."""
        found = texts.lookup(example, self._label_key)
        if isinstance(found, bytes | str):
            text = texts.one(found)
            found = self.classes.index(text) if text in self.classes else -1
        if not 0 <= found < len(self.classes):
            raise BadRecord(f"{name}: of no known class")
        return np.int32(found)

    def _example(self, row: int) -> dict[str, Any]:
        try:
            return self._rows[row]
        except RuntimeError as error:  # what ArrayRecord raises on damaged files
            raise BadRecord(f"{self.name} row {row}: can't be read ({one_line(error)})") from error

    def _name_of(self, example: dict, row: int) -> str:
        return texts.one(example[self._name_key]) if self._name_key else f"{self.name} row {row}"

    def _all_pairs(self, captions: str) -> list[tuple[int, str]]:
        pairs = []
        for row in range(self.image_count):
            name = f"{self.name} row {row}"
            try:
                example = self._example(row)
                name = self._name_of(example, row)
                found = self._captions(example, name)[: None if captions == "all" else 1]
            except BadRecord as error:
                self.skipped[name] = str(error).removeprefix(f"{name}: ")
                continue
            if not found and not self._bare:
                self.skipped[name] = "no caption"
            found = found or ("",) * self._bare
            pairs.extend((row, text) for text in found)
        warn_of_skipped(self.name, self.skipped)
        return pairs

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the pairs, or what TFDS says of them, and of the files that they are in."""
        if self._cache is None:
            return self.former
        return fingerprint_of([self.former, _contents(self._builder, self._split, self._cache)])

    @functools.cached_property
    def former(self) -> str:
        """Of each pair where all are known, else of what TFDS says of the data."""
        builder = self._builder
        known = [builder.name, self._split, self._image_key, self._caption_key]
        if self._pairs is None:
            sizes = {name: info.num_bytes for name, info in builder.info.splits.items()}
            known += [builder.info.full_name, len(self), sizes]
        else:
            known += self._pairs
        return fingerprint_of(known)


def _contents(builder: Any, split: str, cache: pathlib.Path) -> list[list[Any]]:
    """Of each file that a split is in: its name, which records of it, and its content.

    Of a remote file, size and time of change stand for the content.
    """
    try:
        parts = builder.info.splits[split].file_instructions
    except (KeyError, ValueError):  # an expression that only TFDS's reader knows: all files
        parts = [p for info in builder.info.splits.values() for p in info.file_instructions]
    paths = {os.path.basename(part.filename): epath.Path(part.filename) for part in parts}
    names = sorted(paths)
    where = os.fspath(epath.Path(builder.data_dir))
    if "://" in where:
        found = {name: [path.stat().length, path.stat().mtime] for name, path in paths.items()}
    else:
        rows = contents.of_files(where, [os.fspath(paths[name]) for name in names], cache)
        found = {name: row.tobytes().hex() for name, row in zip(names, rows, strict=True)}
    names = [os.path.basename(part.filename) for part in parts]
    return [[n, p.skip, p.take, found[n]] for n, p in zip(names, parts, strict=True)]


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
        for part in reversed(_path(builder.info.features, image_key)):
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


def _path(features: Any, key: str) -> list[str]:
    """The names of nested features that "a/b" is made of: a name may hold a slash itself."""
    if key in features:
        return [key]
    for head in features:
        inner = getattr(features[head], "feature", features[head])
        rest = key.removeprefix(f"{head}/")
        if rest != key and hasattr(inner, "items") and (below := _path(inner, rest)):
            return [head, *below]
    return []


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


def _names(feature: Any) -> tuple[str, ...]:
    """The names of the classes that a feature's numbers stand for; () for any other."""
    return tuple(getattr(feature, "names", None) or ())


def _is_caption(feature: Any) -> bool:
    """Whether a feature holds text, or classes that have names."""
    is_text = isinstance(feature, tfds.features.Text) or (
        isinstance(feature, tfds.features.Tensor)
        and feature.np_dtype in (object, np.str_, np.bytes_)
    )
    return is_text or bool(_names(feature))


def _is_image(feature: Any) -> bool:
    """Whether a feature holds pictures: as files, or as arrays of bytes or of 16 bits."""
    if isinstance(feature, tfds.features.Image):
        return True
    is_array = isinstance(feature, tfds.features.Tensor) and len(feature.shape) in (2, 3)
    return is_array and feature.np_dtype in (np.uint8, np.uint16)
