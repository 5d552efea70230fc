"""What is wrong with a training run, in words, and what to do about it.

    unclip doctor --workdir runs/emoji/prior
    unclip doctor --workdir runs/emoji/prior --clip runs/emoji/clip --json found.json

Reads what train.py left in the workdir, also while it trains, and writes nothing there. The exit
status is 0 if nothing is wrong (notes do not count), 1 if something is.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import textwrap
from pathlib import Path

from unclip_jax.common import command_line
from unclip_jax.common.files import write_text
from unclip_jax.errors import UserError
from unclip_jax.training.doctor import curves, files, settings, weights, workdir
from unclip_jax.training.doctor.findings import SEVERITIES, Finding
from unclip_jax.training.doctor.workdir import Workdir

WIDTH = 100


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = command_line.parser("doctor", __doc__)
    add = parser.add_argument
    add(
        "--workdir", required=True, metavar="DIR", help="what train.py was given, a folder or gs://"
    )
    add("--clip", default="", metavar="DIR", help="the run's CLIP, if not beside the workdir")
    add("--json", metavar="FILE", help="write the findings there, too")
    add("--files_only", action="store_true", help="leave the networks alone: seconds, not minutes")
    return parser.parse_args(argv)


def examine(run: Workdir, clip: str = "", *, files_only: bool = False) -> list[Finding]:
    """All findings in a workdir, the worst first.

    Args:
        run: the workdir, as `workdir.read` gives it; nothing in it is changed.
        clip: the folder of the CLIP that the run stands on; "" looks beside the workdir.
        files_only: whether to leave out what the networks do.
    """
    found = [*settings.examine(run), *files.examine(run, clip), *curves.examine(run)]
    if not files_only:
        found += weights.examine(run, files.find_clip(run, clip))
    once = {finding.name: finding for finding in reversed(found)}  # the first of each name
    kept = [f for f in found if f is once[f.name] or f.name.startswith("checkpoint")]
    return sorted(kept, key=lambda finding: SEVERITIES.index(finding.severity))


def as_text(run: Workdir, findings: list[Finding]) -> str:
    """The findings for people."""
    lines = [
        f"{run.path}: {run.stage.kind}, step {run.step:,} of {run.train.steps:,}",
        f"{run.examples:,} examples seen, {run.train.batch_size:,} a step",
    ]
    for finding in findings:
        lines.append("")
        lines += textwrap.wrap(f"{finding.severity} {finding.name}: {finding.evidence}.", WIDTH)
        lines += textwrap.wrap(
            f"-> {finding.advice}.", WIDTH, initial_indent="  ", subsequent_indent="     "
        )
    bad = [finding for finding in findings if finding.severity != "note"]
    well = "too early to say more" if run.short else "nothing is wrong"
    lines += ["", f"{len(bad)} wrong" if bad else well]
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Look at the run, print the findings, and exit with 1 if something is wrong."""
    args = parse(argv)
    run = workdir.read(args.workdir)
    findings = examine(run, args.clip, files_only=args.files_only)
    print(as_text(run, findings))
    wrong = any(finding.severity != "note" for finding in findings)
    if args.json:
        content = {
            "workdir": str(run.path),
            "kind": run.stage.kind,
            "step": run.step,
            "steps": run.train.steps,
            "examples": run.examples,
            "wrong": wrong,
            "findings": [dataclasses.asdict(finding) for finding in findings],
        }
        try:
            write_text(Path(args.json), json.dumps(content, indent=2) + "\n")
        except OSError as problem:
            raise UserError(f"--json: {args.json!r} cannot be written ({problem})") from problem
    if wrong:
        sys.exit(1)
