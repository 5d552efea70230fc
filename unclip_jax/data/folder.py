"""A folder of images with captions as a data set.

Captions stand in one of three places, never mixed:

- `captions.jsonl` or `metadata.jsonl`: a JSON object on each line;
- `captions.csv` or `metadata.csv`: a header, then a row for each caption;
- where there is no such table, a `.txt` beside each image, each line of it a caption.

In the tables the image is under `file`, `image` or `file_name`, relative to the folder, and the
text under `caption` or `text`. Several rows may name one image. Where classes are asked for, the
first sub-folder on an image's path is its class, and its caption, if it has no other.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from unclip_jax.common import checks
from unclip_jax.data.datasets import DataConfig
from unclip_jax.data.records import SPLITS, BadRecord, is_heldout, nothing_in, warn_of_skipped
from unclip_jax.errors import UserError, wrong

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm")
_TABLES = ("captions.jsonl", "metadata.jsonl", "captions.csv", "metadata.csv")
_IMAGE_FIELDS = ("file", "image", "file_name")
_CAPTION_FIELDS = ("caption", "text")


def open_source(config: DataConfig, path: str) -> FolderSource:
    """The folder that a config names."""
    return FolderSource(path, config.split, config.captions, config.labels)


class FolderSource:
    """The pairs of a folder, by the relative paths of the images; see `records.Source`.

    The SHA-256 of its relative path decides an image's split: `train` is about nine tenths,
    `heldout` the rest, `all` everything. Adding an image moves no other.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        split: str = "all",
        captions: str = "all",
        labels: bool = False,
    ):
        """Read the captions and the names of the images, but no image.

        Sub-folders count, hidden ones don't. The other arguments are those of `DataConfig`.

        Raises:
            UserError: there is no such folder or split, nothing usable in it, an image in no
                sub-folder where those are the classes, or a table of captions that can't be read
                or names a file outside the folder.
        """
        self.name = os.fspath(folder)
        self._root = pathlib.Path(folder).expanduser()
        if not self._root.is_dir():
            raise UserError(f"name: {self.name}: no such folder; give a folder of images")
        checks.choice("split", split, SPLITS)
        self.skipped: dict[str, str] = {}
        captioned = _captioned_images(self._root, self.skipped, labels)
        # Of all images, whatever the split: a class has one number in every split.
        self.classes = tuple(sorted({_class(name) for name in captioned})) if labels else ()
        warn_of_skipped(self.name, self.skipped)
        self._images = sorted(
            name for name in captioned if split == "all" or is_heldout(name) == (split == "heldout")
        )
        if not self._images:
            raise nothing_in(split, f"{len(captioned)} images of {self.name}")
        kept = None if captions == "all" else 1
        self._pairs = [
            (number, caption)
            for number, name in enumerate(self._images)
            for caption in captioned[name][:kept]
        ]
        self.image_count = len(self._images)
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
            image = (self._root / name).read_bytes()
        except OSError as error:
            raise BadRecord(f"{name}: can't be read ({error.strerror})") from error
        record = {"image": image, "caption": caption, "index": index, "name": name}
        if self.classes:
            record["label"] = np.int32(self.classes.index(_class(name)))
        return record

    def _fingerprint(self) -> str:
        """Of each pair: the image's relative path and its size in bytes, the caption."""
        digest = hashlib.sha256(b"folder")
        sizes = [(self._root / name).stat().st_size for name in self._images]
        for number, caption in self._pairs:
            digest.update(json.dumps([self._images[number], sizes[number], caption]).encode())
        return digest.hexdigest()[:16]


def _class(name: str) -> str:
    """The first sub-folder on a relative posix path."""
    return name.split("/")[0]


def _captioned_images(
    root: pathlib.Path, skipped: dict[str, str], labels: bool
) -> dict[str, list[str]]:
    """Relative posix path of an image -> its captions, none empty; what isn't kept is `skipped`.

    With labels, an image without a caption is called by its class.
    """
    images = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file()
    )
    images = [name for name in images if not any(p[0] == "." for p in name.split("/"))]
    if not images:
        raise UserError(
            f"name: {root}: no images in it; expected files ending in {' '.join(SUFFIXES)}"
        )
    tables = [name for name in _TABLES if (root / name).is_file()]
    if len(tables) > 1:
        raise UserError(f"name: {root}: it has {' and '.join(tables)}; keep one of them")
    if tables:
        captioned = _from_table(root, tables[0], frozenset(images), skipped)
    else:
        beside = {name: (root / name).with_suffix(".txt") for name in images}
        captioned = {
            name: [line.strip() for line in _text(path) if line.strip()] if path.is_file() else []
            for name, path in beside.items()
        }
    if labels:
        if outside := [name for name in images if "/" not in name]:
            raise UserError(
                f"labels: {root}: {outside[0]} lies in no sub-folder, and the sub-folders are the"
                f" classes; move it ({len(outside)} such images) into one"
            )
        captioned = {name: captioned.get(name) or [_class(name)] for name in images}
    for name in images:
        if not captioned.get(name):
            expected_in = tables[0] if tables else os.path.splitext(name)[0] + ".txt"
            skipped[name] = f"no caption in {expected_in}"
    kept = {name: captions for name, captions in captioned.items() if captions}
    if not kept:
        raise UserError(
            f"name: {root}: none of its {len(images)} images has a caption; write captions.jsonl, "
            f"or {os.path.splitext(images[0])[0]}.txt beside {images[0]} and so on"
        )
    return kept


def _text(path: pathlib.Path) -> list[str]:
    """The lines of a text file, without what ends them."""
    try:
        # Not splitlines: a caption may hold U+2028 and its like, a JSON string too.
        return path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read as UTF-8 text ({error})") from error


def _from_table(
    root: pathlib.Path, table: str, images: frozenset[str], skipped: dict[str, str]
) -> dict[str, list[str]]:
    """Relative posix path -> captions, from the rows of a table."""
    captioned: dict[str, list[str]] = {}
    for line, row in (_json_rows if table.endswith(".jsonl") else _csv_rows)(root / table):
        where = f"{root / table} line {line}"
        name = _inside(root, _field(row, _IMAGE_FIELDS, where), where)
        if name not in images:
            skipped[name] = f"{table} line {line} names it, but no such image is there"
            continue
        texts = _field(row, _CAPTION_FIELDS, where)
        for text in texts if isinstance(texts, list) else [texts]:
            if not isinstance(text, str | None):
                raise wrong(f"{where}: caption", text, "text, or a list of texts")
            caption = (text or "").strip()
            captioned.setdefault(name, []).extend([caption] if caption else [])
    return captioned


def _json_rows(table: pathlib.Path) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(_text(table), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{table} line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f'{table} line {number}: expected {{"file": ..., "caption": ...}}')
        yield number, row


def _csv_rows(table: pathlib.Path) -> Iterator[tuple[int, dict]]:
    reader = csv.DictReader(line + "\n" for line in _text(table))
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{table} line {reader.line_num}: not CSV ({error})") from error


def _field(row: dict, names: tuple[str, ...], where: str) -> Any:
    """The value under the first of `names` that a row has."""
    for name in names:
        if name in row:
            return row[name]
    raise UserError(
        f"{where}: has {', '.join(map(repr, row)) or 'nothing'}; expected one of "
        f"{', '.join(map(repr, names))}"
    )


def _inside(root: pathlib.Path, given: Any, where: str) -> str:
    """The relative posix path of a file that a table names, which must lie in the folder."""
    if not isinstance(given, str) or not given.strip() or "\0" in given:
        raise wrong(f"{where}: file", given, "a path relative to the folder")
    absolute = os.path.abspath(root)
    target = os.path.normpath(os.path.join(absolute, given.strip()))
    if os.path.commonpath([absolute, target]) != absolute:
        raise UserError(f"{where}: file {given!r}: leads out of the folder; name one inside it")
    return pathlib.Path(os.path.relpath(target, absolute)).as_posix()
