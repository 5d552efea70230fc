"""Run one task of `unclip sample`: its name to its function."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
from pathlib import Path

from unclip_jax.parallel import compile_cache, distributed, shares
from unclip_jax.parallel.cpu import devices as cpu_devices
from unclip_jax.pipeline.drawing import Kept, keeping
from unclip_jax.pipeline.tasks import edits, probes
from unclip_jax.pipeline.tasks.inputs import load, read_image, read_prompts
from unclip_jax.pipeline.tasks.outputs import (
    StageBars,
    check_out,
    settings_of,
    task_name,
    write,
)
from unclip_jax.pipeline.unclip import UnCLIP

TASKS = {
    "text2im": edits.text2im,
    "img2img": edits.img2img,
    "mix": edits.mix,
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

    Several processes share its batches if each of them runs it; the first one writes.

    Raises:
        UserError: a wrong setting, or a file or model that cannot be used.
    """
    if "distributed" in args:
        shares.join(args)
    more = [getattr(args, name, None) for name in ("mask", "hint")]
    check_out(args.out, [*getattr(args, "image", ()), *filter(None, more)])
    cpu_devices.use()
    compile_cache.use()
    if "prompts" in args and (args.task != "mix" or args.prompt or args.prompts):
        args.prompt = read_prompts(args)
    images = [read_image(path) for path in getattr(args, "image", ())]
    task = TASKS[f"probe {args.probe}" if args.task == "probe" else args.task]
    with StageBars() as bars, contextlib.ExitStack() as stack:
        kept = Kept()

        def loaded() -> UnCLIP:
            nonlocal kept
            model = load(args)
            if getattr(args, "keep", None):
                what = [task_name(args), settings_of(args), getattr(args, "prompt", None)]
                seen = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
                kept = Kept(Path(args.keep), [model.identity(), *what, *seen])
                stack.enter_context(keeping(kept))
            return model

        progress = bars.update if distributed.is_lead() else lambda *told: None
        drawn = task(args, images, loaded, progress)
        if distributed.is_lead():
            write(args, drawn, bars.seconds)
            kept.forget()
