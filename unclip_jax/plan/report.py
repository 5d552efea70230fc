"""A plan in words, and many plans as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unclip_jax.errors import UserError
from unclip_jax.plan.chips import GIB, Topology

ASSUMPTIONS = (
    "FLOPs are of matrix products and convolutions, recomputation included, spread evenly over"
    " chips; bytes and collectives are the compiled program's; ring algorithms use every link at"
    " once. The least time overlaps computing, memory and network entirely, the most overlaps"
    " nothing. MFU counts three forward passes' FLOPs, beside adapters two, of constant networks"
    " one, at the peak of bfloat16."
)
GPUS = (
    "FLOPs are of matrix products and convolutions, recomputation included, spread evenly over"
    " GPUs; all else is the compiled program's, which was tuned on no GPU. Times need one."
)
RATES = ("compute", "memory", "network", "dcn")
COLUMNS = (
    "config", "topology", "mesh", "accum", "remat", "HBM GiB", "of", "step s", "MFU", "days",
    "bound by", "mode",
)  # fmt: skip


def in_words(plan: Mapping[str, Any]) -> str:
    """The whole report of a plan, as `unclip plan` prints it."""
    topology = Topology.parse(plan["topology"])
    lines = [
        f"{plan['config']} on {plan['topology']}: {plan['chips']}"
        f" {'GPUs' if topology.chip.gpu else 'chips'} as {plan['mesh']}",
        *_chip_lines(topology),
        "",
    ]
    if "train" in plan:
        lines += _train_lines(plan["train"], plan["remat"])
    if "sample" in plan:
        lines += ["", *_sample_lines(plan["sample"])]
    if "suggestion" in plan:
        lines += ["", plan["suggestion"]]
    return "\n".join([*lines, "", GPUS if topology.chip.gpu else ASSUMPTIONS])


def _chip_lines(topology: Topology) -> list[str]:
    chip = topology.chip
    if chip.gpu:
        return [f"a GPU: {chip.hbm_bytes / GIB:.2f} GiB"]
    name = "a chip" if chip.devices == 1 else f"a device, of which a chip has {chip.devices}"
    lines = [
        f"{name}: {chip.bf16 / 1e12:.0f} TFLOP/s in bfloat16, {chip.hbm_bytes / GIB:.2f} GiB at"
        f" {chip.hbm_rate / 1e9:.0f} GB/s, {chip.ici_rate / 1e9:.0f} GB/s to its neighbours",
    ]
    if topology.slices > 1:
        lines.append(f"{topology.slices} slices: {chip.dcn_rate / 1e9:.1f} GB/s to others")
    return lines


def _train_lines(train: Mapping[str, Any], remat: str) -> list[str]:
    lines = [
        f"training, {train['mode']}: {train['parameters'] / 1e6:.0f} M parameters, of which"
        f" {train['trained'] / 1e6:.0f} M train, batch {train['batch_size']} in"
        f" {train['grad_accum']} microbatches, remat {remat}",
        "memory of a chip",
        *(f"  {name:<12}{_gib(size)}" for name, size in train["bytes"].items()),
        f"  {'limit':<12}{_gib(train['limit'])}  {'fits' if train['fits'] else 'DOES NOT FIT'}",
        "a step of a chip",
        f"  FLOPs       {train['flops']['chip'] / 1e12:.2f} T",
    ]
    if (line := train.get("roofline")) is None:
        return [*lines, *_collective_lines(train["collectives"]), *_product_lines(train)]
    return [
        *lines,
        f"  HBM bytes   {_gib(train['moved'])}  {train['intensity']:.0f} FLOPs a byte",
        *_collective_lines(train["collectives"]),
        "time",
        *(f"  {name:<12}{line[name]:.4f} s" for name in RATES if line.get(name)),
        f"  step        {line['least']:.4f} to {line['most']:.4f} s, MFU"
        f" {train['mfu']['least']:.0%} to {train['mfu']['most']:.0%}",
        f"  {train['steps']} steps in {train['days']['least']:.1f} to"
        f" {train['days']['most']:.1f} days",
    ]


def _sample_lines(sample: Mapping[str, Any]) -> list[str]:
    lines = [
        f"sampling {sample['rows']} at once, {sample['mode']}",
        f"  peak        {_gib(sample['bytes']['peak'])}"
        f"  {'fits' if sample['fits'] else 'DOES NOT FIT'}",
        f"  FLOPs       {sample['flops']['chip'] / 1e12:.2f} T",
    ]
    if (line := sample.get("roofline")) is None:
        return [*lines, *_collective_lines(sample["collectives"]), *_product_lines(sample)]
    return [
        *lines,
        f"  HBM bytes   {_gib(sample['moved'])}",
        *_collective_lines(sample["collectives"]),
        f"  time        {line['least']:.3f} to {line['most']:.3f} s",
    ]


def _product_lines(figures: Mapping[str, Any]) -> list[str]:
    """What the program's products are, of a platform whose times are not known."""
    lines = [
        f"  {count:>6} x {kind}, of at most {size / 2**20:.2f} MiB"
        for kind, (count, size) in figures["products"].items()
    ]
    return [f"  donated     {_gib(figures['donated'])}", "products and kernels in it", *lines]


def _collective_lines(collectives: list[Mapping[str, Any]]) -> list[str]:
    return [
        f"  {c['kind']:<19} among {c['group']:>3}: {c['count']:>5} of"
        f" {_gib(c['bytes']).strip()} together"
        for c in collectives
    ]


def _gib(size: float) -> str:
    return f"{size / GIB:9.3f} GiB"


def table(folder: Path) -> str:
    """A Markdown table of all plans in a folder of JSON files, in the order of their names.

    UserError if there is none, or one is no plan.
    """
    rows = []
    for file in sorted(folder.glob("*.json")):
        try:
            plan = json.loads(file.read_text())
            rows += [] if "sample" in plan and "train" not in plan else [_row(plan)]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--table={folder}: {file.name} is no plan ({error}); write it again with --json"
            ) from error
    if not rows:
        raise UserError(f"--table={folder}: no plans there; write some with --json=FILE")
    head = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    return "\n".join([*head, *("| " + " | ".join(row) + " |" for row in rows)])


def _row(plan: Mapping[str, Any]) -> list[str]:
    train = plan["train"]
    kept, line = train["bytes"], train.get("roofline")
    times = ["–"] * 4
    if line is not None:
        times = [
            f"{line['least']:.2f}–{line['most']:.2f}",
            f"{train['mfu']['most'] * 100:.0f}–{train['mfu']['least'] * 100:.0f} %",
            f"{train['days']['least']:.0f}–{train['days']['most']:.0f}",
            max(RATES, key=lambda name: line.get(name, 0.0)),
        ]
    return [
        Path(plan["config"]).stem,
        plan["topology"],
        plan["mesh"],
        str(train["grad_accum"]),
        plan["remat"],
        f"{kept['peak'] / GIB:.1f}",
        f"{train['limit'] / GIB:.1f}",
        *times,
        train["mode"],
    ]
