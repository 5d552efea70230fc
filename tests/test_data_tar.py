"""Tar members: those that Python's own tarfile finds, and what is no tar."""

import io
import tarfile

import numpy as np
import pytest

from tests.tar_shards import shard
from unclip_jax.data.shards import tar


def walk(content):
    return list(tar.members(lambda start, stop: content[start:stop], len(content)))


def until_damaged(content):
    found = []
    try:
        for member in tar.members(lambda start, stop: content[start:stop], len(content)):
            found.append(member)
    except tar.Damaged:
        pass
    return found


LONG = "d/" * 80 + "a" * 60 + ".txt"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(form):
    rng = np.random.default_rng(form)
    names = ["a.txt", "b/c.d.png", "p/" * 60 + "q.txt"]
    names += [] if form == tarfile.USTAR_FORMAT else [LONG, "naïve café ✓.txt", "x" * 5000]
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as opened:
        for name in names:
            folder = tarfile.TarInfo("some folder")
            folder.type = tarfile.DIRTYPE
            link = tarfile.TarInfo("a link")
            link.type, link.linkname = tarfile.SYMTYPE, "l" * 99
            info = tarfile.TarInfo(name)
            info.size = int(rng.integers(0, 3000))
            opened.addfile(folder)
            opened.addfile(link)
            opened.addfile(info, io.BytesIO(rng.bytes(info.size)))
    content = file.getvalue()
    with tarfile.open(fileobj=io.BytesIO(content)) as opened:
        expected = [(m.name, m.offset_data, m.size) for m in opened if m.isfile()]
    assert [tuple(member) for member in walk(content)] == expected
    # Without its end mark it may be cut short; behind the mark may be another archive.
    end = max(offset + size for _, offset, size in expected)
    for other, why in (
        (content[: end + -end % 512], "without an end mark"),
        (content * 2, "follow"),
    ):
        with pytest.raises(tar.Damaged, match=why):
            walk(other)
        assert [tuple(member) for member in until_damaged(other)] == expected


def header(name=b"a.jpg", size=b"00000000010\0", kind=b"0", magic=b"ustar\x0000"):
    block = bytearray(512)
    block[: len(name)], block[124:136], block[156:157], block[257:265] = name, size, kind, magic
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(records, claimed=None):
    size = len(records) if claimed is None else claimed
    field = b"\x80" + size.to_bytes(11, "big")
    return header(b"PaxHeader", field, b"x") + records + b"\0" * (-len(records) % 512)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "only 0 bytes"),
        (b"\x1f\x8b" + bytes(1000), "gzip-compressed data at byte 0"),
        (b"\x28\xb5\x2f\xfd" + bytes(1000), "zstd"),
        (b"<html>" * 200, "no tar header at byte 0"),
        (header() + bytes(512) + b"junk" * 128, "no tar header at byte 1024"),
        (header() + b"12345", "ends inside 'a.jpg' at byte 0"),
        (header() + bytes(512) + header()[:100], "ends inside a header at byte 1024"),
        (header(size=b"\x80" + b"\xff" * 11) + bytes(512), "ends inside 'a.jpg'"),
        (header(size=b"-0000000001\0") + bytes(512), "no tar header"),
        (pax(b"", claimed=10**12), "a name or header of 1000000000000 bytes"),
        (pax(b"", claimed=2**19), "ends inside a long name"),
        (pax(b"22 size=1000000000000\n") + header() + bytes(512), "ends inside 'a.jpg'"),
        (pax(b"12 size=ten\n") + header() + bytes(512), "a pax size that is no number"),
        (pax(b"0 size=1\n") + header() + bytes(512), "a pax header that makes no sense"),
        (pax(b"\xff\xfe" * 300) + header() + bytes(512), "a pax header that makes no sense"),
        (header(kind=b"S") + bytes(512), "a sparse file"),
    ],
)
def test_where_a_tar_is_none_it_says_so(content, why):
    with pytest.raises(tar.Damaged, match=why):
        walk(content)


def test_any_prefix_of_a_tar_gives_the_members_before_the_cut():
    content = shard(range(3), form=tarfile.PAX_FORMAT)
    whole = walk(content)
    for stop in range(512, len(content), 100):
        assert until_damaged(content[:stop]) == [m for m in whole if m.offset + m.size <= stop]
