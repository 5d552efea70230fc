"""AdamW as the paper trains with it: what is decayed, what never moves, and the learning rate."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from unclip_jax.checkpoint import TRAINED
from unclip_jax.train_config import TrainConfig

Params = dict[str, Any]

# The leaves that weight decay shrinks: matrices. Biases, norms' scales, positions, learned tokens
# and temperatures go by other names (a Linen bias may have two axes, so its rank does not tell).
DECAYED = ("kernel", "embedding", "lora_a", "lora_b")


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """The learning rate of the step that makes step n into n + 1.

    It rises linearly over the first `warmup_steps`, the last of which has the full rate, then
    stays ("constant") or falls to zero at `steps` along half a cosine ("cosine").
    """

    def schedule(step: jax.Array) -> jax.Array:
        n = jnp.asarray(step, jnp.float32)
        rate = jnp.minimum(1.0, (n + 1.0) / max(1, config.warmup_steps))
        if config.schedule == "cosine":
            progress = (n - config.warmup_steps) / (config.steps - config.warmup_steps)
            rate = rate * 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))
        return config.learning_rate * rate

    return schedule


def decay_mask(params: Params) -> Params:
    """True for the leaves that weight decay shrinks: kernels and token embeddings."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.ndim >= 2 and path[-1].key in DECAYED, params
    )


def trained(params: Params) -> Params:
    """The entries of the params that training moves; all others are constant.

    Only these have gradients, optimizer state and averages.
    """
    return {TRAINED: params[TRAINED]}


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019), after clipping the gradient's global norm.

    Weight decay is decoupled and multiplied by the learning rate, and acts on `decay_mask` only.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.grad_clip) if config.grad_clip else optax.identity(),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=jnp.float32),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(learning_rate(config)),
    )
