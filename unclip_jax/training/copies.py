"""Copies of the training state on the hosts' own disks, for a run that dies and comes back.

Each process writes what its own devices hold, without asking any other and without a network. The
copies of one step are of use together: a run goes on from them if every process finds its own, for
the same devices of the same mesh. Otherwise the last checkpoint counts.
"""

from __future__ import annotations

import json
import shutil
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from unclip_jax.common.files import default_cache_dir, flush, making_folder, remove_leftovers
from unclip_jax.errors import one_line
from unclip_jax.parallel import distributed
from unclip_jax.training import sums

KEPT = 2
ARRAYS, INDEX = "arrays.bin", "index.json"

State = TypeVar("State")
Slices = tuple[tuple[int, int], ...]


def _slices(index: tuple[slice, ...], shape: tuple[int, ...]) -> Slices:
    return tuple(cut.indices(size)[:2] for cut, size in zip(index, shape, strict=True))


class Copies:
    """The copies of one process of a run."""

    def __init__(self, run: str) -> None:
        """Of the run of this name, which no other one has; those of other runs are left alone."""
        own = f"{jax.process_index()}-of-{jax.process_count()}"
        self.folder = default_cache_dir() / "copies" / run / own
        self._writer: threading.Thread | None = None

    def save(
        self,
        step: int,
        state: Any,
        positions: Mapping[str, Any],
        description: Mapping[str, Any],
    ) -> None:
        """Begin to write a copy; returns once the state is copied off the devices."""
        self.wait()
        parts: list[np.ndarray] = []
        leaves = []
        names = sums.names(state)
        for name, array in zip(names, jax.tree.leaves(state), strict=True):
            held = {_slices(s.index, array.shape): s.data for s in array.addressable_shards}
            found = []
            for slices, data in held.items():
                parts.append(np.array(data))  # the devices' own memory is used again
                starts = tuple(start for start, _ in slices)
                total = sums.of_part(sums.Part(parts[-1], starts, array.shape))
                found.append({"slices": slices, "sum": f"{total:016x}"})
            leaves.append({"name": name, "parts": found})
        index = {
            "step": step,
            "leaves": leaves,
            "positions": dict(positions),
            "description": dict(description),
        }
        self._writer = threading.Thread(target=self._write, args=(step, parts, index), name="copy")
        self._writer.start()

    def _write(self, step: int, parts: list[np.ndarray], index: dict[str, Any]) -> None:
        try:
            shutil.rmtree(self.folder / str(step), ignore_errors=True)
            with making_folder(self.folder / str(step)) as folder:
                with (folder / ARRAYS).open("wb") as file:
                    for part in parts:
                        file.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8))
                text = json.dumps(index | {"digest": sums.of_json(index)})
                (folder / INDEX).write_text(text, encoding="utf-8")
                for name in (ARRAYS, INDEX):
                    flush(folder / name)
            for old in self.steps()[:-KEPT]:
                shutil.rmtree(self.folder / str(old), ignore_errors=True)
        except OSError as error:
            warnings.warn(f"no copy of step {step} on this disk: {one_line(error)}", stacklevel=2)

    def wait(self) -> None:
        """Wait until what was begun is on the disk."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def steps(self) -> list[int]:
        """The steps of this process's copies, rising."""
        found = self.folder.glob("*") if self.folder.is_dir() else ()
        return sorted(int(path.name) for path in found if path.name.isdecimal())

    def usable(self, after: int) -> list[int]:
        """The steps beyond `after` of which every process has a copy, newest first. All call it."""
        remove_leftovers(self.folder)
        every = distributed.gather(self.steps())
        common = set.intersection(*map(set, every))
        return sorted((step for step in common if step > after), reverse=True)

    def index(self, step: int) -> dict[str, Any]:
        """What the copy of a step says of itself, empty if it is not as it was written."""
        try:
            text = (self.folder / str(step) / INDEX).read_text(encoding="utf-8")
            found = json.loads(text)
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) and sums.is_intact(found) else {}

    def restore(self, step: int, like: State) -> State | None:
        """The state, placed as `like` is; None unless all processes can. All must call it."""
        try:
            state = self._restore(self.folder / str(step), self.index(step), like)
        except (OSError, ValueError, KeyError, TypeError):
            state = None
        return state if all(distributed.gather(state is not None)) else None

    def _restore(self, folder: Path, index: dict[str, Any], like: State) -> State | None:
        wanted = dict(zip(sums.names(like), jax.tree.leaves(like), strict=True))
        if [leaf["name"] for leaf in index["leaves"]] != list(wanted):
            return None
        arrays = []
        with (folder / ARRAYS).open("rb") as file:
            for leaf, target in zip(index["leaves"], wanted.values(), strict=True):
                held: dict[Slices, np.ndarray] = {}
                for part in leaf["parts"]:
                    slices = tuple((start, stop) for start, stop in part["slices"])
                    shape = tuple(stop - start for start, stop in slices)
                    dtype = np.dtype(target.dtype)
                    data = file.read(dtype.itemsize * int(np.prod(shape)))
                    array = np.frombuffer(data, dtype).reshape(shape)
                    starts = tuple(start for start, _ in slices)
                    total = sums.of_part(sums.Part(array, starts, target.shape))
                    if part["sum"] != f"{total:016x}":
                        return None
                    held[slices] = array
                where = target.sharding.addressable_devices_indices_map(target.shape)
                placed = [
                    jax.device_put(held[_slices(index, target.shape)], device)
                    for device, index in where.items()
                ]
                arrays.append(
                    jax.make_array_from_single_device_arrays(target.shape, target.sharding, placed)
                )
        return jax.tree.unflatten(jax.tree.structure(like), arrays)

    def forget(self) -> None:
        """Delete all copies of this process: the run has ended."""
        self.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
