"""Tasks that show what CLIP and the prior know."""

from __future__ import annotations

import argparse
import json

import numpy as np

from unclip_jax.common import checks
from unclip_jax.data.datasets import DataConfig
from unclip_jax.data.images import square
from unclip_jax.pipeline import manipulate
from unclip_jax.pipeline.manipulate import Latents
from unclip_jax.pipeline.tasks.inputs import load, read_images, read_prompts, seed_key, walk_of
from unclip_jax.pipeline.tasks.outputs import Picture, StageBars, shares, sources, write
from unclip_jax.stages.conditioning import example_keys


def pca(args: argparse.Namespace, bars: StageBars) -> None:
    """Each picture decoded from more and more principal components, itself on the right."""
    images, key = read_images(args), seed_key(args)
    model = load(args)
    walk = walk_of(args, model)
    z_i = manipulate.embed(model, images, args.batch_size)
    dims = args.dims or [k for k in manipulate.PCA_DIMS if k <= z_i.shape[1]] or [z_i.shape[1]]
    components = manipulate.fit_pca(model, DataConfig(name=args.data, split=args.split))
    left = manipulate.pca_embeddings(components, z_i, dims)
    x_T = np.repeat(manipulate.noise(model, example_keys(key, 1)), len(left), axis=0)
    made = manipulate.pictures(
        model,
        key,
        Latents(left, x_T),
        walk,
        upsample=not args.no_upsample,
        progress=bars.update,
    )
    cells = []
    labels = [f"{k} dims, {100 * components.kept(k):.1f}% of variance" for k in dims]
    for i, source in enumerate(sources(args, images, made.shape[1])):
        row = made[i * len(dims) : (i + 1) * len(dims)]
        cells += [*zip(row, labels, strict=True), source]
    title = f"The first principal components of CLIP's {z_i.shape[1]} dimensions"
    write(args, cells, columns=len(dims) + 1, title=title)


def prior(args: argparse.Namespace, bars: StageBars) -> None:
    """Captions alone, with their text embedding in the image's place, and with the prior's."""
    prompts, key = read_prompts(args), seed_key(args)
    model = load(args)
    rows = manipulate.ablate_prior(
        model,
        key,
        prompts,
        walk_of(args, model),
        upsample=not args.no_upsample,
        progress=bars.update,
    )
    cells = [
        (picture, f"{name}: {prompt}")
        for name, row in zip(manipulate.ABLATIONS, rows, strict=True)
        for picture, prompt in zip(row, prompts, strict=True)
    ]
    title = "What the prior is good for"
    write(args, cells, len(prompts), title=title, about={"prompt": json.dumps(prompts)})


def typographic(args: argparse.Namespace, bars: StageBars) -> None:
    """Each picture and the same with a word on it: what CLIP calls it, and what it decodes to."""
    images, key = read_images(args), seed_key(args)
    manipulate.check_labels(args.label)
    model = load(args)
    pairs = [
        variant for image in images for variant in (image, manipulate.overlay(image, args.word))
    ]
    cells = _decoded(args, model, key, pairs, args.label, args.label, bars)
    write(args, cells, args.num + 1, title=f'The word "{args.word}" on a picture')


def binding(args: argparse.Namespace, bars: StageBars) -> None:
    """Pictures of two objects and what they decode to, and the same for captions."""
    images, prompts, key = read_images(args), read_prompts(args), seed_key(args)
    manipulate.check_labels(prompts)
    model = load(args)
    letters = [chr(ord("A") + i % 26) for i in range(len(prompts))]
    cells = _decoded(args, model, key, images, prompts, letters, bars) if images else []
    made = model.generate(
        key,
        prompts,
        num=args.num + 1,
        guidance_scale=args.guidance_scale,
        upsample=not args.no_upsample,
        batch_size=args.batch_size,
        progress=bars.update,
    )
    chances = manipulate.zero_shot(model, manipulate.embed(model, made, args.batch_size), prompts)
    for i, (picture, chance) in enumerate(zip(made, chances, strict=True)):
        drawn = letters[i // (args.num + 1)]
        cells.append((picture, f"drawn for {drawn}: {shares(letters, chance)}"))
    named = "; ".join(f"{a}: {prompt}" for a, prompt in zip(letters, prompts, strict=True))
    title = f"Which attribute is whose? {named}"
    write(args, cells, args.num + 1, title=title, about={"prompt": json.dumps(prompts)})


def _decoded(args, model, key, images, labels, names, bars) -> list[Picture]:
    """Rows of a picture and `args.num` decoded from its z_i, with what CLIP calls each of them.

    `names` stand for the labels in the captions.
    """
    walk, num = walk_of(args, model), checks.count("--num", args.num)
    z_i = manipulate.embed(model, images, args.batch_size)
    chances = manipulate.zero_shot(model, z_i, labels)
    x_T = manipulate.noise(model, example_keys(key, num))
    made = manipulate.pictures(
        model,
        key,
        Latents(np.repeat(z_i, num, axis=0), np.tile(x_T, (len(images), 1, 1, 1))),
        walk,
        upsample=not args.no_upsample,
        progress=bars.update,
    )
    seen = manipulate.zero_shot(model, manipulate.embed(model, made, args.batch_size), labels)
    cells = []
    for i, image in enumerate(images):
        cells.append((square(image, made.shape[1]), f"picture: {shares(names, chances[i])}"))
        for j in range(i * num, (i + 1) * num):
            cells.append((made[j], f"decoded: {shares(names, seen[j])}"))
    return cells
