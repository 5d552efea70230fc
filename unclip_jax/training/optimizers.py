"""AdamW as the paper trains with it, or Muon: what is decayed, what never moves, and the rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from unclip_jax.common.params import TRAINED, Params
from unclip_jax.parallel import axes
from unclip_jax.training.config import TrainConfig

# The leaves that weight decay shrinks: matrices. Biases, norms' scales, positions, learned tokens
# and temperatures go by other names (a Linen bias may have two axes, so its rank does not tell).
DECAYED = ("kernel", "embedding", *axes.ADAPTERS)

# Muon's quintic a x + b x^3 + c x^5 that, applied to a singular value five times, brings it near 1
# from anywhere in (0.002, 1] (Jordan et al. 2024), and how many of the five go by one Gram matrix.
QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = (3, 2)

# The root mean square of a step of Muon's before the learning rate: what AdamW's usually have.
STEP_RMS = 0.2


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


# ---------------------------------------------------------------- Muon


def _muon(config: TrainConfig) -> optax.GradientTransformation:
    """Muon for matrices, and Adam for everything else."""

    def labels(params: Params) -> Params:
        found = matrix_axes(params)
        return jax.tree.map(lambda _, matrix: "muon" if matrix else "adam", params, found)

    return optax.partition(
        {"muon": scale_by_muon(config.muon_momentum), "adam": _adam(config)}, labels
    )


class MatrixAxes(NamedTuple):
    """Which axes of a kernel are a matrix's rows and columns; the others count matrices."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def matrix_axes(params: Params) -> Params:
    """For each param its axes as a matrix between features; None for what is no such matrix.

    Each layer of a stack is a matrix of its own, and so are queries, keys and values. Tables of
    embeddings, biases, norms and adapters are none, nor are the convolutions that pixels enter or
    leave by.
    """

    def of(path: tuple[Any, ...], leaf: Any) -> MatrixAxes | None:
        names, inputs, outputs = axes.of_param(tuple(key.key for key in path), leaf.ndim)
        if not outputs or "pixel" in names:
            return None
        return MatrixAxes(inputs, tuple(axis for axis in outputs if names[axis] != "fused"))

    return jax.tree_util.tree_map_with_path(of, params)


def scale_by_muon(momentum: float) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024): steps along the polar factors of gradients averaged with
    Nesterov's momentum.

    Their size is that of Liu et al. 2025 (arXiv 2502.16982): a root mean square of about 0.2 for
    a matrix of any shape, so that one learning rate serves these steps and Adam's.
    """

    def step(update: jax.Array, matrix: MatrixAxes) -> jax.Array:
        matrices, back = _as_matrices(update, matrix)
        rms = STEP_RMS * math.sqrt(max(matrices.shape[-2:]))
        return back(polar_factor(matrices) * rms)

    return optax.chain(
        optax.trace(momentum, nesterov=True, accumulator_dtype=jnp.float32),
        optax.stateless(lambda updates, _: jax.tree.map(step, updates, matrix_axes(updates))),
    )


def polar_factor(matrices: jax.Array) -> jax.Array:
    """[..., m, n] to about U V^T of each matrix's U S V^T: singular values between 0.6 and 1.25.

    A Newton-Schulz step takes X to X q(X^T X), with q a polynomial. All these factors commute, so
    steps are taken on the smaller of the Gram matrices alone, [n, n] for m >= n, and their product
    multiplies X once: for the kernel of a 3 x 3 convolution that is half of the work. A small
    singular value s drowns in a Gram matrix, where its rounding against s^2 grows 12 times with
    each step, and five steps on one lose two digits more than steps on X do; so the last two
    begin from X again. Squaring needs float32's precision on every platform.
    """
    tall = matrices.shape[-2] >= matrices.shape[-1]
    x = matrices if tall else jnp.swapaxes(matrices, -1, -2)
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-8)
    for steps in ITERATIONS:
        x = _newton_schulz(x, steps)
    return x if tall else jnp.swapaxes(x, -1, -2)


def _newton_schulz(x: jax.Array, steps: int) -> jax.Array:
    """So many steps of [..., m, n], m >= n, by the Gram matrix of where it stands."""
    a, b, c = QUINTIC
    gram = _dot(jnp.swapaxes(x, -1, -2), x)
    identity = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
    product = identity
    for i in range(steps):
        q = a * identity + b * gram + c * _dot(gram, gram)
        product = _dot(product, q) if i else q
        if i < steps - 1:
            gram = _dot(_dot(gram, q), q)
    return _dot(x, product)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _as_matrices(
    kernel: jax.Array, matrix: MatrixAxes
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """A kernel as [matrices, inputs, outputs], and the way back."""
    features = matrix.inputs + matrix.outputs
    order = [axis for axis in range(kernel.ndim) if axis not in features] + list(features)
    moved = kernel.transpose(order)
    rows, columns = (math.prod(kernel.shape[axis] for axis in part) for part in matrix)
    back = [order.index(axis) for axis in range(kernel.ndim)]
    return moved.reshape(-1, rows, columns), lambda x: x.reshape(moved.shape).transpose(back)
