"""Retrieval by CLIP: whether pictures, drawn ones too, and captions find each other."""

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
    own = np.arange(len(z_i))
    found = {"image_to_text": ranks(z_i, z_t, own), "text_to_image": ranks(z_t, z_i, own)}
    return _figures(found, len(z_i)) | {"pairs": float(len(z_i))}


def own_caption(
    generated: np.ndarray, real: np.ndarray, z_t: np.ndarray, own: np.ndarray
) -> dict[str, float]:
    """How many pictures have their own caption as the nearest of all captions.

    Args:
        generated: z_i of generated pictures [n, e].
        real: z_i of the true pictures of the same captions [n, e].
        z_t: embeddings of all captions [c, e].
        own: [n] index of each picture's caption.

    Returns:
        `generated_r1`, `generated_r5`, the same for `real`, beside chance.
    """
    found = {"generated": ranks(generated, z_t, own), "real": ranks(real, z_t, own)}
    return _figures(found, len(z_t)) | {"pictures": float(len(own)), "captions": float(len(z_t))}


def _figures(found: dict[str, np.ndarray], candidates: int) -> dict[str, float]:
    """R@1 and R@5 of ranks by name, and what chance would find among so many candidates."""
    figures = {f"{name}_r{k}": recall(rank, k) for name, rank in found.items() for k in (1, 5)}
    return figures | {f"chance_r{k}": min(k, candidates) / candidates for k in (1, 5)}
