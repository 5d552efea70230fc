"""The members of a tar file, from its headers alone: POSIX ustar and pax, and GNU's long names.

A tar is a row of members, each a header of 512 bytes and its data, filled up to a multiple of 512.
A header that doesn't fit its own checksum is none. Nothing here touches a disk: a member is a name,
taken for no path, and a place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

BLOCK = 512
_READ = 2**16  # bytes looked at together behind the end mark
_MAX_LONG_NAME = 2**20  # bytes of a pax header or a long name
_WITHOUT_DATA = b"123456V"  # links, devices, folders, pipes, volume labels
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Member(NamedTuple):
    """A file inside a tar: the place of its data."""

    name: str
    offset: int
    size: int


class Damaged(Exception):
    """A tar can't be read further; the message says why and where.

    Attributes:
        offset: where, in bytes; 0 if it is no tar at all.
    """

    def __init__(self, why: str, offset: int):
        """`why`, at byte `offset`, which is 0 if it is no tar at all."""
        super().__init__(f"{why} at byte {offset}")
        self.offset = offset


def members(read: Callable[[int, int], bytes], size: int) -> Iterator[Member]:
    """The regular files of a tar, in order, each wholly inside it.

    Args:
        read: the bytes from .. up to ..; asked from front to back.
        size: of the tar, in bytes.

    Raises:
        Damaged: the tar ends early, without an end mark or before its last byte, or turns into
            something else.
    """
    if size < BLOCK:
        raise Damaged(f"only {size} bytes", 0)
    offset, named = 0, {}
    while offset < size:
        if offset + BLOCK > size:
            raise Damaged("ends inside a header", offset)
        header = read(offset, offset + BLOCK)
        if not any(header):
            _check_rest(read, offset + BLOCK, size)
            return
        kind, name, length = _parsed(header, offset)
        data = offset + BLOCK
        if kind in b"xL":
            if length > _MAX_LONG_NAME:
                raise Damaged(f"a name or header of {length} bytes", offset)
            if data + length > size:
                raise Damaged("ends inside a long name", offset)
            payload = read(data, data + length)
            named |= _pax(payload, offset) if kind == b"x" else {"path": payload.rstrip(b"\0")}
        elif kind not in b"gK":
            name = named.get("path", name)
            length = 0 if kind in _WITHOUT_DATA else int(named.get("size", length))
            if kind == b"S" or "GNU.sparse.major" in named:
                raise Damaged("a sparse file", offset)
            if data + length > size:
                raise Damaged(f"ends inside {_text(name)[:200]!r}", offset)
            if kind not in _WITHOUT_DATA:
                yield Member(_text(name), data, length)
            named = {}
        offset = data + -(-length // BLOCK) * BLOCK
    raise Damaged("ends without an end mark, so it may be cut short", offset)


def _check_rest(read: Callable[[int, int], bytes], start: int, size: int) -> None:
    """Raise Damaged unless all bytes behind the end mark are zeros, of which there may be some."""
    for offset in range(start, size, _READ):
        if any(read(offset, min(offset + _READ, size))):
            rest = size - start
            raise Damaged(f"{rest} bytes follow its end mark, perhaps another archive,", start)


def _parsed(header: bytes, offset: int) -> tuple[bytes, bytes, int]:
    """Type flag, name and size of a header that fits its checksum."""
    try:
        expected = _number(header[148:156])
        length = _number(header[124:136])
    except ValueError:
        raise Damaged(_no_header(header), offset) from None
    if expected != sum(header[:148]) + sum(b" " * 8) + sum(header[156:]) or length < 0:
        raise Damaged(_no_header(header), offset)
    name = header[:100].split(b"\0")[0]
    prefix = header[345:500].split(b"\0")[0]
    if header[257:263] == b"ustar\0" and prefix:  # GNU's own format has other things there
        name = prefix + b"/" + name
    return header[156:157], name, length


def _no_header(header: bytes) -> str:
    packed = next((kind for magic, kind in _PACKED.items() if header.startswith(magic)), None)
    return f"{packed}-compressed data" if packed else "no tar header"


def _number(field: bytes) -> int:
    """A number in octal digits, or in GNU's binary form where those don't suffice."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    return int(field.split(b"\0")[0].strip() or b"0", 8)


def _pax(payload: bytes, offset: int) -> dict[str, bytes]:
    """The records "length key=value\\n" of a pax header."""
    found, place = {}, 0
    while place < len(payload):
        digits, space, _ = payload[place : place + 20].partition(b" ")
        if not space or not digits.isdigit() or not int(digits):
            raise Damaged("a pax header that makes no sense", offset)
        record = payload[place + len(digits) + 1 : place + int(digits)]
        key, _, value = record.removesuffix(b"\n").partition(b"=")
        if key == b"size" and not (value.isdigit() and len(value) < 20):
            raise Damaged("a pax size that is no number", offset)
        found[_text(key)] = value
        place += int(digits)
    return found


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
