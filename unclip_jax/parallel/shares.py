"""Work dealt to processes that need nothing of each other until it is done.

Batches are dealt whole, one to each process in turn. So every batch is the one that a single
process would compute, and what comes of it is the same, bit for bit, however many there are.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from unclip_jax.parallel import distributed, sharding
from unclip_jax.parallel.cpu import devices as cpu_devices

T = TypeVar("T")


def own(batches: Iterable[T]) -> Iterator[T]:
    """This process's of some batches: every one where there is one process."""
    return itertools.islice(batches, jax.process_index(), None, jax.process_count())


def local_mesh() -> Mesh | None:
    """A mesh of this process's own devices; None where it has one.

    UserError where there are devices of processes that were not joined.
    """
    distributed.check_initialized()
    if jax.local_device_count() == 1:
        return None
    if jax.process_count() == 1:
        return cpu_devices.make_mesh()
    return sharding.make_mesh(devices=jax.local_devices())


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """What all processes made of their own batches, rows [n, ...] in the order of the batches.

    Every process must call it, each with an array for each of its batches, in order; all have rows
    of one shape and dtype.
    """
    count = jax.process_count()
    if count == 1:
        return np.concatenate(parts)
    about = [(len(part), part.shape[1:], part.dtype.name) for part in parts]
    every = distributed.gather(about)
    shape, name = next(filter(None, every))[0][1:]
    dtype = jnp.dtype(name)
    most = max(rows for mine in every for rows, _, _ in mine)
    made: list[np.ndarray] = []
    for turn in range(max(map(len, every))):  # one batch of each at a time is on the devices
        held = np.zeros((most, math.prod(shape) * dtype.itemsize), np.uint8)
        if turn < len(parts) and (part := np.ascontiguousarray(parts[turn])).size:
            held[: len(part)] = part.reshape(len(part), -1).view(np.uint8)
        found = np.asarray(multihost_utils.process_allgather(held))
        for rows, mine in zip(found, every, strict=True):
            if turn < len(mine):
                made.append(rows[: mine[turn][0]].view(dtype).reshape(-1, *shape))
    return np.concatenate(made)


def join(args: argparse.Namespace) -> None:
    """Join the other processes, if there are any, by the flags of `command_line.add_hosts`.

    Nothing may have asked for devices before, nor does this. UserError if they are not found.
    """
    given = (args.coordinator_address, args.num_processes, args.process_id)
    distributed.initialize(args.distributed, *given)
