"""Parquet files whose rows hold an image and its caption, as img2dataset and others write them.

Parquet is packed in row groups, so reading one row means decoding its group. A few decoded
groups are kept; still, random order wants groups of about a hundred rows.
"""

from __future__ import annotations

import collections
import functools
import json
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
from unclip_jax.data.shards.index import Sample
from unclip_jax.data.shards.source import ShardedSource
from unclip_jax.data.shards.storage import StoredFile, is_remote
from unclip_jax.errors import UserError, one_line, wrong

IMAGES = ("image", "jpg", "jpeg", "png", "webp", "image_bytes")
CAPTIONS = ("caption", "text", "TEXT")
_ADDRESSES = ("url", "URL")
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
        image = _image_column(schema, self._image, file)
        if self._asked:  # refused even where no classes are read
            _column(schema, self._asked, (), "label_key", file)
        label = _column(schema, self._label, (), "label_key", file) if self._label else None
        required = label is None and not self._bare
        caption = _column(schema, self._caption, CAPTIONS, "caption_key", file, required)
        if caption:
            _check_text(schema, caption, file)
        wanted = {"caption": caption, "label": label}
        wanted["key"] = "key" if "key" in schema.names else None
        wanted["status"] = "status" if set(schema.names) >= _STATUS else None
        wanted = {role: path for role, path in wanted.items() if path}
        tops = list(dict.fromkeys(_top(schema, path) for path in wanted.values()))
        names = _class_names(schema, label) if label else ()
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
            values = {role: _values(table, schema, path, role) for role, path in wanted.items()}
            for at in range(len(table)):
                told = {role: column[at] for role, column in values.items()}
                try:
                    key = _text(told.get("key")) or f"{file.name}#{row}"
                    captions = self._captions(told, wanted, names)
                    yield Sample(key, captions, row, size, _text(told.get("label")), content)
                except texts.NotText as error:
                    skipped[f"row {row}"] = str(error)
                row += 1

    def _captions(
        self, told: dict[str, Any], wanted: dict[str, str], names: tuple[str, ...]
    ) -> tuple[str, ...]:
        """The captions of a row; `NotText` says why it can't be used."""
        if (status := _text(told.get("status", _SUCCESS))) != _SUCCESS:
            raise texts.NotText(f"not downloaded ({status})")
        label = _text(told.get("label"))
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
        return _class_names(schema, self._label)

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
    if key and _type_of(schema, key) is None:
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
    if any(name in schema.names for name in ("file_name", "filepath", "image_path")):
        raise UserError(
            f"name: {file.url}: names of pictures and no pictures ({there}); name the folder that"
            " they lie in"
        )
    raise UserError(f"image_key: {file.url} has none of {', '.join(IMAGES)}; name one of: {there}")


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


def _top(schema: Any, path: str) -> str:
    """The column that "a/b" lies in: the whole name first."""
    return path if path in schema.names else path.partition("/")[0]


def _type_of(schema: Any, path: str) -> Any:
    """The Arrow type of what lies at "a/b", in lists or not; None if nothing does."""
    top = _top(schema, path)
    if top not in schema.names:
        return None
    kind, rest = schema.field(top).type, path[len(top) + 1 :]
    for part in rest.split("/") if rest else ():
        kind = _item(kind)
        at = kind.get_field_index(part) if hasattr(kind, "get_field_index") else -1
        if at < 0:
            return None
        kind = kind.field(at).type
    return kind


def _item(kind: Any) -> Any:
    """The type of what a list or a dictionary holds; any other as it is."""
    import pyarrow as pa

    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return kind.value_type if is_list or pa.types.is_dictionary(kind) else kind


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    kind = _item(_item(kind))
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(test(kind) for test in tests)


def _text_paths(kind: Any, path: str) -> list[str]:
    """Where in a column there is text."""
    inner = _item(kind)
    if _is_text(kind):
        return [path]
    if not hasattr(inner, "get_field_index"):
        return []
    fields = (inner.field(at) for at in range(inner.num_fields))
    return [p for field in fields for p in _text_paths(field.type, f"{path}/{field.name}")]


def _check_text(schema: Any, caption: str, file: StoredFile) -> None:
    """Raise UserError unless a caption's column holds text, or numbers of classes with names."""
    import pyarrow as pa

    kind = _type_of(schema, caption)
    inner = _item(kind)
    if (
        _is_text(kind)
        or any(test(inner) for test in (pa.types.is_binary, pa.types.is_large_binary))
        or pa.types.is_null(kind)
        or _class_names(schema, caption)
    ):
        return
    there = [p for name in schema.names for p in _text_paths(schema.field(name).type, name)]
    there += [name for name in schema.names if _class_names(schema, name)]
    raise wrong(
        "caption_key", caption, f"text, which {kind} is not; {file.url} has {texts.offered(there)}"
    )


def _class_names(schema: Any, column: str) -> tuple[str, ...]:
    """What Hugging Face's datasets say that a column's numbers mean; () if nothing."""
    try:
        said = json.loads((schema.metadata or {})[b"huggingface"])
        return tuple(map(str, said["info"]["features"][column]["names"]))
    except (KeyError, ValueError, TypeError):
        return ()


def _values(table: Any, schema: Any, path: str, role: str) -> list[Any]:
    """What a column holds; texts as bytes, since what should be UTF-8 may be something else."""
    import pyarrow as pa

    top = _top(schema, path)
    column = table[top]
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if path != top:
        return [_inside(item, path[len(top) + 1 :]) for item in column]
    many = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    if _is_text(column.type):
        column = column.cast(pa.list_(pa.binary()) if many else pa.binary())
    found = column.to_pylist()
    if role == "caption" and (names := _class_names(schema, path)):
        return [names[n] if n is not None and 0 <= n < len(names) else None for n in found]
    return found


def _inside(item: Any, path: str) -> Any:
    """What lies at "a/b" in an Arrow value."""
    try:
        return texts.lookup(item.as_py(), path)
    except KeyError:
        return None
    except UnicodeDecodeError:
        return b"\xff"  # which is not UTF-8 either


def _text(found: Any) -> str:
    """A value as text; "" for none. `NotText` where it is not UTF-8."""
    return texts.one(found if found is None or isinstance(found, bytes) else str(found))
