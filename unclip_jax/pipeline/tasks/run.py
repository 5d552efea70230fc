"""Run one task of `unclip sample`: its name to its function."""

from __future__ import annotations

import argparse

from unclip_jax.parallel import compile_cache
from unclip_jax.parallel.cpu import devices as cpu_devices
from unclip_jax.pipeline.tasks import edits, probes
from unclip_jax.pipeline.tasks.inputs import load, read_image, read_prompts
from unclip_jax.pipeline.tasks.outputs import StageBars, check_out, write

TASKS = {
    "text2im": edits.text2im,
    "reconstruct": edits.reconstruct,
    "variations": edits.variations,
    "interpolate": edits.interpolate,
    "textdiff": edits.textdiff,
    "inpaint": edits.inpaint,
    "upscale": edits.upscale,
    "probe pca": probes.pca,
    "probe prior": probes.prior,
    "probe typographic": probes.typographic,
    "probe binding": probes.binding,
}


def run(args: argparse.Namespace) -> None:
    """One task, with what the command line names: everything is checked before a model is loaded.

    Raises:
        UserError: a wrong setting, or a file or model that cannot be used.
    """
    mask = [args.mask] if "mask" in args else []
    check_out(args.out, [*getattr(args, "image", ()), *mask])
    cpu_devices.use()
    compile_cache.use()
    if "prompts" in args:
        args.prompt = read_prompts(args)
    images = [read_image(path) for path in getattr(args, "image", ())]
    task = TASKS[f"probe {args.probe}" if args.task == "probe" else args.task]
    with StageBars() as bars:
        drawn = task(args, images, lambda: load(args), bars.update)
        write(args, drawn, bars.seconds)
