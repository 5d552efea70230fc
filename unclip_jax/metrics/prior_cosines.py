"""Whether the prior listens to its caption: cosines against held-out pairs."""

from __future__ import annotations

import numpy as np

from unclip_jax.metrics.vectors import unit


def prior_cosines(z_hat: np.ndarray, z_i: np.ndarray, z_t: np.ndarray) -> dict[str, float]:
    """Mean cosines of sampled embeddings with the true ones of the same and of other captions.

    Args:
        z_hat: sampled from the captions [n, e].
        z_i: the captions' true image embeddings [n, e].
        z_t: the captions' text embeddings [n, e].

    Returns:
        `cosine_z_i`: with the own picture. `cosine_z_i_shuffled`: the mean over every other
        pair's picture, which is what random shuffling estimates; a prior that ignores its caption
        has the same figure in both. `cosine_z_t`: with the own caption.
    """
    z_hat, z_i, z_t = unit(z_hat), unit(z_i), unit(z_t)
    n = len(z_hat)
    scores = z_hat @ z_i.T
    own = np.trace(scores)
    others = float((scores.sum() - own) / (n * (n - 1))) if n > 1 else float("nan")
    return {
        "cosine_z_i": float(own / n),
        "cosine_z_i_shuffled": others,
        "cosine_z_t": float(np.mean(np.sum(z_hat * z_t, axis=-1))),
    }
