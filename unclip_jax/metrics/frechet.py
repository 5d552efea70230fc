"""The Fréchet distance between two sets of feature vectors, each taken for a Gaussian.

    d^2 = |m_1 - m_2|^2 + tr C_1 + tr C_2 - 2 tr (C_1 C_2)^(1/2)

(Dowson and Landau 1982; as a figure of generators Heusel et al. 2017, arXiv 1706.08500). With
C_1 = A A^T and C_2 = B B^T the last trace is the sum of the singular values of A^T B. A and B come
from eigenvectors of symmetric matrices, so that nothing complex or singular arises, whatever the
ranks; for a set beside itself the distance is zero to rounding.
"""

from __future__ import annotations

import numpy as np

from unclip_jax.errors import wrong
from unclip_jax.metrics.vectors import Moments, Vectors


def compare(drawn: Vectors, real: Vectors) -> dict[str, float]:
    """The distance between two sets of pictures' features."""
    return {"frechet": frechet(drawn.moments, real.moments)}


def frechet(a: Moments, b: Moments) -> float:
    """The squared Fréchet distance, which is what FID is; covariances divide by n - 1.

    Raises:
        UserError: a set of fewer than two, or features of different widths.
    """
    if a.mean.shape != b.mean.shape:
        widths = len(a.mean), len(b.mean)
        raise wrong("features' widths", widths, "the same", "use one feature network for both")
    roots = [_root(each) for each in (a, b)]
    shared = np.linalg.svd(roots[0].T @ roots[1], compute_uv=False).sum()
    traces = sum(np.sum(root**2) for root in roots)
    return float(np.sum((a.mean - b.mean) ** 2) + traces - 2.0 * shared)


def _root(a: Moments) -> np.ndarray:
    """R [d, r] with R R^T the covariance and r its rank."""
    if a.count < 2:
        raise wrong("feature vectors", a.count, "at least 2 for a covariance", "use more pictures")
    eigenvalues, columns = np.linalg.eigh(a.scatter / (a.count - 1))
    # Below this an eigenvalue is the rounding of zero; its root would be far from it.
    kept = eigenvalues > len(eigenvalues) * np.finfo(np.float64).eps * eigenvalues[-1]
    return columns[:, kept] * np.sqrt(eigenvalues[kept])[None]
