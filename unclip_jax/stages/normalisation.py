"""The one normalisation of CLIP image embeddings, kept with the weights that need it.

Diffusion wants coordinates of unit variance; CLIP's are far from it. The paper multiplies a
unit embedding by 17.2, Karlo whitens every coordinate with a stored mean and standard deviation.
Both are `(z - mean) / std`. The two vectors live in a stage's params under the key
`normalisation`, which the optimizer leaves alone and a checkpoint carries along.
"""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.errors import UserError
from unclip_jax.metrics.vectors import Gather, Moments, alone, unit

Normalisation = dict[str, jax.Array]

NAMES = ("whiten", "scale", "none")
PAPER_SCALE = 17.2  # section C of the paper's appendix, for unit embeddings of 1024 dimensions


def identity(embed_dim: int) -> Normalisation:
    """The normalisation that changes nothing: mean 0, std 1, both [e] float32."""
    return {"mean": jnp.zeros(embed_dim), "std": jnp.ones(embed_dim)}


def scaling(embed_dim: int, scale: float = PAPER_SCALE) -> Normalisation:
    """The paper's normalisation, z * scale, as mean 0 and std 1 / scale."""
    return {"mean": jnp.zeros(embed_dim), "std": jnp.full(embed_dim, 1.0 / scale)}


def whitening(
    chunks: Iterable[np.ndarray], floor: float = 1e-6, gather: Gather = alone
) -> Normalisation:
    """Mean and standard deviation of every coordinate of all embeddings (Karlo's normalisation).

    One pass over any number of them, in float64, see `metrics.vectors.Moments`.

    Args:
        chunks: the embeddings in parts, each [n, e] with n >= 1.
        floor: what varies less counts as constant.
        gather: where each of several processes has some of the chunks, what brings them together.

    Raises:
        UserError: fewer than two embeddings, or a coordinate that never varies.
    """
    moments = Moments.together(map(Moments.each, chunks), gather)
    count, mean = moments.count, moments.mean
    if count < 2:
        raise UserError(
            f"embeddings: got {count}, expected at least 2 to measure their standard deviation;"
            " use a larger data set"
        )
    std = np.sqrt(moments.scatter / count)
    if np.any(std < floor):
        raise UserError(
            f"embeddings: {int(np.sum(std < floor))} of {len(std)} coordinates never vary;"
            " the CLIP has collapsed: train it longer or with a lower learning rate"
        )
    return {"mean": jnp.asarray(mean, jnp.float32), "std": jnp.asarray(std, jnp.float32)}


def fit(
    name: str, embed_dim: int, chunks: Iterable[np.ndarray], gather: Gather = alone
) -> Normalisation:
    """The normalisation of that name, one of `NAMES`; only "whiten" reads the embeddings."""
    if name == "whiten":
        return whitening(chunks, gather=gather)
    return scaling(embed_dim) if name == "scale" else identity(embed_dim)


def normalise(stats: Normalisation, z: jax.Array) -> jax.Array:
    """CLIP's coordinates to the network's: z [b, e] -> [b, e]."""
    stats = jax.lax.stop_gradient(stats)
    return (z - stats["mean"][None]) / stats["std"][None]


def denormalise(stats: Normalisation, z: jax.Array) -> jax.Array:
    """The network's coordinates to CLIP's: z [b, e] -> [b, e]."""
    return z * stats["std"][None] + stats["mean"][None]


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Cosine similarity along the last axis: [..., e], [..., e] -> [...]."""
    return jnp.sum(unit(a) * unit(b), axis=-1)
