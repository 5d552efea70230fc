"""What is in a shard, found out once and kept in a small file; and what is in all of a data set.

The index of a shard is a paged file (`shards.pages`): a page has the key, the captions, the class
and the place of each of 64 images, so a record takes one page and one read of its shard. The
catalogue of a data set is the directory of its indices: opening a data set of any size reads the
catalogue, and no shard and no index.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
import random
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from unclip_jax.data.records import SPLITS, fingerprint_of, is_heldout
from unclip_jax.data.shards import pages
from unclip_jax.data.shards.folders import Folder
from unclip_jax.data.shards.ranges import Damaged, Ranges
from unclip_jax.data.shards.storage import StorageError, StoredFile
from unclip_jax.errors import UserError

FORMAT = 4  # of the files; raised when their layout or what is put in them changes
IMAGES = 64  # of a page
CAPTIONS = ("all", "first")
FINGERPRINTS = {"shards 2": "content", "shards": "digest"}  # by what they are of; now and before
IMAGE = np.dtype(
    [("place", "<i8"), ("size", "<i8"), ("label", "<i4"), ("captions", "<u4"), ("heldout", "u1")]
)
_INDEXED_AT_ONCE, _READ_AT_ONCE = 8, 32


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


class Page:
    """The images of a page, opened.

    Attributes:
        images: IMAGE [n].
    """

    def __init__(self, content: bytes, count: int, classes: Sequence[str]):
        """Take the bytes of a page of `count` images, and the shard's classes."""
        self.images, self._classes = np.frombuffer(content, IMAGE, count), classes
        captions = self.images["captions"].astype(np.int64)
        texts = count + int(captions.sum())
        start = count * IMAGE.itemsize
        lengths = np.frombuffer(content, "<u4", texts, start).astype(np.int64)
        self._ends = start + 4 * texts + np.concatenate([[0], np.cumsum(lengths)])
        self._first = np.cumsum(captions + 1) - captions - 1  # text of each image: its key
        self._content = content

    def in_split(self, split: str) -> np.ndarray:
        """The images of a split, int64 [m]."""
        wanted = (self.images["heldout"] != 0) == (split == "heldout")
        return np.flatnonzero(wanted | (split == "all"))

    def sample(self, image: int) -> Sample:
        """An image, as it was put in."""
        place, size, label, captions, _ = self.images[image].tolist()
        first = int(self._first[image])
        key, *captions = (
            self._content[self._ends[n] : self._ends[n + 1]]
            for n in range(first, first + 1 + captions)
        )
        return Sample(
            key.decode("utf-8", "surrogateescape"),
            tuple(caption.decode() for caption in captions),
            place,
            size,
            self._classes[label] if label >= 0 else "",
        )


class Catalogue:
    """The indices of a data set's shards.

    Attributes:
        table: of their pages.
        classes: those met, sorted, which the labels of all images count.
        skipped: what was left out, "shard: name" -> reason.
        fingerprints: of its pairs: kind, split and captions, with spaces between -> fingerprint.
    """

    def __init__(self, ranges: Ranges, names: Sequence[str], content: bytes):
        """Open its bytes; `Damaged` if they are of no catalogue."""
        rows, header, _ = pages.read_end(lambda a, b: content[a:b], len(content))
        if len(rows) != len(names):
            raise Damaged("it is of another data set")
        self.table = pages.Table(rows, lambda file, *place: ranges.read(names[file], *place))
        self.classes, self.skipped = tuple(header["classes"]), header["skipped"]
        self.fingerprints, self.sizes = header["fingerprints"], header["sizes"]
        self._of_shard = header["own_classes"]

    def page(self, shard: int, page: int) -> Page:
        """A page of a shard's index; `Damaged` or `StorageError` if it can't be read."""
        count = int(self.table.directory(shard)[page]["images"])
        classes = [self.classes[n] for n in self._of_shard[shard]] if self._of_shard else ()
        return Page(self.table.page(shard, page), count, classes)


def catalogue(
    name: str,
    files: Sequence[StoredFile],
    form: Format,
    where: str,
    cache: pathlib.Path,
    limit: int,
) -> Catalogue:
    """The catalogue of shards, for which they are indexed where they are not, as they are now.

    Processes that share the folder share the work: each goes through the shards in an order of its
    own, and leaves out those that another has done.

    Args:
        name: of the data set, for messages.
        files: its shards.
        form: their format.
        where: the folder of indices, a path or a URL.
        cache: where what was read of a remote one is kept.
        limit: bytes that this may take.

    Raises:
        UserError: a shard can't be read or is none, or `where` can't be written.
    """
    field = "shared_dir" if "://" in where else "cache_dir"
    folder, whole = Folder(f"{where}/shards", field), Folder(f"{where}/data_sets", field)
    names = [_file_name(file, form) for file in files]
    own = hashlib.sha256(json.dumps([FORMAT, names]).encode()).hexdigest()[:32]
    ranges = Ranges(folder, cache / "remote_shards" / own[:16], limit)
    sizes, known = folder.sizes(), whole.sizes()
    if size := known.get(f"{own}.catalogue"):
        with contextlib.suppress(Damaged, StorageError):
            found = Catalogue(ranges, names, whole.read(f"{own}.catalogue", 0, size))
            if found.sizes == [sizes.get(name) for name in names]:
                return found
    ends = _indexed(name, files, names, form, folder, sizes)
    content = _joined(files, names, ends, folder.sizes())
    whole.write(f"{own}.catalogue", content)
    return Catalogue(ranges, names, content)


def _file_name(file: StoredFile, form: Format) -> str:
    """Of a shard as it is now: another size, version or way of reading is another file."""
    identity = [FORMAT, form.settings, file.url, file.size, file.version]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32] + ".index"


def _indexed(
    name: str, files: Sequence[StoredFile], names: Sequence[str], form: Format, folder: Folder,
    sizes: dict[str, int],
) -> list[pages.End]:  # fmt: skip
    """The ends of the indices of shards, each made where it lacks or is damaged."""
    ends: list[pages.End | None] = [None] * len(files)

    def look(number: int, size: int | None) -> bool:
        if size is not None:
            with contextlib.suppress(Damaged, StorageError):
                ends[number] = pages.read_end(_reads(folder, names[number]), size)
        return ends[number] is not None

    def make(number: int) -> None:
        if not look(number, folder.size(names[number])):
            content = packed(files[number], form)
            folder.write(names[number], content)
            ends[number] = pages.read_end(lambda a, b: content[a:b], len(content))

    numbers = range(len(files))
    with ThreadPoolExecutor(_READ_AT_ONCE) as pool:
        there = list(pool.map(lambda number: look(number, sizes.get(names[number])), numbers))
    missing = [number for number in numbers if not there[number]]
    random.SystemRandom().shuffle(missing)
    try:
        with ThreadPoolExecutor(_INDEXED_AT_ONCE) as pool:
            made = pool.map(make, missing)
            bar = {"desc": f"{name}: index", "unit": "shard", "disable": None if missing else True}
            list(tqdm(made, total=len(missing), **bar))
    except StorageError as error:
        raise UserError(f"name: {error}; check it, and run again to go on") from error
    return ends


def _reads(folder: Folder, name: str) -> Any:
    def read(start: int, stop: int) -> bytes:
        folder.forget()  # it may be another file by that name now
        return folder.read(name, start, stop)

    return read


def _joined(
    files: Sequence[StoredFile], names: Sequence[str], ends: Sequence[pages.End],
    sizes: dict[str, int],
) -> bytes:  # fmt: skip
    """The content of the catalogue of indices with these ends."""
    headers = [header for _, header, _ in ends]
    classes = sorted({label for header in headers for label in header["classes"]})
    number = {label: n for n, label in enumerate(classes)}
    told = {
        "sizes": [sizes.get(name) for name in names],
        "classes": classes,
        "own_classes": [[number[c] for c in h["classes"]] for h in headers] if classes else [],
        "skipped": {
            f"{file.url}: {name}": reason
            for file, header in zip(files, headers, strict=True)
            for name, reason in header["skipped"].items()
        },
        "fingerprints": {
            f"{kind} {split} {captions}": fingerprint_of(
                [kind, split, captions, [header[of] for header in headers]]
            )
            for kind, of in FINGERPRINTS.items()
            for split in SPLITS
            for captions in CAPTIONS
        },
    }
    return pages.directory(np.stack([row for _, _, row in ends]), told)


def packed(file: StoredFile, form: Format) -> bytes:
    """The content of a shard's index."""
    skipped: dict[str, str] = {}
    samples = list(form.samples(file, skipped))
    classes = sorted({sample.label for sample in samples if sample.label})
    digest, contents = hashlib.sha256(), hashlib.sha256()
    for sample in samples:
        captions = [caption.encode("utf-8", "replace").decode() for caption in sample.captions]
        known = [sample.key, sample.size, *captions]
        digest.update(json.dumps(known).encode())
        contents.update(json.dumps([sample.content, *known]).encode())
    header = {
        "shard": file.url,
        "classes": classes,
        "skipped": skipped,
        "digest": digest.hexdigest(),
        "content": contents.hexdigest(),
    }
    return pages.packed(_pages(samples, {label: n for n, label in enumerate(classes)}), header)


def _pages(
    samples: Sequence[Sample], numbers: dict[str, int]
) -> Iterator[tuple[bytes, dict[str, int]]]:
    for start in range(0, len(samples), IMAGES):
        part = samples[start : start + IMAGES]
        images, texts = np.zeros(len(part), IMAGE), []
        for row, sample in enumerate(part):
            captions = [caption.encode("utf-8", "replace") for caption in sample.captions]
            label, heldout = numbers.get(sample.label, -1), is_heldout(sample.key)
            images[row] = sample.place, sample.size, label, len(captions), heldout
            texts += [sample.key.encode("utf-8", "surrogateescape"), *captions]
        lengths = np.array([*map(len, texts)], "<u4")
        heldout = images["heldout"] != 0
        pairs = images["captions"].astype(np.int64)
        counts = (pairs.sum(), pairs[heldout].sum(), len(part), heldout.sum())
        blob = b"".join([images.tobytes(), lengths.tobytes(), *texts])
        yield blob, {n: int(of) for n, of in zip(pages.COUNTS, counts, strict=True)}
