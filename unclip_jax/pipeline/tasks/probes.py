"""Tasks that show what CLIP and the prior know; as those of `edits`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

from unclip_jax.common import checks
from unclip_jax.data.datasets import DataConfig
from unclip_jax.data.images import square
from unclip_jax.pipeline import manipulate
from unclip_jax.pipeline.manipulate import Latents
from unclip_jax.pipeline.tasks.edits import Draw, generate, pictures
from unclip_jax.pipeline.tasks.inputs import seed_key, walk_of
from unclip_jax.pipeline.tasks.outputs import Drawn, Images, Picture, shares, sources
from unclip_jax.pipeline.unclip import Progress, UnCLIP, check_prompts
from unclip_jax.stages.conditioning import example_keys


def pca(args: argparse.Namespace, images: Images) -> Draw:
    """Each picture decoded from more and more principal components, itself on the right."""

    def draw(model: UnCLIP, progress: Progress) -> Drawn:
        walk = walk_of(args, model)
        z_i = manipulate.embed(model, images, args.batch_size)
        dims = args.dims or [k for k in manipulate.PCA_DIMS if k <= z_i.shape[1]] or [z_i.shape[1]]
        components = manipulate.fit_pca(model, DataConfig(name=args.data, split=args.split))
        left = manipulate.pca_embeddings(components, z_i, dims)
        x_T = np.repeat(manipulate.noise(model, example_keys(seed_key(args), 1)), len(left), axis=0)
        made = pictures(model, args, Latents(left, x_T), walk, progress)
        labels = [f"{k} dims, {100 * components.kept(k):.1f}% of variance" for k in dims]
        cells = []
        for i, source in enumerate(sources(args, images, made.shape[1])):
            row = made[i * len(dims) : (i + 1) * len(dims)]
            cells += [*zip(row, labels, strict=True), source]
        title = f"The first principal components of CLIP's {z_i.shape[1]} dimensions"
        return Drawn(cells, columns=len(dims) + 1, title=title)

    return draw


def prior(args: argparse.Namespace, images: Images) -> Draw:
    """Captions alone, with their text embedding in the image's place, and with the prior's."""
    check_prompts(args.prompt)

    def draw(model: UnCLIP, progress: Progress) -> Drawn:
        rows = manipulate.ablate_prior(
            model,
            seed_key(args),
            args.prompt,
            walk_of(args, model),
            upsample=not args.no_upsample,
            progress=progress,
        )
        cells = [
            (picture, f"{name}: {prompt}")
            for name, row in zip(manipulate.ABLATIONS, rows, strict=True)
            for picture, prompt in zip(row, args.prompt, strict=True)
        ]
        return Drawn(cells, columns=len(args.prompt), title="What the prior is good for")

    return draw


def typographic(args: argparse.Namespace, images: Images) -> Draw:
    """Each picture and the same with a word on it: what CLIP calls it, and what it decodes to.

    Without a word, the pictures alone; with `num` 0 nothing is decoded.
    """
    manipulate.check_labels(args.label)
    checks.count("--num", args.num, 0)
    word = args.word
    judged = [[image, manipulate.overlay(image, word)] if word else [image] for image in images]

    def draw(model: UnCLIP, progress: Progress) -> Drawn:
        seen = [image for pair in judged for image in pair]
        cells, chances = _decoded(model, args, seen, args.label, args.label, progress)
        return Drawn(
            cells,
            columns=args.num + 1,
            title=f'The word "{word}" on a picture' if word else "What CLIP calls a picture",
            chances=dict(zip(args.label, chances.T.tolist(), strict=True)),
            seen=("picture", f"with “{word}” on it") if word else ("picture",),
        )

    return draw


def binding(args: argparse.Namespace, images: Images) -> Draw:
    """Pictures of two objects and what they decode to, and the same for captions."""
    check_prompts(args.prompt)
    manipulate.check_labels(args.prompt)
    checks.count("--num", args.num, 0)

    def draw(model: UnCLIP, progress: Progress) -> Drawn:
        prompts, letters = args.prompt, [chr(ord("A") + i % 26) for i in range(len(args.prompt))]
        cells = []
        if images:
            cells, _ = _decoded(model, args, images, prompts, letters, progress)
        made = generate(model, args, args.num + 1, progress)
        z_i = manipulate.embed(model, made, args.batch_size)
        for i, chance in enumerate(manipulate.zero_shot(model, z_i, prompts)):
            drawn = letters[i // (args.num + 1)]
            cells.append((made[i], f"drawn for {drawn}: {shares(letters, chance)}"))
        named = "; ".join(f"{a}: {prompt}" for a, prompt in zip(letters, prompts, strict=True))
        return Drawn(cells, args.num + 1, title=f"Which attribute is whose? {named}")

    return draw


def _decoded(
    model: UnCLIP,
    args: argparse.Namespace,
    images: Images,
    labels: Sequence[str],
    names: Sequence[str],
    progress: Progress,
) -> tuple[list[Picture], np.ndarray]:
    """Rows of a picture and `args.num` decoded from its z_i, with what CLIP calls each of them.

    `names` stand for the labels in the captions. Also returns the pictures' probabilities
    [b, labels].
    """
    num = args.num
    z_i = manipulate.embed(model, images, args.batch_size)
    chances = manipulate.zero_shot(model, z_i, labels)
    made, seen, size = [], [], max(map(len, images))
    if num:  # each picture from the same noises
        x_T = manipulate.noise(model, example_keys(seed_key(args), num))
        latents = Latents(np.repeat(z_i, num, axis=0), np.tile(x_T, (len(images), 1, 1, 1)))
        made = pictures(model, args, latents, walk_of(args, model), progress)
        seen = manipulate.zero_shot(model, manipulate.embed(model, made, args.batch_size), labels)
        size = made.shape[1]
    cells = []
    for i, image in enumerate(images):
        cells.append((square(image, size), f"picture: {shares(names, chances[i])}"))
        for j in range(i * num, (i + 1) * num):
            cells.append((made[j], f"decoded: {shares(names, seen[j])}"))
    return cells, chances
