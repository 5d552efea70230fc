"""Measure the analytic variance of a trained stage, with which it then samples in few steps.

    unclip analytic --stage runs/emoji/prior

Sampling in few steps wants another variance than the fixed ones (Analytic-DPM, arXiv 2201.06503;
the paper samples its prior so, in 64 steps). How large it is depends on how well the network knows
x_0 at each timestep, which this command measures: the residual E ||x_0 - x_0(x_t)||^2 / d over the
stage's own training set. The statistic then stands in the stage's params under `analytic`, and the
stage samples with it. The network is left as it is; after fine-tuning it, measure again.

What is measured is the network with its whole condition. Guidance moves x_0 away from what the
network knows best, of which this statistic says nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from unclip_jax import stages
from unclip_jax.common import checks, command_line
from unclip_jax.common.params import TRAINED
from unclip_jax.data.batches import batches
from unclip_jax.diffusion import METHODS, analytic
from unclip_jax.errors import UserError
from unclip_jax.stages.guided import GuidedDiffusion
from unclip_jax.training.prepare import prepare
from unclip_jax.training.prepared import Prepared
from unclip_jax.weights import folder as model_folder
from unclip_jax.weights.trained import find_parts, read_stage, stage_folder

Params = dict[str, Any]


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = command_line.parser("analytic", __doc__)
    add = parser.add_argument
    add("--stage", required=True, metavar="DIR", help="a trained prior or decoder; it is changed")
    add("--clip", default="", metavar="DIR", help="its CLIP (default: the one beside it)")
    add("--t5", default="", metavar="DIR", help="the T5 whose states it reads, if it reads any")
    add("--data", metavar="NAME", help="emoji, a folder, or tfds:NAME (default: its training set)")
    add("--split", metavar="NAME", help="of the data (default: the one it was trained on)")
    add("--num", type=int, default=32, help="pairs per timestep (default 32)")
    add("--batch_size", type=int, default=64, help="pairs computed together (default 64)")
    add("--seed", type=int, default=0)
    add("--method", default="analytic", choices=METHODS,
        help="how the stage samples from now on (default analytic)")  # fmt: skip
    return parser.parse_args(argv)


@functools.partial(jax.jit, static_argnames="stage")
def _update(
    stage: GuidedDiffusion,
    params: Params,
    residuals: analytic.Residuals,
    batch: dict[str, jax.Array],
    t: jax.Array,
    key: jax.Array,
) -> analytic.Residuals:
    """Add a batch at timesteps t [b]."""
    x_0, cond = stage.data(params, batch)
    noise = jax.random.normal(key, x_0.shape)
    denoise = stage.denoiser(params, cond)
    return analytic.update(residuals, stage.diffusion, denoise, x_0, t, noise)


def measure(run: Prepared, params: Params, *, num: int, batch_size: int, seed: int) -> np.ndarray:
    """The statistic of a stage over the data of a run, float32 [steps].

    Each timestep is met by `num` pairs (rounded up to whole batches over all timesteps), all of
    different noise.

    Args:
        run: `prepare` of the stage: its data, and whatever encodes its captions.
        params: of the stage.
        num: pairs per timestep, at least 1.
        batch_size: pairs computed together, at least 1.
        seed: of the data's order and the noise.

    Raises:
        UserError: a number is out of its range, or the network's output is not finite.
    """
    checks.count("--num", num)
    checks.count("--batch_size", batch_size)
    stage, steps = run.stage, run.stage.diffusion.steps
    pairs = batches(run.source, run.data, encoder=run.encoder, seed=seed, batch_size=batch_size)
    key, residuals = jax.random.key(seed), analytic.init(stage.diffusion)
    for i in tqdm(range(math.ceil(num * steps / batch_size)), desc="Measuring", disable=None):
        t = (i * batch_size + jnp.arange(batch_size)) % steps
        residuals = _update(stage, params, residuals, next(pairs), t, jax.random.fold_in(key, i))
    statistic = analytic.statistic(residuals)
    if not np.isfinite(statistic).all():
        raise UserError(
            "analytic statistic: not finite, so the network's output is not; train the stage again"
        )
    return statistic


def run_of(args: argparse.Namespace) -> Prepared:
    """The run that would train the stage on: its data, and the encoders that it reads.

    Raises:
        UserError: no stage of a kind that is sampled by diffusion from captions or classes, or its
            data, CLIP or T5 are not there.
    """
    folder = stage_folder(args.stage)
    stage, description = read_stage(folder)
    if not stage.obeys:
        expected = "a prior or a decoder, sampled by diffusion"
        raise UserError(f"--stage {args.stage!r}: holds a {stage.kind}, expected {expected}")
    data = dict(description.get("data", {}))
    if args.data:
        data["name"] = args.data
    if "name" not in data:
        raise UserError(
            f"--data: {args.stage!r} does not say what it was trained on; give the data set, such"
            " as --data DIR"
        )
    data |= {"split": args.split} if args.split else {}
    about = {"t5_dtype": description["t5"]["dtype"]} if "t5" in description else {}
    return prepare({
        "stage": {"kind": stage.kind},
        "data": data,
        "train": {},
        "heldout_split": data.get("split", "train"),
        "clip": args.clip or (clip_beside(folder) if "z_i" in stage.reads else ""),
        "t5": args.t5,
        "init": str(folder),
    } | about)  # fmt: skip


def clip_beside(folder: Path) -> str:
    """The only CLIP among the stages beside a model folder or its workdir.

    Raises:
        UserError: there is none, or more than one.
    """
    workdir = folder.parent if folder.name == "model" else folder
    found = find_parts(workdir.absolute().parent).get("clip", [])
    if len(found) != 1:
        raise UserError(
            f"--clip: {len(found)} CLIPs beside {str(workdir)!r}, expected one; give the folder of"
            " the one that the stage was trained with"
        )
    return str(found[0])


def save(folder: Path, statistic: np.ndarray, method: str, about: dict[str, Any]) -> None:
    """Put the statistic into a model folder, and let its stage sample by `method`.

    Args:
        folder: a model folder; its weights keep the dtype they are stored in.
        statistic: float32 [steps].
        method: one of `diffusion.METHODS`.
        about: what the description says of the statistic.
    """
    params, description = model_folder.load_stage(folder)
    stage = stages.build(description["stage"])
    sampling = dataclasses.replace(stage.sampling, method=method)
    stage = dataclasses.replace(stage, sampling=sampling, analytic=True)
    stored = {x.dtype.name for x in jax.tree.leaves(params[TRAINED])} - {"float32"}
    model_folder.save_stage(
        folder,
        params=params | {"analytic": statistic},
        description=description | {"stage": stages.describe(stage), "analytic": about},
        dtype=stored.pop() if stored else None,
    )


def main(argv: list[str]) -> None:
    """Measure, and save."""
    args = parse(argv)
    run = run_of(args)
    statistic = measure(
        run, run.init_params(), num=args.num, batch_size=args.batch_size, seed=args.seed
    )
    folder = stage_folder(args.stage)
    about = {"data_fingerprint": run.source.fingerprint, "num": args.num}
    save(folder, statistic, args.method, about)
    quarter = [f"{statistic[int(f * (len(statistic) - 1))]:.3g}" for f in (0, 0.25, 0.5, 0.75, 1)]
    print(
        f"{folder}: Var(x_0 | x_t) is {', '.join(quarter)} from the first to the last timestep;"
        f" sampling is now {args.method}"
    )
