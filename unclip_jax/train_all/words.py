"""What a stage's figures say, in sentences."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from unclip_jax.errors import UserError
from unclip_jax.training.doctor import command as doctor
from unclip_jax.training.doctor import workdir as workdirs
from unclip_jax.training.doctor.findings import Finding
from unclip_jax.training.doctor.workdir import Workdir

ABOUT = {
    "clip": "learns which caption belongs to which picture; all others stand on it.",
    "prior": "turns a caption into CLIP's embedding of a picture of it.",
    "decoder": "draws a small picture from that embedding and the caption.",
    "upsampler": "makes it large.",
}
PREVIEWS = {
    "clip": "Each picture is the nearest to the caption under it; its own is behind the arrow.",
    "prior": "Each picture is the nearest to what the prior makes of the caption under it; its own"
    " is behind the arrow.",
    "decoder": "Left a real picture, right what the decoder draws from its embedding and caption.",
    "upsampler": "Left the small picture, plainly enlarged; right the real one; between them what"
    " the upsampler makes.",
}

# The doctor's advice in the flags of `unclip train-all`, and findings about settings it has not.
SAID = (
    (r"--config\.train\.steps=\d+ or more", "more --minutes"),
    (r"more steps would help: .*", "more --minutes would help"),
    (r"more data, data\.augment.*", "more pictures; or fewer --minutes, in another --out"),
    (r"more data, or fewer steps", "more pictures; or fewer --minutes, in another --out"),
    (r" and that stage\.caption_drop is about [\d.]+", ""),
    (r"train longer, on more data or with a larger batch", "more pictures, or more --minutes"),
    (r"train longer", "more --minutes"),
    (r": raise stage\.crop", ""),
)
# With these, that the loss still falls is no reason to train on.
KNOWN_BY_HEART = {"overfitting", "retrieval_at_chance", "worse_than_bicubic"}
UNASKED = ("always_clipped",)


def figures(run: Workdir) -> list[str]:
    """What the last evaluation of a run found, each beside what doing nothing gives."""
    last = {
        name.removeprefix("eval/"): run.last(name)
        for name in {name for record in run.records for name in record}
        if name.startswith("eval/")
    }
    pairs = f"{last.get('pairs', 0):.0f} pairs"
    kind = run.stage.kind
    if kind == "clip" and "image_to_text_r5" in last:
        return [_found(last, k, pairs) for k in (1, 5)]
    if kind == "prior" and "cosine_z_i" in last:
        return [
            f"cosine of what it draws with the embedding of the caption's own picture"
            f" {last['cosine_z_i']:.2f}, with another caption's {last['cosine_z_i_shuffled']:.2f}"
            f" ({pairs}; the further apart, the better)"
        ]
    if kind == "upsampler" and "psnr" in last:
        return [
            f"{last['psnr']:.1f} dB from the real pictures, where plain enlarging has"
            f" {last['psnr_bicubic']:.1f} dB (more is nearer)"
        ]
    _, losses = run.series("eval/heldout_loss")
    if len(losses):
        return [f"loss on {pairs} from {losses[0]:.4g} to {losses[-1]:.4g} (less is better)"]
    return []


def _found(last: Mapping[str, float], k: int, pairs: str) -> str:
    where = "at once" if k == 1 else f"among the first {k}"
    chance = last.get(f"chance_r{k}")
    beside = "" if chance is None else f", chance {chance:.0%}"
    return f"finds a picture's caption {where}: {last[f'image_to_text_r{k}']:.0%}{beside} ({pairs})"


def diagnosis(run: Workdir, clip: str) -> str:
    """The doctor's words on a run, of what its files show."""
    try:
        findings = doctor.examine(run, clip, files_only=True)
        return doctor.as_text(run, told(findings))
    except UserError as error:
        return f"the doctor could not look: {error}"


def told(findings: list[Finding]) -> list[Finding]:
    """The findings that say something to who gave data and minutes, none against another."""
    left_out = set(UNASKED)
    if KNOWN_BY_HEART & {one.name for one in findings}:
        left_out.add("still_falling")
    return [in_its_flags(one) for one in findings if one.name not in left_out]


def in_its_flags(finding: Finding) -> Finding:
    """A finding whose advice `unclip train-all` can follow, which has few flags."""
    advice = finding.advice
    for theirs, ours in SAID:
        advice = re.sub(theirs, ours, advice)
    return dataclasses.replace(finding, advice=advice)


read = workdirs.read
