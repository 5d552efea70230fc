"""From bytes and values to captions: the one rule for text, whatever holds it.

Text is UTF-8, unless it begins with the mark (BOM) of another Unicode encoding. Nothing is guessed
and nothing replaced: what is neither is no text, and the record is skipped and named.
"""

from __future__ import annotations

import ast
import codecs
import json
from collections.abc import Iterable, Mapping
from typing import Any

CAPTION_FIELDS = ("caption", "text", "captions", "texts")
_MARKS = (  # UTF-32's begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


class NotText(ValueError):
    """What should be a caption is none; the message says what it is."""


class BadEncoding(NotText):
    """Text in another encoding than UTF-8, or damaged."""


def decoded(data: bytes, lenient: bool = False) -> str:
    """Bytes as text, without a byte order mark.

    Args:
        data: the bytes.
        lenient: keep what is not UTF-8 as surrogates: `one` then finds it in its own row.

    Raises:
        BadEncoding: they are not in the encoding that their mark names, or without one not UTF-8,
            or hold zero bytes, as UTF-16 without a mark does.
    """
    mark, encoding = next(((m, e) for m, e in _MARKS if data.startswith(m)), (b"", "utf-8"))
    try:
        how = "surrogateescape" if lenient and encoding == "utf-8" else "strict"
        text = data[len(mark) :].decode(encoding, how)
    except UnicodeDecodeError as error:
        raise BadEncoding(f"text that is not {encoding.upper()}; save it as UTF-8") from error
    if "\0" in text:
        raise BadEncoding("text with zero bytes in it; save it as UTF-8")
    return text


def file_text(data: bytes, lenient: bool = False) -> str:
    """A file's text, its line ends as "\\n"; otherwise as `decoded`."""
    return decoded(data, lenient).replace("\r\n", "\n").replace("\r", "\n")


def one(value: Any) -> str:
    """A value as one stripped text; "" for None. `NotText` if it is no text."""
    if isinstance(value, bytes):
        value = decoded(value)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise NotText(f"{_shown(value)}, which is no text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # surrogates, which `decoded` leaves
        raise BadEncoding("text that is not UTF-8; save it as UTF-8") from error
    return value.strip()


def captions(value: Any) -> tuple[str, ...]:
    """The captions that a value is, none of them empty.

    Args:
        value: a text, bytes of one, a list of those, or None. A text that is itself a list of
            texts, as JSON or Python writes it, is that list.

    Raises:
        NotText: it is something else: a number, a mapping, bytes in another encoding.
    """
    if isinstance(value, list | tuple):
        return tuple(text for item in value for text in captions(item))
    text = one(value)
    if text.startswith(('["', "['")) and text.endswith(('"]', "']")):
        for read in (json.loads, ast.literal_eval):
            try:
                listed = read(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(listed, list) and all(isinstance(item, str) for item in listed):
                return tuple(item.strip() for item in listed if item.strip())
    return (text,) if text else ()


def lookup(value: Any, key: str) -> Any:
    """What nested mappings have under "a/b": the whole name first, then its parts.

    Of a list, each item's. `KeyError` if nothing is there.
    """
    if isinstance(value, list | tuple):
        return [lookup(item, key) for item in value]
    if not isinstance(value, Mapping):
        raise KeyError(key)
    if key in value:
        return value[key]
    head, slash, rest = key.partition("/")
    while slash:
        if head in value:
            return lookup(value[head], rest)
        more, slash, rest = rest.partition("/")
        head = f"{head}/{more}"
    raise KeyError(key)


def text_fields(value: Mapping[str, Any]) -> list[str]:
    """The paths "a/b" in a mapping under which there is text: what `caption_key` may name."""
    found = []
    for key, item in value.items():
        inner = item[0] if isinstance(item, list | tuple) and item else item
        if isinstance(inner, Mapping):
            found += [f"{key}/{path}" for path in text_fields(inner)]
        elif isinstance(inner, str | bytes):
            found.append(str(key))
    return found


def field_of(names: Iterable[str], usual: tuple[str, ...]) -> str | None:
    """The first of the usual names that is among `names`, in whatever case; None for none."""
    plain = {name.strip().lower(): name for name in reversed(list(names))}
    return next((plain[name] for name in usual if name in plain), None)


def offered(names: Iterable[str], what: str = "text") -> str:
    """What a message offers for a key: the names, at most twenty of them."""
    names = list(names)
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return (", ".join(map(repr, names[:20])) + more) or f"nothing that holds {what}"


def _shown(value: Any) -> str:
    kind = type(value).__name__
    return (
        f"{kind} {str(value)[:60]!r}" if not isinstance(value, Mapping) else f"a mapping ({kind})"
    )
