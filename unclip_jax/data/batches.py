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
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from unclip_jax.common import checks, extras
from unclip_jax.data.datasets import DataConfig
from unclip_jax.data.examples import Examples, TextEncoder, threads_for
from unclip_jax.data.images import jitter
from unclip_jax.data.positions import InMemory, Layout, Positions, Share
from unclip_jax.data.records import Source, fingerprints
from unclip_jax.data.shards.storage import is_remote
from unclip_jax.data.tokenizer import Encoder
from unclip_jax.errors import UserError, wrong


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
    examples = Examples(source, config, encoder, reachable=int(len(source) * met))

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
    examples: Examples,
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
        self, iterator: Any, examples: Examples, settings: dict, encoder: TextEncoder | None
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

        Beyond `examples.TOLD_APART` one counts each time it is met.
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
