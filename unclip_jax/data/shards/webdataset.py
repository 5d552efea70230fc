"""Webdataset's tar shards, read in any order.

A sample is a run of members that share a key: their path up to the first dot of the file's name.
What follows says what a member is: an image by its usual suffix, or by its bytes; `.txt`
or `.caption`, the caption; `.json`, with the caption under "caption" or "text"; `.cls`, the class.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

from unclip_jax.data import images, texts
from unclip_jax.data.contents import digest
from unclip_jax.data.datasets import DataConfig
from unclip_jax.data.records import shown
from unclip_jax.data.shards import tar
from unclip_jax.data.shards.index import Sample
from unclip_jax.data.shards.source import ShardedSource
from unclip_jax.data.shards.storage import StoredFile, is_remote
from unclip_jax.errors import UserError

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm")
_NO_IMAGES = ("txt", "json", "cls", "npy", "pyd", "pth", "url", "mp4", "wav", "flac")
_MAX_TEXT = 2**24  # bytes of a caption, a class or a .json
_MAX_LABEL = 200  # characters
_BLOCK_LOCAL, _BLOCK_REMOTE = 2**16, 2**22  # bytes: the headers lie between the images
_PART = 2**22  # bytes of an image read at a time while indexing


def open_source(config: DataConfig, pattern: str) -> ShardedSource:
    """The tar shards that a config names."""
    return ShardedSource(config, pattern, TarShards(config))


class TarShards:
    """The format of webdataset's shards; see `index.Format`."""

    def __init__(self, config: DataConfig):
        """What a config says of the image's suffix, the caption and the class.

        The keys of those name a member by its suffix, or a field of the `.json`.
        """
        image, self._caption, self._label = map(config.key, ("image", "caption", "label"))
        self._labels, self._bare = config.labels, config.bare
        self.settings = ["webdataset", image, self._caption, self._label, self._labels, self._bare]
        self._images = (image.lower().lstrip("."),) if image else IMAGES
        self._sniffed = not image
        keys = {key.lower().lstrip(".") for key in (self._caption, self._label) if key}
        self._texts = keys | {"json"} | (set() if self._caption else {"txt", "caption"})
        self._texts |= {"cls"} if self._labels and not self._label else set()

    def samples(self, file: StoredFile, skipped: dict[str, str]) -> Iterator[Sample]:
        """The captioned images of a shard, from one pass over its headers and texts.

        Raises:
            UserError: it is no tar.
            StorageError: it can't be read.
        """
        read = file.forward(_BLOCK_REMOTE if is_remote(file.url) else _BLOCK_LOCAL)
        sample = _Parts("", 0)
        try:
            for member in tar.members(read, file.size):
                key, suffix = _split(member.name)
                if not key:
                    continue
                if key != sample.key or suffix in sample.members:
                    yield from self._finished(sample, skipped)
                    sample = _Parts(key, member.offset)
                sample.members[suffix] = member
                if suffix in self._images:
                    sample.contents[member.offset] = _content(read, member)
                if suffix in self._texts and member.size <= _MAX_TEXT:
                    sample.texts[suffix] = read(member.offset, member.offset + member.size)
                elif self._sniffed and suffix not in (*IMAGES, *_NO_IMAGES) and "." not in suffix:
                    head = read(member.offset, member.offset + min(images.HEAD, member.size))
                    if images.is_picture(head):
                        sample.pictures.append(member)
                        sample.contents[member.offset] = _content(read, member)
        except tar.Damaged as error:
            if not error.offset:
                raise UserError(
                    f"name: {file.url}: {error}; expected an uncompressed tar, which alone can be "
                    "read in any order"
                ) from error
            skipped[f"the rest after {shown(sample.key) or 'the beginning'}"] = str(error)
        yield from self._finished(sample, skipped)

    def image(self, file: StoredFile, place: int, size: int) -> bytes:
        """The bytes of an image; `StorageError` if they can't be read."""
        return file.read(place, place + size)

    def _finished(self, sample: _Parts, skipped: dict[str, str]) -> Iterator[Sample]:
        if not sample.key:
            return
        known = (m for s in self._images if (m := sample.members.get(s)))
        image = next(known, next(iter(sample.pictures), None))
        try:
            label = self._label_of(sample) if self._labels else ""
            if reason := self._fault(sample, image, label):
                raise texts.NotText(reason)
            captions = self._captions(sample, label)
        except texts.NotText as error:
            skipped[f"{shown(sample.key)} (byte {sample.offset})"] = str(error)
        else:
            content = sample.contents[image.offset]
            yield Sample(sample.key, captions, image.offset, image.size, label, content)

    def _fault(self, sample: _Parts, image: tar.Member | None, label: str) -> str:
        """Why a sample can't be used; "" if it can."""
        if image is None:
            dotted = any("." in suffix for suffix in sample.members)
            why = " (a key ends at its first dot; image_key may name what is behind)" * dotted
            return f"no image among {sample.there}{why}"
        if not image.size:
            return "an image of 0 bytes"
        if self._labels and not 0 < len(label) <= _MAX_LABEL:
            what = repr(self._label) if self._label else ".cls"
            return f"no {what} among {sample.there}" if not label else "a class that is a long text"
        return ""

    def _label_of(self, sample: _Parts) -> str:
        """The class, a text or a number; "" for none."""
        try:
            found = self._under(sample, self._label) if self._label else sample.text("cls")
        except KeyError:
            return ""
        return str(found).strip() if isinstance(found, str | int) else ""

    def _captions(self, sample: _Parts, label: str) -> tuple[str, ...]:
        """Its captions; `NotText` says why there are none."""
        try:
            captions = self._written(sample)
        except texts.NotText:
            if not self._bare:
                raise
            captions = ()
        if captions or label or self._bare:
            return captions or (label,)
        offers = texts.text_fields(sample.fields)
        has = f"; its .json has {texts.offered(offers)}" if offers else ""
        named = f"no {self._caption!r}, the caption_key," if self._caption else "no caption"
        raise texts.NotText(f"{named} in {sample.there}{has}")

    def _written(self, sample: _Parts) -> tuple[str, ...]:
        if self._caption:
            try:
                return texts.captions(self._under(sample, self._caption))
            except KeyError:
                return ()
        for suffix in ("txt", "caption"):
            if captions := texts.captions(sample.text(suffix)):
                return captions
        field = texts.field_of(sample.fields, texts.CAPTION_FIELDS)
        return texts.captions(sample.fields[field]) if field else ()

    def _under(self, sample: _Parts, key: str) -> Any:
        """What a key names: a member's text, or a field of the `.json`."""
        suffix = key.lower().lstrip(".")
        return sample.text(suffix) if suffix in sample.texts else texts.lookup(sample.fields, key)


class _Parts:
    """The members of one sample."""

    def __init__(self, key: str, offset: int):
        self.key, self.offset = key, offset  # what they share, where the first is
        self.members: dict[str, tar.Member] = {}  # by suffix
        self.texts: dict[str, bytes] = {}  # likewise, the content of those read while indexing
        self.pictures: list[tar.Member] = []  # those of unusual suffixes, by their bytes
        self.contents: dict[int, str] = {}  # of what may be the image, by offset

    @property
    def there(self) -> str:
        """The suffixes of the members, for messages."""
        return shown(", ".join(f".{suffix}" for suffix in self.members))

    @functools.cached_property
    def fields(self) -> dict[str, Any]:
        """What the `.json` says, if it is an object; `NotText` if it is no JSON."""
        try:
            found = json.loads(texts.decoded(self.texts.get("json", b"{}")))
        except texts.NotText:
            raise
        except (ValueError, RecursionError) as error:
            raise texts.NotText("a .json that is no JSON") from error
        return found if isinstance(found, dict) else {}

    def text(self, suffix: str) -> str:
        """A member that is text; `NotText` if it is none."""
        return texts.one(self.texts.get(suffix, b""))


def _content(read: Callable[[int, int], bytes], member: tar.Member) -> str:
    """The digest of a member's bytes, read on the way through the shard."""
    end = member.offset + member.size
    starts = range(member.offset, end, _PART)
    return digest(read(start, min(start + _PART, end)) for start in starts).hex()


def _split(name: str) -> tuple[str, str]:
    """Key and lower-case suffix of a member; no key for what belongs to no sample."""
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    if not stem or not suffix:
        return "", ""
    return folder + slash + stem, suffix.lower()
