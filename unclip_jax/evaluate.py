"""Measure a trained model: `python -m unclip_jax.evaluate --model runs/emoji`.

Prints a table and, with --json, writes the same figures to a file:

clip      retrieval among held-out pairs, and the rank of their image embeddings: how many principal
          components hold 99 % of the variance
prior     cosines of sampled image embeddings with the true ones, and with other pictures' ones
decoder   how many pictures generated for training captions have their own caption as the nearest
          of all captions, beside real pictures and chance
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from unclip_jax import pca
from unclip_jax.data import batches, datasets
from unclip_jax.data.records import Source
from unclip_jax.errors import UserError, run_command
from unclip_jax.evaluation.consistency import own_caption
from unclip_jax.evaluation.prior import prior_cosines
from unclip_jax.evaluation.retrieval import image_text_retrieval
from unclip_jax.files import replacing
from unclip_jax.pipeline import UnCLIP, example_keys

BATCH = 64


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m unclip_jax.evaluate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="folder with one sub-folder per stage")
    add("--data", default="emoji", help="emoji, a folder, or tfds:NAME (default emoji)")
    add("--train_split", default="train", help="split that captions to draw come from")
    add("--heldout_split", default="heldout", help="split no stage was trained on")
    add("--num", type=int, default=100, help="pictures to generate (default 100)")
    add("--seed", type=int, default=0)
    add("--json", metavar="FILE", help="also write the figures here")
    return parser.parse_args(argv)


def pairs(model: UnCLIP, config: datasets.DataConfig) -> tuple[Source, np.ndarray, list[str]]:
    """A split's source, the z_i [n, e] of its readable pictures, and their captions."""
    size = model.clip.stage.image_size
    config = dataclasses.replace(config, image_size=size, captions="first", cache_bytes=0)
    source = datasets.load(config)
    z_i, index = [], []
    for batch in batches.batches(
        source, config, seed=0, batch_size=BATCH, shuffle=False, epochs=1, drop_remainder=False
    ):
        padded = np.resize(batch["image"], (BATCH, size, size, 3))
        z_i.append(np.asarray(model.embed_image(padded))[: len(batch["index"])])
        index += list(batch["index"])
    return source, np.concatenate(z_i), [source[int(i)]["caption"] for i in index]


def embed_captions(model: UnCLIP, captions: Sequence[str]) -> np.ndarray:
    """z_t [n, e] of any number of captions, in batches of one size."""
    padded = list(captions) + [captions[0]] * (-len(captions) % BATCH)
    parts = [model.embed_text(padded[i : i + BATCH]) for i in range(0, len(padded), BATCH)]
    return np.concatenate([np.asarray(part) for part in parts])[: len(captions)]


def draw_embeddings(model: UnCLIP, captions: Sequence[str], key: jax.Array) -> np.ndarray:
    """One z_i [n, e] of the prior for each caption."""
    keys = example_keys(key, len(captions) + -len(captions) % BATCH)
    padded = list(captions) + [captions[0]] * (-len(captions) % BATCH)
    parts = [
        model.sample_prior(keys[i : i + BATCH], padded[i : i + BATCH])
        for i in range(0, len(padded), BATCH)
    ]
    return np.concatenate([np.asarray(part) for part in parts])[: len(captions)]


def evaluate(
    model: UnCLIP, config: datasets.DataConfig, heldout_split: str, num: int, seed: int
) -> dict[str, dict[str, float]]:
    """All figures, by stage.

    Args:
        model: what to measure.
        config: the data set, its split the one whose captions are drawn.
        heldout_split: the split for retrieval and cosines.
        num: pictures to generate; fewer captions than that are all drawn.
        seed: of the captions' choice and of the pictures.

    Raises:
        UserError: num below 1, or no such data.
    """
    if num < 1:
        raise UserError(f"--num: got {num}, expected at least 1")
    key = jax.random.key(seed)
    _, held_i, held_captions = pairs(model, dataclasses.replace(config, split=heldout_split))
    _, train_i, train_captions = pairs(model, config)
    held_t, train_t = (embed_captions(model, c) for c in (held_captions, train_captions))
    chosen = np.sort(
        np.random.default_rng(seed).permutation(len(train_captions))[
            : min(num, len(train_captions))
        ]
    )
    pictures = model.generate(
        key, [train_captions[i] for i in chosen], upsample=False, batch_size=BATCH
    )
    generated = np.concatenate(
        [model.embed_image(pictures[i : i + BATCH]) for i in range(0, len(pictures), BATCH)]
    )
    drawn = draw_embeddings(model, held_captions, key)
    return {
        "clip": image_text_retrieval(held_i, held_t) | {"rank_99": float(pca.rank(held_i))},
        "prior": prior_cosines(drawn, held_i, held_t),
        "decoder": own_caption(
            generated, train_i[chosen], np.concatenate([train_t, held_t]), chosen
        ),
    }


def table(figures: dict[str, dict[str, float]]) -> str:
    """The figures, one a line."""
    rows = [
        (f"{stage}/{name}", value)
        for stage, part in figures.items()
        for name, value in part.items()
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value:>8.4g}" for name, value in rows)


def main(argv: list[str]) -> None:
    """Measure, print, write."""
    args = parse(argv)
    model = UnCLIP.load(args.model)
    config = datasets.DataConfig(name=args.data, split=args.train_split)
    figures = evaluate(model, config, args.heldout_split, args.num, args.seed)
    print(table(figures))
    if args.json:
        with replacing(Path(args.json)) as path:
            path.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
