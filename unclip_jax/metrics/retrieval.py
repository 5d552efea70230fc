"""Retrieval by CLIP: whether pictures and captions find each other."""

from __future__ import annotations

import numpy as np

_BLOCK = 1024  # queries compared at a time


def ranks(queries: np.ndarray, candidates: np.ndarray, own: np.ndarray) -> np.ndarray:
    """How many candidates come before each query's own one, by dot product.

    A candidate as near as the own one counts as before it, so that a collapsed embedding scores
    the worst rank and not the best.

    Args:
        queries: [q, e].
        candidates: [c, e].
        own: [q] index of each query's own candidate.

    Returns:
        int [q], 0 for a query whose own candidate is strictly the nearest.
    """
    queries, candidates = (np.asarray(z, np.float32) for z in (queries, candidates))
    found = []
    for start in range(0, len(queries), _BLOCK):
        rows = slice(start, start + _BLOCK)
        scores = queries[rows] @ candidates.T
        own_scores = np.take_along_axis(scores, own[rows, None], axis=1)
        found.append(np.sum(scores >= own_scores, axis=1) - 1)
    return np.concatenate(found)


def recall(rank: np.ndarray, k: int) -> float:
    """R@k: the fraction of queries whose own candidate is among the k nearest."""
    return float(np.mean(rank < k))


def image_text_retrieval(z_i: np.ndarray, z_t: np.ndarray) -> dict[str, float]:
    """R@1 and R@5 in both directions for n pairs, beside chance.

    Args:
        z_i: image embeddings [n, e].
        z_t: text embeddings [n, e]; row i belongs to row i of z_i.
    """
    n = len(z_i)
    own = np.arange(n)
    to_text, to_image = ranks(z_i, z_t, own), ranks(z_t, z_i, own)
    return {
        "image_to_text_r1": recall(to_text, 1),
        "image_to_text_r5": recall(to_text, 5),
        "text_to_image_r1": recall(to_image, 1),
        "text_to_image_r5": recall(to_image, 5),
        "chance_r1": 1 / n,
        "chance_r5": min(5, n) / n,
        "pairs": float(n),
    }
