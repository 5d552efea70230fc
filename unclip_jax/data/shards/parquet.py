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
from unclip_jax.data.datasets import DataConfig
from unclip_jax.data.records import BadRecord
from unclip_jax.data.shards.index import Sample
from unclip_jax.data.shards.source import ShardedSource, named
from unclip_jax.data.shards.storage import StoredFile
from unclip_jax.errors import UserError, one_line, wrong

IMAGES = ("image", "jpg", "jpeg", "png", "webp", "image_bytes")
CAPTIONS = ("caption", "text", "TEXT")
_ADDRESSES = ("url", "URL")
_STATUS = frozenset({"key", "url", "status"})  # columns of img2dataset, which keeps failures too
_SUCCESS = b"success"
_OPEN_FILES = 256
_KEPT = 2**28  # bytes of decoded row groups
_LARGE_GROUP = 2**26  # bytes of images in a row group, from where random order is slow
_MAX_GROUP = 2**32


def open_source(config: DataConfig, pattern: str) -> ShardedSource:
    """The parquet files that a config names."""
    return ShardedSource(config, pattern, ParquetShards(config))


class ParquetShards:
    """The format of parquet files with images in them; see `index.Format`."""

    def __init__(self, config: DataConfig):
        """What a config says of the columns; the image's holds bytes, or a struct with "bytes"."""
        self._parquet = extras.load("pyarrow.parquet", "parquet", "name: reading parquet")
        self._image = named(config.image_key, "image")
        self._caption = named(config.caption_key, "caption")
        self._label = config.label_key if config.labels else ""
        self.settings = ["parquet", self._image, self._caption, self._label]
        self._open = functools.lru_cache(_OPEN_FILES)(self._opening)
        self._groups = _Recent(_KEPT)
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
        image = _image_column(schema, self._image, file)
        label = _column(schema, self._label, (), "label_key", file) if self._label else None
        caption = _column(schema, self._caption, CAPTIONS, "caption_key", file, label is None)
        named = "key" if "key" in schema.names else None
        status = "status" if set(schema.names) >= _STATUS else None
        wanted = [name for name in (caption, label, named, status) if name]
        row = 0
        for group in range(parquet.num_row_groups):
            size = _image_bytes(parquet.metadata.row_group(group), image)
            if size > _MAX_GROUP:
                raise UserError(
                    f"name: {file.url}: {size} bytes in a row group, more than {_MAX_GROUP}; write "
                    "smaller ones (row_group_size=100)"
                )
            table = parquet.read_row_group(group, wanted, use_threads=False)
            values = {name: _values(table[name]) for name in wanted}
            for at in range(len(table)):
                told = values[status][at] if status else _SUCCESS
                class_name = _text(values[label][at]) if label else ""
                captions = _texts(values[caption][at]) if caption else ()
                captions = captions or ((class_name,) if class_name else ())
                if told != _SUCCESS:
                    skipped[f"row {row}"] = f"not downloaded ({_text(told)})"
                elif label and not class_name:
                    skipped[f"row {row}"] = f"nothing under {label!r}"
                elif not captions:
                    skipped[f"row {row}"] = f"nothing under {caption!r}"
                else:
                    key = _text(values[named][at]) if named else ""
                    yield Sample(key or f"{file.name}#{row}", captions, row, size, class_name)
                row += 1

    def _opening(self, file: StoredFile) -> tuple[Any, str, np.ndarray]:
        """Metadata, the column of images, and where each row group ends."""
        parquet = self._parquet.ParquetFile(file.open())
        metadata = parquet.metadata
        column = _image_column(parquet.schema_arrow, self._image, file)
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


def _column(
    schema: Any,
    key: str,
    usual: tuple[str, ...],
    field: str,
    file: StoredFile,
    required: bool = True,
) -> str | None:
    """The column a key names, or the first of the usual ones; None if none is required."""
    there = ", ".join(schema.names)[:300]
    if key and key not in schema.names:
        raise wrong(field, key, f"a column of {file.url}: {there}")
    found = key or next((name for name in usual if name in schema.names), None)
    if found is None and required:
        raise UserError(
            f"{field}: {file.url} has none of {', '.join(usual)}; name one of its columns: {there}"
        )
    return found


def _image_column(schema: Any, key: str, file: StoredFile) -> str:
    """The path of the column of image bytes: "jpg", or "image.bytes" within a struct."""
    import pyarrow as pa

    named = _column(schema, key, IMAGES, "image_key", file, required=False)
    if named is not None:
        kind = schema.field(named).type
        inside = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        leaf = kind.field("bytes").type if inside else kind
        if pa.types.is_binary(leaf) or pa.types.is_large_binary(leaf):
            return f"{named}.bytes" if inside else named
    if any(name in schema.names for name in _ADDRESSES):
        raise UserError(
            f"name: {file.url}: addresses of images and no images; download them with img2dataset, "
            "or name the tar shards that it wrote beside this file: wds:PATTERN"
        )
    if named is not None:
        raise UserError(f"image_key: {named!r}: {file.url} has {kind} there; expected image bytes")
    there = ", ".join(schema.names)[:300]
    raise UserError(f"image_key: {file.url} has none of {', '.join(IMAGES)}; name one of: {there}")


def _image_bytes(group: Any, column: str) -> int:
    """The size of a column of a row group, decoded but still as image files."""
    chunks = (group.column(number) for number in range(group.num_columns))
    return sum(c.total_uncompressed_size for c in chunks if c.path_in_schema == column)


def _values(column: Any) -> list[Any]:
    """What a column holds; texts as bytes, since what should be UTF-8 may be something else."""
    import pyarrow as pa

    kind, many = column.type, pa.types.is_list(column.type)
    if pa.types.is_string(kind.value_type if many else kind):
        column = column.cast(pa.list_(pa.binary()) if many else pa.binary())
    return column.to_pylist()


def _text(found: Any) -> str:
    """A value as text, bytes that are no UTF-8 replaced; "" for none."""
    if isinstance(found, bytes):
        return found.decode("utf-8", "replace").strip()
    return "" if found is None else str(found).strip()


def _texts(found: Any) -> tuple[str, ...]:
    """The captions that a value is: those that are texts, and not empty."""
    texts = found if isinstance(found, list) else [found]
    return tuple(text for t in texts if isinstance(t, str | bytes) and (text := _text(t)))
