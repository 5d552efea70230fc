"""Webdataset's tar shards, read in any order.

A sample is a run of members that share a key: their path up to the first dot of the file's name.
What follows says what a member is: an image by its usual suffix; `.txt`, the caption; `.json`, with
the caption under "caption" or "text"; `.cls`, the class.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from unclip_jax.data.datasets import DataConfig
from unclip_jax.data.shards import tar
from unclip_jax.data.shards.index import Sample, shown
from unclip_jax.data.shards.source import ShardedSource, named
from unclip_jax.data.shards.storage import StoredFile, is_remote
from unclip_jax.errors import UserError

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm")
CAPTION_FIELDS = ("caption", "text")
_MAX_TEXT = 2**24  # bytes of a caption, a class or a .json
_MAX_LABEL = 200  # characters
_BLOCK_LOCAL, _BLOCK_REMOTE = 2**16, 2**22  # bytes: the headers lie between the images


def open_source(config: DataConfig, pattern: str) -> ShardedSource:
    """The tar shards that a config names."""
    return ShardedSource(config, pattern, TarShards(config))


class TarShards:
    """The format of webdataset's shards; see `index.Format`."""

    def __init__(self, config: DataConfig):
        """What a config says of the image's suffix, the `.json`'s field of captions, and `.cls`."""
        image_key = named(config.image_key, "image")
        caption_key, labels = named(config.caption_key, "caption"), config.labels
        self.settings = ["webdataset", image_key, caption_key, labels]
        self._images = (image_key,) if image_key else IMAGES
        self._caption_fields = (caption_key,) if caption_key else CAPTION_FIELDS
        texts = ("json",) if caption_key else ("txt", "json")
        self._texts = (*texts, "cls") if labels else texts
        self._labels = labels

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
                if suffix in self._texts and member.size <= _MAX_TEXT:
                    sample.texts[suffix] = read(member.offset, member.offset + member.size)
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
        label = sample.text("cls") if self._labels else ""
        image = next((m for s in self._images if (m := sample.members.get(s))), None)
        captions = self._captions(sample) or ((label,) if label else ())
        if reason := self._fault(sample, image, captions, label):
            skipped[f"{shown(sample.key)} (byte {sample.offset})"] = reason
        else:
            yield Sample(sample.key, captions, image.offset, image.size, label)

    def _fault(
        self, sample: _Parts, image: tar.Member | None, captions: tuple[str, ...], label: str
    ) -> str:
        """Why a sample can't be used; "" if it can."""
        there = shown(", ".join(f".{suffix}" for suffix in sample.members))
        if image is None:
            return f"no image among {there}"
        if not image.size:
            return "an image of 0 bytes"
        if self._labels and not 0 < len(label) <= _MAX_LABEL:
            return f"no .cls among {there}" if not label else "a class that is a long text"
        return "" if captions else f"no caption in {there}"

    def _captions(self, sample: _Parts) -> tuple[str, ...]:
        if "txt" in self._texts and (text := sample.text("txt")):
            return (text,)
        try:
            fields = json.loads(sample.texts.get("json", b"{}"))
        except (ValueError, RecursionError):
            return ()
        found: Any = None
        for field in self._caption_fields if isinstance(fields, dict) else ():
            found = fields.get(field) if found is None else found
        texts = found if isinstance(found, list) else [found]
        return tuple(t.strip() for t in texts if isinstance(t, str) and t.strip())


class _Parts:
    """The members of one sample."""

    def __init__(self, key: str, offset: int):
        self.key, self.offset = key, offset  # what they share, where the first is
        self.members: dict[str, tar.Member] = {}  # by suffix
        self.texts: dict[str, bytes] = {}  # likewise, the content of those read while indexing

    def text(self, suffix: str) -> str:
        return self.texts.get(suffix, b"").decode("utf-8", "replace").strip()


def _split(name: str) -> tuple[str, str]:
    """Key and lower-case suffix of a member; no key for what belongs to no sample."""
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    if not stem or not suffix:
        return "", ""
    return folder + slash + stem, suffix.lower()
