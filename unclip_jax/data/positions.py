"""Which positions of a stream each share of a batch holds, and which have been read.

A batch of n shares of b rows is n b positions in a row, the first b of them the first share's. So a
batch holds the same examples in the same rows, however many shares it has. Each share goes on at
its own pace, since bad records make some look further for a full batch: what n shares have read is
said by n counts. What another number of shares read before is said by the counts of that time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Share:
    """The positions of one share: of every `count * block` in a row, `block` from its place on.

    Attributes:
        index: which share, from 0.
        count: how many there are.
        block: rows of a batch that are the share's.
    """

    index: int
    count: int
    block: int

    def position(self, j: int) -> int:
        """The position that is the share's j-th, from 0."""
        return (j // self.block * self.count + self.index) * self.block + j % self.block

    def below(self, position: int) -> int:
        """How many of the share's positions are less than `position`."""
        rounds, rest = divmod(position, self.count * self.block)
        return rounds * self.block + min(max(0, rest - self.index * self.block), self.block)


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a number of shares have read: of share p, the first `counts[p]` positions."""

    block: int
    counts: tuple[int, ...]

    def __contains__(self, position: int) -> bool:
        """Whether a position, from 0, has been read."""
        block, row = divmod(position, self.block)
        turn, p = divmod(block, len(self.counts))
        return turn * self.block + row < self.counts[p]

    def first_missing(self) -> int:
        """The smallest position that hasn't been read."""
        return min(self._share(p).position(k) for p, k in enumerate(self.counts))

    def last(self) -> int:
        """The largest position read; -1 if there is none."""
        return max(self._share(p).position(k - 1) if k else -1 for p, k in enumerate(self.counts))

    def _share(self, p: int) -> Share:
        return Share(p, len(self.counts), self.block)


@dataclasses.dataclass(frozen=True)
class Positions:
    """A finite set of positions.

    Attributes:
        layouts: one for each number of shares there has been.
    """

    layouts: tuple[Layout, ...] = ()

    def __contains__(self, position: int) -> bool:
        """Whether a position, from 0, has been read."""
        return any(position in layout for layout in self.layouts)

    def first_missing(self) -> int:
        """The smallest position that hasn't been read."""
        first = max((layout.first_missing() for layout in self.layouts), default=0)
        while first in self:
            first += 1
        return first

    def beyond(self, position: int) -> Positions:
        """The layouts that have read something from `position` on; the others say nothing new."""
        return Positions(tuple(found for found in self.layouts if found.last() >= position))


class InMemory:
    """Batches of examples that stay in memory, as grain's iterator makes them.

    Grain minds each element, at several times what one costs that needs no reading.
    """

    def __init__(
        self,
        order: Any,
        share: Share,
        examples: Callable[[int, int], dict | None],
        length: int,
        drop_remainder: bool,
    ):
        """Take positions' indices, the share's positions, and how many of those there are."""
        self._order, self._share, self._examples = order, share, examples
        self._length, self._drop_remainder = length, drop_remainder
        self._next = 0

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch."""
        rows, following = [], self._next
        while len(rows) < self._share.block and following < self._length:
            position = self._share.position(following)
            example = self._examples(position, self._order[position])
            following += 1
            if example is not None:
                rows.append(example)
        if not rows or (self._drop_remainder and len(rows) < self._share.block):
            raise StopIteration
        self._next = following
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def get_state(self) -> dict[str, int]:
        """How many of the share's positions have been read or passed over."""
        return {"next_index": self._next}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Go on from there; IndexError if there are not so many."""
        if state["next_index"] > self._length:
            raise IndexError(state["next_index"])
        self._next = state["next_index"]
