"""What lets a run be killed at any moment and go on as if it had not been.

Orbax writes a checkpoint in the background. On a disk it renames the finished folder into place; in
a bucket it writes a last file that says so. So a checkpoint is whole or not there. `saved` tells
what it holds.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath

from unclip_jax.common.params import compare_shapes, flatten
from unclip_jax.data.shards.storage import is_address
from unclip_jax.errors import UserError, wrong
from unclip_jax.parallel import distributed
from unclip_jax.training import sums
from unclip_jax.training.config import TrainConfig
from unclip_jax.training.saved import SUMS, Damaged, Saved

State = TypeVar("State")
T = TypeVar("T")

_LATE = 10.0  # seconds of waiting for the storage that are told
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextlib.contextmanager
def disk_in_words(workdir: str) -> Iterator[None]:
    """Raise UserError where a block fails for want of space. Whole checkpoints stay whole."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        raise UserError(
            f"workdir {workdir!r}: cannot be written to ({error}); free some space there, then"
            " run the same command again"
        ) from error


class Checkpoints(Saved):
    """The checkpoints in a folder, to train on from and to add to; use as a context manager."""

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        """Open `folder`, created if missing.

        The last `config.keep_checkpoints` stay, and the best by `config.best`, if that is set.
        """
        self.folder, self._config = folder, config
        policies = ocp.checkpoint_managers
        keep: Any = policies.LatestN(config.keep_checkpoints)
        if config.best:
            best = policies.BestN(
                get_metric_fn=self._score, n=1, keep_checkpoints_without_metrics=False
            )
            keep = policies.AnyPreservationPolicy([keep, best])
        # Orbax asks the wall clock how long a write takes: where the clock first hears the time in
        # the midst of one, any timeout is over. Several processes need one: some may have died.
        patience = {"timeout_secs": 2**31} if jax.process_count() == 1 else {}
        options = {
            "preservation_policy": keep,
            "best_fn": self._score if config.best else None,
            "cleanup_tmp_directories": True,
            "async_options": ocp.AsyncOptions(**patience),
        }
        self._open(logging.ERROR, ocp.StandardCheckpointHandler(), options)

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        """Finish what is being written, and close.

        UserError if it could not be written, and nothing else went wrong before.
        """
        told = contextlib.suppress(Exception)
        with told if kind else self._writing("the last checkpoint"):
            self._close()

    def newest(self, read: Callable[[int], T]) -> T | None:
        """`read(step)` of the newest checkpoint that is as it was written; None if there is none.

        With `config.if_damaged` "previous", damaged ones are moved to `damaged/` in the workdir
        until one is whole. All processes of a run must call it.

        Raises:
            Damaged: the newest checkpoint is, and nothing or nothing else is asked for.
        """
        for step in reversed(self.steps()):
            try:
                return read(step)
            except Damaged as error:
                is_last = step == min(self.steps())
                if self._config.if_damaged == "stop" or is_last:
                    how = self._instead(step)
                    if not is_last:
                        how = how.replace(
                            "delete that folder", "give --config.train.if_damaged=previous"
                        )
                    copy = "copy that folder again if there is another copy"
                    raise self.damaged(step, error.problem, f"{copy}, or {how}") from error
                if jax.process_count() > 1 and error.__cause__ is not None:
                    # This process alone may know; the others wait for it in Orbax's depths.
                    moved = f"it was moved to {self._move_aside(step)}; run the same command again"
                    raise self.damaged(step, error.problem, moved) from error
                self._set_aside(step, error.problem)
        return None

    def _instead(self, step: int) -> str:
        rest = [other for other in self.steps() if other < step]
        goal = f"go on from step {rest[-1]}" if rest else "start from the beginning"
        return f"delete that folder to {goal}"

    def _set_aside(self, step: int, problem: str) -> None:
        """Move a damaged checkpoint to where nothing looks for it."""
        if distributed.is_lead():
            aside = self._move_aside(step)
            warnings.warn(
                f"checkpoint {step} is damaged ({problem}); moved to {aside}", stacklevel=2
            )
        distributed.gather(None)  # the others look again when it is gone
        self._tables.pop(step, None)
        self._manager.reload()

    def _move_aside(self, step: int) -> Path:
        aside = epath.Path(self.folder).parent / "damaged" / str(step)
        aside.rmtree(missing_ok=True)
        aside.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another process was first
            epath.Path(self.folder / str(step)).rename(aside)
        return aside

    def _score(self, figures: Mapping[str, float]) -> float:
        """The greater, the better."""
        value = float(figures[self._config.best])
        if math.isnan(value):
            return -math.inf
        return -value if self._config.best_is == "least" else value

    def is_best(self, figures: Mapping[str, float]) -> bool:
        """Whether no checkpoint is as good as one with these figures would be.

        UserError if `config.best` is none of them.
        """
        if self._config.best not in figures:
            stage = f"one of the figures of this stage: {', '.join(sorted(figures))}"
            raise wrong("train.best", self._config.best, stage)
        best = self._manager.best_step()
        before = None if best is None else self._manager.metrics(best)
        return before is None or self._score(figures) > self._score(before)

    def save(
        self,
        step: int,
        state: Any,
        positions: Mapping[str, Any],
        description: Mapping[str, Any],
        figures: Mapping[str, float],
    ) -> None:
        """Begin to write a checkpoint; returns once the state is copied off the devices.

        The positions in the data and the description of the run are JSON-able; `figures` are of the
        evaluation at this step, if there was one. UserError if this checkpoint or the one before
        could not be written.
        """
        if step == self.latest():
            return
        self._check_space(step, state)
        parts = {"data": dict(positions), "description": dict(description)}
        judged = dict(figures) if self._config.best else {}  # Orbax keeps no others
        parts[SUMS] = sums.table(state, **parts, **({"metrics": judged} if judged else {}))
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            **{name: ocp.args.JsonSave(value) for name, value in parts.items()},
        )
        self._check_earlier(step)
        with self._writing(f"checkpoint {step}"):
            self._manager.save(step, args=items, metrics=judged or None)

    def _check_space(self, step: int, state: Any) -> None:
        """Raise UserError where a disk has no room: better no checkpoint than a part of one."""
        if is_address(self.folder):
            return
        size = sum(x.nbytes for x in jax.tree.leaves(state))
        free = shutil.disk_usage(self.folder).free
        if free < size:
            self._manager.wait_until_finished()
            raise UserError(
                f"{self.folder}: checkpoint {step} would not fit ({size / 2**20:,.1f} MiB, and"
                f" {free / 2**20:,.1f} MiB are free); free some space there, then run the same"
                " command again"
            )

    def _check_earlier(self, step: int) -> None:
        """Tell of an earlier checkpoint that is late, or that a bucket did not take.

        One process goes on without the one that failed, as this step is written anew. Several
        stop: not all of them know of it.
        """
        began = time.monotonic()
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            if not is_address(self.folder) or jax.process_count() > 1:
                raise self._failed("the last checkpoint", error) from error
            reason = _reason(error)
            print(
                f"{self.folder}: the last checkpoint could not be written ({reason}); step {step}"
                " is written instead",
                file=sys.stderr,
                flush=True,
            )
            self._manager.reload()
        if (waited := time.monotonic() - began) > _LATE:
            print(
                f"checkpoint {step}: waited {waited:.0f} s until the storage had taken the one"
                " before; a higher train.checkpoint_every waits less",
                file=sys.stderr,
                flush=True,
            )

    def wait(self) -> None:
        """Wait until everything is on disk; UserError if it could not be written."""
        with self._writing("the last checkpoint"):
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """Orbax, and TensorStore below it, raise whatever they like when a disk is full."""
        try:
            yield
        except Exception as error:
            raise self._failed(what, error) from error

    def _failed(self, what: str, error: Exception) -> UserError:
        return UserError(
            f"{self.folder}: {what} could not be written ({_reason(error)}); look at the"
            " disk and the space on it, then run the same command again"
        )

    def restore(self, step: int, like: State) -> tuple[State, dict[str, Any]]:
        """The state and the data positions of checkpoint `step`.

        Args:
            step: which one.
            like: the names, shapes, dtypes and shardings to restore: arrays, or shapes with places.

        Raises:
            UserError: the checkpoint is damaged, or its params are other than those of `like`.
        """
        # Orbax's own message for a changed network is a screen long.
        self._table(step)
        problems = compare_shapes(flatten(self._tree(step)["params"]), flatten(like.params))
        if problems:
            raise UserError(
                f"{self.folder / str(step)}: the checkpoint's params are not those of this model:"
                f" {problems}; use the code and the config it was made with, or another workdir"
            )
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        items = ocp.args.Composite(state=ocp.args.StandardRestore(shapes))
        state = self._read(step, lambda: self._manager.restore(step, args=items)["state"])
        self.compare(step, state)
        return state, self.item(step, "data")


def _reason(error: Exception) -> str:
    """What Orbax and TensorStore say, without the latter's notes for developers."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r" \[\w+='.*?'\]", "", reason)[-200:]
