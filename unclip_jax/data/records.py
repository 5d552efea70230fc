"""What every data set looks like to the rest of the code, and what becomes of a bad record.

One bad record never stops a run and never goes unseen: it is named in a warning, counted and
skipped. Only when nothing is left is that a `UserError`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TypedDict

import numpy as np
from absl import logging
from tqdm import tqdm

from unclip_jax.common import bars
from unclip_jax.errors import UserError, wrong

HELDOUT_FRACTION = 0.1
SPLITS = ("train", "heldout", "all")
MAX_CLASSES = 1_000_000
_REASONS = 8  # that are told of what is left out
_NUMBERED = re.compile(r"\b(line|row|entry|annotation|byte) \d+")
NAMED = 5  # of what is skipped or cut, this many are named in warnings
SILENT_FOR = 2.0  # seconds before a line says how far it is


class Record(TypedDict):
    """One (image, caption) pair.

    Attributes:
        image: an image file's bytes, or decoded pixels, uint8 `[h, w, c]`.
        caption: empty only where no captions are needed: `DataConfig.bare`.
        index: the pair's place in its source, from 0.
        name: the image's name in messages: a relative path, or code points.
    """

    image: bytes | np.ndarray
    caption: str
    index: int
    name: str


class BadRecord(Exception):
    """A record that can't be used; the message names it and says why."""


class Source(Protocol):
    """A random-access data set of (image, caption) pairs.

    An image with k captions gives k pairs. They are known when the source is made, so indices are
    stable and results can be stored per pair.

    Attributes:
        name: what to call the data set in messages.
        fingerprint: 16 hexadecimal digits that identify the contents of the pictures, the captions
            and the split. It is the same at every image size, so that embeddings computed at
            CLIP's size fit the images a decoder trains on. It may be found out, by reading the
            pictures, when it is first asked for.
        former: what the fingerprint of the same pairs was before it knew contents; old checkpoints
            and stores have it. A source may lack it, if its fingerprint is what it always was.
        classes: names of the classes that a record's `label`, int32, counts; empty where records
            carry none.
        image_count: the number of different images.
        skipped: records found unusable when the source was made: name -> reason.
        captions: of all pairs; None, or lacking, where they are known only by reading pictures.
    """

    name: str
    fingerprint: str
    classes: tuple[str, ...]
    image_count: int
    skipped: Mapping[str, str]

    def __len__(self) -> int:
        """The number of pairs."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The pair at `index`: a `Record`, perhaps with more keys.

        Raises:
            BadRecord: it can't be read.
        """

    def image_of(self, index: int) -> int:
        """The number of the image of pair `index`: pairs that share an image share it."""


def fingerprints(source: Source) -> tuple[str, str]:
    """The fingerprint of a source, and the one it had before that knew contents."""
    return source.fingerprint, getattr(source, "former", source.fingerprint)


def is_heldout(name: str) -> bool:
    """Whether a named thing is held out, as about one in ten is.

    The SHA-256 of the name alone decides: neither the order nor the company of the others moves it.
    """
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < HELDOUT_FRACTION * 2**64


def fingerprint_of(known: Any) -> str:
    """A `Source`'s fingerprint, from what JSON can hold of its pairs."""
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]


def nothing_in(split: str, of: str, more: str = "use split 'all', or more data") -> UserError:
    """The error for a split with nothing in it."""
    return UserError(f"split: {split!r}: none of the {of} is in it; {more}")


def class_names(labels: Iterable[str], name: str) -> tuple[str, ...]:
    """Classes in order of their numbers: all up to the largest where they are numbers, else sorted.

    Raises:
        UserError: a number is `MAX_CLASSES` or more; `name` says of which data.
    """
    met = set(labels)
    if not all(label.isascii() and label.isdigit() for label in met):
        return tuple(sorted(met))
    largest = max((int(label[:20]) for label in met), default=-1)
    if largest >= MAX_CLASSES:
        raise wrong(f"labels: {name}: class", largest, f"numbers below {MAX_CLASSES}")
    return tuple(str(number) for number in range(largest + 1))


def shown(name: str) -> str:
    """A name in one line of reasonable length, for messages: it may hold anything."""
    return repr(name[:200])[1:-1]


def counted(skipped: Mapping[str, str]) -> str:
    """How many records were left out, by reason, in one line, with an example; "" for none.

    The numbers of lines and bytes in a reason make no reason of their own.
    """
    reasons: dict[str, list] = {}
    for record, reason in skipped.items():
        reasons.setdefault(_NUMBERED.sub(r"\1 N", reason), [0, record])[0] += 1
    most = sorted(reasons.items(), key=lambda item: -item[1][0])
    told = [f"{why}: {count}, such as {shown(one)}" for why, (count, one) in most[:_REASONS]]
    if len(most) > _REASONS:
        told.append(f"and {len(most) - _REASONS} more reasons")
    return f"left out {len(skipped)} ({'; '.join(told)})" if skipped else ""


def summary(source: Source, split: str) -> str:
    """What a data set holds, and what it left out, in a line."""
    said = f"{source.name}, split {split}: {len(source)} pairs of {source.image_count} images"
    where = getattr(source, "layout", "")  # of a folder, which may have captions in several places
    where = f"captions in {where}" if where else ""
    return "; ".join(filter(None, (said, where, counted(source.skipped))))


def warn_of_skipped(name: str, skipped: Mapping[str, str]) -> None:
    """Name the few records that the data set `name` left out, or count the many by reason."""
    if len(skipped) > NAMED:
        logging.warning("%s: %s", name, counted(skipped))
        return
    for record, reason in skipped.items():
        logging.warning("%s: skipped %s: %s", name, record, reason)


def progress(title: str, unit: str, total: int | None = None) -> tqdm:
    """A bar that shows up after two seconds; a line now and then where it goes into a log."""
    return bars.bar(
        desc=title, unit=unit, total=total, delay=SILENT_FOR, mininterval=0.5, leave=False
    )
