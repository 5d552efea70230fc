"""AdamW as the paper trains with it, or Muon: what is decayed, what never moves, and the rate."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from unclip_jax.common.params import TRAINED
from unclip_jax.training.config import TrainConfig
from unclip_jax.training.muon import matrix_axes, scale_by_muon

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
    """AdamW (Loshchilov and Hutter 2019) or Muon, after clipping the gradient's global norm.

    Weight decay is decoupled and multiplied by the learning rate, and acts on `decay_mask` only.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.grad_clip) if config.grad_clip else optax.identity(),
        _muon(config) if config.optimizer == "muon" else _adam(config),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(learning_rate(config)),
    )


def _adam(config: TrainConfig) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=jnp.float32)
    return adam if config.moment_dtype == "float32" else moments_in(config.moment_dtype, adam)


def _muon(config: TrainConfig) -> optax.GradientTransformation:
    """Muon for matrices, and Adam for everything else."""

    def labels(params: Params) -> Params:
        found = matrix_axes(params)
        return jax.tree.map(lambda _, axes: "adam" if axes is None else "muon", params, found)

    return optax.partition(
        {"muon": scale_by_muon(config.muon_momentum), "adam": _adam(config)}, labels
    )


def stored(key: jax.Array, tree: Any, dtype: str) -> Any:
    """A tree of float32 arrays as it is kept: itself, or rounded to "bfloat16".

    The rounding is stochastic. An average moves by a thousandth of what it lacks, and bfloat16 has
    steps of a 256th: rounded to the nearest, it would never move at all.
    """
    if dtype == "float32":
        return tree
    leaves, structure = jax.tree.flatten(tree)
    keys = (jax.random.fold_in(key, i) for i in range(len(leaves)))
    return structure.unflatten(map(round_stochastically, keys, leaves))


def round_stochastically(key: jax.Array, x: jax.Array) -> jax.Array:
    """float32 to bfloat16, up or down at random, such that the mean is the float32.

    Sixteen random bits are added below bfloat16's last bit, and what lies there is cut off. What
    is not finite stays as it is.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    cut = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), cut, x.astype(jnp.bfloat16))


class _Moments(NamedTuple):
    """Adam's state with its moments in a narrow dtype."""

    count: jax.Array
    mu: Params
    nu: Params


def moments_in(dtype: str, adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """`adam`, computing in float32 and keeping its moments in `dtype`."""

    def init(params: Params) -> _Moments:
        state = adam.init(params)
        narrow = jax.tree.map(lambda m: m.astype(dtype), (state.mu, state.nu))
        return _Moments(state.count, *narrow)

    def update(updates: Params, state: _Moments, params: Params | None = None) -> tuple:
        wide = jax.tree.map(lambda m: m.astype(jnp.float32), (state.mu, state.nu))
        whole = optax.ScaleByAdamState(state.count, *wide)
        updates, whole = adam.update(updates, whole, params)
        narrow = stored(jax.random.key(whole.count), (whole.mu, whole.nu), dtype)
        return updates, _Moments(whole.count, *narrow)

    return optax.GradientTransformation(init, update)
