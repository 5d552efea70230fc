"""A model folder from a training checkpoint: the averaged weights and all they stand on.

    python -m unclip_jax save --workdir runs/emoji/decoder --out decoder-at-2000 --step 2000

train.py writes WORKDIR/model when it ends; this command takes any checkpoint, also while the run
goes on, or after it stopped. The run is only read.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging

from unclip_jax import stages
from unclip_jax.common import config as settings
from unclip_jax.common.params import TRAINED, compare_shapes, fingerprint, flatten
from unclip_jax.errors import UserError, run_command
from unclip_jax.parallel import sharding
from unclip_jax.training import checkpoints
from unclip_jax.training.fine_tuning import Origin
from unclip_jax.training.lora import Lora
from unclip_jax.weights import folder as model_folder

Params = dict[str, Any]


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m unclip_jax save", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--workdir", required=True, metavar="DIR", help="what train.py was given")
    add("--out", required=True, metavar="DIR", help="the model folder to write")
    add("--step", default="latest", metavar="N", help="of the checkpoint, latest or best")
    add("--init", default="", metavar="DIR", help="the run's config.init, where it had one")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="to store weights in")
    return parser.parse_args(argv)


@contextlib.contextmanager
def open_checkpoints(workdir: Path) -> Iterator[ocp.CheckpointManager]:
    """The checkpoints of a run, to read alone.

    Meanwhile only errors are logged: Orbax warns of what is asked for, that it only reads.

    Raises:
        UserError: there are none.
    """
    folder = workdir.absolute() / "checkpoints"
    if not folder.is_dir():
        raise UserError(
            f"--workdir: {str(workdir)!r} has no checkpoints; give the --workdir of a train.py run"
        )
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with ocp.CheckpointManager(
            folder,
            options=ocp.CheckpointManagerOptions(read_only=True, create=False),
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(),
                "description": ocp.JsonCheckpointHandler(),
                "metrics": ocp.JsonCheckpointHandler(),
            },
        ) as manager:
            if not manager.all_steps():
                raise UserError(
                    f"--workdir: {str(workdir)!r} has no whole checkpoint yet; train on"
                )
            yield manager
    finally:
        logging.set_verbosity(verbosity)


def choose(manager: ocp.CheckpointManager, wanted: str) -> int:
    """The step of the checkpoint that is asked for: a number, "latest" or "best".

    Raises:
        UserError: there is none.
    """
    steps = sorted(manager.all_steps())
    if wanted == "latest":
        return steps[-1]
    if wanted == "best":
        return best(manager, steps)
    if not wanted.isdecimal() or int(wanted) not in steps:
        there = ", ".join(map(str, steps))
        raise UserError(f"--step: got {wanted!r}, expected latest, best or one of {there}")
    return int(wanted)


def best(manager: ocp.CheckpointManager, steps: list[int]) -> int:
    """The step at which the run's `train.best` was best."""
    train = read(manager, steps[-1], "description")["train"]
    values = {}
    for step in steps if train.get("best") else []:
        metrics = manager.directory / str(step) / "metrics" / "metrics"
        figures = json.loads(metrics.read_text()) if metrics.is_file() else {}
        if train["best"] in figures:
            values[step] = figures[train["best"]]
    if not values:
        raise UserError(
            "--step: got best, but this run compared no checkpoints; train with"
            " --config.train.best=FIGURE, or give a step"
        )
    return (min if train["best_is"] == "least" else max)(values, key=values.get)


def check_intact(manager: ocp.CheckpointManager, step: int) -> None:
    """Raise UserError if a file of a checkpoint is not as it was written."""
    folder = manager.directory / str(step)
    problem = checkpoints.damage(Path(folder))
    if problem:
        raise UserError(
            f"{folder}: the checkpoint is damaged ({problem}); choose another with --step"
        )


def read(manager: ocp.CheckpointManager, step: int, item: str) -> dict[str, Any]:
    """A JSON item of a checkpoint."""
    items = ocp.args.Composite(**{item: ocp.args.JsonRestore()})
    return _reading(manager, step, lambda: manager.restore(step, args=items)[item])


def read_averaged(manager: ocp.CheckpointManager, step: int) -> Params:
    """The params of a checkpoint with the average, float32, in place of what is trained.

    The optimizer's state is not read.
    """

    def wanted(tree: dict[str, Any]) -> dict[str, Any]:
        constants = {name: part for name, part in tree["params"].items() if name != TRAINED}
        # Orbax takes an empty dict for a leaf.
        return {"ema_params": tree["ema_params"]} | ({"params": constants} if constants else {})

    state = read_state(manager, step, wanted)
    average = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), state["ema_params"])
    return state.get("params", {}) | average


def read_state(
    manager: ocp.CheckpointManager, step: int, wanted: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """The part of a checkpoint's state that `wanted` chooses of it, in the host's memory.

    Raises:
        UserError: the checkpoint is damaged.
    """

    def restore() -> dict[str, Any]:
        tree = manager.item_metadata(step)["state"].tree
        here = jax.sharding.SingleDeviceSharding(sharding.host_device())
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), wanted(tree)
        )
        item = ocp.args.PyTreeRestore(
            item=shapes,
            restore_args=ocp.checkpoint_utils.construct_restore_args(shapes),
            partial_restore=True,
        )
        return manager.restore(step, args=ocp.args.Composite(state=item))["state"]

    return _reading(manager, step, restore)


def _reading(manager: ocp.CheckpointManager, step: int, read: Any) -> Any:
    try:
        return read()
    except Exception as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise UserError(
            f"{manager.directory / str(step)}: the checkpoint is damaged ({type(error).__name__}:"
            f" {reason[:200]}); choose another with --step"
        ) from error


def whole(params: Params, description: dict[str, Any], init: str) -> Params:
    """The stage's params, with what a checkpoint leaves out because it never changes.

    Args:
        params: of a checkpoint.
        description: of its run.
        init: the folder that the run started from, "" if it started from none.

    Raises:
        UserError: the folder is missing, or is another than the run's.
    """
    if "init" not in description:
        if init:
            raise UserError(f"--init: got {init!r}, but this run started from no folder; leave it")
        return params
    if not init:
        raise UserError(
            "--init: missing; this run started from a trained stage, whose frozen weights are not"
            " in its checkpoints: give the folder that was its config.init"
        )
    origin = Origin.read(init, {"kind": description["stage"]["kind"]})
    if origin.fingerprint != description["init"]["fingerprint"]:
        raise UserError(
            f"--init: {init!r} holds weights {origin.fingerprint}, but the run started from"
            f" {description['init']['fingerprint']}; give that folder"
        )
    if "lora" in description:
        return origin.merged(settings.build(Lora, description["lora"], "lora"), params)
    return origin.params() | params


def main(argv: list[str]) -> None:
    """Read the checkpoint and write the model folder."""
    args = parse(argv)
    with open_checkpoints(Path(args.workdir)) as manager:
        step = choose(manager, args.step)
        check_intact(manager, step)
        description = read(manager, step, "description")
        stage = stages.build(description["stage"], "checkpoint: stage")
        params = whole(read_averaged(manager, step), description, args.init)
    expected = flatten(jax.eval_shape(stage.init, jax.random.key(0)))
    problems = compare_shapes(flatten(params), expected)
    if problems:
        raise UserError(f"checkpoint {step}: the weights do not fit its own stage: {problems}")
    description = description | {"step": step}
    if isinstance(stage, stages.ClipStage):  # in whatever dtype it is stored, it stays this CLIP
        description["fingerprint"] = fingerprint(params)
    model_folder.save_stage(args.out, params=params, description=description, dtype=args.dtype)
    print(f"{args.out}: the {stage.kind} at step {step} of {args.workdir}")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
