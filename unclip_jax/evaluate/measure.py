"""All figures of a model: see docs/evaluation.md for what each of them means."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from unclip_jax import metrics
from unclip_jax.common import checks
from unclip_jax.data import datasets
from unclip_jax.data.records import Source
from unclip_jax.errors import UserError, wrong
from unclip_jax.evaluate.features import load, of_clip
from unclip_jax.evaluate.pictures import Measurer, Real, with_moments
from unclip_jax.metrics import pca, zero_shot
from unclip_jax.metrics.precision_recall import NEIGHBOURS
from unclip_jax.metrics.prior_cosines import prior_cosines
from unclip_jax.metrics.retrieval import Told, image_text_retrieval, own_caption
from unclip_jax.metrics.vectors import Vectors
from unclip_jax.parallel import distributed, sharding
from unclip_jax.parallel.cpu import memory as host_memory
from unclip_jax.pipeline.drawing import Kept
from unclip_jax.pipeline.unclip import UnCLIP
from unclip_jax.weights.trained import Part, clip_fingerprint

SHOWN = 16  # pictures in the grid of generated beside real
SHOWN_CAPTIONS = 6  # rows in the grid of guidance scales

# What each use of the seed folds into the key.
CAPTIONS, PRIOR, CLASSES = 0, 1, 2

Figures = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured, and on how many pictures.

    Attributes:
        features: the network of the Fréchet distance, precision and recall, see `features.load`.
        num: captions that a picture is drawn for; fewer captions than that are all drawn.
        guidance_scale: the decoder's; None takes the model's own.
        sweep: other guidance scales, at each of which the same captions are drawn again.
        upsample: whether pictures go through the upsamplers, or are the decoder's.
        class_pictures: pictures drawn for the name of each class; 0 measures nothing of classes.
        template: what a class's name becomes a caption by.
        seed: of the choice of captions and of the pictures.
        batch_size: pictures computed together; it changes figures by rounding alone.
    """

    features: str = "own-clip"
    num: int = 100
    guidance_scale: float | None = None
    sweep: tuple[float, ...] = ()
    upsample: bool = False
    class_pictures: int = 0
    template: str = "{}"
    seed: int = 0
    batch_size: int = 32

    def __post_init__(self) -> None:
        """Check every field."""
        if checks.count("--num", self.num) <= NEIGHBOURS:
            why = f"precision and recall look at {NEIGHBOURS} neighbours of each picture"
            raise wrong("--num", self.num, f"at least {NEIGHBOURS + 1}", why)
        checks.count("--batch_size", self.batch_size)
        checks.count("--class_pictures", self.class_pictures, 0)
        if self.template.count("{}") != 1:
            expected = '{} once, where the class\'s name goes, as in "a photo of a {}"'
            raise wrong("--template", self.template, expected)
        sweep = tuple(checks.number("guidance scale", scale) for scale in self.sweep)
        object.__setattr__(self, "sweep", sweep)
        if self.guidance_scale is not None:
            scale = checks.number("guidance scale", self.guidance_scale)
            object.__setattr__(self, "guidance_scale", scale)
        if not 0 <= checks.count("--seed", self.seed, 0) < 2**63:
            raise wrong("--seed", self.seed, f"0 to {2**63 - 1}")


class Grid(NamedTuple):
    """Captioned pictures to show: file name without its ending, title, and cells row by row."""

    name: str
    title: str
    columns: int
    cells: list[tuple[np.ndarray, str]]


class Report(NamedTuple):
    """All that was measured.

    Attributes:
        about: how: model, data, feature network, counts.
        figures: by the part of the model that they judge, then by name; NaN where undefined.
        sweep: a row for each guidance scale, rising.
        subsets: the scores of subsets of the classes, if classes were measured.
        grids: pictures.
    """

    about: dict[str, Any]
    figures: dict[str, Figures]
    sweep: list[Figures]
    subsets: zero_shot.Subsets | None
    grids: list[Grid]


def evaluate(
    model: UnCLIP,
    data: datasets.DataConfig,
    heldout_split: str,
    settings: Settings,
    judge: Part | None = None,
    keep: Path | None = None,
) -> Report:
    """Measure a model. Several processes share the work if each calls it.

    Args:
        model: what to measure; on several devices if it lies on a mesh.
        data: the data set, its split the one whose captions are drawn and whose pictures are the
            reference.
        heldout_split: the split for retrieval, the prior's cosines and zero-shot accuracy.
        settings: the rest.
        judge: the CLIP that measures; None for the model's own.
        keep: a folder of drawn batches: those in it are not drawn again, new ones go into it.

    Raises:
        UserError: a model without CLIP or prior, no such data or feature network, or too little
            data.
    """
    measurer = _measurer(model, settings, judge)
    key, stage = jax.random.key(settings.seed), model.decoder.stage
    scale = stage.guidance_scale if settings.guidance_scale is None else settings.guidance_scale
    size = model.image_size if settings.upsample else stage.image_size
    heldout_data = dataclasses.replace(
        data, split=heldout_split, labels=settings.class_pictures > 0, **_seen_by(measurer.judge)
    )
    heldout, real = _read(measurer, heldout_data, dataclasses.replace(data, image_size=size))
    kept = Kept(keep, keep and [model.identity(), measurer.about(), settings, real.about()])
    measurer = dataclasses.replace(measurer, kept=kept)
    chosen, reference, disjoint = choose(len(real.index), settings.num, settings.seed)

    held_t, z_t = (measurer.read_captions(part.captions) for part in (heldout, real))
    held_told, told = (measurer.captions_alike(part.captions) for part in (heldout, real))
    _warn_of_repeats(heldout.source.name, len(held_told), len(set(held_told)))
    _warn_of_repeats(real.source.name, len(told), len(set(told)))
    figures = {"clip": clip_figures(heldout.vectors.z_i, held_t, heldout.alike, held_told)}
    if model.prior is not None:
        figures["prior"] = _prior_figures(measurer, judge, heldout, heldout_data, key)

    captions = [real.captions[i] for i in chosen]
    drawn = _draw(measurer, captions, {scale, *settings.sweep}, settings, key)
    figures["decoder"] = own_caption(
        drawn[scale][0].z_i,
        real.vectors.z_i[chosen],
        np.concatenate([z_t, held_t]),
        chosen,
        captions=told + held_told,
        pictures=[real.alike[i] for i in chosen],
    )
    captioned = functools.partial(dataclasses.replace, z_t=z_t[chosen])
    others = with_moments(real.vectors.rows(reference))
    own = captioned(with_moments(real.vectors.rows(chosen)))
    rows = {each: picture_figures(captioned(one), others) for each, (one, _) in drawn.items()}
    floor = picture_figures(own, others, disjoint)
    figures["pictures"] = rows[scale] | {f"real_{name}": value for name, value in floor.items()}
    sweep = [{"guidance_scale": each} | row for each, row in rows.items()]
    pictures = {each: shown for each, (_, shown) in drawn.items()}
    grids = _grids(real, chosen, captions, pictures, scale)

    subsets = None
    if settings.class_pictures:
        figures["classes"], subsets, grid = _classes(measurer, heldout, settings, key, scale)
        grids.append(grid)
    own_clip, sets = judge is None, (chosen, reference, disjoint)
    about = _about(data, heldout_split, own_clip, scale, sets, settings, measurer, real)
    if distributed.is_lead():
        kept.forget()
    return Report(about, figures, sweep if settings.sweep else [], subsets, grids)


def _about(
    data: datasets.DataConfig,
    heldout_split: str,
    own_clip: bool,
    scale: float,
    sets: tuple[np.ndarray, np.ndarray, bool],
    settings: Settings,
    measurer: Measurer,
    real: Real,
) -> dict[str, Any]:
    """How it was measured."""
    chosen, reference, disjoint = sets
    return {
        "data": data.name,
        "split": data.split,
        "heldout_split": heldout_split,
        "clip": "own" if own_clip else "another",
        "guidance_scale": scale,
        "pictures": len(chosen),
        "reference_pictures": len(reference),
        "reference": "the other pictures" if disjoint else "all pictures",
        "seed": settings.seed,
        "clip_fingerprint": clip_fingerprint(measurer.judge),
        "features": measurer.network.name,
        "feature_dims": real.vectors.features.shape[1],
        "pixels": real.image_size,
    }


def _read(
    measurer: Measurer, heldout: datasets.DataConfig, real: datasets.DataConfig
) -> tuple[Real, Real]:
    """The held-out pictures, seen by CLIP alone, and those that generated ones are beside."""
    datasets.load(real)  # a split that is not there is told before anything is measured
    by_clip = dataclasses.replace(measurer, network=measurer.clip)
    found = by_clip.read(heldout, "heldout_split")
    if heldout.labels:
        _check_classes(found.source)
    return found, measurer.read(real)


def _check_classes(source: Source) -> None:
    """Raise UserError unless there are classes to tell apart."""
    if (count := len(set(source.classes))) < 2:
        expected = "expected at least 2; leave it out"
        raise UserError(f"--class_pictures: {source.name} has {count} class, {expected}")


def _measurer(model: UnCLIP, settings: Settings, judge: Part | None) -> Measurer:
    if "z_i" in model.decoder.stage.conditions and model.prior is None:
        raise UserError("--model: has no prior, so it draws no captions; train one, or add it")
    judge = judge or model.clip
    if judge is None:
        raise UserError(
            "--model: has no CLIP, by which its pictures would be measured; name one with --clip"
        )
    if model.mesh is not None:
        where = sharding.tree_shardings(judge.params, model.mesh)
        judge = judge._replace(params=host_memory.place(judge.params, where))
    clip = of_clip(judge, model.mesh)
    return Measurer(model, judge, clip, load(settings.features, clip), settings.batch_size)


def _seen_by(clip: Part) -> dict[str, Any]:
    """The settings of data whose pictures are as a CLIP sees them."""
    return {"image_size": clip.stage.image_size, "fit": clip.stage.model.fit}


def choose(total: int, num: int, seed: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """Which rows of a split are drawn, which are the reference, and whether none is both.

    The reference is every row that is not drawn; where those are fewer than the drawn ones, every
    row. UserError if there are too few for precision and recall.
    """
    if total <= NEIGHBOURS:
        expected = f"at least {NEIGHBOURS + 1} pictures in this split"
        raise wrong("--data", total, expected, "use more data or another --split")
    chosen = np.sort(np.random.default_rng(seed).permutation(total)[:num])
    others = np.setdiff1d(np.arange(total), chosen)
    disjoint = len(others) >= len(chosen)
    return chosen, others if disjoint else np.arange(total), disjoint


def picture_figures(drawn: Vectors, real: Vectors, disjoint: bool = True) -> Figures:
    """All that `metrics` says of pictures, and of them beside real ones.

    Distances to a set that these are part of would say nothing, and are NaN: `disjoint` False.
    """
    alone, beside = {}, {}
    for judge in metrics.found("judge"):
        alone |= judge(drawn)
    for compare in metrics.found("compare"):
        beside |= compare(drawn, real)
    return alone | (beside if disjoint else dict.fromkeys(beside, math.nan))


def _warn_of_repeats(name: str, pictures: int, captions: int) -> None:
    if captions < pictures:
        logging.warning(
            "%s: %d pictures have %d different captions; ranks and chances are over those",
            name,
            pictures,
            captions,
        )


def clip_figures(
    z_i: np.ndarray, z_t: np.ndarray, pictures: Told = None, captions: Told = None
) -> Figures:
    """Retrieval among n pairs [n, e], and how many principal components hold 99 % of z_i."""
    return image_text_retrieval(z_i, z_t, pictures, captions) | {"rank_99": float(pca.rank(z_i))}


def _draw(
    measurer: Measurer, captions: list[str], scales: set[float], settings: Settings, key: jax.Array
) -> dict[float, tuple[Vectors, np.ndarray]]:
    """At every guidance scale, rising: vectors of all pictures, and those that are shown."""
    drawn = {}
    for each in sorted(scales):
        vectors, shown = measurer.draw(
            jax.random.fold_in(key, CAPTIONS),
            captions,
            guidance_scale=each,
            upsample=settings.upsample,
            shown=SHOWN,
            name=f"pictures, guidance {each:g}",
        )
        drawn[each] = with_moments(vectors), shown
    return drawn


def _prior_figures(
    measurer: Measurer,
    judge: Part | None,
    heldout: Real,
    heldout_data: datasets.DataConfig,
    key: jax.Array,
) -> Figures:
    """Cosines of sampled z_i with those of held-out pairs."""
    if judge is not None:  # the prior speaks the language of its own CLIP, whoever measures
        own = measurer.model.clip
        measurer = measurer.by(own)
        heldout = measurer.read(dataclasses.replace(heldout_data, **_seen_by(own)))
    drawn = measurer.sample_prior(jax.random.fold_in(key, PRIOR), heldout.captions)
    z_t = measurer.read_captions(heldout.captions)
    captions = measurer.captions_alike(heldout.captions)
    return prior_cosines(drawn, heldout.vectors.z_i, z_t, captions)


def _classes(
    measurer: Measurer, heldout: Real, settings: Settings, key: jax.Array, scale: float
) -> tuple[Figures, zero_shot.Subsets, Grid]:
    """Zero-shot accuracy on labelled pictures, and what generated ones say of it.

    Classes of one name are one class: no text could tell them apart.
    """
    names, each = list(dict.fromkeys(heldout.source.classes)), settings.class_pictures
    texts = [settings.template.replace("{}", name) for name in names]
    true = np.array([names.index(name) for name in heldout.source.classes])[heldout.labels]
    labels = np.repeat(np.arange(len(names)), each)
    generated, pictures = measurer.draw(
        jax.random.fold_in(key, CLASSES),
        [texts[i] for i in labels],
        guidance_scale=scale,
        upsample=settings.upsample,
        shown=len(labels),
        name="pictures of classes",
    )
    z_t = measurer.read_captions(texts)
    made, found = (generated.z_i, labels), (heldout.vectors.z_i, true)
    subsets = zero_shot.over_subsets(made, found, z_t, seed=settings.seed)
    figures = {
        "zero_shot_accuracy": zero_shot.accuracy(*found, z_t),
        "chance": 1 / len(names),
        "own_class": zero_shot.accuracy(*made, z_t),
        "direction": zero_shot.direction(zero_shot.class_means(*made, len(names)), z_t),
        "classes": float(len(names)),
        "subsets": float(len(subsets.accuracy)),
    }
    for score in ("own_class", "direction"):
        related = zero_shot.correlation(getattr(subsets, score), subsets.accuracy)
        figures |= {f"{score}_{name}": value for name, value in related.items()}
    columns = min(each, 8)
    cells = [(pictures[i * each + j], text) for i, text in enumerate(texts) for j in range(columns)]
    return figures, subsets, Grid("classes", "Drawn for the names of classes", columns, cells)


def _grids(
    real: Real,
    chosen: np.ndarray,
    captions: list[str],
    pictures: dict[float, np.ndarray],
    scale: float,
) -> list[Grid]:
    """Generated beside real pictures, and the same captions at every guidance scale."""
    truth = real.pictures(chosen[:SHOWN])
    rows = zip(truth, pictures[scale], captions, strict=False)
    pairs = [(np.concatenate([image, drawn], axis=1), caption) for image, drawn, caption in rows]
    grids = [Grid("generated", "Real pictures, and generated from their captions", 4, pairs)]
    if len(pictures) > 1:
        cells = [
            (drawn[i], f"{caption}, guidance {each:g}")
            for i, caption in enumerate(captions[:SHOWN_CAPTIONS])
            for each, drawn in pictures.items()
        ]
        grids.append(Grid("sweep_pictures", "Guidance scales", len(pictures), cells))
    return grids
