"""Tasks that draw pictures, and those that edit given ones."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax
import numpy as np

from unclip_jax.common import checks
from unclip_jax.data.images import square
from unclip_jax.errors import UserError
from unclip_jax.pipeline import manipulate
from unclip_jax.pipeline.manipulate import Latents
from unclip_jax.pipeline.tasks.inputs import (
    load,
    read_image,
    read_images,
    read_prompts,
    seed_key,
    walk_of,
)
from unclip_jax.pipeline.tasks.outputs import StageBars, grid_size, sources, write
from unclip_jax.pipeline.unclip import check_prompts


def text2im(args: argparse.Namespace, bars: StageBars) -> None:
    """Captions to pictures."""
    prompts, key = read_prompts(args), seed_key(args)
    images = load(args).generate(
        key,
        prompts,
        num=args.num,
        prior_guidance_scale=args.prior_guidance_scale,
        guidance_scale=args.guidance_scale,
        upsample=not args.no_upsample,
        batch_size=args.batch_size,
        progress=bars.update,
    )
    captions = [prompt for prompt in prompts for _ in range(args.num)]
    write(
        args,
        list(zip(images, captions, strict=True)),
        columns=max(args.num, min(4, len(captions))),
        about={"prompt": json.dumps(prompts)},
        each=[{"prompt": c, "sample": str(i % args.num)} for i, c in enumerate(captions)],
    )


def reconstruct(args: argparse.Namespace, bars: StageBars) -> None:
    """Each picture, and what comes back of it in so many steps."""
    images, key, walks = (
        read_images(args),
        seed_key(args),
        [walk_of(args, steps=n) for n in args.steps],
    )
    model = load(args)
    rows = [[source] for source in sources(args, images, grid_size(args, model))]
    for walk in walks:
        again, ratios = manipulate.reconstruct(
            model, key, images, walk, upsample=not args.no_upsample, progress=bars.update
        )
        for row, picture, ratio in zip(rows, again, ratios, strict=True):
            row.append((picture, f"{walk.steps} steps, {ratio:.1f} dB"))
        print(
            f"{walk.steps} steps: PSNR {ratios.mean():.2f} dB, the mean of {len(ratios)} pictures"
        )
    write(
        args,
        [cell for row in rows for cell in row],
        columns=len(rows[0]),
        title="Inversion and decoding",
    )


def variations(args: argparse.Namespace, bars: StageBars) -> None:
    """Each picture and its variations."""
    images, key, walk = read_images(args), seed_key(args), walk_of(args)
    checks.count("--num", args.num)
    model = load(args)
    latents = manipulate.encode(model, images, walk, bars.update)
    made = manipulate.pictures(
        model,
        key,
        latents,
        walk,
        num=args.num,
        upsample=not args.no_upsample,
        progress=bars.update,
    )
    rows = []
    for i, source in enumerate(sources(args, images, made.shape[1])):
        rows += [source]
        rows += [(made[i * args.num + j], f"variation {j + 1}") for j in range(args.num)]
    write(args, rows, columns=args.num + 1, title=f"Variations, eta = {args.eta:g}")


def interpolate(args: argparse.Namespace, bars: StageBars) -> None:
    """Two pictures and the way between them, once for each x_T."""
    images, key, walk = read_images(args), seed_key(args), walk_of(args)
    if len(images) != 2:
        raise UserError(f"--image: got {len(images)}, expected two pictures to go between")
    if args.frames < 2:
        raise UserError(f"--frames: got {args.frames}, expected at least 2, one for each end")
    if args.rows < 0:
        raise UserError(f"--rows: got {args.rows}, expected 0 or more")
    model = load(args)
    ends = manipulate.encode(model, images, walk, bars.update)
    ways = [("x_T interpolated", manipulate.interpolate(ends, args.frames))]
    for i in range(args.rows):
        x_T = manipulate.noise(model, jax.random.fold_in(key, i)[None])[0]
        ways.append((f"random x_T {i + 1}", manipulate.interpolate(ends, args.frames, x_T)))
    made = manipulate.pictures(
        model,
        key,
        Latents(*(np.concatenate(parts) for parts in zip(*(way for _, way in ways), strict=True))),
        walk,
        upsample=not args.no_upsample,
        progress=bars.update,
    )
    first, last = sources(args, images, made.shape[1])
    cells = []
    for row, (name, _) in enumerate(ways):
        frames = made[row * args.frames : (row + 1) * args.frames]
        labels = [f"θ = {theta:.2f}, {name}" for theta in np.linspace(0, 1, args.frames)]
        cells += [first, *zip(frames, labels, strict=True), last]
    write(args, cells, columns=args.frames + 2, title="Interpolation")


def textdiff(args: argparse.Namespace, bars: StageBars) -> None:
    """Each picture turned towards a caption."""
    images, key, walk = read_images(args), seed_key(args), walk_of(args)
    if not 0.0 <= args.theta_max <= 1.0:
        raise UserError(f"--theta_max: got {args.theta_max}, expected 0 to 1")
    thetas = np.linspace(0.0, args.theta_max, checks.count("--frames", args.frames))
    check_prompts([args.to])
    model = load(args)
    latents = manipulate.encode(model, images, walk, bars.update)
    made = manipulate.pictures(
        model,
        key,
        manipulate.text_diff(model, latents, args.source, args.to, thetas),
        walk,
        upsample=not args.no_upsample,
        progress=bars.update,
    )
    cells = []
    for i, source in enumerate(sources(args, images, made.shape[1])):
        turned = made[i * len(thetas) : (i + 1) * len(thetas)]
        labels = [f"θ = {theta:.2f}" for theta in thetas]
        cells += [source, *zip(turned, labels, strict=True)]
    title = f'From "{args.source}" to "{args.to}"'
    write(args, cells, columns=len(thetas) + 1, title=title)


def inpaint(args: argparse.Namespace, bars: StageBars) -> None:
    """Each picture, what of it is kept, and the hole painted anew."""
    images, key = read_images(args), seed_key(args)
    hole = read_image(args.mask, "--mask").mean(axis=2) >= 128
    model = load(args)
    walk = walk_of(args, model, caption=args.prompt)
    cells = []
    for image, source in zip(images, sources(args, images, grid_size(args, model)), strict=True):
        made = manipulate.inpaint(
            model,
            key,
            image,
            hole,
            walk,
            num=args.num,
            upsample=not args.no_upsample,
            progress=bars.update,
        )
        mask = square(np.uint8(255) * hole.astype(np.uint8)[..., None], len(source[0]))
        kept = np.where(mask[..., :1] >= 128, np.uint8(160), source[0])
        cells += [source, (kept, "to paint: grey")]
        cells += [(picture, f"painted {i + 1}") for i, picture in enumerate(made)]
    title = f'Inpainting: "{args.prompt}"' if args.prompt else "Inpainting"
    write(args, cells, columns=args.num + 2, title=title)


def upscale(args: argparse.Namespace, bars: StageBars) -> None:
    """Each picture as it entered the upsamplers, enlarged by bicubic, and as it left them."""
    images, key = read_images(args), seed_key(args)
    model = load(args)
    cells = []
    for image, path in zip(images, args.image, strict=True):
        low, made = manipulate.upscale(
            model, key, image, num=args.num, batch_size=args.batch_size, progress=bars.update
        )
        name, size = Path(path).name, made.shape[1]
        cells += [(low, f"{name}, {len(low)} px"), (square(low, size), "bicubic")]
        cells += [(picture, f"upsampled, {size} px") for picture in made]
    write(args, cells, columns=args.num + 2, title="Upsamplers alone")
