"""Tables of captions: which file names which picture, and what it says of it.

CSV with commas, semicolons, tabs or bars; JSON lines; JSON: COCO's annotations, Karpathy's splits,
a list of objects, or an object by file name; Flickr's `name.jpg#0<tab>caption`; parquet. What a
table is follows from its content, and what its fields mean from their names or the config's keys.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from unclip_jax.common import extras
from unclip_jax.data import texts
from unclip_jax.errors import UserError, one_line, wrong

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".token", ".txt", ".parquet")
IMAGE_FIELDS = (
    "file", "image", "file_name", "filename", "filepath", "file_path", "path", "image_path", "img",
    "image_name", "image_file", "img_path",
)  # fmt: skip
CAPTION_FIELDS = (*texts.CAPTION_FIELDS, "title", "description", "comment", "raw")
LABEL_FIELDS = ("label",)
_ADDRESSES = ("url", "image_url", "coco_url", "flickr_url", "link")
_DELIMITERS = ",\t;|"
_FLICKR = re.compile(r"([^\t]+)#\d+\t(.*)")


class Keys(NamedTuple):
    """The fields that a config names; "" for any usual one."""

    image: str = ""
    caption: str = ""
    label: str = ""


class Row(NamedTuple):
    """What a row of a table says.

    Attributes:
        where: the table and the line, for messages.
        file: of which picture, as it is written there.
        captions: none empty; an empty tuple for none.
        label: the picture's class; "" for none.
        fault: why its caption can't be read; "" if it can.
    """

    where: str
    file: str
    captions: tuple[str, ...]
    label: str = ""
    fault: str = ""


def rows(
    name: str, data: bytes, keys: Keys, *, bare: bool = False, is_image: Callable[[str], bool]
) -> Iterator[Row]:
    """The rows of a table.

    Args:
        name: of the file, for messages; its suffix says how it is packed.
        data: its content.
        keys: the fields to read.
        bare: whether a table without captions will do.
        is_image: whether a text names a picture of the folder: tells a first row from a header.

    Raises:
        UserError: it isn't what its suffix says, a row is broken, or lacks a field; with the line.
    """
    for line, fields in _records(name, data, is_image, keys):
        yield _row(f"{name} {line}", fields, keys, bare)


def _row(where: str, fields: dict[str, Any], keys: Keys, bare: bool) -> Row:
    file = _found(where, fields, "image", keys.image, IMAGE_FIELDS)
    label = _found(where, fields, "label", keys.label, LABEL_FIELDS, bool(keys.label))
    required = not bare and not label
    found = _found(where, fields, "caption", keys.caption, CAPTION_FIELDS, required)
    try:
        captions, fault = texts.captions(found), ""
    except texts.BadEncoding as error:
        captions, fault = (), str(error)
    except texts.NotText:
        offers = texts.offered(texts.text_fields(fields))
        raise wrong(
            f"{where}: caption", found, "text, or a list of texts", f"caption_key may be {offers}"
        ) from None
    if not isinstance(file, str) or not file.strip() or "\0" in file:
        raise wrong(f"{where}: file", file, "a path relative to the folder")
    return Row(where, file.strip(), captions, "" if label is None else str(label).strip(), fault)


def _found(
    where: str,
    fields: dict[str, Any],
    what: str,
    key: str,
    usual: tuple[str, ...],
    required: bool = True,
) -> Any:
    """What a row has under a key, or under the first of the usual names."""
    try:
        if key:
            return texts.lookup(fields, key)
        name = texts.field_of(fields, usual)
        if name is None and what == "caption" and "sentences" in fields:  # Karpathy's
            return texts.lookup(fields["sentences"], "raw")
        if name is not None:
            value = fields[name]
            if what == "caption" and (inner := _texts_inside(value)):
                raise UserError(
                    f"{where}: {name!r} holds no text, but fields; name one,"
                    f" {what}_key={name + '/' + inner[0]!r}"
                )
            return value
    except KeyError:
        pass
    if not required:
        return None
    there = ", ".join(map(repr, fields)) or "nothing"
    if key:
        raise wrong(f"{what}_key", key, f"a field of {where}, which has {there}")
    if what == "image" and texts.field_of(fields, _ADDRESSES):
        raise UserError(
            f"{where}: has {there}: addresses of pictures and no files; download them with"
            " img2dataset, and name what it writes"
        )
    shown = ", ".join(map(repr, usual[:4]))
    raise UserError(
        f"{where}: has {there}; expected one of {shown} and the like, or set {what}_key"
    )


def _texts_inside(value: Any) -> list[str]:
    inner = value[0] if isinstance(value, list) and value else value
    return texts.text_fields(inner) if isinstance(inner, dict) else []


def _records(
    name: str, data: bytes, is_image: Callable[[str], bool], keys: Keys
) -> Iterator[tuple[str, dict[str, Any]]]:
    """("line 7", fields) of each row."""
    if name.endswith(".parquet"):
        yield from _parquet(name, data)
        return
    try:
        text = texts.file_text(data, lenient=True)
    except texts.NotText as error:
        raise UserError(f"{name}: can't be read as UTF-8 text ({error})") from error
    if name.endswith((".jsonl", ".ndjson")):
        yield from _json_lines(name, text)
    elif name.endswith(".json"):
        yield from _json(name, text)
    elif _FLICKR.match(text):
        for number, line in _lines(text):
            if not (match := _FLICKR.fullmatch(line)):
                raise wrong(f"{name} line {number}", line[:80], "name.jpg#0<tab>caption")
            yield f"line {number}", {"file": match[1], "caption": match[2]}
    else:
        yield from _separated(name, text, is_image, keys)


def _lines(text: str) -> Iterator[tuple[int, str]]:
    # Not splitlines: a caption may hold U+2028 and its like, a JSON string too.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line


def _json_lines(name: str, text: str) -> Iterator[tuple[str, dict]]:
    for number, line in _lines(text):
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name} line {number}: not JSON ({one_line(error)})") from error
        if not isinstance(fields, dict):
            raise UserError(f'{name} line {number}: expected {{"file": ..., "caption": ...}}')
        yield f"line {number}", fields


def _json(name: str, text: str) -> Iterator[tuple[str, dict]]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not JSON ({one_line(error)})") from error
    images = found.get("images") if isinstance(found, dict) else None
    if images and isinstance(found.get("annotations"), list):
        files = {image["id"]: image for image in images if "id" in image}
        for number, note in enumerate(found["annotations"]):
            if not isinstance(note, dict) or note.get("image_id") not in files:
                raise UserError(f"{name}: annotation {number} is of no image that it lists")
            file = texts.lookup(files[note["image_id"]], "file_name")
            yield f"annotation {number}", {"file_name": file, **note}
        return
    entries = images if isinstance(images, list) else found
    if isinstance(entries, dict):
        entries = [
            {"file": file, **value} if isinstance(value, dict) else {"file": file, "caption": value}
            for file, value in entries.items()
        ]
    for number, fields in enumerate(entries if isinstance(entries, list) else [entries]):
        if not isinstance(fields, dict):
            raise UserError(f'{name} entry {number}: expected {{"file": ..., "caption": ...}}')
        yield f"entry {number}", fields


def _parquet(name: str, data: bytes) -> Iterator[tuple[str, dict]]:
    import pyarrow as pa

    parquet = extras.load("pyarrow.parquet", "parquet", f"name: {name}")
    try:
        table = parquet.ParquetFile(io.BytesIO(data)).read()
        for number, fields in enumerate(table.to_pylist()):
            yield f"row {number}", fields
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{name}: not readable as parquet ({one_line(error)})") from error


def _separated(
    name: str, text: str, is_image: Callable[[str], bool], keys: Keys
) -> Iterator[tuple[str, dict]]:
    """CSV of whatever separator its header has."""
    start = 1
    if text.startswith("sep=") and text[5:6] == "\n":  # as Excel writes it
        text, start = text[6:], 2
    delimiter = _delimiter(next(_lines(text), (1, ""))[1], keys)
    parsed = (_plain if delimiter in "\t|" else _quoted)(name, text, delimiter, start)
    first = next(parsed, None)
    if first is None:
        return
    header = [field.strip() for field in first[1]]
    if any(map(is_image, header)):  # no header, but a file and its caption
        if delimiter != "\t" or len(header) != 2:
            raise wrong(f"{name} line {first[0]}", header, "the names of the fields: file,caption")
        header = ["file", "caption"] if is_image(header[0]) else ["caption", "file"]
        yield f"line {first[0]}", dict(zip(header, first[1], strict=True))
    elif any(re.match(r"https?://", field) for field in first[1]):
        raise UserError(
            f"{name}: addresses of pictures and no files, as CC3M's own table has; download them"
            " with img2dataset, and name what it writes"
        )
    for line, fields in parsed:
        if len(fields) != len(header):
            raise UserError(
                f"{name} line {line}: {len(fields)} fields where the header has {len(header)}"
                f" ({', '.join(header)}); put captions with {delimiter!r} in them in double quotes"
            )
        for field in fields:
            for below in field.split("\n")[1:]:
                if is_image(below.split(delimiter)[0].strip()):
                    raise UserError(
                        f"{name} line {line}: a quote (\") that the row doesn't close: it would"
                        " swallow the rows below; close or double it"
                    )
        yield f"line {line}", dict(zip(header, fields, strict=True))


def _delimiter(header: str, keys: Keys) -> str:
    """The separator of a table: the one that shows a picture and a caption among its fields."""

    def worth(delimiter: str) -> tuple[int, int]:
        fields = [field.strip().strip('"').strip() for field in header.split(delimiter)]
        shows = (keys.image in fields or texts.field_of(fields, IMAGE_FIELDS) is not None) + (
            keys.caption in fields or texts.field_of(fields, CAPTION_FIELDS) is not None
        )
        return shows if len(fields) > 1 else 0, len(fields)

    return max(_DELIMITERS, key=worth)


def _quoted(name: str, text: str, delimiter: str, start: int) -> Iterator[tuple[int, list[str]]]:
    """The rows of CSV as spreadsheets write it, each with the line where it begins."""
    reader = csv.reader(
        (line + "\n" for line in text.split("\n")), delimiter=delimiter, strict=True
    )
    line = start
    try:
        for fields in reader:
            if fields and any(field.strip() for field in fields):
                yield line, fields
            line = reader.line_num + start
    except csv.Error as error:
        why = "a quote that is never closed, or text behind a closed one"
        raise UserError(f"{name} line {line}: not CSV: {why} ({one_line(error)})") from error


def _plain(name: str, text: str, delimiter: str, start: int) -> Iterator[tuple[int, list[str]]]:
    """The rows of a table with tabs or bars: one a line; a quoted field loses its quotes."""
    for number, line in _lines(text):
        fields = []
        for field in (part.strip() for part in line.split(delimiter)):
            if field.startswith('"') and field.count('"') % 2:
                raise UserError(
                    f'{name} line {number + start - 1}: a quote (") that is never closed; close it'
                )
            whole = len(field) > 1 and field[0] == field[-1] == '"'
            inner = field[1:-1].replace('""', "\0")
            fields.append(inner.replace("\0", '"') if whole and '"' not in inner else field)
        yield number + start - 1, fields
