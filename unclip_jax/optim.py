"""AdamW as the paper trains with it, or Muon: what is decayed, what never moves, and the rate."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from unclip_jax.axes import STACKED
from unclip_jax.checkpoint import TRAINED
from unclip_jax.train_config import TrainConfig

Params = dict[str, Any]

# The leaves that weight decay shrinks: matrices. Biases, norms' scales, positions, learned tokens
# and temperatures go by other names (a Linen bias may have two axes, so its rank does not tell).
DECAYED = ("kernel", "embedding", "lora_a", "lora_b")

# The kernels that are matrices between features, by the last names on their path and their rank:
# their input axes and their output axes; an axis that is neither counts matrices, as the three of
# "qkv" do. In a scanned stack the layer axis comes before them all.
MATRICES: dict[tuple[str, int], tuple[tuple[int, ...], tuple[int, ...]]] = {
    ("qkv/kernel", 4): ((0,), (2, 3)),
    ("context_kv/kernel", 4): ((0,), (2, 3)),
    ("key_value/kernel", 4): ((0,), (2, 3)),
    ("query/kernel", 3): ((0,), (1, 2)),
    ("out/kernel", 3): ((0, 1), (2,)),
    ("conv_1/kernel", 4): ((0, 1, 2), (3,)),
    ("conv_2/kernel", 4): ((0, 1, 2), (3,)),
    ("kernel", 2): ((0,), (1,)),
}

# The root mean square of Muon's steps at a learning rate of 1: what AdamW's usually have.
MUON_RMS = 0.2


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


def matrix_axes(params: Params) -> Params:
    """For each param its axes as a matrix, see `MATRICES`; None for what is no matrix.

    Tables of embeddings, biases, norms and adapters are none, nor are the convolutions that pixels
    enter or leave by, whose input or output axes are no features.
    """

    def axes(path: tuple[Any, ...], leaf: Any) -> MuonDimensionNumbers | None:
        names = [key.key for key in path]
        layers = int(STACKED in names)
        for name in ("/".join(names[-2:]), names[-1]):
            found = MATRICES.get((name, leaf.ndim - layers))
            if found is not None:
                return MuonDimensionNumbers(*(tuple(a + layers for a in part) for part in found))
        return None

    return jax.tree_util.tree_map_with_path(axes, params)


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
    """Muon (Jordan et al. 2024) for matrices, and Adam for everything else.

    A matrix steps along its averaged gradient with all singular values brought to about 1 by five
    Newton-Schulz iterations. The step is scaled as by Liu et al. 2025 (arXiv 2502.16982), so that
    one learning rate serves both.
    """

    def labels(params: Params) -> Params:
        found = matrix_axes(params)
        return jax.tree.map(lambda _, axes: "adam" if axes is None else "muon", params, found)

    def scaled(step: jax.Array, axes: MuonDimensionNumbers) -> jax.Array:
        inputs = math.prod(step.shape[a] for a in axes.reduction_axis)
        outputs = math.prod(step.shape[a] for a in axes.output_axis)
        return step * (MUON_RMS * math.sqrt(max(inputs, outputs)))

    muon = optax.chain(
        scale_by_muon(beta=config.muon_momentum, weight_dimension_numbers=matrix_axes),
        optax.stateless(lambda steps, _: jax.tree.map(scaled, steps, matrix_axes(steps))),
    )
    return optax.partition({"muon": muon, "adam": _adam(config)}, labels)


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
