"""What a config needs of a pod, with no pod: memory, FLOPs, bytes, collectives, days.

    unclip plan --config=paper/decoder --topology=v5p:4x4x8 --mesh=fsdp=8 --json=plans/v5p.json
    unclip plan --table=docs/plans

Big U-Nets compile slowly: --blocks, their default, compiles each distinct block once and adds up.
Any field of the config can be set, as in unclip train.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
from absl import flags

from unclip_jax.common import command_line
from unclip_jax.common.checks import choice
from unclip_jax.common.files import check_place, write_text
from unclip_jax.errors import UserError, wrong
from unclip_jax.parallel import sharding
from unclip_jax.plan import analysis, report, search
from unclip_jax.plan.chips import GIB, Topology
from unclip_jax.plan.measure import TooLarge
from unclip_jax.plan.programs import Plan
from unclip_jax.weights.trained import in_dtype

FLAGS = flags.FlagValues()
_string = functools.partial(flags.DEFINE_string, flag_values=FLAGS)
_boolean = functools.partial(flags.DEFINE_boolean, default=False, flag_values=FLAGS)
CONFIG = command_line.define_config(FLAGS)
TOPOLOGY = _string(
    "topology", None, "Slices of a pod, such as v5e:16x16 or 2xv5p:4x4x8; or h100:8x8."
)
MESH = _string("mesh", None, "Such as data=-1,fsdp=8,tensor=1; the config's own by default.")
JSON = _string("json", None, "Also write the figures here.")
BLOCKS = _boolean("blocks", help="Compile each distinct block once, and add up.")
WHOLE = _boolean("whole", help="Compile the whole program.")
SAMPLE = flags.DEFINE_integer(
    "sample", 0, "Plan the sampler too, drawing so many pictures at once.", flag_values=FLAGS
)
TRAIN = flags.DEFINE_boolean(
    "train", True, "Plan training; --notrain plans the sampler alone.", flag_values=FLAGS
)
DTYPE = _string("dtype", None, "What the sampler keeps its weights in, as unclip sample's.")
FIT = _boolean("fit", help="Search for the mesh, accumulation and remat that fit; compile those.")
TABLE = _string("table", None, "Print the plans in this folder as a Markdown table, and stop.")

MESH_AXES = tuple(field.name for field in dataclasses.fields(sharding.MeshConfig))


def parse(argv: list[str]) -> None:
    """Read the command line into the flags.

    Raises:
        UserError: a flag that does not exist or lacks, or a value that makes no sense.
    """
    command_line.parse(FLAGS, argv, "plan", __doc__)
    if TABLE.value is not None:
        return
    command_line.check(FLAGS, argv, "plan", "config", "topology")
    if BLOCKS.value and WHOLE.value:
        raise UserError("--blocks, --whole: both given, expected one of them; leave one out")
    if FIT.value and MESH.value is not None:
        raise UserError("--fit, --mesh: both given, and --fit looks for the mesh; leave one out")
    if SAMPLE.value < 0:
        raise wrong("--sample", SAMPLE.value, "a number of pictures, 0 for none")
    if not TRAIN.value and (FIT.value or not SAMPLE.value):
        raise UserError("--notrain: got no --sample=N or --fit, which looks for a mesh to train on")
    if DTYPE.value is not None:
        choice("--dtype", DTYPE.value, ("float32", "bfloat16"))
        if not SAMPLE.value:
            raise wrong("--dtype", DTYPE.value, "none without --sample=N")
    if JSON.value is not None:
        check_place("--json", Path(JSON.value))


def parse_mesh(text: str) -> sharding.MeshConfig:
    """The mesh that "data=-1,fsdp=8" means; an axis that is not named keeps its default.

    UserError if it is not of this form.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in MESH_AXES or not re.fullmatch(r"-?[0-9]{1,6}", size):
            forms = " or ".join(f"{axis}=N" for axis in MESH_AXES)
            raise UserError(f"--mesh={text}: {part!r} is not of the form {forms}")
        sizes[name] = int(size)
    return sharding.MeshConfig(**sizes)


def plan_of(config: Any, topology: Topology) -> dict[str, Any]:
    """All the figures asked for."""
    mesh = parse_mesh(MESH.value) if MESH.value else None
    devices = topology.devices()
    if FIT.value:
        return _fitted(config, topology, devices)
    plan = Plan.of(config, devices, mesh)
    blocks = _by_blocks(plan)
    if blocks and (policy := search.remat_of(plan.stage)) != "full":
        raise UserError(
            f"--blocks: got a network with remat {policy!r}, expected 'full', since blocks are what"
            " is recomputed; set its remat in config.stage.model, or give --whole"
        )
    try:
        figures = _header(plan, topology)
        if TRAIN.value:
            figures["train"] = _train(plan, topology, blocks)
        if SAMPLE.value:
            figures["sample"] = _sample(plan, topology, blocks)
    except TooLarge as error:
        limit = topology.chip.hbm_bytes / GIB
        raise UserError(
            f"--topology={topology.name}: the program needs {error} of a chip, expected at most"
            f" {limit:.2f} GiB; {_MENDS if TRAIN.value else 'name a larger chip'}"
        ) from error
    return figures


_MENDS = "raise mesh.fsdp or train.grad_accum, or let --fit look for them; to draw alone, --notrain"


def _fitted(config: Any, topology: Topology, devices: list[jax.Device]) -> dict[str, Any]:
    """The figures of the first arrangement that the compiler, too, finds small enough."""
    blocks = _by_blocks(Plan.of(config, devices, sharding.MeshConfig()))
    policies = ("full",) if blocks else search.REMAT
    for plan, text in search.candidates(config, topology, devices, policies):
        tried = text.removeprefix("smallest that fits: ").split(", by")[0]
        try:
            train = _train(plan, topology, blocks)
        except TooLarge as error:
            _say(f"{tried} would fit by the model, but the compiler needs {error}; going on")
            continue
        if not train["fits"]:
            _say(f"{tried} would fit by the model, but does not; going on")
            continue
        figures = _header(plan, topology) | {"train": train, "suggestion": text}
        try:
            if SAMPLE.value:
                figures["sample"] = _sample(plan, topology, blocks)
        except TooLarge as error:
            figures["suggestion"] += (
                f"\ndrawing {SAMPLE.value} at once does not fit there, it needs {error}: give a"
                " smaller --sample"
            )
        return figures
    raise AssertionError("candidates end in an error")


def _by_blocks(plan: Plan) -> bool:
    return BLOCKS.value or (not WHOLE.value and plan.stage.unet is not None)


def _header(plan: Plan, topology: Topology) -> dict[str, Any]:
    return {
        "config": command_line.name_of(FLAGS),
        "topology": topology.name,
        "chips": topology.chips,
        "mesh": ", ".join(f"{name} {size}" for name, size in plan.mesh.shape.items()),
        "remat": search.remat_of(plan.stage),
        "versions": analysis.versions(),
    }


_say = functools.partial(print, file=sys.stderr, flush=True)


def _train(plan: Plan, topology: Topology, blocks: bool) -> dict[str, Any]:
    return analysis.train_figures(plan, topology, blocks=blocks, say=_say)


def _sample(plan: Plan, topology: Topology, blocks: bool) -> dict[str, Any]:
    if DTYPE.value is not None:
        stage = in_dtype(plan.stage, DTYPE.value)
        plan = dataclasses.replace(plan, stage=stage, sampled=DTYPE.value)
    return analysis.sample_figures(plan, topology, SAMPLE.value, blocks=blocks, say=_say)


def main(argv: list[str]) -> None:
    """Plan, and print."""
    parse(argv)
    if TABLE.value is not None:
        print(report.table(Path(TABLE.value)))
        return
    topology = Topology.parse(TOPOLOGY.value)
    jax.config.update("jax_platforms", "cpu")
    figures = plan_of(CONFIG.value, topology)
    print(report.in_words(figures))
    if JSON.value is not None:
        write_text(Path(JSON.value), json.dumps(figures, indent=1) + "\n")
