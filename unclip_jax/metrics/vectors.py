"""What metrics look at: vectors of length one, sets of pictures as vectors, and their moments."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np

from unclip_jax.errors import UserError, wrong

Array = TypeVar("Array")

# What every process gives, arrays by name, to all: a list in order of processes.
Gather = Callable[[dict[str, np.ndarray]], list[dict[str, np.ndarray]]]

# What two float32 embeddings that are the same may differ by, as a fraction of their length.
ROUNDING = 1e-7

_CHUNK = 4096  # rows that are in float64 at a time


def alone(arrays: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The `Gather` of a process that is the only one."""
    return [dict(arrays)]


def unit(z: Array) -> Array:
    """Vectors [..., e] of NumPy's or JAX's, each with length one; zeros stay zeros."""
    xp = z.__array_namespace__()
    return z / xp.maximum(xp.linalg.norm(z, axis=-1, keepdims=True), 1e-12)


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """What a set of n vectors contributes to its covariance.

    Two sets' moments merge exactly into those of the union (Chan, Golub and LeVeque 1979). All of
    it is NumPy in float64.

    Attributes:
        count: n.
        mean: [e] float64.
        scatter: float64, the sum over the vectors less their mean: of outer products [e, e], or,
            as `each` makes it, of each coordinate's square [e].
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, z: np.ndarray) -> Moments:
        """The moments of the rows of z [n, e], n >= 1.

        Raises:
            UserError: another shape, or values that are not finite.
        """
        z = np.asarray(z, np.float64)
        if z.ndim != 2 or not z.size:
            raise wrong("embeddings' shape", z.shape, "[n, e] with n >= 1")
        if not np.isfinite(z).all():
            raise UserError("embeddings: some are not finite; check the CLIP they come from")
        mean = z.mean(axis=0)
        centred = z - mean[None]
        return cls(len(z), mean, centred.T @ centred)

    @classmethod
    def each(cls, z: np.ndarray) -> Moments:
        """The moments of every coordinate of z [n, e] by itself, n >= 1."""
        z = np.asarray(z, np.float64)
        return cls(len(z), z.mean(axis=0), len(z) * z.var(axis=0))

    @classmethod
    def together(cls, parts: Iterable[Moments], gather: Gather) -> Moments:
        """The moments of all parts that all processes have, each some."""
        none = cls(0, np.zeros(()), np.zeros(()))
        own = functools.reduce(cls.merge, parts, none)
        told = gather(dataclasses.asdict(own))
        return functools.reduce(cls.merge, (cls(int(t.pop("count")), **t) for t in told), none)

    @property
    def varies(self) -> bool:
        """Whether the vectors differ by more than the rounding of float32."""
        variance = np.trace(self.scatter) / self.count
        return bool(variance > ROUNDING**2 * np.sum(self.mean**2))

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets together."""
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        apart = other.mean - self.mean
        square = np.outer(apart, apart) if self.scatter.ndim == 2 else apart**2
        return Moments(
            count,
            self.mean + apart * (other.count / count),
            self.scatter + other.scatter + square * (self.count * other.count / count),
        )


def moments(features: np.ndarray) -> Moments:
    """`Moments.of` the rows of `features` [n, d], which are in float64 chunk by chunk only.

    Raises:
        UserError: no rows, another shape, or values that are not finite.
    """
    starts = range(0, max(len(features), 1), _CHUNK)
    chunks = (Moments.of(features[start : start + _CHUNK]) for start in starts)
    return functools.reduce(Moments.merge, chunks)


@dataclasses.dataclass(frozen=True, eq=False)
class Vectors:
    """What is kept of n pictures.

    Attributes:
        z_i: CLIP's embeddings [n, e].
        features: of a feature network [n, d].
        z_t: CLIP's embeddings of their captions [n, e], where these matter.
        known: the features' moments, where they were computed in parts.
    """

    z_i: np.ndarray
    features: np.ndarray
    z_t: np.ndarray | None = None
    known: Moments | None = None

    def rows(self, chosen: np.ndarray) -> Vectors:
        """Those of some pictures."""
        z_t = None if self.z_t is None else self.z_t[chosen]
        return Vectors(self.z_i[chosen], self.features[chosen], z_t)

    @functools.cached_property
    def moments(self) -> Moments:
        """Of the features; computed once, if they are not known already."""
        return moments(self.features) if self.known is None else self.known
