"""Guidance: a network and a condition, made into a `denoise` that leads further towards it.

What comes out is again a `denoise(x_t, t)`, which samplers and inversion take like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.common import checks
from unclip_jax.diffusion.gaussian import Denoise, Diffusion, levels, split_variance
from unclip_jax.errors import wrong

Network = Callable[[jax.Array, jax.Array, Any], jax.Array]
"""`network(x_t [b, ...], t int32 [b], condition) -> output`, condition a pytree of `[b, ...]`."""


def changes_nothing(scale: float | jax.Array, at: float = 1.0) -> bool:
    """Whether a guidance scale is known to be `at`, where the network need be asked only once.

    Args:
        scale: a number of any type, or one per example; False for what is traced.
        at: the scale that changes nothing.

    Raises:
        UserError: it is known, and no finite number.
    """
    if isinstance(scale, jax.core.Tracer):
        return False
    if np.ndim(scale):
        scale = np.asarray(scale, np.float64)
        if not np.isfinite(scale).all():
            raise wrong("guidance scale", scale.tolist(), "finite numbers")
        return bool((scale == at).all())
    return checks.number("guidance scale", scale) == at


def classifier_free(
    network: Network,
    cond: Any,
    null: Any,
    scale: float | jax.Array,
    learned_variance: bool = False,
    encode: Callable[[Any], Any] = lambda condition: condition,
) -> Denoise:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): one network call per step.

    The guided prediction is cond + (scale - 1) (cond - null): scale 1 is exactly the conditional
    model. It holds for eps, x_0 and v alike, which differ by affine maps at given x_t. A learned
    variance is the conditional one, never guided. Each example's two conditions lie side by side
    on the batch axis, so that a batch spread over devices stays where it is.

    Args:
        network: evaluates each row on its own.
        cond: pytree of `[b, ...]` arrays.
        null: what to lead away from; the same tree and shapes.
        scale: scalar or `[b]`, may be traced. A 1 that is not evaluates the condition alone.
        learned_variance: whether the output's last axis holds variance channels in its second half.
        encode: of a condition, what `network` takes in its place; called once, not once a step.

    Returns:
        a `denoise` whose output is float32.

    Raises:
        UserError: `cond` and `null` differ in structure or shape, or the scale's shape is wrong,
            or it is not finite.
    """
    _check_same_shapes(cond, null)
    if changes_nothing(scale):
        encoded = encode(cond)

        def alone(x_t: jax.Array, t: jax.Array) -> jax.Array:
            _per_example(scale, x_t)
            return network(x_t, t, encoded).astype(jnp.float32)

        return alone
    pairs = encode(jax.tree.map(interleave, cond, null))

    def denoise(x_t: jax.Array, t: jax.Array) -> jax.Array:
        output = network(interleave(x_t, x_t), interleave(t, t), pairs).astype(jnp.float32)
        output = output.reshape(x_t.shape[0], 2, *output.shape[1:])
        conditional, unconditional = output[:, 0], output[:, 1]
        variance = []
        if learned_variance:
            conditional, *variance = jnp.split(conditional, 2, axis=-1)
            unconditional, _ = jnp.split(unconditional, 2, axis=-1)
        extra = _per_example(scale, x_t) - 1.0
        guided = conditional + extra * (conditional - unconditional)
        return jnp.concatenate([guided, *variance], axis=-1)

    return denoise


def classifier_guided(
    denoise: Denoise,
    log_prob: Callable[[jax.Array, jax.Array], jax.Array],
    scale: float | jax.Array,
    diffusion: Diffusion,
) -> Denoise:
    """Classifier guidance (Dhariwal & Nichol 2021, arXiv 2105.05233, algorithm 2).

    Bayes' rule adds the classifier's gradient g = grad log p(y | x_t) to the score
    -eps / sqrt(1 - alpha_bar), so eps moves by -sqrt(1 - alpha_bar) scale g, and with it, at the
    same x_t, x_0 by (1 - alpha_bar) / sqrt(alpha_bar) scale g and v by
    -sqrt((1 - alpha_bar) / alpha_bar) scale g.

    Args:
        denoise: the network to guide.
        log_prob: `log_prob(x_t [b, ...], t int32 [b]) -> log p(y | x_t) [b]`, differentiable.
        scale: scalar or `[b]`, may be traced; 1 is Bayes' rule. A 0 that is not asks no classifier.
        diffusion: what the network predicts. A learned variance is left alone.

    Returns:
        a `denoise` whose output is float32.

    Raises:
        UserError: the scale's shape is wrong, or it is not finite.
    """
    if changes_nothing(scale, at=0.0):
        return lambda x_t, t: denoise(x_t, t).astype(jnp.float32)
    full = diffusion.process()

    def guided(x_t: jax.Array, t: jax.Array) -> jax.Array:
        prediction, fraction = split_variance(diffusion, denoise(x_t, t), x_t)
        gradient = jax.grad(lambda x: jnp.sum(log_prob(x, t)))(x_t).astype(jnp.float32)
        alpha, sigma = levels(full, t, x_t)
        size = {"eps": -sigma, "x_0": sigma**2 / alpha, "v": -sigma / alpha}[diffusion.prediction]
        prediction += _per_example(scale, x_t) * size * gradient
        variance = [] if fraction is None else [fraction]
        return jnp.concatenate([prediction, *variance], axis=-1)

    return guided


def interleave(first: jax.Array, second: jax.Array) -> jax.Array:
    """Two `[b, ...]` -> `[2b, ...]`: first[0], second[0], first[1], ..."""
    pairs = jnp.stack([first, second], axis=1)
    return pairs.reshape(-1, *pairs.shape[2:])


def _per_example(scale: float | jax.Array, x: jax.Array) -> jax.Array:
    """A scale, scalar or `[b]`, as float32, shaped to multiply `x`."""
    value = jnp.asarray(scale, jnp.float32)
    if value.shape not in ((), x.shape[:1]):
        expected = f"a scalar or one per example {x.shape[:1]}"
        raise wrong("guidance scale's shape", value.shape, expected)
    return value.reshape(value.shape + (1,) * (x.ndim - 1)) if value.ndim else value


def _check_same_shapes(cond: Any, null: Any) -> None:
    one, other = (jax.tree_util.tree_flatten_with_path(tree) for tree in (cond, null))
    if one[1] != other[1]:
        raise wrong("null condition's structure", other[1], f"the condition's {one[1]}")
    for (path, a), (_, b) in zip(one[0], other[0], strict=True):
        if jnp.shape(a) != jnp.shape(b):
            field = f"null condition{jax.tree_util.keystr(path)}'s shape"
            do = "broadcast the null over the batch"
            raise wrong(field, jnp.shape(b), f"the condition's {jnp.shape(a)}", do)
