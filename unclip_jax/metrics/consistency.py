"""Whether generated pictures show their captions, judged by the model's own CLIP."""

from __future__ import annotations

import numpy as np

from unclip_jax.metrics.retrieval import ranks, recall


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
    figures = {}
    for name, z_i in (("generated", generated), ("real", real)):
        rank = ranks(z_i, z_t, own)
        figures |= {f"{name}_r1": recall(rank, 1), f"{name}_r5": recall(rank, 5)}
    return figures | {
        "chance_r1": 1 / len(z_t),
        "chance_r5": min(5, len(z_t)) / len(z_t),
        "pictures": float(len(own)),
        "captions": float(len(z_t)),
    }
