"""How well a model draws what it is asked, judged by a network that did not train it.

    python benchmarks/box.py --out report [--model DIR] [--num 200] [--heldout 100]

Draws one picture at the decoder's size for captions of each split of the data that the model was
trained on, with the model's own settings, and asks of it

- judge: whether the nearest of all real drawings, or one of the nearest five, is of the caption's
  emoji, and whether it is the very drawing of the caption. Near is meant by EfficientNet-lite0's
  features of 112 px (pip install -e ".[features]"), standardised over the real drawings, by cosine;
- style: whether it is in the style that its caption names, by a linear classifier of colours, which
  is fitted to real training drawings that are not shown to it again;
- copies: whether it lies within a mean squared error of 0.01, pixels from -1 to 1, of any training
  drawing: then it is that drawing;
- clip: whether its own caption is the nearest of all captions, by the model's CLIP;
- paraphrases, where the data keep words out of training: whether those find a drawing and the name
  of an emoji that has them, by the model's CLIP;
- Fréchet distances to the training drawings whose captions are not drawn, by both networks.

Beside each stands what real drawings score: the caption's own ("real"), it at half its size or with
a little noise, another style's drawing of the same emoji (which is then none of the candidates),
and chance.

Writes figures.json, for each split a grid of real beside drawn pictures, and two galleries of whole
pictures at seed 0, as users get them: every n-th caption of training, and everyday ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from unclip_jax.common.files import replacing
from unclip_jax.common.grids import captioned_grid, save_png
from unclip_jax.data.datasets import DataConfig, load
from unclip_jax.data.emoji.styles import BUILDERS, PARAPHRASES
from unclip_jax.data.images import square
from unclip_jax.errors import run_command, wrong
from unclip_jax.evaluate import features as feature_networks
from unclip_jax.evaluate.measure import choose
from unclip_jax.evaluate.pictures import Measurer, Real
from unclip_jax.metrics.frechet import frechet
from unclip_jax.metrics.nearest import Nearest, by_chance, copies, top
from unclip_jax.metrics.retrieval import own_caption
from unclip_jax.metrics.vectors import Vectors, moments
from unclip_jax.parallel import compile_cache
from unclip_jax.parallel.cpu import memory as host_memory
from unclip_jax.pipeline.unclip import UnCLIP
from unclip_jax.weights.trained import clip_fingerprint

JUDGE = "efficientnet-lite0"
JUDGE_SIZE = 112  # px; smaller ones are enlarged by a bicubic filter
NOISE = 0.02  # its standard deviation, likewise
FITTED = 600  # real pictures of each style, to which the classifier is fitted
RIDGE = 1000.0  # on features of unit variance
SHOWN, COLUMNS = 24, 4
GALLERY, GALLERY_COLUMNS = 48, 8
EVERYDAY = (
    "pizza, twemoji style", "slice of pizza", "a cat face, noto style", "dog face, fluent style",
    "a yellow star, fluent style", "rainbow, noto style", "banana, twemoji style",
    "strawberry, fluent style", "green apple, noto style", "broccoli, twemoji style",
    "soccer ball, noto style", "basketball, fluent style", "red car, twemoji style",
    "airplane, noto style", "house, fluent style", "tree, noto style", "snowman, twemoji style",
    "heart with arrow, noto style", "smiling face with sunglasses, fluent style",
    "fire, twemoji style", "flag of Japan", "flag of Germany", "umbrella, fluent style",
    "fish, noto style",
)  # fmt: skip

Figures = dict[str, float]


class Drawings(NamedTuple):
    """Every real drawing, split after split.

    Attributes:
        images: uint8 [n, s, s, 3].
        captions: the canonical ones.
        emoji: [n] what each shows, by number.
        codes: the code points of each number.
        styles: [n] by number.
        same: [n] a number for each, equal for equal pictures.
        first: each split -> its first row, in order.
        vectors: of the pictures.
    """

    images: np.ndarray
    captions: list[str]
    emoji: np.ndarray
    codes: list[str]
    styles: np.ndarray
    same: np.ndarray
    first: dict[str, int]
    vectors: Vectors

    def rows(self, split: str) -> np.ndarray:
        """The rows of a split."""
        ends = [*self.first.values(), len(self.images)]
        place = list(self.first).index(split)
        return np.arange(ends[place], ends[place + 1])

    def others(self, rows: np.ndarray) -> np.ndarray:
        """For each row the next drawing of the same emoji, -1 where there is none."""
        same = defaultdict(list)
        for row, emoji in enumerate(self.emoji):
            same[emoji].append(row)
        found = []
        for row in rows:
            own = same[self.emoji[row]]
            after = own[(own.index(row) + 1) % len(own)]
            found.append(-1 if after == row else after)
        return np.array(found)


class Enlarging(feature_networks.FeatureNetwork):
    """The judge's network behind a bicubic filter."""

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Features float32 [b, d] of uint8 images [b, h, w, 3]."""
        return super().__call__(np.stack([resized(x, JUDGE_SIZE, "BICUBIC") for x in images]))


def resized(image: np.ndarray, size: int, how: str) -> np.ndarray:
    """A picture uint8 [h, w, 3] as [size, size, 3]."""
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling[how]))


def halved(image: np.ndarray) -> np.ndarray:
    """A picture at half its size and back: what is fine in it is gone."""
    return resized(resized(image, len(image) // 2, "BOX"), len(image), "BILINEAR")


def noisy(image: np.ndarray, seed: int) -> np.ndarray:
    """A picture with a little Gaussian noise."""
    noise = np.random.default_rng(seed).normal(0, NOISE * 127.5, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def colours(images: list[np.ndarray] | np.ndarray) -> np.ndarray:
    """Square roots [n, 4096] of how much of each picture has which colour, by 16 levels each."""
    found = []
    for image in images:
        red, green, blue = np.moveaxis(image.astype(np.int64) // 16, -1, 0)
        counts = np.bincount((red * 256 + green * 16 + blue).ravel(), minlength=4096)
        found.append(np.sqrt(counts / red.size))
    return np.stack(found).astype(np.float32)


class StyleClassifier:
    """Ridge regression of the styles on standardised colours; the largest output wins."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        """Fit it to uint8 pictures [n, s, s, 3] and labels [n], blurred and noisy ones besides."""
        made = [halved(x) for x in images], [noisy(x, i) for i, x in enumerate(images)]
        x = np.concatenate([colours(each) for each in (images, *made)])
        self._mean, self._std = x.mean(axis=0), x.std(axis=0) + 1e-2
        x, y = self._prepare(x), np.eye(labels.max() + 1, dtype=np.float32)[np.tile(labels, 3)]
        self._weights = np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ y)

    def _prepare(self, x: np.ndarray) -> np.ndarray:
        x = (x - self._mean) / self._std
        return np.concatenate([x, np.ones((len(x), 1), np.float32)], axis=1)

    def accuracy(self, images: list[np.ndarray] | np.ndarray, labels: np.ndarray) -> float:
        """The fraction of pictures that is in its style."""
        outputs = self._prepare(colours(images)) @ self._weights
        return float(np.mean(outputs.argmax(axis=1) == labels))


def looked_at(measurer: Measurer, config: DataConfig, keep: Path | None) -> Real:
    """A split as the networks see it; what they saw is kept in a folder, if there is one."""
    if keep is None:
        return measurer.read(config)
    source = load(config)
    by = f"{clip_fingerprint(measurer.judge)}-{measurer.network.name.replace(':', '-')}"
    path = keep / f"{source.fingerprint}-{config.image_size}-{by}.npz"
    if not path.exists():
        real = measurer.read(config)
        alike = np.frombuffer(b"".join(real.alike), np.uint8).reshape(len(real.alike), -1)
        seen = {"z_i": real.vectors.z_i, "features": real.vectors.features, "alike": alike}
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, index=real.index, labels=real.labels, **seen)
    with np.load(path) as kept:
        vectors, alike = Vectors(kept["z_i"], kept["features"]), [bytes(x) for x in kept["alike"]]
        return Real(source, config.image_size, kept["index"], kept["labels"], vectors, alike)


def config_of(data: str, split: str, size: int) -> DataConfig:
    """How a split of a data set is read: each drawing once, with its style."""
    return DataConfig(name=data, split=split, image_size=size, labels=True, captions="first")


def read(
    measurer: Measurer, data: str, splits: tuple[str, ...], size: int, keep: Path | None
) -> Drawings:
    """Look at every drawing of a data set."""
    images, captions, names, alike, found, first = [], [], [], [], [], {}
    for split in splits:
        real = looked_at(measurer, config_of(data, split, size), keep)
        records = [real.source[int(i)] for i in real.index]
        first[split] = len(captions)
        images += [square(record["image"], size) for record in records]
        captions += [record["caption"] for record in records]
        names += [record["name"].rpartition("/")[2] for record in records]
        alike += real.alike
        found.append((real.labels, real.vectors.z_i, real.vectors.features))
    styles, z_i, features = (np.concatenate(parts) for parts in zip(*found, strict=True))
    codes, emoji = np.unique(names, return_inverse=True)
    same = np.unique(alike, return_inverse=True)[1]
    vectors = Vectors(z_i, features)
    return Drawings(np.stack(images), captions, emoji, codes.tolist(), styles, same, first, vectors)


def looked(measurer: Measurer, images: list[np.ndarray]) -> np.ndarray:
    """The judge's features [n, d] of any number of pictures."""
    starts = range(0, len(images), measurer.batch_size)
    parts = [measurer.look(np.stack(images[i : i + measurer.batch_size])) for i in starts]
    return np.concatenate([vectors.features for vectors in parts])


def beside(measurer: Measurer, nearest: Nearest, real: Drawings, rows: np.ndarray) -> dict:
    """What real drawings score by the judge where drawn pictures are judged."""
    own, features = real.images[rows], real.vectors.features
    changed = {
        "real_halved": [halved(image) for image in own],
        "real_noisy": [noisy(image, i) for i, image in enumerate(own)],
    }
    found = {"real": nearest.figures(features[rows], rows)}
    found |= {n: nearest.figures(looked(measurer, x), rows) for n, x in changed.items()}
    others = real.others(rows)
    has = others >= 0
    if has.any():
        others = others[has]
        found["another_style"] = nearest.figures(features[others], rows[has], others)
        found["another_style"]["pictures"] = float(has.sum())
    return found | {"chance": nearest.chance(rows)}


def write(figures: dict, latest: str, out: Path) -> None:
    """Write all figures so far, and print the latest."""
    (out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps({latest: figures[latest]}, indent=1), flush=True)


def grid(images: list[np.ndarray], captions: list[str], columns: int, path: Path) -> None:
    """Write a captioned grid."""
    save_png(captioned_grid(images, captions, columns=columns), path, {"seed": "0"})


def galleries(model: UnCLIP, captions: list[str], out: Path) -> None:
    """Draw whole pictures as a user would, at seed 0: every n-th caption, and the everyday ones."""
    every = [captions[i * len(captions) // GALLERY] for i in range(GALLERY)]
    for name, chosen in (("gallery", every), ("everyday", list(EVERYDAY))):
        images = []
        for start in tqdm(range(0, len(chosen), 8), desc=f"{name:<26}"):
            images += list(model.generate(jax.random.key(0), chosen[start : start + 8]))
        grid(images, chosen, GALLERY_COLUMNS, out / f"{name}.png")


class Bench:
    """A model, all real drawings, and what is fitted to them."""

    def __init__(self, model: UnCLIP, data: str, args: argparse.Namespace) -> None:
        """Look at the drawings, and choose captions of each split; UserError for a wrong num."""
        size = model.decoder.stage.image_size
        total = len(load(config_of(data, "train", size)))
        if not 2 <= args.num <= total - 2:  # a covariance takes two, on both sides
            expected = f"2 to {total - 2}, as training has {total} captions"
            raise wrong("--num", args.num, expected, "those that are not drawn are the reference")
        clip = feature_networks.of_clip(model.clip)
        plain = feature_networks.load(f"{args.judge}:{JUDGE_SIZE}", clip)
        judge = Enlarging(plain.name, plain.params, plain.apply, plain.mesh)
        self.measurer = Measurer(model, model.clip, clip, judge, args.batch_size)
        self.stage = model.decoder.stage
        splits = BUILDERS[data][0].splits if data in BUILDERS else ("train", "heldout")
        self.data = data
        self.real = real = read(self.measurer, data, splits, size, args.keep)
        self.z_t = self.measurer.read_captions(real.captions)
        self.told = self.measurer.captions_alike(real.captions)
        self.nearest = Nearest(real.vectors.features, real.emoji, real.same)
        self.train = real.rows("train")
        nums = {split: args.num if split == "train" else args.heldout for split in splits}
        self.chosen = {
            split: first + choose(len(real.rows(split)), nums[split], seed=0)[0]
            for split, first in real.first.items()
        }
        left = np.random.default_rng(1).permutation(np.setdiff1d(self.train, self.chosen["train"]))
        fitted = np.concatenate(
            [left[real.styles[left] == style][:FITTED] for style in np.unique(real.styles)]
        )
        self.classifier = StyleClassifier(real.images[fitted], real.styles[fitted])
        self.reference = real.vectors.rows(left)

    def draw(self, split: str) -> tuple[Vectors, np.ndarray]:
        """A picture for each chosen caption of a split, and what the networks see in it."""
        rows = self.chosen[split]
        return self.measurer.draw(
            jax.random.key(0),
            [self.real.captions[i] for i in rows],
            guidance_scale=self.stage.guidance_scale,
            upsample=False,
            shown=len(rows),
            name=f"pictures, {split}",
        )

    def figures(self, split: str, drawn: Vectors, images: np.ndarray) -> dict:
        """Everything that is asked of the pictures of a split."""
        rows, real = self.chosen[split], self.real
        truth, own = real.vectors.rows(rows), real.images[rows]
        seen = {"drawn": images, "real": own, "real_halved": [halved(x) for x in own]}
        return {
            "pictures": len(rows),
            "judge": {"drawn": self.nearest.figures(drawn.features, rows)}
            | beside(self.measurer, self.nearest, real, rows),
            "style": {n: self.classifier.accuracy(x, real.styles[rows]) for n, x in seen.items()},
            "copies": copies(images, own, real.images[self.train], rows[:, None] == self.train),
            "clip": own_caption(drawn.z_i, truth.z_i, self.z_t, rows, self.told, real.same[rows]),
            "frechet_clip": self._frechet("z_i", drawn, truth),
            "frechet_judge": self._frechet("features", drawn, truth),
        }

    def paraphrases(self) -> Figures:
        """Whether words that no caption of training has find what is called so, by CLIP."""
        number = {code: i for i, code in enumerate(self.real.codes)}
        emoji = defaultdict(set)
        source = load(DataConfig(name=f"{self.data}:{PARAPHRASES}", split="all"))
        for pair in (source[i] for i in range(len(source))):
            emoji[pair["caption"]].add(number[pair["name"].rpartition("/")[2]])
        z_t = self.measurer.read_captions(list(emoji))
        first = np.unique(self.real.emoji, return_index=True)[1]
        named = [self.real.captions[i].rpartition(", ")[0] for i in first]
        found = {"words": float(len(emoji))}
        for what, shown, candidates in (
            ("drawing", self.real.emoji, self.real.vectors.z_i),
            ("name", np.arange(len(named)), self.measurer.read_captions(named)),
        ):
            right = np.stack([np.isin(shown, list(own)) for own in emoji.values()])
            found |= top(z_t @ candidates.T, {what: right}) | by_chance({f"{what}_chance": right})
        return found

    def _frechet(self, field: str, drawn: Vectors, truth: Vectors) -> Figures:
        reference, a, b = (moments(getattr(v, field)) for v in (self.reference, drawn, truth))
        return {"drawn": frechet(a, reference), "real": frechet(b, reference)}


def main(argv: list[str]) -> None:
    """Draw, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", metavar="DIR", help="default: the box model")
    parser.add_argument("--num", type=int, default=200, help="pictures of training captions")
    parser.add_argument("--heldout", type=int, default=100, help="and of each held-out split")
    parser.add_argument("--data", help="default: what the decoder was trained on")
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--judge", choices=list(feature_networks.LITE), default=JUDGE)
    parser.add_argument("--keep", type=Path, help="folder for what the networks see in real ones")
    parser.add_argument("--no_galleries", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    compile_cache.use()
    host_memory.keep_freed()
    model = UnCLIP.load(args.model)
    data = args.data or model.decoder.description["data"]["name"]
    bench = Bench(model, data, args)
    real = bench.real
    figures: dict = {
        "data": data,
        "judge": args.judge,
        "drawings": len(real.images),
        "pixels": real.images.shape[1],
    }
    for split, rows in bench.chosen.items():
        drawn, images = bench.draw(split)
        figures[split] = bench.figures(split, drawn, images)
        pairs = zip(real.images[rows[:SHOWN]], images, strict=False)
        pairs = [np.concatenate(pair, axis=1) for pair in pairs]
        grid(pairs, [real.captions[i] for i in rows[:SHOWN]], COLUMNS, args.out / f"{split}.png")
        write(figures, split, args.out)
    if data in BUILDERS and PARAPHRASES in BUILDERS[data][0].features:
        figures[PARAPHRASES] = bench.paraphrases()
        write(figures, PARAPHRASES, args.out)
    if not args.no_galleries:
        galleries(model, [real.captions[i] for i in bench.train], args.out)


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
