"""Precision and recall of generated pictures, as fractions inside estimated manifolds.

Kynkäänniemi et al. 2019 (arXiv 1904.06991): a set's manifold is the union of balls around its
vectors, each as large as the distance to the k-th nearest other one. Precision asks how many
generated vectors lie on the real manifold, recall how many real ones lie on the generated one.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from unclip_jax.errors import wrong
from unclip_jax.metrics.vectors import Vectors

NEIGHBOURS = 3
_BLOCK = 1024  # rows compared at a time


def precision_recall(
    real: np.ndarray, generated: np.ndarray, neighbours: int = NEIGHBOURS
) -> dict[str, float]:
    """Both figures of n and m feature vectors [., d]; memory grows with n and m, not with n m.

    Returns:
        `precision`: the fraction of generated vectors in any real vector's ball.
        `recall`: the fraction of real vectors in any generated vector's ball.

    Raises:
        UserError: a set without so many neighbours.
    """
    for name, features in (("real", real), ("generated", generated)):
        if len(features) <= neighbours:
            expected = f"at least {neighbours + 1}, to have {neighbours} neighbours each"
            raise wrong(f"{name} pictures", len(features), expected, "raise --num or use more data")
    centre = np.mean(real, axis=0, dtype=np.float64, keepdims=True)  # distances round less there
    real, generated = np.float64(real) - centre, np.float64(generated) - centre
    return {
        "precision": _covered(generated, real, _squared_radii(real, neighbours)),
        "recall": _covered(real, generated, _squared_radii(generated, neighbours)),
    }


def compare(drawn: Vectors, real: Vectors) -> dict[str, float]:
    """Of two sets of pictures' features."""
    return precision_recall(real.features, drawn.features)


def _squared_distances(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks [., m] of squared distances between rows of a and all of b, each with its start."""
    lengths = np.sum(b**2, axis=1)
    for start in range(0, len(a), _BLOCK):
        rows = a[start : start + _BLOCK]
        squared = np.sum(rows**2, axis=1, keepdims=True) + lengths[None] - 2.0 * rows @ b.T
        yield start, np.maximum(squared, 0.0)


def _squared_radii(manifold: np.ndarray, neighbours: int) -> np.ndarray:
    """Squared distance [n] of every vector to its k-th nearest other one."""
    radii = np.empty(len(manifold))
    for start, squared in _squared_distances(manifold, manifold):
        rows = np.arange(len(squared))
        squared[rows, start + rows] = np.inf  # no neighbour of itself
        radii[start : start + len(rows)] = np.partition(squared, neighbours - 1)[:, neighbours - 1]
    return radii


def _covered(points: np.ndarray, manifold: np.ndarray, squared_radii: np.ndarray) -> float:
    inside = [
        (squared <= squared_radii[None]).any(axis=1)
        for _, squared in _squared_distances(points, manifold)
    ]
    return float(np.mean(np.concatenate(inside)))
