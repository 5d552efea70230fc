"""Tasks that show what CLIP and the prior know; called as those of `edits`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from unclip_jax.common import checks
from unclip_jax.data.datasets import DataConfig
from unclip_jax.data.images import square
from unclip_jax.pipeline import manipulate
from unclip_jax.pipeline.drawing import Progress, check_prompts
from unclip_jax.pipeline.manipulate import Latents
from unclip_jax.pipeline.tasks.edits import Load, Settings, how
from unclip_jax.pipeline.tasks.inputs import seed_key, walk_of
from unclip_jax.pipeline.tasks.outputs import Drawn, Images, Picture, shares, sources
from unclip_jax.pipeline.unclip import UnCLIP
from unclip_jax.stages.conditioning import example_keys


def pca(args: Settings, images: Images, load: Load, progress: Progress) -> Drawn:
    """Each picture decoded from more and more principal components, itself on the right."""
    model, key = load(), seed_key(args)
    walk = walk_of(args, model)
    z_i = manipulate.embed(model, images, args.batch_size)
    dims = args.dims or [k for k in manipulate.PCA_DIMS if k <= z_i.shape[1]] or [z_i.shape[1]]
    components = manipulate.fit_pca(model, DataConfig(name=args.data, split=args.split))
    left = manipulate.pca_embeddings(components, z_i, dims)
    x_T = np.repeat(manipulate.noise(model, example_keys(key, 1)), len(left), axis=0)
    made = manipulate.pictures(model, key, Latents(left, x_T), walk, **how(args, progress))
    labels = [f"{k} dims, {100 * components.kept(k):.1f}% of variance" for k in dims]
    cells = []
    for i, source in enumerate(sources(args, images, made.shape[1:3])):
        cells += [*zip(made[i * len(dims) : (i + 1) * len(dims)], labels, strict=True), source]
    title = f"The first principal components of CLIP's {z_i.shape[1]} dimensions"
    return Drawn(cells, len(dims) + 1, title)


def prior(args: Settings, images: Images, load: Load, progress: Progress) -> Drawn:
    """Captions alone, with their text embedding in the image's place, and with the prior's."""
    prompts, key = args.prompt, seed_key(args)
    check_prompts(prompts)
    model = load()
    walk = walk_of(args, model)
    rows = manipulate.ablate_prior(model, key, prompts, walk, **how(args, progress))
    cells = [
        (picture, f"{name}: {prompt}")
        for name, row in zip(manipulate.ABLATIONS, rows, strict=True)
        for picture, prompt in zip(row, prompts, strict=True)
    ]
    return Drawn(cells, len(prompts), "What the prior is good for")


def typographic(args: Settings, images: Images, load: Load, progress: Progress) -> Drawn:
    """Each picture and the same with a word on it: what CLIP calls it, and what it decodes to.

    Without a word, the pictures alone; with `num` 0 nothing is decoded.
    """
    manipulate.check_labels(args.label)
    word, shown = args.word, []
    for image in images:
        shown += [image, manipulate.overlay(image, word)] if word else [image]
    cells, chances = _decoded(args, shown, load(), args.label, args.label, progress)
    return Drawn(
        cells,
        columns=args.num + 1,
        title=f'The word "{word}" on a picture' if word else "What CLIP calls a picture",
        chances=dict(zip(args.label, chances.T.tolist(), strict=True)),
        seen=("picture", f"with “{word}” on it") if word else ("picture",),
    )


def binding(args: Settings, images: Images, load: Load, progress: Progress) -> Drawn:
    """Pictures of two objects and what they decode to, and the same for captions."""
    prompts, key = args.prompt, seed_key(args)
    check_prompts(prompts)
    manipulate.check_labels(prompts)
    letters = [chr(ord("A") + i % 26) for i in range(len(prompts))]
    model, cells = load(), []
    if images:
        cells, _ = _decoded(args, images, model, prompts, letters, progress)
    each = {"num": args.num + 1, "batch_size": args.batch_size, **how(args, progress)}
    made = model.generate(key, prompts, guidance_scale=args.guidance_scale, **each)
    z_i = manipulate.embed(model, made, args.batch_size)
    for i, chance in enumerate(manipulate.zero_shot(model, z_i, prompts)):
        drawn = letters[i // (args.num + 1)]
        cells.append((made[i], f"drawn for {drawn}: {shares(letters, chance)}"))
    named = "; ".join(f"{a}: {prompt}" for a, prompt in zip(letters, prompts, strict=True))
    return Drawn(cells, args.num + 1, f"Which attribute is whose? {named}")


def _decoded(
    args: Settings,
    images: Images,
    model: UnCLIP,
    labels: Sequence[str],
    names: Sequence[str],
    progress: Progress,
) -> tuple[list[Picture], np.ndarray]:
    """Rows of a picture and `args.num` decoded from its z_i, with what CLIP calls each of them.

    `names` stand for the labels in the captions. Also the pictures' probabilities [b, labels].
    """
    num, key = checks.count("--num", args.num, 0), seed_key(args)
    z_i = manipulate.embed(model, images, args.batch_size)
    chances = manipulate.zero_shot(model, z_i, labels)
    made, seen, size = [], [], max(map(len, images))
    if num:  # each picture from the same noises
        x_T = np.tile(manipulate.noise(model, example_keys(key, num)), (len(images), 1, 1, 1))
        latents, walk = Latents(np.repeat(z_i, num, axis=0), x_T), walk_of(args, model)
        made = manipulate.pictures(model, key, latents, walk, **how(args, progress))
        seen = manipulate.zero_shot(model, manipulate.embed(model, made, args.batch_size), labels)
        size = made.shape[1:3]
    cells = []
    for i, image in enumerate(images):
        cells.append((square(image, size), f"picture: {shares(names, chances[i])}"))
        for j in range(i * num, (i + 1) * num):
            cells.append((made[j], f"decoded: {shares(names, seen[j])}"))
    return cells, chances
