"""A model folder from a training checkpoint: the averaged weights and all they stand on.

    unclip save --workdir runs/emoji/decoder --out decoder-at-2000 --step 2000

train.py writes WORKDIR/model when it ends; this command takes any checkpoint, also while the run
goes on, or after it stopped. The run is only read. Of a run that trains adapters (config.lora), a
name that ends in .safetensors holds those alone, and --lora of other commands takes it:

    unclip save --workdir runs/emoji/lora --init runs/emoji/decoder --out hats.safetensors
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax

from unclip_jax import stages
from unclip_jax.common import command_line
from unclip_jax.common import config as settings
from unclip_jax.common.params import compare_shapes, fingerprint, flatten
from unclip_jax.errors import UserError, wrong
from unclip_jax.training.fine_tuning import Origin
from unclip_jax.training.lora import Lora
from unclip_jax.training.saved import Params, Saved
from unclip_jax.weights import folder as model_folder


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = command_line.parser("save", __doc__)
    add = parser.add_argument
    add(
        "--workdir", required=True, metavar="DIR", help="what train.py was given, a folder or gs://"
    )
    add("--out", required=True, metavar="DIR", help="the model folder to write, or a .safetensors")
    add("--step", default="latest", metavar="N", help="of the checkpoint, latest or best")
    add("--init", default="", metavar="DIR", help="the run's config.init, where it had one")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="to store weights in")
    return parser.parse_args(argv)


def choose(saved: Saved, wanted: str) -> int:
    """The step of the checkpoint asked for, a number, "latest" or "best"; UserError if none is."""
    steps = saved.steps()
    if wanted == "latest":
        return steps[-1]
    if wanted == "best":
        return best(saved)
    if not wanted.isdecimal() or int(wanted) not in steps:
        raise wrong("--step", wanted, f"latest, best or one of {', '.join(map(str, steps))}")
    return int(wanted)


def best(saved: Saved) -> int:
    """The step at which the run's `train.best` was best; UserError if it compared none."""
    train = saved.item(saved.latest(), "description")["train"]
    figures = {step: saved.figures(step) for step in saved.steps() if train.get("best")}
    values = {step: row[train["best"]] for step, row in figures.items() if train["best"] in row}
    if not values:
        raise UserError(
            "--step: got best, but this run compared no checkpoints; train with"
            " --config.train.best=FIGURE, or give a step"
        )
    return (min if train["best_is"] == "least" else max)(values, key=values.get)


def origin_of(description: dict[str, Any], init: str, stage: stages.Stage) -> Origin | None:
    """The trained stage that a run started from; None if it started from none.

    Args:
        description: of the run.
        stage: what it trains, which may have more than the folder's.
        init: the folder that it started from, "" if it started from none.

    Raises:
        UserError: the folder is missing, or is another than the run's.
    """
    if "init" not in description:
        if init:
            raise wrong("--init", init, "none: this run started from no folder", "leave it out")
        return None
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
    return dataclasses.replace(origin, stage=stage)


def whole(params: Params, description: dict[str, Any], origin: Origin | None) -> Params:
    """A checkpoint's params with those it leaves out because they never change."""
    if origin is None:
        return params
    if "canvas" in description:  # config.canvas, which may differ from the folder's
        origin = dataclasses.replace(origin, replaced={"canvas": params["canvas"]})
    if "lora" in description:
        return origin.merged(settings.build(Lora, description["lora"], "lora"), params)
    return origin.params() | params


def save_adapters(
    path: Path, params: Params, description: dict[str, Any], origin: Origin | None
) -> None:
    """Write a run's adapters alone; UserError for a run that trains none."""
    if origin is None or "lora" not in description:
        expected = "a folder: this run trains no adapters (config.lora)"
        raise wrong("--out", str(path), expected, "give a name without .safetensors")
    config = settings.build(Lora, description["lora"], "lora")
    origin.save_adapters(path, config, params, description)


def main(argv: list[str]) -> None:
    """Read the checkpoint and write the model folder."""
    args = parse(argv)
    with Saved(args.workdir) as saved:
        step = choose(saved, args.step)
        averaged, description = saved.averaged(step), saved.item(step, "description")
        stage = stages.build(description["stage"], "checkpoint: stage")
        origin = origin_of(description, args.init, stage)
    if Path(args.out).suffix == ".safetensors":
        save_adapters(Path(args.out), averaged, description | {"step": step}, origin)
        print(f"{args.out}: the adapters of a {stage.kind} at step {step} of {args.workdir}")
        return
    params = whole(averaged, description, origin)
    expected = flatten(jax.eval_shape(stage.init, jax.random.key(0)))
    problems = compare_shapes(flatten(params), expected)
    if problems:
        raise UserError(f"checkpoint {step}: the weights do not fit its own stage: {problems}")
    description = description | {"step": step}
    if stage.keeps_fingerprint:  # in whatever dtype it is stored, it stays this CLIP
        description["fingerprint"] = fingerprint(params)
    model_folder.save_stage(args.out, params=params, description=description, dtype=args.dtype)
    print(f"{args.out}: the {stage.kind} at step {step} of {args.workdir}")
