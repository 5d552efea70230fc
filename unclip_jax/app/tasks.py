"""What each tab draws: the tasks of `unclip sample`, with a model that stays loaded.

A tab's function takes the fields of its form and checks them, and gives a `Request`: the settings,
named as `unclip sample` names them, so that its command line draws the same pictures, and the work.
How many pictures are drawn, and in how many steps, is one of a few numbers, since each makes a
program of its own; all else is traced.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from unclip_jax.app import inputs
from unclip_jax.common import checks
from unclip_jax.errors import UserError
from unclip_jax.pipeline.drawing import Progress
from unclip_jax.pipeline.manipulate import MIXES
from unclip_jax.pipeline.tasks import edits, probes
from unclip_jax.pipeline.tasks.outputs import Drawn, Images
from unclip_jax.pipeline.unclip import UnCLIP

NUMS = (1, 4, 8)  # pictures
FRAMES = (5, 9, 17)  # of an interpolation or a text diff
STEPS = (10, 25, 50, 100)  # of the decoder's DDIM; each a whole stride of 1000 timesteps
DECODED = (0, 4)  # pictures decoded from what CLIP sees
MAX_LABELS, MAX_PROMPTS = 32, 4


@dataclasses.dataclass(frozen=True)
class Served:
    """The model that the page draws with, and how it was named on the command line."""

    model: UnCLIP
    name: str | list[str] | None = None
    dtype: str = ""
    t5: str | None = None
    batch_size: int = 4
    lora: list[str] | None = None
    lora_weight: list[float] | None = None


@dataclasses.dataclass(frozen=True)
class Request:
    """Settings, as the parser of `unclip sample` would give them, and what draws with them.

    `again` says whether `unclip sample` can draw the same; it has no task for labels alone.
    """

    args: argparse.Namespace
    images: Images
    task: edits.Task
    model: UnCLIP
    again: bool = True

    def draw(self, progress: Progress) -> Drawn:
        """What the settings ask for; it reports to `progress`, and ends with what that raises."""
        return self.task(self.args, self.images, lambda: self.model, progress)


def _settings(served: Served, task: str, seed: object, small: object, **own) -> argparse.Namespace:
    return argparse.Namespace(
        task=task,
        model=served.name,
        dtype=served.dtype,
        t5=served.t5,
        lora=served.lora,
        lora_weight=served.lora_weight,
        seed=inputs.whole("seed", seed, 0, inputs.MAX_SEED),
        batch_size=served.batch_size,
        no_upsample=bool(small),
        **own,
    )


def _walk(steps: object, guidance: object, negative: object, eta: float = 0.0) -> dict[str, object]:
    """The settings of `manipulate.Walk`."""
    return {
        "eta": eta,
        "steps": inputs.choice("steps", steps, STEPS),
        "guidance_scale": inputs.scale("guidance scale", guidance),
        "negative": inputs.text("negative prompt", negative, empty=True),
    }


def text_to_image(
    served: Served, prompt, num, seed, guidance, prior_guidance, small, negative=""
) -> Request:
    """Pictures for a caption."""
    args = _settings(
        served,
        "text2im",
        seed,
        small,
        prompt=[inputs.text("prompt", prompt)],
        num=inputs.choice("pictures", num, NUMS),
        first=0,
        guidance_scale=inputs.scale("guidance scale", guidance),
        prior_guidance_scale=inputs.scale("prior's guidance scale", prior_guidance),
        negative=inputs.text("negative prompt", negative, empty=True),
    )
    return Request(args, [], edits.text2im, served.model)


def img2img(
    served: Served,
    file,
    prompt,
    strength,
    invert,
    num,
    seed,
    steps,
    guidance,
    small,
    negative="",
) -> Request:
    """A picture drawn anew from under some noise."""
    image = inputs.picture("picture", file)
    args = _settings(
        served,
        "img2img",
        seed,
        small,
        image=[Path(file).name],
        prompt=inputs.text("prompt", prompt, empty=True),
        strength=checks.number("strength", strength, 0.0, 1.0),
        invert=bool(invert),
        num=inputs.choice("pictures", num, NUMS),
        **_walk(steps, guidance, negative),
    )
    return Request(args, [image], edits.img2img, served.model)


def mix(
    served: Served,
    one,
    two,
    prompts,
    weights,
    how,
    num,
    seed,
    guidance,
    small,
    negative="",
) -> Request:
    """Pictures and captions mixed; either picture may be missing."""
    given = {"first picture": one, "second picture": two}
    files = {name: file for name, file in given.items() if file}
    images = [inputs.picture(name, file) for name, file in files.items()]
    prompt = inputs.lines("prompts", prompts, least=0, most=MAX_PROMPTS)
    if not images and not prompt:
        raise UserError("mix: there is nothing to mix; upload pictures, or type prompts")
    args = _settings(
        served,
        "mix",
        seed,
        small,
        image=[Path(file).name for file in files.values()],
        prompt=prompt,
        weight=inputs.numbers("weights", weights, len(images) + len(prompt)),
        how=checks.choice("how", how, MIXES),
        num=inputs.choice("pictures", num, NUMS),
        guidance_scale=inputs.scale("guidance scale", guidance),
        negative=inputs.text("negative prompt", negative, empty=True),
    )
    return Request(args, images, edits.mix, served.model)


def variations(
    served: Served, file, num, eta, seed, steps, guidance, small, negative=""
) -> Request:
    """Pictures that share a picture's CLIP embedding."""
    image = inputs.picture("picture", file)
    args = _settings(
        served,
        "variations",
        seed,
        small,
        image=[Path(file).name],
        num=inputs.choice("pictures", num, NUMS),
        **_walk(steps, guidance, negative, checks.number("eta", eta, 0.0, 1.0)),
    )
    return Request(args, [image], edits.variations, served.model)


def interpolation(
    served: Served, first, last, frames, seed, steps, guidance, small, negative=""
) -> Request:
    """The way from one picture to another, (z_i, x_T) slerped."""
    images = [inputs.picture("first picture", first), inputs.picture("second picture", last)]
    args = _settings(
        served,
        "interpolate",
        seed,
        small,
        image=[Path(first).name, Path(last).name],
        frames=inputs.choice("frames", frames, FRAMES),
        rows=0,
        **_walk(steps, guidance, negative),
    )
    return Request(args, images, edits.interpolate, served.model)


def text_diff(
    served: Served,
    file,
    source,
    target,
    theta_max,
    frames,
    seed,
    steps,
    guidance,
    small,
    negative="",
) -> Request:
    """A picture turned from one caption towards another."""
    image = inputs.picture("picture", file)
    args = _settings(
        served,
        "textdiff",
        seed,
        small,
        image=[Path(file).name],
        source=inputs.text("from", source, empty=True),
        to=inputs.text("to", target),
        theta_max=checks.number("theta at the end", theta_max, 0.0, 1.0),
        frames=inputs.choice("frames", frames, FRAMES),
        **_walk(steps, guidance, negative),
    )
    return Request(args, [image], edits.textdiff, served.model)


def labels(
    served: Served, file, names, word, num, seed, steps, guidance, small, negative=""
) -> Request:
    """What CLIP calls a picture, and the same with a word written on it; what both decode to."""
    image = inputs.picture("picture", file)
    args = _settings(
        served,
        "probe",
        seed,
        small,
        probe="typographic",
        image=[Path(file).name],
        word=inputs.text("word", word, empty=True).strip() or None,
        label=inputs.lines("labels", names, least=2, most=MAX_LABELS),
        num=inputs.choice("decoded", num, DECODED),
        **_walk(steps, guidance, negative),
    )
    return Request(args, [image], probes.typographic, served.model, again=args.word is not None)


def ablation(served: Served, prompts, seed, steps, guidance, small, negative="") -> Request:
    """Captions decoded without an embedding, with their text embedding, and with the prior's."""
    args = _settings(
        served,
        "probe",
        seed,
        small,
        probe="prior",
        prompt=inputs.lines("prompts", prompts, least=1, most=MAX_PROMPTS),
        **_walk(steps, guidance, negative),
    )
    return Request(args, [], probes.prior, served.model)
