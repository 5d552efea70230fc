"""Keeping a predicted x_0 in the range of the data: static clipping and dynamic thresholding."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def threshold(
    x_0: jax.Array, clip_x_0: float, dynamic_percentile: float, dynamic_most: float = 0.0
) -> jax.Array:
    """Keep a predicted x_0 in the range of the data.

    Args:
        x_0: `[b, ...]`.
        clip_x_0: the data lies in [-clip_x_0, clip_x_0]; 0 for no static clipping.
        dynamic_percentile: Imagen's dynamic thresholding (arXiv 2205.11487, section 2.3), in
            percent: each example is clipped at that percentile s of its own |x_0| and scaled
            back by s wherever s exceeds the range (`clip_x_0`, or 1 if that is 0); 0 for off.
        dynamic_most: the largest s; 0 for no limit.
    """
    if dynamic_percentile:
        bound = clip_x_0 or 1.0
        size = jnp.percentile(jnp.abs(x_0).reshape(x_0.shape[0], -1), dynamic_percentile, axis=1)
        size = jnp.clip(size, bound, dynamic_most or None).reshape((-1,) + (1,) * (x_0.ndim - 1))
        return jnp.clip(x_0, -size, size) * (bound / size)
    return jnp.clip(x_0, -clip_x_0, clip_x_0) if clip_x_0 else x_0
