"""Tasks that draw pictures, and those that edit given ones.

A task takes the settings and the given pictures, checks them, and returns what draws with a model:
`task(args, images)(model, progress)`. The web page draws with the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from unclip_jax.common import checks
from unclip_jax.data.images import square
from unclip_jax.errors import wrong
from unclip_jax.pipeline import manipulate
from unclip_jax.pipeline.manipulate import Latents
from unclip_jax.pipeline.tasks.inputs import read_image, seed_key, walk_of
from unclip_jax.pipeline.tasks.outputs import Drawn, Images, grid_size, sources
from unclip_jax.pipeline.unclip import Progress, UnCLIP, check_prompts

Draw = Callable[[UnCLIP, Progress], Drawn]


def pictures(
    model: UnCLIP,
    args: argparse.Namespace,
    latents: Latents,
    walk,
    progress: Progress,
    num: int = 1,
) -> np.ndarray:
    """`num` pictures of each latent, as the settings say."""
    return manipulate.pictures(
        model,
        seed_key(args),
        latents,
        walk,
        num=num,
        upsample=not args.no_upsample,
        progress=progress,
    )


def generate(model: UnCLIP, args: argparse.Namespace, num: int, progress: Progress) -> np.ndarray:
    """`num` pictures for each of the captions, as the settings say."""
    return model.generate(
        seed_key(args),
        args.prompt,
        num=num,
        prior_guidance_scale=getattr(args, "prior_guidance_scale", None),
        guidance_scale=args.guidance_scale,
        upsample=not args.no_upsample,
        batch_size=args.batch_size,
        progress=progress,
    )


def text2im(args: argparse.Namespace, images: Images) -> Draw:
    """Captions to pictures."""
    check_prompts(args.prompt)
    checks.count("--num", args.num)

    def draw(model: UnCLIP, progress: Progress) -> Drawn:
        made = generate(model, args, args.num, progress)
        captions = [prompt for prompt in args.prompt for _ in range(args.num)]
        return Drawn(
            list(zip(made, captions, strict=True)),
            columns=max(args.num, min(4, len(captions))),
            each=[{"prompt": c, "sample": str(i % args.num)} for i, c in enumerate(captions)],
        )

    return draw


def reconstruct(args: argparse.Namespace, images: Images) -> Draw:
    """Each picture, and what comes back of it in so many steps."""
    walks = [walk_of(args, steps=steps) for steps in args.steps]

    def draw(model: UnCLIP, progress: Progress) -> Drawn:
        rows = [[source] for source in sources(args, images, grid_size(args, model))]
        for walk in walks:
            again, ratios = manipulate.reconstruct(
                model,
                seed_key(args),
                images,
                walk,
                upsample=not args.no_upsample,
                progress=progress,
            )
            steps = f"{walk.steps} steps"
            for row, picture, ratio in zip(rows, again, ratios, strict=True):
                row.append((picture, f"{steps}, {ratio:.1f} dB"))
            print(f"{steps}: PSNR {ratios.mean():.2f} dB, the mean of {len(ratios)} pictures")
        cells = [cell for row in rows for cell in row]
        return Drawn(cells, columns=len(rows[0]), title="Inversion and decoding")

    return draw


def variations(args: argparse.Namespace, images: Images) -> Draw:
    """Each picture and its variations."""
    walk, num = walk_of(args), checks.count("--num", args.num)

    def draw(model: UnCLIP, progress: Progress) -> Drawn:
        latents = manipulate.encode(model, images, walk, progress)
        made = pictures(model, args, latents, walk, progress, num=num)
        cells = []
        for i, source in enumerate(sources(args, images, made.shape[1])):
            cells.append(source)
            cells += [(made[i * num + j], f"variation {j + 1}") for j in range(num)]
        return Drawn(cells, columns=num + 1, title=f"Variations, eta = {args.eta:g}")

    return draw


def interpolate(args: argparse.Namespace, images: Images) -> Draw:
    """Two pictures and the way between them, once for each x_T."""
    if len(images) != 2:
        raise wrong("--image", len(images), "two pictures to go between")
    walk, frames = walk_of(args), checks.count("--frames", args.frames, 2)
    checks.count("--rows", args.rows, 0)

    def draw(model: UnCLIP, progress: Progress) -> Drawn:
        ends = manipulate.encode(model, images, walk, progress)
        ways = [("x_T interpolated", manipulate.interpolate(ends, frames))]
        for i in range(args.rows):
            x_T = manipulate.noise(model, jax.random.fold_in(seed_key(args), i)[None])[0]
            ways.append((f"random x_T {i + 1}", manipulate.interpolate(ends, frames, x_T)))
        parts = zip(*(way for _, way in ways), strict=True)
        made = pictures(model, args, Latents(*map(np.concatenate, parts)), walk, progress)
        first, last = sources(args, images, made.shape[1])
        cells = []
        for row, (name, _) in enumerate(ways):
            labels = [f"θ = {theta:.2f}, {name}" for theta in np.linspace(0, 1, frames)]
            between = made[row * frames : (row + 1) * frames]
            cells += [first, *zip(between, labels, strict=True), last]
        return Drawn(cells, frames + 2, title="Interpolation", walk=range(1, frames + 1))

    return draw


def textdiff(args: argparse.Namespace, images: Images) -> Draw:
    """Each picture turned towards a caption."""
    walk, most = walk_of(args), checks.number("--theta_max", args.theta_max, 0, 1)
    thetas = np.linspace(0.0, most, checks.count("--frames", args.frames))
    check_prompts([args.to])

    def draw(model: UnCLIP, progress: Progress) -> Drawn:
        latents = manipulate.encode(model, images, walk, progress)
        turned = manipulate.text_diff(model, latents, args.source, args.to, thetas)
        made = pictures(model, args, turned, walk, progress)
        labels = [f"θ = {theta:.2f}" for theta in thetas]
        cells = []
        for i, source in enumerate(sources(args, images, made.shape[1])):
            row = made[i * len(thetas) : (i + 1) * len(thetas)]
            cells += [source, *zip(row, labels, strict=True)]
        title = f'From "{args.source}" to "{args.to}"'
        return Drawn(cells, len(thetas) + 1, title, walk=range(1, len(thetas) + 1))

    return draw


def inpaint(args: argparse.Namespace, images: Images) -> Draw:
    """Each picture, what of it is kept, and the hole painted anew."""
    hole = read_image(args.mask, "--mask").mean(axis=2) >= 128

    def draw(model: UnCLIP, progress: Progress) -> Drawn:
        walk, cells = walk_of(args, model, caption=args.prompt), []
        shown = sources(args, images, grid_size(args, model))
        for image, source in zip(images, shown, strict=True):
            made = manipulate.inpaint(
                model,
                seed_key(args),
                image,
                hole,
                walk,
                num=args.num,
                upsample=not args.no_upsample,
                progress=progress,
            )
            mask = square(np.uint8(255) * hole.astype(np.uint8)[..., None], len(source[0]))
            kept = np.where(mask[..., :1] >= 128, np.uint8(160), source[0])
            cells += [source, (kept, "to paint: grey")]
            cells += [(picture, f"painted {i + 1}") for i, picture in enumerate(made)]
        title = f'Inpainting: "{args.prompt}"' if args.prompt else "Inpainting"
        return Drawn(cells, columns=args.num + 2, title=title)

    return draw


def upscale(args: argparse.Namespace, images: Images) -> Draw:
    """Each picture as it entered the upsamplers, enlarged by bicubic, and as it left them."""

    def draw(model: UnCLIP, progress: Progress) -> Drawn:
        cells = []
        for image, path in zip(images, args.image, strict=True):
            low, made = manipulate.upscale(
                model,
                seed_key(args),
                image,
                num=args.num,
                batch_size=args.batch_size,
                progress=progress,
            )
            name, size = Path(path).name, made.shape[1]
            cells += [(low, f"{name}, {len(low)} px"), (square(low, size), "bicubic")]
            cells += [(picture, f"upsampled, {size} px") for picture in made]
        return Drawn(cells, columns=args.num + 2, title="Upsamplers alone")

    return draw
