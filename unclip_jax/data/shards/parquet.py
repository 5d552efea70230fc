"""Parquet files whose rows hold an image and its caption, as img2dataset and others write them.

Parquet is packed in row groups, so reading one row means decoding its group. A few decoded
groups are kept; still, random order wants groups of about a hundred rows.
"""

from __future__ import annotations

import collections
import functools
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
from absl import logging

from unclip_jax.common import extras
from unclip_jax.data import texts
from unclip_jax.data.contents import digest
from unclip_jax.data.datasets import DataConfig
from unclip_jax.data.memory import Budget
from unclip_jax.data.records import BadRecord
from unclip_jax.data.shards import columns
from unclip_jax.data.shards.index import Sample
from unclip_jax.data.shards.source import ShardedSource
from unclip_jax.data.shards.storage import StoredFile, is_remote
from unclip_jax.errors import UserError, one_line

CAPTIONS = ("caption", "text", "TEXT")
_STATUS = frozenset({"key", "url", "status"})  # columns of img2dataset, which keeps failures too
_SUCCESS = "success"
_OPEN_FILES = 256
_KEPT = 2**28  # bytes of decoded row groups
_DECODED_AT_ONCE = 2**30  # bytes of images in the row groups that threads decode
_LARGE_GROUP = 2**26  # bytes of images in a row group, from where random order is slow
_MAX_GROUP = 2**32
_PART = 2**22  # bytes of a column read at a time while indexing


def open_source(config: DataConfig, pattern: str) -> ShardedSource:
    """The parquet files that a config names."""
    return ShardedSource(config, pattern, ParquetShards(config))


class ParquetShards:
    """The format of parquet files with images in them; see `index.Format`."""

    def __init__(self, config: DataConfig):
        """What a config says of the columns; the image's holds bytes, or a struct with "bytes"."""
        self._parquet = extras.load("pyarrow.parquet", "parquet", "name: reading parquet")
        self._image, self._caption = config.key("image"), config.key("caption")
        self._label = config.label_key if config.labels else ""
        self._asked, self._bare = config.key("label"), config.bare
        self.settings = ["parquet", self._image, self._caption, self._label, self._bare]
        self._open = functools.lru_cache(_OPEN_FILES)(self._opening)
        self._groups, self._decoding = _Recent(_KEPT), Budget(_DECODED_AT_ONCE)
        self._warned = False

    def samples(self, file: StoredFile, skipped: dict[str, str]) -> Iterator[Sample]:
        """The captioned rows of a file, from its columns without the images.

        A sample's place is its row. Its size is that of the images of its row group, since that of
        one image takes decoding it.

        Raises:
            UserError: it is no parquet, has no such columns, or too large row groups.
            StorageError: it can't be read.
        """
        import pyarrow as pa

        try:
            yield from self._samples(file, skipped)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(
                f"name: {file.url}: not readable as parquet ({one_line(error)})"
            ) from error

    def image(self, file: StoredFile, place: int, size: int) -> bytes:
        """The image of a row; its row group is decoded, or at hand.

        Raises:
            BadRecord: no such row, or no readable image in it.
            StorageError: the file can't be read.
        """
        import pyarrow as pa

        try:
            metadata, column, ends = self._open(file)
            group = int(np.searchsorted(ends, place, "right"))
            if group >= len(ends):
                raise BadRecord(f"{file.url}: no row {place} any more")
            images = self._groups.get(
                (file.url, group), lambda: self._decode(file, metadata, column, group)
            )
            found = images[place - (int(ends[group - 1]) if group else 0)].as_py()
        except (pa.ArrowException, OSError, ValueError) as error:
            raise BadRecord(f"{file.url} row {place}: can't be read ({one_line(error)})") from error
        found = found.get("bytes") if isinstance(found, dict) else found
        if not found:
            raise BadRecord(f"{file.url} row {place}: no image in it")
        return found

    def _samples(self, file: StoredFile, skipped: dict[str, str]) -> Iterator[Sample]:
        parquet = self._parquet.ParquetFile(file.open())
        schema = parquet.schema_arrow
        image = columns.find_image(schema, self._image, file)
        if self._asked:  # refused even where no classes are read
            columns.find(schema, self._asked, (), "label_key", file)
        label = columns.find(schema, self._label, (), "label_key", file) if self._label else None
        required = label is None and not self._bare
        caption = columns.find(schema, self._caption, CAPTIONS, "caption_key", file, required)
        if caption:
            columns.check_text(schema, caption, file)
        wanted = {"caption": caption, "label": label}
        wanted["key"] = "key" if "key" in schema.names else None
        wanted["status"] = "status" if set(schema.names) >= _STATUS else None
        wanted = {role: path for role, path in wanted.items() if path}
        tops = list(dict.fromkeys(columns.outer(schema, path) for path in wanted.values()))
        names = columns.class_names(schema, label) if label else ()
        row = 0
        for group in range(parquet.num_row_groups):
            size = _image_bytes(parquet.metadata.row_group(group), image)
            if size > _MAX_GROUP:
                raise UserError(
                    f"name: {file.url}: {size} bytes in a row group, more than {_MAX_GROUP}; write "
                    "smaller ones (row_group_size=100)"
                )
            content = _content(file, parquet.metadata.row_group(group), image)
            table = parquet.read_row_group(group, tops, use_threads=False)
            values = {
                role: columns.values(table, schema, path, role) for role, path in wanted.items()
            }
            for at in range(len(table)):
                told = {role: column[at] for role, column in values.items()}
                try:
                    key = columns.text(told.get("key")) or f"{file.name}#{row}"
                    captions = self._captions(told, wanted, names)
                    yield Sample(key, captions, row, size, columns.text(told.get("label")), content)
                except texts.NotText as error:
                    skipped[f"row {row}"] = str(error)
                row += 1

    def _captions(
        self, told: dict[str, Any], wanted: dict[str, str], names: tuple[str, ...]
    ) -> tuple[str, ...]:
        """The captions of a row; `NotText` says why it can't be used."""
        if (status := columns.text(told.get("status", _SUCCESS))) != _SUCCESS:
            raise texts.NotText(f"not downloaded ({status})")
        label = columns.text(told.get("label"))
        if names:  # which number the classes
            label = names[int(label)] if label.isdigit() and int(label) < len(names) else ""
        if "label" in wanted and not label:
            raise texts.NotText(f"nothing under {wanted['label']!r}")
        try:
            found = texts.captions(told.get("caption"))
        except texts.NotText:
            if not self._bare:
                raise
            found = ()
        if not (found or label or self._bare):
            raise texts.NotText(f"nothing under {wanted['caption']!r}")
        return found or (label,)

    def class_names(self, file: StoredFile) -> tuple[str, ...]:
        """What Hugging Face's datasets say that the numbers of the label mean; () if nothing."""
        schema = self._parquet.ParquetFile(file.open()).schema_arrow
        return columns.class_names(schema, self._label)

    def _opening(self, file: StoredFile) -> tuple[Any, str, np.ndarray]:
        """Metadata, the column of images, and where each row group ends."""
        parquet = self._parquet.ParquetFile(file.open())
        metadata = parquet.metadata
        column = columns.find_image(parquet.schema_arrow, self._image, file)
        groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
        largest = max((_image_bytes(group, column) for group in groups), default=0)
        if largest > _LARGE_GROUP and not self._warned:
            self._warned = True
            logging.warning(
                "%s: %d MB of images in a row group: in random order each image read costs that"
                " much; write row_group_size=100, or tar shards",
                file.url,
                largest >> 20,
            )
        return metadata, column, np.cumsum([group.num_rows for group in groups])

    def _decode(self, file: StoredFile, metadata: Any, column: str, group: int) -> Any:
        """The images of a row group. Each has a file object of its own: threads share none."""
        parquet = self._parquet.ParquetFile(file.open(), metadata=metadata)
        with self._decoding.holding(_image_bytes(metadata.row_group(group), column)):
            return parquet.read_row_group(group, [column], use_threads=False).column(0)


class _Recent:
    """What was made lately, up to a number of bytes; made once, whoever asks meanwhile."""

    def __init__(self, limit: int):
        self._limit, self._lock = limit, threading.Lock()
        self._made: collections.OrderedDict[Any, Future] = collections.OrderedDict()

    def get(self, key: Any, make: Any) -> Any:
        """What `make()` returned for this key, an Arrow array."""
        with self._lock:
            future = self._made.get(key)
            if mine := future is None:
                future = self._made[key] = Future()
            self._made.move_to_end(key)
        if mine:
            try:
                future.set_result(make())
            except BaseException as error:
                with self._lock:
                    self._made.pop(key, None)
                future.set_exception(error)
            with self._lock:
                sizes = {key: f.result().nbytes for key, f in self._made.items() if f.done()}
                for old in list(sizes)[:-1]:
                    if sum(sizes.values()) > self._limit:
                        del self._made[old], sizes[old]
        return future.result()


def _content(file: StoredFile, group: Any, column: str) -> str:
    """What differs where the images of a row group do: a digest of their column, as it is stored.

    Of a remote file it is what its store says of the whole file, if that says anything: reading the
    images would be fetching the data set.
    """
    if is_remote(file.url) and file.version:
        return file.version
    chunks = (group.column(number) for number in range(group.num_columns))
    parts = []
    for chunk in chunks:
        if chunk.path_in_schema == column:
            first = chunk.data_page_offset
            if chunk.has_dictionary_page:
                first = min(first, chunk.dictionary_page_offset)
            stop = first + chunk.total_compressed_size
            parts += [(a, min(a + _PART, stop)) for a in range(first, stop, _PART)]
    return digest(file.read(*part) for part in parts).hex()


def _image_bytes(group: Any, column: str) -> int:
    """The size of a column of a row group, decoded but still as image files."""
    chunks = (group.column(number) for number in range(group.num_columns))
    return sum(c.total_uncompressed_size for c in chunks if c.path_in_schema == column)
