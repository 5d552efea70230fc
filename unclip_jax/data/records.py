"""What every data set looks like to the rest of the code, and what becomes of a bad record.

The policy: one bad record never stops a run and never goes unseen. It is named in a
warning, counted, and skipped. Only when nothing is left does it become a `UserError`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Protocol, TypedDict

import numpy as np

HELDOUT_FRACTION = 0.1


class Record(TypedDict):
    """One (image, caption) pair.

    Attributes:
      image: an encoded image file's bytes, or decoded pixels, uint8 `[h, w, c]`.
      caption: text; never empty.
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

    An image with k captions gives k pairs, known when the source is made, so that
    indices are stable and results can be stored per pair.

    Attributes:
      name: what to call the data set in messages.
      fingerprint: 16 hexadecimal digits that identify the data set, its version, split
        and captions; the same at every image size.
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
          BadRecord: if it can't be read.
        """

    def image_of(self, index: int) -> int:
        """The number of the image of pair `index`: pairs that share an image share it."""


def is_heldout(name: str) -> bool:
    """Whether a named thing falls on the held-out side, as about one in ten does.

    Decided by the SHA-256 of the name alone, so neither the order nor the company
    of the others ever moves it.
    """
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < HELDOUT_FRACTION * 2**64
