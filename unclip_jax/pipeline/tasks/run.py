"""Run one task of `unclip sample`: its name to its function."""

from __future__ import annotations

import argparse

from unclip_jax.parallel import compile_cache
from unclip_jax.parallel.cpu import devices as cpu_devices
from unclip_jax.pipeline.tasks import edits, probes
from unclip_jax.pipeline.tasks.outputs import StageBars, check_out

TASKS = {
    "text2im": edits.text2im,
    "reconstruct": edits.reconstruct,
    "variations": edits.variations,
    "interpolate": edits.interpolate,
    "textdiff": edits.textdiff,
    "inpaint": edits.inpaint,
    "upscale": edits.upscale,
}
PROBES = {
    "pca": probes.pca,
    "prior": probes.prior,
    "typographic": probes.typographic,
    "binding": probes.binding,
}


def run(args: argparse.Namespace) -> None:
    """One task, named `args.task`, or `args.probe` where that is "probe"."""
    task = PROBES[args.probe] if args.task == "probe" else TASKS[args.task]
    check_out(args.out)
    cpu_devices.use()
    compile_cache.use()
    with StageBars() as bars:
        task(args, bars)
