"""What is in a shard, found out once and kept in a small file.

An index holds the key, the captions, the class and the place of each image: opening a data set of
any size reads no shard, and a record takes one read. The file is mapped into memory, not read: a
JSON header; `images`, int64 `[n, 5]`; `ends`, int64; and `text`, the keys and captions one after
another.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import random
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from unclip_jax.common.files import replacing
from unclip_jax.data.records import is_heldout
from unclip_jax.data.shards.storage import StorageError, StoredFile
from unclip_jax.errors import UserError

FORMAT = 3  # of the file; raised when its layout or what is put in it changes
_INDEXED_AT_ONCE = 8
_HELDOUT, _TEXT = 2, 4  # columns of `images`


class Sample(NamedTuple):
    """One image of a shard.

    Attributes:
        key: its name, which decides its split.
        captions: its texts; one, and empty, where it has none and none is needed.
        place: where the image is, as the shard's format counts.
        size: of the image in bytes, or of what it is stored with.
        label: its class; "" where classes weren't asked for.
        content: what differs where the image's bytes do; "" once it is in an index, which keeps
            the digest of all.
    """

    key: str
    captions: tuple[str, ...]
    place: int
    size: int
    label: str = ""
    content: str = ""


class Format(Protocol):
    """A kind of shard. Whatever of it can't be read is a `StorageError`.

    Attributes:
        settings: what the samples of a shard depend on beside its content, JSON-able.
    """

    settings: list[Any]

    def samples(self, file: StoredFile, skipped: dict[str, str]) -> Iterable[Sample]:
        """The usable samples of a shard; what isn't goes into `skipped`, name -> reason.

        Raises:
            UserError: it is no such shard.
        """

    def image(self, file: StoredFile, place: int, size: int) -> bytes:
        """An encoded image; `BadRecord` if it is gone."""


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """An index, open.

    Attributes:
        header: "counts", split -> [images, pairs]; "classes", the classes met, sorted;
            "skipped", name -> reason; "content", the digest of keys, images' contents and
            captions; "digest", that of sizes in place of contents.
        images: int64 `[n, 5]`: place, size, whether held out, number of the class in "classes",
            number of the first of its texts, which is its key; its captions follow.
        ends: int64: where each text ends in `text`, uint8, beginning with a 0.
    """

    header: dict[str, Any]
    images: np.ndarray
    ends: np.ndarray
    text: np.ndarray

    @classmethod
    def open(cls, path: pathlib.Path) -> ShardIndex:
        """An index from its file; `OSError` if there is none, `ValueError` if it is damaged."""
        content = np.memmap(path, np.uint8, "r")
        length = int(content[:8].view("<i8")[0])
        if not 0 < length <= len(content):
            raise ValueError("no index")
        header = json.loads(content[8 : 8 + length].tobytes())
        images, ends = header["images"] * 40, header["texts"] * 8 + 8
        start = 8 + length
        if len(content) != start + images + ends + header["bytes"]:
            raise ValueError("an index of another length")
        return cls(
            header,
            content[start : start + images].view("<i8").reshape(-1, 5),
            content[start + images : start + images + ends].view("<i8"),
            content[start + images + ends :],
        )

    @functools.cached_property
    def captions_of(self) -> np.ndarray:
        """How many captions each image has, int64 `[n]`."""
        ends = np.append(self.images[1:, _TEXT], len(self.ends) - 1)
        return ends - self.images[:, _TEXT] - 1

    @property
    def heldout(self) -> np.ndarray:
        """Which images are held out, bool `[n]`."""
        return self.images[:, _HELDOUT] != 0

    def sample(self, image: int) -> Sample:
        """An image, as it was put in."""
        place, size, _, label, first = self.images[image].tolist()
        key, *captions = (
            self.text[self.ends[n] : self.ends[n + 1]].tobytes()
            for n in range(first, first + 1 + self.captions_of[image])
        )
        return Sample(
            key.decode("utf-8", "surrogateescape"),
            tuple(caption.decode() for caption in captions),
            place,
            size,
            self.header["classes"][label] if label >= 0 else "",
        )


def indexed(
    name: str, files: Sequence[StoredFile], form: Format, cache_dir: str | os.PathLike
) -> list[pathlib.Path]:
    """The index of each shard, made where there is none of this shard as it is now.

    Processes that share `cache_dir` share the work: each goes through the shards in an order of its
    own, and leaves out those that another has done. `UserError` if a shard can't be read or is
    none, or `cache_dir` can't be written.
    """
    folder = pathlib.Path(cache_dir).expanduser() / "shards"
    paths = [folder / _file_name(file, form) for file in files]
    missing = [number for number, path in enumerate(paths) if not _is_index(path)]
    if not missing:
        return paths
    random.SystemRandom().shuffle(missing)

    def make(number: int) -> None:
        if not _is_index(paths[number]):
            _write(paths[number], files[number], form)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(_INDEXED_AT_ONCE) as pool:
            made = pool.map(make, missing)
            list(tqdm(made, f"{name}: index", total=len(missing), unit="shard", disable=None))
    except StorageError as error:
        raise UserError(f"name: {error}; check it, and run again to go on") from error
    except OSError as error:
        raise UserError(f"cache_dir: {folder}: can't be written ({error.strerror})") from error
    return paths


def _file_name(file: StoredFile, form: Format) -> str:
    """Of a shard as it is now: another size, version or way of reading is another file."""
    identity = [FORMAT, form.settings, file.url, file.size, file.version]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32] + ".index"


def _is_index(path: pathlib.Path) -> bool:
    try:
        ShardIndex.open(path)
    except (OSError, ValueError, KeyError):
        return False
    return True


def _write(path: pathlib.Path, file: StoredFile, form: Format) -> None:
    """Make an index."""
    skipped: dict[str, str] = {}
    samples = list(form.samples(file, skipped))
    classes = sorted({sample.label for sample in samples if sample.label})
    numbers = {label: number for number, label in enumerate(classes)}
    counts = {"train": [0, 0], "heldout": [0, 0]}
    digest, contents = hashlib.sha256(), hashlib.sha256()
    images, texts = np.zeros((len(samples), 5), "<i8"), []
    for row, sample in zip(images, samples, strict=True):
        heldout = is_heldout(sample.key)
        label = numbers.get(sample.label, -1)
        row[:] = sample.place, sample.size, heldout, label, len(texts)
        captions = [caption.encode("utf-8", "replace") for caption in sample.captions]
        texts += [sample.key.encode("utf-8", "surrogateescape"), *captions]
        known = [sample.key, sample.size, *(caption.decode() for caption in captions)]
        digest.update(json.dumps(known).encode())
        contents.update(json.dumps([sample.content, *known]).encode())
        count = counts["heldout" if heldout else "train"]
        count[0], count[1] = count[0] + 1, count[1] + len(captions)
    ends = np.cumsum([0, *map(len, texts)]).astype("<i8")
    counts["all"] = [sum(pair) for pair in zip(*counts.values(), strict=True)]
    header = {
        "shard": file.url,
        "images": len(samples),
        "texts": len(texts),
        "bytes": int(ends[-1]),
        "counts": counts,
        "classes": classes,
        "skipped": skipped,
        "digest": digest.hexdigest(),
        "content": contents.hexdigest(),
    }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the numbers are aligned
    parts = [np.int64(len(encoded)).astype("<i8").tobytes(), encoded]
    parts += [images.tobytes(), ends.tobytes(), *texts]
    with replacing(path) as temporary, open(temporary, "wb") as opened:
        opened.writelines(parts)
