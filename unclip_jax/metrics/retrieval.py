"""Retrieval by CLIP: whether pictures, drawn ones too, and captions find each other.

Captions that are the same count once, and so do pictures: who has several own candidates has found
one when it finds any, and only what belongs to others can come before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

_BLOCK = 1024  # queries compared at a time

Told = Sequence[Hashable] | np.ndarray | None


def digests(rows: np.ndarray) -> list[bytes]:
    """Sixteen bytes for each row of an array [n, ...], the same for equal rows."""
    return [hashlib.blake2b(np.ascontiguousarray(x), digest_size=16).digest() for x in rows]


def numbered(told: Told, z: np.ndarray) -> np.ndarray:
    """A number from 0 for each of n things, int [n], the same for the same thing.

    Args:
        told: [n], equal for the same; None to go by the embeddings.
        z: their embeddings [n, e]. If all are equal, they have collapsed, and tell nothing.
    """
    if told is None:
        rows = np.unique(z, axis=0, return_inverse=True)[1].reshape(-1)
        return rows if rows.any() else np.arange(len(z))
    seen: dict[Hashable, int] = {}
    told = told.tolist() if isinstance(told, np.ndarray) else told
    return np.array([seen.setdefault(x, len(seen)) for x in told], int)


class Ranks(NamedTuple):
    """The outcome of a search.

    Attributes:
        rank: how many candidates of others come before each query's best own one, int [q].
        own: how many candidates are each query's own, int [q].
        candidates: how many different ones there are.
    """

    rank: np.ndarray
    own: np.ndarray
    candidates: int

    def recall(self, k: int) -> float:
        """R@k: the fraction of queries with an own candidate among the k nearest."""
        return recall(self.rank, k)

    def chance(self, k: int) -> float:
        """What R@k would be if the order were random."""
        n = self.candidates
        if np.all(self.own == 1):
            return min(k, n) / n
        missed = np.ones(len(self.own))
        for i in range(min(k, n)):
            missed *= np.maximum(n - i - self.own, 0) / (n - i)
        return float(np.mean(1.0 - missed))


def search(
    queries: np.ndarray,
    candidates: np.ndarray,
    own: np.ndarray,
    same: Told = None,
    asked: Told = None,
) -> Ranks:
    """Rank candidates by dot product for each query.

    A candidate as near as the own one counts as before it, so that a collapsed embedding scores
    the worst rank and not the best.

    Args:
        queries: [q, e].
        candidates: [c, e].
        own: [q] index of each query's own candidate.
        same: [c], equal for candidates that are the same; None to go by their embeddings.
        asked: [q], equal for queries that are the same, and so have the same own candidates; None
            to go by their embeddings.
    """
    queries, candidates = (np.asarray(z, np.float32) for z in (queries, candidates))
    candidate, query = numbered(same, candidates), numbered(asked, queries)
    kept = candidates[np.unique(candidate, return_index=True)[1]]
    owners, owned = np.unique(np.stack([query, candidate[own]]), axis=1)
    starts = np.searchsorted(owners, np.arange(query.max() + 2))
    counts = np.diff(starts)[query]
    found = []
    for start in range(0, len(queries), _BLOCK):
        rows = slice(start, start + _BLOCK)
        scores = queries[rows] @ kept.T
        belongs = np.zeros(scores.shape, bool)
        columns = [owned[starts[q] : starts[q + 1]] for q in query[rows]]
        belongs[np.repeat(np.arange(len(columns)), counts[rows]), np.concatenate(columns)] = True
        best = np.max(scores, axis=1, where=belongs, initial=-np.inf)
        found.append(np.sum((scores >= best[:, None]) & ~belongs, axis=1))
    return Ranks(np.concatenate(found), counts, len(kept))


def ranks(queries: np.ndarray, candidates: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The ranks of `search`, int [q], every query by itself: 0 where no other is as near."""
    return search(queries, candidates, own, asked=np.arange(len(queries))).rank


def recall(rank: np.ndarray, k: int) -> float:
    """R@k: the fraction of queries that fewer than k candidates of others come before."""
    return float(np.mean(rank < k))


def image_text_retrieval(
    z_i: np.ndarray, z_t: np.ndarray, pictures: Told = None, captions: Told = None
) -> dict[str, float]:
    """R@1 and R@5 in both directions for n pairs, beside chance.

    Args:
        z_i: image embeddings [n, e].
        z_t: text embeddings [n, e]; row i belongs to row i of z_i.
        pictures: [n], equal for equal pictures; None to go by z_i.
        captions: [n], equal for equal captions; None to go by z_t.

    Returns:
        `image_to_text_r1`, `image_to_text_r5` and their `chance_r1`, `chance_r5`; the same for
        `text_to_image`, beside `text_to_image_chance_r1`, `text_to_image_chance_r5`; `pairs`, and
        how many `pictures` and `captions` are different.
    """
    own = np.arange(len(z_i))
    pictures, captions = numbered(pictures, z_i), numbered(captions, z_t)
    to_text = search(z_i, z_t, own, captions, pictures)
    to_image = search(z_t, z_i, own, pictures, captions)
    found = {"image_to_text": to_text, "text_to_image": to_image}
    counts = {"pairs": len(z_i), "pictures": to_image.candidates, "captions": to_text.candidates}
    return (
        _figures(found, to_text)
        | {f"text_to_image_chance_r{k}": to_image.chance(k) for k in (1, 5)}
        | {name: float(count) for name, count in counts.items()}
    )


def own_caption(
    generated: np.ndarray,
    real: np.ndarray,
    z_t: np.ndarray,
    own: np.ndarray,
    captions: Told = None,
    pictures: Told = None,
) -> dict[str, float]:
    """How many pictures have their own caption as the nearest of all captions.

    Args:
        generated: z_i of generated pictures [n, e].
        real: z_i of the true pictures of the same captions [n, e].
        z_t: embeddings of all captions [c, e].
        own: [n] index of each picture's caption.
        captions: [c], equal for equal captions; None to go by z_t.
        pictures: [n], equal for equal true pictures; None to go by `real`.

    Returns:
        `generated_r1`, `generated_r5`, the same for `real`, beside chance.
    """
    captions = numbered(captions, z_t)
    drawn = search(generated, z_t, own, captions, np.arange(len(own)))
    found = {"generated": drawn, "real": search(real, z_t, own, captions, pictures)}
    counts = {"pictures": float(len(own)), "captions": float(drawn.candidates)}
    return _figures(found, drawn) | counts


def _figures(found: dict[str, Ranks], random: Ranks) -> dict[str, float]:
    """R@1 and R@5 by name, and what chance would find in one of them."""
    figures = {f"{name}_r{k}": each.recall(k) for name, each in found.items() for k in (1, 5)}
    return figures | {f"chance_r{k}": random.chance(k) for k in (1, 5)}
