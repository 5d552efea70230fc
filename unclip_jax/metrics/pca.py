"""Principal components of CLIP embeddings, from one pass over any number of shards.

What the components need of the data is its `Moments`, so that a data set may be read in chunks, in
any order, by any number of hosts:

    total = functools.reduce(Moments.merge, map(Moments.of, chunks))
    components = fit(total)

All of it is NumPy in float64. The spectrum of CLIP embeddings spans many decades (319 of the
paper's 1024 dimensions hold nearly all variance), and a sum in float32 loses whatever is 2^24
times smaller than its total: after a few million embeddings the tail would be rounding errors.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from unclip_jax.errors import UserError, wrong
from unclip_jax.metrics.vectors import Moments


@dataclasses.dataclass(frozen=True, eq=False)
class PCA:
    """Principal components of vectors of e dimensions, by falling variance.

    Attributes:
        mean: [e] float64.
        eigenvalues: [e] float64, the variance along each component, falling.
        components: [e, e] float64, orthonormal rows; the largest entry of each is positive.
    """

    mean: np.ndarray
    eigenvalues: np.ndarray
    components: np.ndarray

    def kept(self, dims: int) -> float:
        """The fraction of the variance that the first `dims` components hold."""
        return float(self.eigenvalues[:dims].sum() / self.eigenvalues.sum())

    def rank(self, fraction: float = 0.99) -> int:
        """The smallest number of components that hold `fraction` of the variance."""
        cumulated = np.cumsum(self.eigenvalues)
        return int(np.searchsorted(cumulated, fraction * cumulated[-1])) + 1

    def project(self, z: np.ndarray, dims: int) -> np.ndarray:
        """Coordinates [n, dims] of z [n, e] along the first `dims` components."""
        return (np.asarray(z, np.float64) - self.mean[None]) @ self.components[:dims].T

    def reconstruct(self, coordinates: np.ndarray) -> np.ndarray:
        """The vectors [n, e] of coordinates [n, dims]; what lies outside of `dims` is lost."""
        return self.mean[None] + coordinates @ self.components[: coordinates.shape[1]]


def fit(moments: Moments) -> PCA:
    """The principal components of all that went into `moments`.

    Raises:
        UserError: fewer than two vectors, or vectors that are all the same.
    """
    if moments.count < 2:
        expected = "at least 2 for principal components"
        raise wrong("embeddings", moments.count, expected, "use a larger data set")
    if not moments.varies:
        raise UserError(
            f"embeddings: all {moments.count} are the same; the CLIP has collapsed: train it"
            " longer or with a lower learning rate"
        )
    eigenvalues, columns = np.linalg.eigh(moments.scatter / (moments.count - 1))
    components = columns.T[::-1]
    largest = np.abs(components).argmax(axis=1)
    signs = np.sign(np.take_along_axis(components, largest[:, None], axis=1))
    return PCA(moments.mean, np.maximum(eigenvalues[::-1], 0.0), components * signs)


def rank(z: np.ndarray, fraction: float = 0.99) -> int:
    """How many principal components of z [n, e] hold `fraction` of its variance; below n.

    The paper's measure of CLIP's embedding space, which training with SAM lowers (section 2.2).
    It is 0 where all embeddings are the same.
    """
    moments = Moments.of(z)
    return fit(moments).rank(fraction) if moments.varies else 0
