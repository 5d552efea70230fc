"""Checksums of arrays, computed as they are saved and compared as they are restored.

The sum of an array is one modulo 2^64, of the bits of every element times an odd factor that its
place gives. Sums of parts add up. So each process sums what its own devices hold, on whatever mesh,
and no file is read twice. A changed element always changes the sum, since an odd factor has an
inverse; of several at once, one change in billions passes. What is compared is what arrived on the
devices: a fault of the storage, of the network or of a library on the way is noticed alike.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

_ROW, _COLUMN = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03  # what tells rows' factors from columns'
_CHUNK = 1 << 18  # elements summed at a time, which stay in the processor's cache
_THREADS = 16


class Part(NamedTuple):
    """A part of an array: what it holds, where it begins along each axis, and the whole's shape."""

    array: Any
    starts: tuple[int, ...]
    shape: tuple[int, ...]


def of_tree(tree: Any) -> dict[str, str]:
    """The sum of every array in a tree, by its path, in hexadecimal. All processes must call it.

    Args:
        tree: JAX's arrays, of all processes or of one; or NumPy's.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        own = list(pool.map(lambda leaf: sum(map(of_part, own_parts(leaf[1]))), leaves))
    halves = np.array([[n % 2**64 >> 32, n % 2**32] for n in own], np.uint32).reshape(-1, 2)
    if any(isinstance(x, jax.Array) and not x.is_fully_addressable for _, x in leaves):
        halves = multihost_utils.process_allgather(halves).astype(object).sum(0)
    totals = ((int(high) << 32) + int(low) for high, low in halves)
    return {n: f"{total % 2**64:016x}" for n, total in zip(names(tree), totals, strict=True)}


def names(tree: Any) -> list[str]:
    """The paths of a tree's leaves, the same for named tuples as for dicts of their fields."""
    paths = (path for path, _ in jax.tree_util.tree_leaves_with_path(tree))
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]


def own_parts(array: Any) -> Iterator[Part]:
    """The parts that this process answers for: of equal ones, one process has the first."""
    if not isinstance(array, jax.Array):
        array = np.asarray(array)
        yield Part(array, (0,) * array.ndim, array.shape)
        return
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            starts = tuple(cut.start or 0 for cut in shard.index)
            yield Part(shard.data, starts, array.shape)


def of_part(part: Part) -> int:
    """The sum of a part. The whole is seen as rows of its last axis, numbered in order."""
    found = np.ascontiguousarray(part.array)
    if not found.size:
        return 0
    bits = found.view(f"u{found.dtype.itemsize}").reshape(-1, found.shape[-1] if part.shape else 1)
    first = part.starts[-1] if part.starts else 0
    columns = _factors(np.arange(first, first + bits.shape[1], dtype=np.uint64), _COLUMN)
    rows = np.zeros((1,) * max(0, len(part.shape) - 1), np.uint64)
    for axis in range(len(part.shape) - 1):
        places = np.arange(
            part.starts[axis], part.starts[axis] + found.shape[axis], dtype=np.uint64
        )
        stride = math.prod(part.shape[axis + 1 : -1])
        rows = rows + np.expand_dims(
            places * np.uint64(stride), [i for i in range(rows.ndim) if i != axis]
        )
    factors, total = _factors(rows.reshape(-1), _ROW), 0
    each = max(1, _CHUNK // bits.shape[1])
    for begin in range(0, len(bits), each):
        chunk = bits[begin : begin + each].astype(np.uint64)
        total += int((chunk @ columns) @ factors[begin : begin + each])
    return total % 2**64


def _factors(numbers: np.ndarray, salt: int) -> np.ndarray:
    """An odd factor for each number, as if drawn at random (SplitMix64, Steele et al. 2014)."""
    x = (numbers + np.uint64(1)) * np.uint64(salt)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) | np.uint64(1)


def of_json(value: Any) -> str:
    """The SHA-256 of what is JSON-able, however it is written."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def table(state: Any, **items: Any) -> dict[str, Any]:
    """What a checkpoint keeps: the sums of a state and of JSON-able items. All must call it."""
    found = {"arrays": of_tree(state), "items": {name: of_json(x) for name, x in items.items()}}
    return found | {"digest": of_json(found)}


def is_intact(found: Mapping[str, Any]) -> bool:
    """Whether a table itself is as it was made."""
    rest = {name: value for name, value in found.items() if name != "digest"}
    return found.get("digest") == of_json(rest)


def difference(kept: Mapping[str, str], tree: Any) -> str:
    """The first array of a tree whose sum is another than is kept, in words; "" for none."""
    return next(
        (
            f"{name} has changed since it was written" if name in kept else f"{name} is new"
            for name, total in of_tree(tree).items()
            if kept.get(name) != total
        ),
        "",
    )
