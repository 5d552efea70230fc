"""What each tab draws: the tasks of `unclip sample`, with a model that stays loaded.

A tab's function takes the fields of its form and checks them, and gives a `Request`: the settings,
named as `unclip sample` names them, so that its command line draws the same pictures, and the work.
How many pictures are drawn, and in how many steps, is one of a few numbers, since each makes a
program of its own; all else is traced.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from unclip_jax.app import inputs
from unclip_jax.data.images import square
from unclip_jax.pipeline import manipulate
from unclip_jax.pipeline.manipulate import Latents
from unclip_jax.pipeline.tasks.inputs import seed_key, walk_of
from unclip_jax.pipeline.tasks.outputs import Picture, shares, sources
from unclip_jax.pipeline.unclip import Progress, UnCLIP
from unclip_jax.stages.conditioning import example_keys

NUMS = (1, 4, 8)  # pictures
FRAMES = (5, 9, 17)  # of an interpolation or a text diff
STEPS = (10, 25, 50, 100)  # of the decoder's DDIM; each a whole stride of 1000 timesteps
DECODED = (0, 4)  # pictures decoded from what CLIP sees
MAX_LABELS, MAX_PROMPTS = 32, 4


@dataclasses.dataclass(frozen=True)
class Served:
    """The model that the page draws with, and how it was named on the command line."""

    model: UnCLIP
    name: str | None = None
    dtype: str = ""
    t5: str | None = None
    batch_size: int = 4


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What a request came to.

    Attributes:
        cells: pictures with captions, as the grid shows them, row by row.
        columns: of the grid.
        title: of the grid.
        walk: which of the cells lie along theta.
        chances: CLIP's probabilities of labels, {label: one for each of `seen`}.
        seen: what was judged.
    """

    cells: list[Picture]
    columns: int
    title: str | None = None
    walk: range = range(0)
    chances: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    seen: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Request:
    """Settings, as the parser of `unclip sample` would give them, and what draws with them.

    `again` says whether `unclip sample` can draw the same; it has no task for labels alone.
    """

    args: argparse.Namespace
    draw: Callable[[Progress], Drawn]
    again: bool = True


def _settings(served: Served, task: str, seed: object, small: object, **own) -> argparse.Namespace:
    return argparse.Namespace(
        task=task,
        model=served.name,
        dtype=served.dtype,
        t5=served.t5,
        seed=inputs.whole("seed", seed, 0, inputs.MAX_SEED),
        batch_size=served.batch_size,
        no_upsample=bool(small),
        **own,
    )


def text_to_image(served: Served, prompt, num, seed, guidance, prior_guidance, small) -> Request:
    """Pictures for a caption."""
    args = _settings(
        served,
        "text2im",
        seed,
        small,
        prompt=[inputs.text("prompt", prompt)],
        num=inputs.choice("pictures", num, NUMS),
        guidance_scale=inputs.scale("guidance scale", guidance),
        prior_guidance_scale=inputs.scale("prior's guidance scale", prior_guidance),
    )

    def draw(progress: Progress) -> Drawn:
        images = served.model.generate(
            seed_key(args),
            args.prompt,
            num=args.num,
            prior_guidance_scale=args.prior_guidance_scale,
            guidance_scale=args.guidance_scale,
            upsample=not args.no_upsample,
            batch_size=args.batch_size,
            progress=progress,
        )
        return Drawn([(image, args.prompt[0]) for image in images], columns=args.num)

    return Request(args, draw)


def variations(served: Served, file, num, eta, seed, steps, guidance, small) -> Request:
    """Pictures that share a picture's CLIP embedding."""
    image = inputs.picture("picture", file)
    args = _settings(
        served,
        "variations",
        seed,
        small,
        image=[Path(file).name],
        num=inputs.choice("pictures", num, NUMS),
        eta=inputs.number("eta", eta, 0.0, 1.0),
        steps=inputs.choice("steps", steps, STEPS),
        guidance_scale=inputs.scale("guidance scale", guidance),
    )

    def draw(progress: Progress) -> Drawn:
        walk = walk_of(args)
        latents = manipulate.encode(served.model, [image], walk, progress)
        made = _pictures(served, args, latents, walk, progress, num=args.num)
        cells = sources(args, [image], made.shape[1])
        cells += [(picture, f"variation {i + 1}") for i, picture in enumerate(made)]
        title = f"Variations, eta = {args.eta:g}"
        return Drawn(cells, columns=args.num + 1, title=title)

    return Request(args, draw)


def interpolation(served: Served, first, last, frames, seed, steps, guidance, small) -> Request:
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
        eta=0.0,
        steps=inputs.choice("steps", steps, STEPS),
        guidance_scale=inputs.scale("guidance scale", guidance),
    )

    def draw(progress: Progress) -> Drawn:
        walk = walk_of(args)
        ends = manipulate.encode(served.model, images, walk, progress)
        between = manipulate.interpolate(ends, args.frames)
        made = _pictures(served, args, between, walk, progress)
        start, end = sources(args, images, made.shape[1])
        thetas = np.linspace(0, 1, args.frames)
        labels = [f"θ = {theta:.2f}, x_T interpolated" for theta in thetas]
        cells = [start, *zip(made, labels, strict=True), end]
        walked = range(1, args.frames + 1)
        return Drawn(cells, columns=len(cells), title="Interpolation", walk=walked)

    return Request(args, draw)


def text_diff(
    served: Served, file, source, target, theta_max, frames, seed, steps, guidance, small
) -> Request:
    """A picture turned from one caption towards another."""
    image = inputs.picture("picture", file)
    args = _settings(
        served,
        "textdiff",
        seed,
        small,
        image=[Path(file).name],
        source=inputs.text("from", source or "", empty=True),
        to=inputs.text("to", target),
        theta_max=inputs.number("theta at the end", theta_max, 0.0, 1.0),
        frames=inputs.choice("frames", frames, FRAMES),
        eta=0.0,
        steps=inputs.choice("steps", steps, STEPS),
        guidance_scale=inputs.scale("guidance scale", guidance),
    )

    def draw(progress: Progress) -> Drawn:
        walk, thetas = walk_of(args), np.linspace(0.0, args.theta_max, args.frames)
        latents = manipulate.encode(served.model, [image], walk, progress)
        turned = manipulate.text_diff(served.model, latents, args.source, args.to, thetas)
        made = _pictures(served, args, turned, walk, progress)
        labels = [f"θ = {theta:.2f}" for theta in thetas]
        cells = [*sources(args, [image], made.shape[1]), *zip(made, labels, strict=True)]
        title = f'From "{args.source}" to "{args.to}"'
        return Drawn(cells, len(cells), title, walk=range(1, len(cells)))

    return Request(args, draw)


def labels(served: Served, file, names, word, num, seed, steps, guidance, small) -> Request:
    """What CLIP calls a picture, and the same with a word written on it; what both decode to."""
    image = inputs.picture("picture", file)
    found = inputs.lines("labels", names, least=2, most=MAX_LABELS)
    word = inputs.text("word", word or "", empty=True).strip()
    seen = [image, manipulate.overlay(image, word)] if word else [image]
    args = _settings(
        served,
        "probe",
        seed,
        small,
        probe="typographic",
        image=[Path(file).name],
        word=word or None,
        label=found,
        num=inputs.choice("decoded", num, DECODED),
        eta=0.0,
        steps=inputs.choice("steps", steps, STEPS),
        guidance_scale=inputs.scale("guidance scale", guidance),
    )

    def draw(progress: Progress) -> Drawn:
        model, num = served.model, args.num
        z_i = manipulate.embed(model, seen, args.batch_size)
        chances = manipulate.zero_shot(model, z_i, found)
        made, again = [], []
        if num:
            made = _decoded(served, args, z_i, progress)
            decoded = manipulate.embed(model, made, args.batch_size)
            again = manipulate.zero_shot(model, decoded, found)
        size = len(made[0]) if num else max(map(len, seen))
        cells = []
        for i, (image, chance) in enumerate(zip(seen, chances, strict=True)):
            cells.append((square(image, size), f"picture: {shares(found, chance)}"))
            for j in range(i * num, (i + 1) * num):
                cells.append((made[j], f"decoded: {shares(found, again[j])}"))
        return Drawn(
            cells,
            columns=num + 1,
            title=f'The word "{word}" on a picture' if word else "What CLIP calls a picture",
            chances={label: chances[:, i].tolist() for i, label in enumerate(found)},
            seen=("picture", f"with “{word}” on it") if word else ("picture",),
        )

    return Request(args, draw, again=bool(word and args.num))


def ablation(served: Served, prompts, seed, steps, guidance, small) -> Request:
    """Captions decoded without an embedding, with their text embedding, and with the prior's."""
    args = _settings(
        served,
        "probe",
        seed,
        small,
        probe="prior",
        prompt=inputs.lines("prompts", prompts, least=1, most=MAX_PROMPTS),
        eta=0.0,
        steps=inputs.choice("steps", steps, STEPS),
        guidance_scale=inputs.scale("guidance scale", guidance),
    )

    def draw(progress: Progress) -> Drawn:
        rows = manipulate.ablate_prior(
            served.model,
            seed_key(args),
            args.prompt,
            walk_of(args, served.model),
            upsample=not args.no_upsample,
            progress=progress,
        )
        cells = [
            (picture, f"{name}: {prompt}")
            for name, row in zip(manipulate.ABLATIONS, rows, strict=True)
            for picture, prompt in zip(row, args.prompt, strict=True)
        ]
        return Drawn(cells, columns=len(args.prompt), title="What the prior is good for")

    return Request(args, draw)


def _pictures(served: Served, args, latents, walk, progress: Progress, num: int = 1) -> np.ndarray:
    return manipulate.pictures(
        served.model,
        seed_key(args),
        latents,
        walk,
        num=num,
        upsample=not args.no_upsample,
        progress=progress,
    )


def _decoded(served: Served, args, z_i: np.ndarray, progress: Progress) -> np.ndarray:
    """Pictures [b * num, size, size, 3] of embeddings [b, e], each from the same num noises."""
    x_T = manipulate.noise(served.model, example_keys(seed_key(args), args.num))
    latents = Latents(np.repeat(z_i, args.num, axis=0), np.tile(x_T, (len(z_i), 1, 1, 1)))
    return _pictures(served, args, latents, walk_of(args, served.model), progress)
