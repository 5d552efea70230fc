"""The exponential moving average (EMA) of what is trained, which samples and model folders use."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from unclip_jax.common.params import Params
from unclip_jax.training.config import TrainConfig


def decay(config: TrainConfig, step: jax.Array) -> jax.Array:
    """How much of the average a step keeps, float32 scalar.

    With `ema_warmup` it is (1 + step) / (10 + step) until that reaches `ema_decay`, so that the
    random params of the beginning are soon forgotten.
    """
    full = jnp.float32(config.ema_decay)
    n = step.astype(jnp.float32)
    return jnp.minimum(full, (1.0 + n) / (10.0 + n)) if config.ema_warmup else full


def average(averaged: Params, params: Params, decay: jax.Array) -> Params:
    """decay * averaged + (1 - decay) * params in float32, exact where the two are equal."""
    return jax.tree.map(
        lambda a, p: a + (1.0 - decay) * (p.astype(jnp.float32) - a), averaged, params
    )
