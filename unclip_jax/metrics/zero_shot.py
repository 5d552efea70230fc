"""Zero-shot classification, and what pictures generated for class names say about it.

Two scores need no labelled picture, only pictures that the model itself generated for each class's
name: whether a generated picture's nearest text is that of its own class (`own_class`), and
whether two classes' texts differ in the direction in which their generated pictures differ
(`direction`). Whoever trains a CLIP can read from them how well it will classify; `Subsets`
measures how far that is true, as correlations with the accuracy on labelled pictures.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np

from unclip_jax.metrics.retrieval import ranks, recall
from unclip_jax.metrics.vectors import unit


def accuracy(z_i: np.ndarray, labels: np.ndarray, z_t: np.ndarray) -> float:
    """The fraction of pictures whose nearest class text, by cosine, is their own class's.

    Args:
        z_i: embeddings of pictures [n, e].
        labels: [n] each picture's class, 0..k-1.
        z_t: embeddings of the classes' texts [k, e].
    """
    return recall(ranks(unit(z_i), unit(z_t), labels), 1)


def class_means(z_i: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """The mean unit embedding [classes, e] of each class's pictures; every class has one."""
    sums = np.zeros((classes, z_i.shape[1]))
    np.add.at(sums, labels, unit(np.float64(z_i)))
    return sums / np.bincount(labels, minlength=classes)[:, None]


def direction(means: np.ndarray, z_t: np.ndarray) -> float:
    """The mean cosine, over pairs of classes, of their texts' and their pictures' difference.

    cos(z_t[a] - z_t[b], means[a] - means[b]) for a < b; where either difference is zero, and so
    points nowhere, it counts as 0.

    Args:
        means: mean embeddings of each class's pictures [k, e], k >= 2.
        z_t: embeddings of the classes' texts [k, e].
    """
    texts, means = unit(np.float64(z_t)), np.float64(means)
    a, b = np.triu_indices(len(texts), 1)

    def between(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """(x_a - x_b) · (y_a - y_b) for every pair."""
        products = x @ y.T
        own = np.diag(products)
        return own[a] + own[b] - products[a, b] - products[b, a]

    lengths = np.sqrt(np.maximum(between(texts, texts) * between(means, means), 0.0))
    apart = lengths > 1e-12
    return float(np.sum(between(texts, means)[apart] / lengths[apart]) / len(a))


class Subsets(NamedTuple):
    """Both scores and the true accuracy of several subsets of the classes, [s] each."""

    own_class: np.ndarray
    direction: np.ndarray
    accuracy: np.ndarray


def over_subsets(
    generated: tuple[np.ndarray, np.ndarray],
    real: tuple[np.ndarray, np.ndarray],
    z_t: np.ndarray,
    *,
    most: int = 60,
    seed: int = 0,
) -> Subsets:
    """Scores and accuracy of up to `most` different subsets of half of the classes.

    All are of the same size, as fewer classes are easier and would make any two figures rise
    together. Classes of which there is no real picture are in none; fewer than four others have
    no subsets worth comparing, and s is 0.

    Args:
        generated: embeddings of generated pictures [n, e] and their classes [n].
        real: embeddings of labelled pictures [m, e] and their classes [m].
        z_t: embeddings of the classes' texts [k, e].
        most: subsets, drawn at random where there are more.
        seed: of that draw.
    """
    present = np.unique(real[1])
    if len(present) < 4:
        return Subsets(np.zeros(0), np.zeros(0), np.zeros(0))
    means = class_means(*generated, len(z_t))
    rows = []
    for subset in _subsets(present, len(present) // 2, most, seed):
        texts, scores = z_t[subset], []
        for z_i, labels in (generated, real):
            chosen = np.isin(labels, subset)
            scores.append(accuracy(z_i[chosen], np.searchsorted(subset, labels[chosen]), texts))
        rows.append((scores[0], direction(means[subset], texts), scores[1]))
    return Subsets(*np.array(rows).T)


def _subsets(items: np.ndarray, size: int, most: int, seed: int) -> list[np.ndarray]:
    """Different sorted subsets: all of them, or `most` drawn at random."""
    if math.comb(len(items), size) <= most:
        return [np.array(chosen) for chosen in itertools.combinations(items, size)]
    rng = np.random.default_rng(seed)
    found: set[tuple[int, ...]] = set()
    while len(found) < most:
        found.add(tuple(np.sort(rng.choice(items, size, replace=False)).tolist()))
    return [np.array(chosen) for chosen in sorted(found)]


def correlation(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """`pearson` and `spearman` of [s] pairs; NaN where x or y is constant or s is below 2."""
    return {"pearson": _pearson(x, y), "spearman": _pearson(_places(x), _places(y))}


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    if len(x) < 2 or np.ptp(x) == 0.0 or np.ptp(y) == 0.0:
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / math.sqrt((x @ x) * (y @ y)))


def _places(x: np.ndarray) -> np.ndarray:
    """Each value's place in order, from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
