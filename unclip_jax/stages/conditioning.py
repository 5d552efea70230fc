"""Captions as conditioning, and how training drops them for classifier-free guidance.

A condition is a dict of arrays with one row per example, so that guidance can stack the
condition on its null along the batch axis. Dropping never changes a shape: a dropped caption has
a mask that is False everywhere, a dropped embedding a mask bit or zeros.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from unclip_jax import samplers

Condition = dict[str, jax.Array]
Params = dict[str, Any]


def text_mask(tokens: jax.Array, vocab_size: int) -> jax.Array:
    """True through the first end-of-text token (id vocab_size - 1): [b, l] int32 -> [b, l] bool."""
    is_end = (tokens == vocab_size - 1).astype(jnp.int32)
    return jnp.cumsum(is_end, axis=1) - is_end == 0


def keep(key: jax.Array, batch: int, drop: float) -> jax.Array:
    """One bit per example [b], False with probability `drop`."""
    return jax.random.bernoulli(key, 1.0 - drop, (batch,))


def random_timesteps(key: jax.Array, batch: int, steps: int) -> jax.Array:
    """Uniform timesteps [b] int32 in 0..steps-1."""
    return jax.random.randint(key, (batch,), 0, steps)


def initial_noise(keys: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Each example's x_T [b, *shape], and the keys [b] that are left for the sampler's steps."""
    pairs = jax.vmap(jax.random.split)(keys)
    return samplers.normal(pairs[:, 0], shape), pairs[:, 1]
