"""Which real pictures drawn ones are like: whether they show what they should, or are copies."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from unclip_jax.metrics.vectors import unit

NEAREST = 5
COPY = 0.01  # mean squared error of pixels from -1 to 1


class Nearest:
    """Which real pictures are the nearest, by cosine of features standardised over all of them.

    Equal pictures are one, whatever they are said to show: France and St. Martin share a flag, and
    nobody could tell which was drawn.
    """

    def __init__(self, features: np.ndarray, shows: np.ndarray, same: np.ndarray) -> None:
        """Standardise the features of every real picture.

        Args:
            features: [n, d].
            shows: [n] what each shows, by number.
            same: [n] a number for each, equal for equal pictures.
        """
        self._mean, self._std = features.mean(axis=0), features.std(axis=0) + 1e-6
        self._real, self._shows, self._same = self._unit(features), shows, same

    def _unit(self, features: np.ndarray) -> np.ndarray:
        return unit((features - self._mean) / self._std)

    def _right(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """For each own picture [q], which of all [q, n] are right: of its concept, or itself."""
        own = self._same == self._same[rows][:, None]
        return {"concept": own | (self._shows == self._shows[rows][:, None]), "own": own}

    def figures(
        self, features: np.ndarray, rows: np.ndarray, hidden: np.ndarray | None = None
    ) -> dict[str, float]:
        """How often the nearest show the own one's concept, or are that very picture.

        Args:
            features: of drawn pictures [q, d].
            rows: [q] each one's own real picture.
            hidden: [q] a real picture that is no candidate for it.

        Returns:
            `concept_top1`, `own_top1`, and the same of the nearest five.
        """
        cosines = self._unit(features) @ self._real.T
        if hidden is not None:
            cosines[self._right(hidden)["own"]] = -np.inf
        return top(cosines, self._right(rows))

    def chance(self, rows: np.ndarray) -> dict[str, float]:
        """The same of real pictures taken at random."""
        return by_chance(self._right(rows))


def top(scores: np.ndarray, right: Mapping[str, np.ndarray]) -> dict[str, float]:
    """How often the candidate with the highest score is right, and one of the highest five.

    Args:
        scores: [q, c] of every candidate for every query.
        right: by name, boolean [q, c]: which candidates are right.

    Returns:
        `NAME_top1` and `NAME_top5` for each name.
    """
    order = np.argsort(-scores, axis=1, kind="stable")[:, :NEAREST]
    found = {}
    for name, wanted in right.items():
        hit = np.take_along_axis(wanted, order, axis=1)
        found[f"{name}_top1"] = float(hit[:, 0].mean())
        found[f"{name}_top{NEAREST}"] = float(hit.any(axis=1).mean())
    return found


def by_chance(right: Mapping[str, np.ndarray]) -> dict[str, float]:
    """What `top` would be of scores at random."""
    found = {}
    for name, wanted in right.items():
        total, counts = wanted.shape[1], wanted.sum(axis=1).tolist()
        for k in (1, NEAREST):
            missed = [math.comb(total - n, k) / math.comb(total, k) for n in counts]
            found[f"{name}_top{k}"] = 1 - float(np.mean(missed))
    return found


def errors(images: np.ndarray, others: np.ndarray, block: int = 512) -> np.ndarray:
    """Mean squared errors [n, m] of pictures with others, by pixels from -1 to 1.

    Args:
        images: uint8 [n, h, w, 3].
        others: uint8 [m, h, w, 3].
        block: others that are in float32 at a time.
    """
    a = images.reshape(len(images), -1).astype(np.float32) / 127.5 - 1
    found = []
    for start in range(0, len(others), block):
        b = others[start : start + block].reshape(-1, a.shape[1]).astype(np.float32) / 127.5 - 1
        squares = (a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1)[None]
        found.append(np.maximum(squares - 2 * a @ b.T, 0) / a.shape[1])
    return np.concatenate(found, axis=1)


def copies(
    images: np.ndarray, real: np.ndarray, train: np.ndarray, same: np.ndarray
) -> dict[str, float]:
    """How many drawn pictures are copies of training pictures, and how many real ones of others.

    Args:
        images: drawn, uint8 [n, h, w, 3].
        real: the true pictures of the same captions, uint8 [n, h, w, 3].
        train: those of training, uint8 [m, h, w, 3].
        same: [n, m], whether the real one is that of training, which it is no copy of.

    Returns:
        `drawn`, `real`, and medians of the distance to the nearest, `drawn_nearest`,
        `real_nearest`; `drawn_own`, how many are copies of the true picture.
    """
    found = {}
    for name, pictures in (("drawn", images), ("real", real)):
        distance = errors(pictures, train)
        nearest = np.where(same & (name == "real"), np.inf, distance).min(axis=1)
        found[name] = float(np.mean(nearest < COPY))
        found[f"{name}_nearest"] = float(np.median(nearest))
    own = ((images.astype(np.float32) - real) / 127.5) ** 2
    return found | {"drawn_own": float(np.mean(own.mean(axis=(1, 2, 3)) < COPY))}
