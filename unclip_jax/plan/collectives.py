"""What devices send each other: collectives by kind and by how many take part."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable

COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
)  # fmt: skip
# Between slices: all-reduce is dcn-all-reduce, and so on.
DCN = "dcn-"


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind among groups of one size.

    Attributes:
        kind: one of `COLLECTIVES`; behind `DCN`, among slices.
        group: devices that take part in one, or slices.
        bytes: of the operands on one device, over all runs.
        count: runs.
    """

    kind: str
    group: int
    bytes: int
    count: int

    @property
    def sent(self) -> float:
        """Bytes that a device sends, by the ring algorithms (Thakur et al. 2005)."""
        n, kind = self.group, self.kind.removeprefix(DCN)
        if kind == "collective-permute":
            return self.bytes
        if kind == "all-gather":  # the operand is one of n parts
            return self.bytes * (n - 1)
        return self.bytes * (n - 1) / n * (2 if kind == "all-reduce" else 1)

    @property
    def between_slices(self) -> bool:
        """Whether it goes over the data centre's network."""
        return self.kind.startswith(DCN)


def added_up(collectives: Iterable[tuple[Collective, int]]) -> tuple[Collective, ...]:
    """Collectives that run so many times each, together, by kind and size of group."""
    totals: dict[tuple[str, int], list[int]] = collections.defaultdict(lambda: [0, 0])
    for c, times in collectives:
        total = totals[c.kind, c.group]
        total[0] += c.bytes * times
        total[1] += c.count * times
    return tuple(Collective(*key, *total) for key, total in sorted(totals.items()))
