"""The columns of a parquet file: which hold images and captions, and what is in them.

A column is named by its path: "a/b" is b in the structs, or the lists of structs, of column a.
"""

from __future__ import annotations

import json
from typing import Any

from unclip_jax.data import texts
from unclip_jax.data.shards.storage import StoredFile
from unclip_jax.errors import UserError, wrong

IMAGES = ("image", "jpg", "jpeg", "png", "webp", "image_bytes")
_ADDRESSES = ("url", "URL")


def find(
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


def find_image(schema: Any, key: str, file: StoredFile) -> str:
    """The path of the column of image bytes: "jpg", or "image.bytes" within a struct."""
    import pyarrow as pa

    named = find(schema, key, IMAGES, "image_key", file, required=False)
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


def outer(schema: Any, path: str) -> str:
    """The column that "a/b" lies in: the whole name first."""
    return path if path in schema.names else path.partition("/")[0]


def _type_of(schema: Any, path: str) -> Any:
    """The Arrow type of what lies at "a/b", in lists or not; None if nothing does."""
    top = outer(schema, path)
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


def check_text(schema: Any, caption: str, file: StoredFile) -> None:
    """Raise UserError unless a caption's column holds text, or numbers of classes with names."""
    import pyarrow as pa

    kind = _type_of(schema, caption)
    inner = _item(kind)
    if (
        _is_text(kind)
        or any(test(inner) for test in (pa.types.is_binary, pa.types.is_large_binary))
        or pa.types.is_null(kind)
        or class_names(schema, caption)
    ):
        return
    there = [p for name in schema.names for p in _text_paths(schema.field(name).type, name)]
    there += [name for name in schema.names if class_names(schema, name)]
    raise wrong(
        "caption_key", caption, f"text, which {kind} is not; {file.url} has {texts.offered(there)}"
    )


def class_names(schema: Any, column: str) -> tuple[str, ...]:
    """What Hugging Face's datasets say that a column's numbers mean; () if nothing."""
    try:
        said = json.loads((schema.metadata or {})[b"huggingface"])
        return tuple(map(str, said["info"]["features"][column]["names"]))
    except (KeyError, ValueError, TypeError):
        return ()


def values(table: Any, schema: Any, path: str, role: str) -> list[Any]:
    """What a column holds; texts as bytes, since what should be UTF-8 may be something else."""
    import pyarrow as pa

    top = outer(schema, path)
    column = table[top]
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if path != top:
        return [_inside(item, path[len(top) + 1 :]) for item in column]
    many = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    if _is_text(column.type):
        column = column.cast(pa.list_(pa.binary()) if many else pa.binary())
    found = column.to_pylist()
    if role == "caption" and (names := class_names(schema, path)):
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


def text(found: Any) -> str:
    """A value as text; "" for none. `NotText` where it is not UTF-8."""
    return texts.one(found if found is None or isinstance(found, bytes) else str(found))
