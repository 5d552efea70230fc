"""One example of a data set: a record's picture and caption as arrays.

What is bad is left out, what is cut is counted, what fits in memory is made once.
"""

from __future__ import annotations

import os
import threading
from typing import Any, Protocol

import numpy as np
from absl import logging

from unclip_jax.data.datasets import DataConfig
from unclip_jax.data.images import square
from unclip_jax.data.positions import Positions
from unclip_jax.data.records import NAMED, BadRecord, Source
from unclip_jax.data.shards.storage import is_remote
from unclip_jax.data.tokenizer import Encoder, Tokenizer
from unclip_jax.errors import UserError

TOLD_APART = 2**18  # bad records, and cut captions: some 20 MB
NOT_MORE = frozenset({"image", "caption", "index", "name", "tokens"})


class TextEncoder(Protocol):
    """A frozen network that reads captions: Karlo's CLIP, Imagen's T5."""

    @property
    def tokenizer(self) -> Encoder:
        """Captions to the ids [b, l] that it reads."""

    def states(self, tokens: np.ndarray) -> dict[str, Any]:
        """Ids [b, l] to "text_states" [b, l, d] float32 and "text_mask" [b, l] bool, on devices."""


class Met:
    """Numbers that were met. `TOLD_APART` of them are remembered; further ones count each time."""

    def __init__(self):
        """None yet."""
        self._known: set[int] = set()
        self._more = 0

    def __contains__(self, number: int) -> bool:
        """Whether a number is remembered."""
        return number in self._known

    def __len__(self) -> int:
        """How many there were."""
        return len(self._known) + self._more

    def add(self, number: int) -> bool:
        """Count a number; returns whether it is not remembered from before."""
        if number in self._known:
            return False
        if len(self._known) < TOLD_APART:
            self._known.add(number)
        else:
            self._more += 1
        return True


class Captions:
    """Captions to tokens; those that are cut are counted, and the first of them named."""

    def __init__(self, name: str, tokenizer: Encoder):
        """Name the data set, for messages, and what makes tokens."""
        self.cut = Met()  # indices of the captions cut so far
        self._name, self._tokenizer, self._lock = name, tokenizer, threading.Lock()

    def tokens(self, index: int, name: str, caption: str) -> np.ndarray:
        """The tokens of the caption of pair `index`, int32 `[l]`. Safe to call from threads."""
        (tokens,), cut = self._tokenizer.encode_and_report([caption])
        if cut:
            with self._lock:
                if self.cut.add(index) and len(self.cut) <= NAMED:
                    more = "; no further ones are named" if len(self.cut) == NAMED else ""
                    logging.warning(
                        "%s: cut the caption of %s: %s%s", self._name, name, cut[0], more
                    )
        return tokens


class Examples:
    """Position, index -> an example, or None for a bad record. Safe to call from threads."""

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        encoder: TextEncoder | Encoder | None,
        reachable: int,
    ):
        """Of a source, `reachable` of whose pairs this process meets."""
        self.source = source
        self.earlier = Positions()  # that other numbers of processes had read: None there as well
        self.bad = Met()  # indices of bad records met so far
        # Whether examples are kept in memory once made.
        self.cached = source.image_count * config.image_size**2 * 3 <= config.cache_bytes
        ours = Tokenizer(config.context_length, config.vocab_size)
        self.captions = Captions(source.name, getattr(encoder, "tokenizer", encoder) or ours)
        self._size, self._fit = config.image_size, config.fit
        self._augments = bool(config.augment)
        self._takes_tokens = encoder is None  # those a record has: they are the config's
        self._reachable = reachable
        self._good = False
        self._images: dict[int, np.ndarray] = {}
        self._examples: dict[int, dict[str, np.ndarray]] = {}
        self._lock = threading.Lock()

    def __call__(self, position: int, index: int) -> dict[str, np.ndarray] | None:
        """The example, unless it is bad or was read by an earlier number of processes."""
        if position in self.earlier or index in self.bad:
            return None
        if index in self._examples:
            return self._examples[index]
        try:
            example = self._example(self.source[index])
        except BadRecord as error:
            self._skip(index, str(error))
            return None
        self._good = True
        if self.cached:
            self._examples[index] = example
        return example

    def _example(self, record: dict[str, Any]) -> dict[str, np.ndarray]:
        index = record["index"]
        if "tokens" in record and self._takes_tokens:
            tokens = record["tokens"]
        else:
            tokens = self.captions.tokens(index, record["name"], record["caption"])
        more = {k: np.asarray(v) for k, v in record.items() if k not in NOT_MORE}
        image = {"image": self._image(record)} if "image" in record else {}
        if image and self._augments:
            image["picture"] = np.int32(self.source.image_of(index))
        return {**image, "tokens": tokens, "index": np.int32(index), **more}

    def _image(self, record: dict[str, Any]) -> np.ndarray:
        number = self.source.image_of(record["index"])
        if number in self._images:
            return self._images[number]
        try:
            image = square(record["image"], self._size, self._fit)
        except BadRecord as error:
            raise BadRecord(f"{record['name']}: {error}") from error
        if self.cached:
            self._images[number] = image
        return image

    def _skip(self, index: int, why: str) -> None:
        with self._lock:
            if self.bad.add(index):
                logging.warning("%s: skipped %s", self.source.name, why)
        self.raise_if_all_bad()

    def raise_if_all_bad(self, at_end: bool = False) -> None:
        """Raise UserError once every pair there is to meet was met and none was good."""
        all_met = len(self.bad) >= self._reachable or (at_end and len(self.bad))
        if all_met and not self._good:
            raise UserError(
                f"name: {self.source.name}: every one of the {len(self.bad)} records read is bad; "
                "the warnings above say why"
            )


def threads_for(config: DataConfig, remote: bool = False) -> int:
    """Threads that read and decode ahead: Pillow lets go of the interpreter lock meanwhile.

    `remote` says that some of a record comes over a network, whatever the config's name.

    No worker processes: those need a guarded main module and parsed absl flags, and would each
    hold the data set.
    """
    if config.read_threads:
        return config.read_threads
    return 64 if remote or is_remote(config.name) else min(os.cpu_count() or 1, 16)
