"""What every data set looks like to the rest of the code, and what becomes of a bad record.

One bad record never stops a run and never goes unseen: it is named in a warning, counted and
skipped. Only when nothing is left is that a `UserError`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Protocol, TypedDict

import numpy as np
from absl import logging

from unclip_jax.errors import UserError

HELDOUT_FRACTION = 0.1
SPLITS = ("train", "heldout", "all")
NAMED = 5  # of what is skipped or cut, this many are named in warnings


class Record(TypedDict):
    """One (image, caption) pair.

    Attributes:
        image: an image file's bytes, or decoded pixels, uint8 `[h, w, c]`.
        caption: never empty.
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
        fingerprint: 16 hexadecimal digits that identify the data set, its version, split and
            captions. It is the same at every image size, so that embeddings computed at CLIP's
            size fit the images a decoder trains on.
        classes: names of the classes that a record's `label`, int32, counts; empty where records
            carry none.
        image_count: the number of different images.
        skipped: records found unusable when the source was made: name -> reason.
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


def warn_of_skipped(name: str, skipped: Mapping[str, str]) -> None:
    """Name the first few records that the data set `name` left out, and say how many there are."""
    for record, reason in list(skipped.items())[:NAMED]:
        logging.warning("%s: skipped %s: %s", name, record, reason)
    if len(skipped) > NAMED:
        logging.warning("%s: skipped %d in all", name, len(skipped))
