"""The checkpoints of a run, to read.

A training checkpoint holds three things that belong to one step: the training state, the position
of the data iterator right after the batch that step consumed, and the description of the run.
Beside them are the sums of all arrays and items (`sums`), taken before anything was written.
Whatever is read is compared with them: Orbax checks its own index, but a byte that changes in the
arrays or in the position in the data would reach the run unnoticed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from unclip_jax.common.params import TRAINED
from unclip_jax.data.shards import storage
from unclip_jax.errors import UserError, one_line
from unclip_jax.parallel import distributed, sharding
from unclip_jax.training import checksums, sums

Params = dict[str, Any]
T = TypeVar("T")

SUMS = "sums"  # the item with the sums of the others
_ITEMS = ("state", "data", "description")


class Damaged(UserError):
    """A checkpoint is not as it was written.

    Attributes:
        problem: what is wrong with it.
    """

    def __init__(self, where: str, problem: str, do: str) -> None:
        """Say which, what is wrong, and what to do."""
        super().__init__(f"{where}: the checkpoint is damaged ({problem}); {do}")
        self.problem = problem


def has_sums(folder: Path) -> bool:
    """Whether a checkpoint says what it holds; those of the first versions do not."""
    return checksums.exist(folder) or (folder / SUMS).is_dir()


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint, in words; "" if nothing is, or none can tell.

    All of it is read.
    """
    with Saved(folder.parent.parent) as saved:
        try:
            saved.check(int(folder.name))
        except Damaged as error:
            return error.problem
    return ""


class Saved:
    """The checkpoints of a run, to read alone; use as a context manager."""

    def __init__(self, workdir: str | Path) -> None:
        """Open `workdir`/checkpoints; UserError if there is no whole checkpoint."""
        place = storage.place(workdir, "--workdir")
        self.folder = (place if storage.is_address(place) else place.absolute()) / "checkpoints"
        if not self.folder.is_dir():
            raise UserError(
                f"--workdir: {str(workdir)!r} has no checkpoints; give the --workdir of a train.py"
                " run"
            )
        options = {"read_only": True, "create": False}
        # Orbax warns of what is asked for, that it only reads.
        self._open(logging.WARNING, ocp.PyTreeCheckpointHandler(), options, "metrics")
        if not self.steps():
            self._close()
            raise UserError(f"--workdir: {str(workdir)!r} has no whole checkpoint yet; train on")

    def _open(self, mute: int, state: Any, options: dict[str, Any], *more: str) -> None:
        """Open `folder`, and keep what Orbax logs at the level `mute` and above off the terminal.

        Its errors are raised as well, and told by us.
        """
        self._filter = lambda log: not (log.levelno >= mute and "orbax" in log.pathname)
        logging.getLogger("absl").addFilter(self._filter)
        self._tables: dict[int, dict[str, Any]] = {}
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(**options),
            item_handlers={"state": state}
            | {item: ocp.JsonCheckpointHandler() for item in ("data", "description", SUMS, *more)},
        )

    def _close(self) -> None:
        try:
            self._manager.close()
        finally:
            logging.getLogger("absl").removeFilter(self._filter)

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(self, *raised: Any) -> None:
        """Close."""
        self._close()

    def steps(self) -> list[int]:
        """The steps of whole checkpoints, rising."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def item(self, step: int, name: str) -> dict[str, Any]:
        """What checkpoint `step` holds as JSON: "description" or "data".

        Like every method that reads, it raises a UserError if the checkpoint is damaged.
        """
        found = self._json(step, name)
        kept = self._table(step)
        if kept and kept["items"].get(name) != sums.of_json(found):
            raise self.damaged(step, f"{name} has changed since it was written")
        return found

    def _json(self, step: int, name: str) -> dict[str, Any]:
        items = ocp.args.Composite(**{name: ocp.args.JsonRestore()})
        return self._read(step, lambda: self._manager.restore(step, args=items)[name])

    def _table(self, step: int) -> dict[str, Any]:
        """The sums of a checkpoint, empty if it is from before there were any.

        One whose files have checksums of their own, as a former version wrote them, is compared
        with those, once, each process with its share. All processes of a run must call it.
        """
        if step not in self._tables:
            folder = self.folder / str(step)
            self._tables[step] = {}
            if (folder / SUMS).is_dir():
                found = self._json(step, SUMS)
                if not sums.is_intact(found):
                    raise self.damaged(step, f"{SUMS} is damaged")
                self._tables[step] = found
            elif checksums.exist(folder):
                share = (jax.process_index(), jax.process_count())
                every = distributed.gather(checksums.problem(folder, *share))
                if problem := next(filter(None, every), ""):
                    raise self.damaged(step, problem)
            elif missing := [item for item in _ITEMS if not (folder / item).is_dir()]:
                raise self.damaged(step, f"{missing[0]} is missing")
        return self._tables[step]

    def compare(self, step: int, tree: Any) -> None:
        """Raise `Damaged` unless arrays are those that were saved. All processes must call it."""
        kept = self._table(step)
        if kept and (problem := sums.difference(kept["arrays"], tree)):
            raise self.damaged(step, problem)

    def check(self, step: int) -> None:
        """Read all of a checkpoint, part by part; raise `Damaged` if it is."""
        kept = self._table(step)
        self.item(step, "data")
        described = self.item(step, "description")
        if not kept:
            return
        tree = self._tree(step)
        seen = {name for part in tree for name in sums.names({part: tree[part]})}
        if missing := sorted(kept["arrays"].keys() - seen):
            raise self.damaged(step, f"{missing[0]} is missing")
        for part in tree:
            if jax.tree.leaves(tree[part]):
                self.state(step, lambda tree, part=part: {part: tree[part]})
        # A former version had a sum of figures that were not kept, as nothing was judged by them.
        figures = kept["items"].get("metrics", "") if described.get("train", {}).get("best") else ""
        if figures and figures != sums.of_json(self.figures(step)):
            raise self.damaged(step, "metrics has changed since it was written")

    def figures(self, step: int) -> dict[str, float]:
        """The figures of the evaluation at `step`, empty if there was none."""
        path = self.folder / str(step) / "metrics" / "metrics"
        return self._read(step, lambda: json.loads(path.read_text()) if path.is_file() else {})

    def averaged(self, step: int) -> Params:
        """All params with the average, float32, in place of what is trained.

        The optimizer's state is not read.
        """

        def wanted(tree: dict[str, Any]) -> dict[str, Any]:
            constants = {name: part for name, part in tree["params"].items() if name != TRAINED}
            # Orbax takes an empty dict for a leaf.
            return {"ema_params": tree["ema_params"]} | ({"params": constants} if constants else {})

        state = self.state(step, wanted)
        return state.get("params", {}) | in_float32(state["ema_params"])

    def _tree(self, step: int) -> dict[str, Any]:
        """Names, shapes and dtypes of a checkpoint's state."""
        return self._read(step, lambda: self._manager.item_metadata(step)["state"].tree)

    def state(
        self, step: int, wanted: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> dict[str, Any]:
        """The part of the training state that `wanted` chooses of it, in the host's memory."""

        def restore() -> dict[str, Any]:
            here = jax.sharding.SingleDeviceSharding(sharding.host_device())
            shapes = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
                wanted(self._tree(step)),
            )
            item = ocp.args.PyTreeRestore(
                item=shapes,
                restore_args=ocp.checkpoint_utils.construct_restore_args(shapes),
                partial_restore=True,
            )
            return self._manager.restore(step, args=ocp.args.Composite(state=item))["state"]

        found = self._read(step, restore)
        self.compare(step, found)
        return found

    def _read(self, step: int, read: Callable[[], T]) -> T:
        """`read()`; whatever goes wrong in the reader's depths means a damaged checkpoint."""
        try:
            return read()
        except Damaged:
            raise
        except Exception as error:
            raise self.damaged(step, f"{type(error).__name__}: {one_line(error)}") from error

    def damaged(self, step: int, problem: str, do: str = "") -> Damaged:
        """The error for a damaged checkpoint, with what to do about it."""
        return Damaged(str(self.folder / str(step)), problem, do or self._instead(step))

    def _instead(self, step: int) -> str:
        return "choose another with --step"


def in_float32(params: Params) -> Params:
    """The params of an average, in whatever dtype it is kept, as float32."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
