"""CMMD: the maximum mean discrepancy between two sets of CLIP embeddings.

Jayasumana et al. 2023 (arXiv 2401.09603). No Gaussian is assumed, and a few thousand pictures
suffice, where a Fréchet distance would still move with their number.
"""

from __future__ import annotations

import numpy as np

from unclip_jax.metrics.vectors import Vectors, unit

SIGMA = 10.0  # of the Gaussian kernel, for embeddings of length one
SCALE = 1000.0
_BLOCK = 1024  # rows compared at a time


def cmmd(x: np.ndarray, y: np.ndarray) -> float:
    """1000 times the squared MMD of n and m embeddings [., e], whose lengths do not matter.

    The kernel is exp(-|u - v|^2 / (2 sigma^2)) with sigma 10; as in the authors' program the
    means run over all pairs, a vector with itself included, so that the figure is never negative.
    """
    x, y = (unit(np.float64(z)) for z in (x, y))
    return SCALE * (_mean_kernel(x, x) + _mean_kernel(y, y) - 2.0 * _mean_kernel(x, y))


def compare(drawn: Vectors, real: Vectors) -> dict[str, float]:
    """Of two sets of pictures."""
    return {"cmmd": cmmd(drawn.z_i, real.z_i)}


def _mean_kernel(x: np.ndarray, y: np.ndarray) -> float:
    """The kernel's mean over all pairs, less one: what is left would drown in float64's ones."""
    total = 0.0
    for start in range(0, len(x), _BLOCK):
        squared = 2.0 - 2.0 * x[start : start + _BLOCK] @ y.T
        total += np.expm1(-np.maximum(squared, 0.0) / (2.0 * SIGMA**2)).sum()
    return total / (len(x) * len(y))
