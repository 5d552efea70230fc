"""Batches of a source: decoded, tokenised, shuffled, sharded over processes, resumable.

The stream of a data set is one sequence of positions: epoch after epoch, each in its own order,
drawn from the seed. A batch is the next positions in a row, and each of n processes reads its rows
of it: the examples of a batch don't depend on n. A bad record leaves its position empty and the
next one fills the batch. So batches are full, and the state is a count of positions: resuming is
exact, whatever was skipped.

The states of all n processes together say which positions have been read. Any number of processes
can go on from there: each passes over those of its positions that were.
"""

from __future__ import annotations

import functools
import math
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from absl import logging

from unclip_jax.common import checks, extras
from unclip_jax.data.datasets import DataConfig
from unclip_jax.data.images import jitter, square
from unclip_jax.data.positions import InMemory, Layout, Positions, Share
from unclip_jax.data.records import NAMED, BadRecord, Source, fingerprints
from unclip_jax.data.shards.storage import is_remote
from unclip_jax.data.tokenizer import Encoder, Tokenizer
from unclip_jax.errors import UserError, wrong

TOLD_APART = 2**18  # bad records, and cut captions: some 20 MB


class TextEncoder(Protocol):
    """A frozen network that reads captions: Karlo's CLIP, Imagen's T5."""

    @property
    def tokenizer(self) -> Encoder:
        """Captions to the ids [b, l] that it reads."""

    def states(self, tokens: np.ndarray) -> dict[str, Any]:
        """Ids [b, l] to "text_states" [b, l, d] float32 and "text_mask" [b, l] bool, on devices."""


def batches(
    source: Source,
    config: DataConfig,
    *,
    seed: int,
    batch_size: int,
    shuffle: bool = True,
    epochs: int | None = None,
    drop_remainder: bool = True,
    process_index: int = 0,
    process_count: int = 1,
    encoder: TextEncoder | Encoder | None = None,
) -> Batches:
    """An iterator of batches, endless unless `epochs` says otherwise.

    Each batch is a dict of numpy arrays: `image` uint8 `[b, s, s, 3]`, `tokens` int32 `[b, l]`,
    `index` int32 `[b]`, and whatever else the source's records carry; where images are augmented,
    `picture` int32 `[b]`, equal for pairs that share an image. An encoder adds its states of
    the captions as each batch is read. They stay on the device: nothing is stored, so a data set
    may be of any size.

    Args:
        source: the data set.
        config: gives image size, context length, vocabulary, augmentation and cache.
        seed: from which orders and augmentations are drawn, 0..2**32-1.
        batch_size: pairs per batch, of this process.
        shuffle: whether each epoch has its own random order, rather than the source's.
        epochs: passes over the data set, all processes together; None for no end. With several
            processes prefer None: where images are bad, one may end before another.
        drop_remainder: whether a last batch that isn't full is left out.
        process_index: which share of the data this is. A share is commonly a process's,
            `jax.process_index()`; processes that feed the same rows of a batch have the same one.
        process_count: how many shares there are.
        encoder: a frozen network whose tokens and states of the captions batches hold, or the
            tokenizer alone; None for this package's, of the config's context length and vocabulary.

    Raises:
        UserError: an argument has no meaning, or the data set has an end and holds fewer pairs
            than one batch; and, from the iterator, every record is bad.
    """
    checks.count("batch_size", batch_size)
    if epochs is not None:
        checks.count("epochs", epochs)
    if not 0 <= seed < 2**32:
        raise wrong("seed", seed, "0..4294967295")
    if not 0 <= process_index < process_count:
        raise wrong("process_index", process_index, f"0..{process_count - 1}")
    share = Share(process_index, process_count, batch_size)
    total = sys.maxsize if epochs is None else len(source) * epochs
    length = share.below(total)
    if drop_remainder and length < batch_size:
        raise wrong(
            "batch_size",
            batch_size,
            f"at most {length}, the pairs of {source.name} that a process sees",
            "use a smaller batch, epochs=None or drop_remainder=False",
        )
    # Unshuffled, a process may meet the same pairs in every epoch.
    common = math.gcd(len(source), process_count * batch_size)
    met = 1 if shuffle else min(batch_size, common) / common
    examples = _Examples(source, config, encoder, reachable=int(len(source) * met))

    grain = extras.load("grain", "train", "batches of a data set")
    stream = grain.MapDataset.range(len(source)).seed(seed)
    if shuffle:
        stream = stream.shuffle()
    order = stream.repeat(epochs)
    remote = is_remote(config.name) or getattr(source, "remote", False)
    in_memory = examples.cached and not config.augment and not remote
    threads = 0 if examples.cached and not remote else threads_for(config, remote)
    iterator = InMemory if in_memory else functools.partial(_reading, config.augment, threads)
    batched = iterator(order, share, examples, length, drop_remainder)
    settings = {
        "seed": seed,
        "shuffle": shuffle,
        "process_index": process_index,
        "process_count": process_count,
        "batch_size": batch_size,
    }
    reads = None if isinstance(encoder, Encoder) else encoder
    return Batches(batched, examples, settings, reads)


def _reading(
    augment: float,
    threads: int,
    order: Any,
    share: Share,
    examples: _Examples,
    length: int,
    full: bool,
) -> Any:
    """Grain's iterator of batches whose examples are read and augmented ahead."""
    grain = extras.load("grain", "train", "batches of a data set")
    stream = order.map_with_index(examples)
    if augment:
        stream = stream.random_map(lambda x, rng: {**x, "image": jitter(x["image"], augment, rng)})
    mine = grain.MapDataset.range(length).map(lambda j: stream[share.position(j)])
    options = grain.ReadOptions(threads, prefetch_buffer_size=max(2 * share.block, threads))
    return iter(mine.to_iter_dataset(options).batch(share.block, drop_remainder=full))


class Batches:
    """An iterator of batches whose position can be saved and restored; made by `batches`."""

    def __init__(
        self, iterator: Any, examples: _Examples, settings: dict, encoder: TextEncoder | None
    ):
        """Take a grain.DatasetIterator, and what its states are compared with."""
        self._iterator, self._examples = iterator, examples
        self._given, self._encoder = settings, encoder

    @functools.cached_property
    def _settings(self) -> dict:
        return {"data": self._examples.source.fingerprint, **self._given}

    def __iter__(self) -> Batches:
        """The iterator itself."""
        return self

    def __next__(self) -> dict[str, Any]:
        """The next batch; `UserError` once it is clear that every record is bad."""
        try:
            batch = next(self._iterator)
        except StopIteration:
            self._examples.raise_if_all_bad(at_end=True)
            raise
        return batch | self._encoder.states(batch["tokens"]) if self._encoder else batch

    @property
    def skipped(self) -> int:
        """How many different records were skipped so far, those the source left out included.

        Beyond `TOLD_APART` one counts each time it is met.
        """
        return len(self._examples.bad) + len(self._examples.source.skipped)

    @property
    def truncated(self) -> int:
        """How many different captions were cut to the context length so far, as `skipped`."""
        return len(self._examples.captions.cut)

    def get_state(self) -> dict[str, Any]:
        """This process's place after the last batch returned, as a dict that JSON can hold.

        `consumed` counts the positions it has read or passed over. Bad records count, what is read
        ahead does not. `earlier` are the batch sizes and counts of earlier numbers of processes, as
        in `positions.Layout`.
        """
        return {
            **self._settings,
            "consumed": self._iterator.get_state()["next_index"],
            "earlier": [[e.block, list(e.counts)] for e in self._examples.earlier.layouts],
        }

    def set_state(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Continue where all processes called `get_state`, whatever their number was.

        Every position is read once: before, or from now on by one of the processes. With the same
        number of processes and the same batch size the same batches follow, bit for bit.

        Args:
            states: those of all processes, taken after the same step, in order of process.

        Raises:
            UserError: they are of other data, another seed or order, or not of all processes.
        """
        _, former = fingerprints(self._examples.source)
        earlier, last = _together(states, self._settings, former)
        names = ("process_index", "process_count", "batch_size")
        share = Share(*(self._settings[name] for name in names))
        everything = Positions((*earlier.layouts, last))
        consumed, kept = share.below(everything.first_missing()), everything
        if (last.block, len(last.counts)) == (share.block, share.count):
            # Its own count says more than what all have in common.
            consumed, kept = max(consumed, last.counts[share.index]), earlier
        try:
            self._iterator.set_state({"next_index": consumed})
        except IndexError as error:
            raise UserError(
                f"states: {consumed} positions were consumed, more than there are; they are of "
                "more epochs"
            ) from error
        self._examples.earlier = kept.beyond(everything.first_missing())


def _together(
    states: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], former: str
) -> tuple[Positions, Layout]:
    """What earlier numbers of processes had read, and the counts of the processes that saved.

    `former` is another name that the data may have in the states.
    """
    if isinstance(states, Mapping) or not states:
        raise wrong("states", states, "a list of the states of all processes that saved")
    for place, state in enumerate(states):
        expected = {k: settings[k] for k in ("data", "seed", "shuffle")}
        expected |= {"process_index": place, "process_count": len(states)}
        expected |= {name: states[0].get(name) for name in ("earlier", "batch_size")}
        for field, value in expected.items():
            if state.get(field) != value and (field, state.get(field)) != ("data", former):
                raise wrong(
                    f"states[{place}].{field}",
                    state.get(field),
                    repr(value),
                    "batches continue only with the data, seed and order that they began with, "
                    "from the states of all processes, in their order",
                )
        for field in ("consumed", "earlier", "batch_size"):
            if state.get(field) is None:
                raise UserError(f"states[{place}]: has no {field}; expected what get_state returns")
    earlier = tuple(Layout(block, tuple(counts)) for block, counts in states[0]["earlier"])
    last = Layout(states[0]["batch_size"], tuple(state["consumed"] for state in states))
    return Positions(earlier), last


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


class _Examples:
    """Position, index -> an example, or None for a bad record. Safe to call from threads."""

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        encoder: TextEncoder | Encoder | None,
        reachable: int,
    ):
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
        more = {k: np.asarray(v) for k, v in record.items() if k not in _NOT_MORE}
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
        all_met = len(self.bad) >= self._reachable or (at_end and len(self.bad))
        if all_met and not self._good:
            raise UserError(
                f"name: {self.source.name}: every one of the {len(self.bad)} records read is bad; "
                "the warnings above say why"
            )


_NOT_MORE = frozenset({"image", "caption", "index", "name", "tokens"})


def threads_for(config: DataConfig, remote: bool = False) -> int:
    """Threads that read and decode ahead: Pillow lets go of the interpreter lock meanwhile.

    `remote` says that some of a record comes over a network, whatever the config's name.

    No worker processes: those need a guarded main module and parsed absl flags, and would each
    hold the data set.
    """
    if config.read_threads:
        return config.read_threads
    return 64 if remote or is_remote(config.name) else min(os.cpu_count() or 1, 16)
