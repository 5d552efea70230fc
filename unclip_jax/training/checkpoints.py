"""What lets a run be killed at any moment and go on as if it had not been.

A training checkpoint holds three things that belong to one step: the training state, the position
of the data iterator right after the batch that step consumed, and the description of the run.
Orbax writes them in the background and renames the finished folder into place, so a checkpoint is
either whole or not there. Before that renaming the SHA-256 of every file goes into the folder, and
nothing is read of a checkpoint until all of them agree: Orbax checks its own index, but a byte that
changes in the arrays or in the position in the data reaches the run unnoticed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import math
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from unclip_jax.common.params import TRAINED, compare_shapes, flatten
from unclip_jax.errors import UserError, one_line, wrong
from unclip_jax.parallel import distributed, sharding
from unclip_jax.training import checksums
from unclip_jax.training.config import TrainConfig

Params = dict[str, Any]
State = TypeVar("State")
T = TypeVar("T")

# Settings of `train` that a resumed run may change: first those that touch nothing that a step
# computes (but a cosine schedule ends at `steps`), then those that say how far a step goes and how
# it is computed. Nothing that a checkpoint holds is made otherwise under them.
CHANGEABLE = tuple(
    f"train.{name}"
    for name in (
        "steps", "log_every", "eval_every", "preview_every", "checkpoint_every", "keep_checkpoints",
        "best", "best_is", "if_damaged", "stall_minutes",
        "learning_rate", "warmup_steps", "schedule", "weight_decay", "grad_clip", "grad_accum",
        "ema_decay", "ema_warmup",
    )
)  # fmt: skip

_LISTED = 3
_ITEMS = ("state", "data", "description")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def damage(folder: Path) -> str:
    """What is wrong with the files of a checkpoint, in words; "" if nothing is, or none can tell.

    Old checkpoints have no checksums. One that a killed run was deleting may have lost them, but
    then it has lost more. All processes of a run must call it: each reads its share of the files.
    """
    if not checksums.exist(folder):
        missing = [item for item in _ITEMS if not (folder / item).is_dir()]
        return f"{missing[0]} is missing" if missing else ""
    own = checksums.problem(folder, jax.process_index(), jax.process_count())
    return next(filter(None, distributed.gather(own)), "")


class _Checksummed(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A checkpoint being written, which gets its checksums before it gets its name.

    Orbax finishes a folder by writing a last file and renaming it. Here it renames it to another
    temporary name; then come the checksums, and the name. So there is no whole checkpoint without
    them, whenever the process dies.
    """

    async def finalize(self) -> None:
        """See the base class. The parts of a step are finished likewise, and need none."""
        name = self._final_path
        if not name.name.isdecimal():
            await super().finalize()
            return
        self._final_path = finished = self.get().with_name(self.get().name + "-finished")
        try:
            await super().finalize()
        finally:
            self._final_path = name
        await asyncio.to_thread(checksums.write, Path(finished))
        Path(finished).rename(name)


@contextlib.contextmanager
def disk_in_words(workdir: Path) -> Iterator[None]:
    """Raise UserError where a block fails for want of space. Whole checkpoints stay whole."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        raise UserError(
            f"workdir {str(workdir)!r}: cannot be written to ({error}); free some space there, then"
            " run the same command again"
        ) from error


class Saved:
    """The checkpoints of a run, to read alone; use as a context manager."""

    def __init__(self, workdir: Path) -> None:
        """Open `workdir`/checkpoints; UserError if there is no whole checkpoint."""
        self.folder = workdir.absolute() / "checkpoints"
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
        json_items = ("data", "description", *more)
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(**options),
            item_handlers={"state": state}
            | {item: ocp.JsonCheckpointHandler() for item in json_items},
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
        items = ocp.args.Composite(**{name: ocp.args.JsonRestore()})
        return self._read(step, lambda: self._manager.restore(step, args=items)[name])

    def figures(self, step: int) -> dict[str, float]:
        """The figures of the evaluation at `step`, empty if there was none."""
        path = self.folder / str(step) / "metrics" / "metrics"
        return json.loads(path.read_text()) if path.is_file() else {}

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

    def state(
        self, step: int, wanted: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> dict[str, Any]:
        """The part of the training state that `wanted` chooses of it, in the host's memory."""

        def restore() -> dict[str, Any]:
            tree = self._manager.item_metadata(step)["state"].tree
            here = jax.sharding.SingleDeviceSharding(sharding.host_device())
            shapes = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
                wanted(tree),
            )
            item = ocp.args.PyTreeRestore(
                item=shapes,
                restore_args=ocp.checkpoint_utils.construct_restore_args(shapes),
                partial_restore=True,
            )
            return self._manager.restore(step, args=ocp.args.Composite(state=item))["state"]

        return self._read(step, restore)

    def _read(self, step: int, read: Callable[[], T]) -> T:
        """`read()`; whatever goes wrong in the reader's depths means a damaged checkpoint."""
        try:
            return read()
        except Exception as error:
            raise self.damaged(step, f"{type(error).__name__}: {one_line(error)}") from error

    def damaged(self, step: int, problem: str, do: str = "") -> UserError:
        """The error for a damaged checkpoint, with what to do about it."""
        do = do or self._instead(step)
        return UserError(f"{self.folder / str(step)}: the checkpoint is damaged ({problem}); {do}")

    def _instead(self, step: int) -> str:
        return "choose another with --step"


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
            "temporary_path_class": _Checksummed,
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

    def resumable(self) -> int | None:
        """The step of the newest checkpoint, once its files are found to be as they were written.

        With `config.if_damaged` "previous", damaged ones are moved to `damaged/` in the workdir
        until one is whole. All processes of a run must call it.

        Raises:
            UserError: the newest checkpoint is damaged, and nothing or nothing else is asked for.
        """
        for step in reversed(self.steps()):
            problem = damage(self.folder / str(step))
            if not problem:
                return step
            is_last = step == min(self.steps())
            if self._config.if_damaged == "stop" or is_last:
                how = self._instead(step)
                if not is_last:
                    how = how.replace(
                        "delete that folder", "give --config.train.if_damaged=previous"
                    )
                copy = "copy that folder again if there is another copy"
                raise self.damaged(step, problem, f"{copy}, or {how}")
            self._set_aside(step, problem)
        return None

    def _instead(self, step: int) -> str:
        rest = [other for other in self.steps() if other < step]
        goal = f"go on from step {rest[-1]}" if rest else "start from the beginning"
        return f"delete that folder to {goal}"

    def _set_aside(self, step: int, problem: str) -> None:
        """Move a damaged checkpoint to where nothing looks for it."""
        if distributed.is_lead():
            aside = self.folder.parent / "damaged" / str(step)
            warnings.warn(
                f"checkpoint {step} is damaged ({problem}); moved to {aside}", stacklevel=2
            )
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            (self.folder / str(step)).rename(aside)
        distributed.gather(None)  # the others look again when it is gone
        self._manager.reload()

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
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(dict(positions)),
            description=ocp.args.JsonSave(dict(description)),
        )
        size, free = (
            sum(x.nbytes for x in jax.tree.leaves(state)),
            shutil.disk_usage(self.folder).free,
        )
        if free < size:  # better no checkpoint than a part of one
            self._manager.wait_until_finished()
            raise UserError(
                f"{self.folder}: checkpoint {step} would not fit ({size / 2**20:,.1f} MiB, and"
                f" {free / 2**20:,.1f} MiB are free); free some space there, then run the same"
                " command again"
            )
        with self._writing(f"checkpoint {step}"):
            self._manager.save(step, args=items, metrics=dict(figures) or None)

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
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            reason = re.sub(r" \[\w+='.*?'\]", "", reason)  # TensorStore's notes for developers
            raise UserError(
                f"{self.folder}: {what} could not be written ({reason[-200:]}); look at the"
                " disk and the space on it, then run the same command again"
            ) from error

    def restore(self, step: int, like: State) -> tuple[State, dict[str, Any]]:
        """The state and the data positions of checkpoint `step`.

        Args:
            step: which one.
            like: the names, shapes, dtypes and shardings to restore: arrays, or shapes with places.

        Raises:
            UserError: the checkpoint is damaged, or its params are other than those of `like`.
        """
        # Orbax's own message for a changed network is a screen long.
        metadata = self._read(step, lambda: self._manager.item_metadata(step)["state"].tree)
        problems = compare_shapes(flatten(metadata["params"]), flatten(like.params))
        if problems:
            raise UserError(
                f"{self.folder / str(step)}: the checkpoint's params are not those of this model:"
                f" {problems}; use the code and the config it was made with, or another workdir"
            )
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(shapes), data=ocp.args.JsonRestore()
        )
        restored = self._read(step, lambda: self._manager.restore(step, args=items))
        return restored["state"], restored["data"]


def in_float32(params: Params) -> Params:
    """The params of an average, in whatever dtype it is kept, as float32."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)


class Change(NamedTuple):
    """A setting that a resumed run has otherwise than before, both as JSON or "absent"."""

    setting: str
    was: str
    now: str

    def __str__(self) -> str:
        """In words."""
        said = f"{self.setting} was {self.was}, now {self.now}"
        why = " (pictures or captions of the data set are others now)"
        return said + why * (self.setting == "data_fingerprint")


def check_description(
    saved: Mapping[str, Any], current: Mapping[str, Any], where: Path
) -> list[Change]:
    """How the run to resume and this one differ; UserError if in more than `CHANGEABLE`."""
    before, now = _leaves(saved), _leaves(current)
    changes = [
        Change(name, before.get(name, "absent"), now.get(name, "absent"))
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    differing = [str(change) for change in changes if change.setting not in CHANGEABLE]
    if differing:
        more = f" and {len(differing) - _LISTED} more" if len(differing) > _LISTED else ""
        raise UserError(
            f"workdir {str(where)!r}: holds a run with other settings:"
            f" {'; '.join(differing[:_LISTED])}{more}; resume with the same ones (only"
            f" {', '.join(CHANGEABLE)} may change) or use another workdir"
        )
    return changes


def _leaves(tree: Any, path: str = "") -> dict[str, str]:
    """Dotted path -> JSON of every leaf; lists count as leaves."""
    if isinstance(tree, Mapping) and tree:
        leaves = {}
        for name, value in tree.items():
            leaves.update(_leaves(value, f"{path}.{name}" if path else name))
        return leaves
    return {path: json.dumps(tree, ensure_ascii=False)}
