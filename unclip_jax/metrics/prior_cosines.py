"""Whether the prior listens to its caption: cosines against held-out pairs."""

from __future__ import annotations

import numpy as np

from unclip_jax.metrics.retrieval import Told, numbered
from unclip_jax.metrics.vectors import unit


def prior_cosines(
    z_hat: np.ndarray, z_i: np.ndarray, z_t: np.ndarray, captions: Told = None
) -> dict[str, float]:
    """Mean cosines of sampled embeddings with the true ones of the same and of other captions.

    Args:
        z_hat: sampled from the captions [n, e].
        z_i: the captions' true image embeddings [n, e].
        z_t: the captions' text embeddings [n, e].
        captions: [n], equal for equal captions; None to go by z_t.

    Returns:
        `cosine_z_i`: with the own picture. `cosine_z_i_shuffled`: the mean over the pictures of all
        other captions, which is what random shuffling estimates; a prior that ignores its caption
        has the same figure in both. `cosine_z_t`: with the own caption.
    """
    number = numbered(captions, z_t)
    z_hat, z_i, z_t = unit(z_hat), unit(z_i), unit(z_t)
    scores = z_hat @ z_i.T
    same = number[:, None] == number[None]
    others = len(same) ** 2 - np.count_nonzero(same)
    shuffled = float((scores.sum() - scores.sum(where=same)) / others) if others else float("nan")
    return {
        "cosine_z_i": float(np.trace(scores) / len(scores)),
        "cosine_z_i_shuffled": shuffled,
        "cosine_z_t": float(np.mean(np.sum(z_hat * z_t, axis=-1))),
    }
