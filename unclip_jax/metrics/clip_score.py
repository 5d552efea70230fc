"""How well pictures fit their captions, by the angle between their CLIP embeddings."""

from __future__ import annotations

import numpy as np

from unclip_jax.metrics.vectors import Vectors, unit


def clip_score(z_i: np.ndarray, z_t: np.ndarray) -> float:
    """The mean of 100 max(cos(z_i, z_t), 0) over n pairs (Hessel et al. 2021, arXiv 2104.08718).

    The article itself weighs the cosine by 2.5; 100 is what most tables show.

    Args:
        z_i: embeddings of pictures [n, e].
        z_t: embeddings of their captions [n, e].
    """
    cosines = np.sum(unit(np.float64(z_i)) * unit(np.float64(z_t)), axis=-1)
    return float(100.0 * np.mean(np.maximum(cosines, 0.0)))


def judge(drawn: Vectors) -> dict[str, float]:
    """The score of pictures and the captions that they were drawn for."""
    return {"clip_score": clip_score(drawn.z_i, drawn.z_t)}
