"""Tasks that draw pictures, and those that edit given ones.

`task(args, images, load, progress)` takes the settings, the given pictures, what loads the model,
and whom to tell how far it is. It checks before it loads. The web page draws with the same tasks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from unclip_jax.common import checks
from unclip_jax.data.images import square
from unclip_jax.errors import wrong
from unclip_jax.pipeline import manipulate
from unclip_jax.pipeline.drawing import Progress, check_prompts, numbered
from unclip_jax.pipeline.manipulate import Latents, masks
from unclip_jax.pipeline.tasks.inputs import read_mask, seed_key, walk_of, warn_of_unfamiliar
from unclip_jax.pipeline.tasks.outputs import Drawn, Images, grid_size, sources
from unclip_jax.pipeline.unclip import UnCLIP

Settings = argparse.Namespace
Load = Callable[[], UnCLIP]
Task = Callable[[Settings, Images, Load, Progress], Drawn]


def how(args: Settings, progress: Progress) -> dict[str, Any]:
    """What everything that draws is told."""
    return {"upsample": not args.no_upsample, "progress": progress}


def text2im(args: Settings, images: Images, load: Load, progress: Progress) -> Drawn:
    """Captions to pictures."""
    check_prompts(args.prompt)
    key, first = seed_key(args), getattr(args, "first", 0)
    _, whose, numbers = numbered(key, len(args.prompt), args.num, first)
    model = load()
    warn_of_unfamiliar(model, args.prompt)
    made = model.generate(
        key,
        args.prompt,
        negative=getattr(args, "negative", ""),
        num=args.num,
        first=first,
        prior_guidance_scale=args.prior_guidance_scale,
        guidance_scale=args.guidance_scale,
        batch_size=args.batch_size,
        **how(args, progress),
    )
    captions = [args.prompt[i] for i in whose]
    each = [{"prompt": c, "sample": str(i)} for c, i in zip(captions, numbers, strict=True)]
    columns = max(np.bincount(whose).max(), min(4, len(captions)))
    return Drawn(list(zip(made, captions, strict=True)), int(columns), each=each)


def img2img(args: Settings, images: Images, load: Load, progress: Progress) -> Drawn:
    """Each picture, and what is drawn of it after some noise."""
    key, strength = seed_key(args), checks.number("--strength", args.strength, 0, 1)
    num = checks.count("--num", args.num)
    model = load()
    warn_of_unfamiliar(model, [args.prompt])
    walk, told = walk_of(args, model, caption=args.prompt), how(args, progress)
    told |= {"num": num, "strength": strength, "inverted": args.invert}
    made = manipulate.img2img(model, key, images, walk, **told)
    cells = []
    for i, source in enumerate(sources(args, images, made.shape[1:3])):
        cells.append(source)
        cells += [(made[i * num + j], f"drawn {j + 1}") for j in range(num)]
    asked = f': "{args.prompt}"' if args.prompt else ""
    return Drawn(cells, num + 1, f"From a picture, strength {strength:g}{asked}")


def mix(args: Settings, images: Images, load: Load, progress: Progress) -> Drawn:
    """What is mixed, pictures and then captions, and what the mix looks like."""
    key, num = seed_key(args), checks.count("--num", args.num)
    things = [*images, *args.prompt]
    if not things:
        raise wrong("--image and --prompt", "neither", "pictures or captions to mix")
    weights = args.weight or [1 / len(things)] * len(things)
    if len(weights) != len(things):
        expected = f"one for each of {len(images)} pictures and {len(args.prompt)} captions"
        raise wrong("--weight", weights, expected, "give those of pictures first")
    model = load()
    warn_of_unfamiliar(model, args.prompt)
    told = how(args, progress) | {"num": num, "how": args.how, "batch_size": args.batch_size}
    told |= {"negative": args.negative, "guidance_scale": args.guidance_scale}
    made = manipulate.mix(model, key, things, weights, **told)
    given = sources(args, images, made.shape[1:3])
    cells = [(p, f"{w:.3g} × {name}") for (p, name), w in zip(given, weights, strict=False)]
    words = [f'{w:.3g} × "{c}"' for c, w in zip(args.prompt, weights[len(images) :], strict=True)]
    cells += [(picture, f"mix {j + 1}") for j, picture in enumerate(made)]
    title = "A mix" + (f" with {', '.join(words)}" if words else "")
    return Drawn(cells, min(len(cells), 6), title)


def reconstruct(args: Settings, images: Images, load: Load, progress: Progress) -> Drawn:
    """Each picture, and what comes back of it in so many steps."""
    walks, key = [walk_of(args, steps=steps) for steps in args.steps], seed_key(args)
    model = load()
    rows = [[source] for source in sources(args, images, grid_size(args, model))]
    for walk in walks:
        again, ratios = manipulate.reconstruct(model, key, images, walk, **how(args, progress))
        steps = f"{walk.steps} steps"
        for row, picture, ratio in zip(rows, again, ratios, strict=True):
            row.append((picture, f"{steps}, {ratio:.1f} dB"))
        print(f"{steps}: PSNR {ratios.mean():.2f} dB, the mean of {len(ratios)} pictures")
    return Drawn([cell for row in rows for cell in row], len(rows[0]), "Inversion and decoding")


def variations(args: Settings, images: Images, load: Load, progress: Progress) -> Drawn:
    """Each picture and its variations."""
    walk, num, key = walk_of(args), checks.count("--num", args.num), seed_key(args)
    model = load()
    latents = manipulate.encode(model, images, walk, progress)
    made = manipulate.pictures(model, key, latents, walk, num=num, **how(args, progress))
    cells = []
    for i, source in enumerate(sources(args, images, made.shape[1:3])):
        cells.append(source)
        cells += [(made[i * num + j], f"variation {j + 1}") for j in range(num)]
    return Drawn(cells, num + 1, f"Variations, eta = {args.eta:g}")


def interpolate(args: Settings, images: Images, load: Load, progress: Progress) -> Drawn:
    """Two pictures and the way between them, once for each x_T."""
    if len(images) != 2:
        raise wrong("--image", len(images), "two pictures to go between")
    walk, frames, key = walk_of(args), checks.count("--frames", args.frames, 2), seed_key(args)
    checks.count("--rows", args.rows, 0)
    model = load()
    ends = manipulate.encode(model, images, walk, progress)
    ways = [("x_T interpolated", manipulate.interpolate(ends, frames))]
    for i in range(args.rows):
        x_T = manipulate.noise(model, jax.random.fold_in(key, i)[None])[0]
        ways.append((f"random x_T {i + 1}", manipulate.interpolate(ends, frames, x_T)))
    latents = Latents(*map(np.concatenate, zip(*(way for _, way in ways), strict=True)))
    made = manipulate.pictures(model, key, latents, walk, **how(args, progress))
    first, last = sources(args, images, made.shape[1:3])
    cells = []
    for row, (name, _) in enumerate(ways):
        labels = [f"θ = {theta:.2f}, {name}" for theta in np.linspace(0, 1, frames)]
        between = made[row * frames : (row + 1) * frames]
        cells += [first, *zip(between, labels, strict=True), last]
    return Drawn(cells, frames + 2, "Interpolation", walk=range(1, frames + 1))


def textdiff(args: Settings, images: Images, load: Load, progress: Progress) -> Drawn:
    """Each picture turned towards a caption."""
    walk, most = walk_of(args), checks.number("--theta_max", args.theta_max, 0, 1)
    thetas = np.linspace(0.0, most, checks.count("--frames", args.frames))
    key = seed_key(args)
    check_prompts([args.to])
    model = load()
    warn_of_unfamiliar(model, [args.source, args.to])
    latents = manipulate.encode(model, images, walk, progress)
    turned = manipulate.text_diff(model, latents, args.source, args.to, thetas)
    made = manipulate.pictures(model, key, turned, walk, **how(args, progress))
    labels = [f"θ = {theta:.2f}" for theta in thetas]
    cells = []
    for i, source in enumerate(sources(args, images, made.shape[1:3])):
        row = made[i * len(thetas) : (i + 1) * len(thetas)]
        cells += [source, *zip(row, labels, strict=True)]
    title = f'From "{args.source}" to "{args.to}"'
    return Drawn(cells, len(thetas) + 1, title, walk=range(1, len(thetas) + 1))


def inpaint(args: Settings, images: Images, load: Load, progress: Progress) -> Drawn:
    """Each picture, what of it is kept, and the hole painted anew."""
    hole, key = read_mask(args.mask), seed_key(args)
    for image in images:
        masks.check_hole(hole, image)
    model = load()
    warn_of_unfamiliar(model, [args.prompt])
    walk, told = walk_of(args, model, caption=args.prompt), how(args, progress)
    cells = []
    for image, source in zip(images, sources(args, images, grid_size(args, model)), strict=True):
        made = manipulate.inpaint(model, key, image, hole, walk, num=args.num, **told)
        kept = np.where(masks.cover(hole, image, source[0].shape[:2]), np.uint8(160), source[0])
        cells += [source, (kept, "to paint: grey")]
        cells += [(picture, f"painted {i + 1}") for i, picture in enumerate(made)]
    title = f'Inpainting: "{args.prompt}"' if args.prompt else "Inpainting"
    return Drawn(cells, args.num + 2, title)


def upscale(args: Settings, images: Images, load: Load, progress: Progress) -> Drawn:
    """Each picture as it entered the upsamplers, enlarged by bicubic, and as it left them."""
    model, key, cells = load(), seed_key(args), []
    told = {"num": args.num, "batch_size": args.batch_size, "progress": progress}
    for image, path in zip(images, args.image, strict=True):
        low, made = manipulate.upscale(model, key, image, **told)
        name, size = Path(path).name, made.shape[1]
        cells += [(low, f"{name}, {len(low)} px"), (square(low, size), "bicubic")]
        cells += [(picture, f"upsampled, {size} px") for picture in made]
    return Drawn(cells, args.num + 2, "Upsamplers alone")
