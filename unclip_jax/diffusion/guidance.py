"""Guidance: networks and conditions, made into a `denoise` that leads further to what is asked.

What comes out is again a `denoise(x_t, t)`, which samplers and inversion take like any other. Each
function here asks for two predictions, one to lead towards and one to lead away from, and hands
them with the scale to a rule; any of them goes with any rule and any scale of `rules`.

x_t is an array `[b, ...]` or a pytree of such arrays, which the network then takes and returns; a
rule sees all leaves of an example as one row `[b, n]`.

All is float32, pure and differentiable. Scales, weights and bounds may be traced, so that a new
value compiles nothing. A learned variance is that of the first prediction, never guided.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.common import checks
from unclip_jax.diffusion.gaussian import Denoise, Diffusion, split_variance
from unclip_jax.diffusion.rules import Rule, Scale, along, linear, scale_at, shaped, x_0_per_output
from unclip_jax.diffusion.rules import apg as apg
from unclip_jax.diffusion.rules import interval as interval
from unclip_jax.diffusion.rules import per_step as per_step
from unclip_jax.diffusion.rules import rescaled as rescaled
from unclip_jax.diffusion.rules import rising as rising
from unclip_jax.diffusion.rules import zero_init as zero_init
from unclip_jax.diffusion.rules import zero_star as zero_star
from unclip_jax.diffusion.states import Packing, one_array
from unclip_jax.errors import wrong

Network = Callable[[jax.Array, jax.Array, Any], jax.Array]
"""`network(x_t [b, ...], t int32 [b], condition) -> output`, condition a pytree of `[b, ...]`."""


def changes_nothing(scale: Scale, at: float = 1.0) -> bool:
    """Whether a guidance scale is known to be `at`, where the network need be asked only once.

    Args:
        scale: a number of any type, or one per example; False for functions and what is traced.
        at: the scale that changes nothing.

    Raises:
        UserError: it is known, and no finite number.
    """
    if callable(scale) or isinstance(scale, jax.core.Tracer):
        return False
    if np.ndim(scale):
        scale = np.asarray(scale, np.float64)
        if not np.isfinite(scale).all():
            raise wrong("guidance scale", scale.tolist(), "finite numbers")
        return bool((scale == at).all())
    return checks.number("guidance scale", scale) == at


def _same(condition: Any) -> Any:
    return condition


# ------------------------------------------------------------------------------- who is asked


def classifier_free(
    network: Network,
    cond: Any,
    null: Any,
    scale: Scale,
    learned_variance: bool = False,
    encode: Callable[[Any], Any] = _same,
    rule: Rule = linear,
) -> Denoise:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): one network call per step.

    The guided prediction is cond + (scale - 1) (cond - null): scale 1 is exactly the conditional
    model. Each example's two conditions lie side by side on the batch axis, so that a batch spread
    over devices stays where it is.

    Args:
        network: evaluates each row on its own.
        cond: pytree of `[b, ...]` arrays.
        null: what to lead away from, no condition or one that is not wanted (a negative prompt);
            the same tree and shapes.
        scale: see `Scale`.
        learned_variance: whether the output's last axis holds variance channels in its second half.
        encode: of a condition, what `network` takes in its place; called before the first step, not
            once a step.
        rule: see `Rule`.

    Returns:
        a `denoise` whose output is float32.

    Raises:
        UserError: `cond` and `null` differ in structure or shape, or the scale's shape is wrong,
            or it is not finite.
    """
    asked = _encoded([cond, null], scale, encode)

    def made(lift: Lift) -> Denoise:
        alone, both = _asking(lift(network), 2, *asked)
        return _guided(alone, both, scale, rule, learned_variance)

    return _of_trees(made, learned_variance)


def composed(
    network: Network,
    conds: Sequence[Any],
    null: Any,
    weights: Sequence[float | jax.Array],
    scale: Scale = 1.0,
    learned_variance: bool = False,
    encode: Callable[[Any], Any] = _same,
    rule: Rule = linear,
) -> Denoise:
    """Several conditions at once (Liu et al. 2022, arXiv 2206.01714): one network call.

    Leads towards null + sum of weight_i (cond_i - null). A negative weight avoids a condition. With
    scale 1 these are the paper's weights; those that sum to 1, with a scale, mix conditions first
    and guide then, which the other rules need.

    Args:
        conds: conditions, each as for `classifier_free`. A learned variance is the first one's.
        weights: one for each condition, scalar or `[b]`, may be traced.

    The others and what is raised are as for `classifier_free`; and `UserError` unless there is one
    weight for each condition, and at least one.
    """
    if len(weights) != len(conds) or not len(conds):
        raise wrong("weights", len(weights), f"one for each of {len(conds)} conditions")
    asked = _encoded([*conds, null], 0.0, encode)

    def mix(*predictions: jax.Array) -> tuple[jax.Array, jax.Array]:
        *found, away = predictions
        terms = zip(weights, found, strict=True)
        return away + sum(shaped(w, away, "weight") * (each - away) for w, each in terms), away

    def made(lift: Lift) -> Denoise:
        _, every = _asking(lift(network), len(conds) + 1, *asked)
        return _guided(None, every, scale, rule, learned_variance, mix)

    return _of_trees(made, learned_variance)


def perpendicular(
    network: Network,
    cond: Any,
    null: Any,
    negative: Any,
    scale: Scale,
    weight: float | jax.Array = 1.0,
    learned_variance: bool = False,
    encode: Callable[[Any], Any] = _same,
    rule: Rule = linear,
) -> Denoise:
    """Perp-Neg (Armandpour et al. 2023, arXiv 2304.04968): one network call of 3b rows.

    Leads away from a negative prompt only as far as it is not the positive one: with p = cond -
    null and n = negative - null, towards cond - weight (n - <n, p> / <p, p> p).

    Args:
        negative: the condition that is not wanted; the same tree and shapes as `cond`.
        weight: of the negative, scalar or `[b]`, may be traced; 0 is `classifier_free`.

    The others and what is raised are as for `classifier_free`.
    """
    asked = _encoded([cond, null, negative], scale, encode)

    def mix(towards: jax.Array, away: jax.Array, avoided: jax.Array) -> tuple[jax.Array, jax.Array]:
        step = avoided - away
        step = step - along(step, towards - away)
        return towards - shaped(weight, step, "weight") * step, away

    def made(lift: Lift) -> Denoise:
        alone, every = _asking(lift(network), 3, *asked)
        return _guided(alone, every, scale, rule, learned_variance, mix)

    return _of_trees(made, learned_variance)


def autoguided(
    denoise: Denoise,
    weak: Denoise,
    scale: Scale,
    learned_variance: bool = False,
    rule: Rule = linear,
) -> Denoise:
    """Autoguidance (Karras et al. 2024, arXiv 2406.02507): away from a worse version of itself.

    Args:
        denoise: the network under its condition, perhaps guided already.
        weak: an earlier checkpoint of it, or a smaller or less trained network, under the same
            condition; it predicts the same thing. Called once a step beside `denoise`.

    The others are as for `classifier_free`.

    Raises:
        UserError: the outputs differ in shape, or the scale's shape is wrong.
    """

    def made(lift: Lift) -> Denoise:
        strong, weaker = lift(denoise), lift(weak, "weak network's output")

        def pair(x_t: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
            good = one_array(strong(x_t, t))
            bad = one_array(weaker(x_t, t), "weak network's output")
            if good.shape != bad.shape:
                raise wrong("weak network output's shape", bad.shape, f"the network's {good.shape}")
            return good, bad

        return _guided(strong, pair, scale, rule, learned_variance)

    return _of_trees(made, learned_variance)


def classifier_guided(
    denoise: Denoise,
    log_prob: Callable[[jax.Array, jax.Array], jax.Array],
    scale: Scale,
    diffusion: Diffusion,
) -> Denoise:
    """Classifier guidance (Dhariwal & Nichol 2021, arXiv 2105.05233, algorithm 2).

    Bayes' rule adds the classifier's gradient g = grad log p(y | x_t) to the score
    -eps / sqrt(1 - alpha_bar), so eps moves by -sqrt(1 - alpha_bar) scale g, and with it, at the
    same x_t, x_0 by (1 - alpha_bar) / sqrt(alpha_bar) scale g, and other predictions as x_0 does.

    Args:
        denoise: the network to guide.
        log_prob: `log_prob(x_t [b, ...], t int32 [b]) -> log p(y | x_t) [b]`, differentiable.
        scale: scalar, `[b]` or a function of t, may be traced; 1 is Bayes' rule. A 0 that is not
            traced asks no classifier.
        diffusion: what the network predicts. A learned variance is left alone.

    Returns:
        a `denoise` whose output is float32.

    Raises:
        UserError: the scale's shape is wrong, or it is not finite.
    """
    none = changes_nothing(scale, at=0.0)

    def made(lift: Lift) -> Denoise:
        network, judge = lift(denoise), lift(log_prob, judges=True)

        def guided(x_t: jax.Array, t: jax.Array) -> jax.Array:
            prediction, fraction = split_variance(diffusion, network(x_t, t), x_t)
            gradient = jax.grad(lambda x: jnp.sum(judge(x, t)))(x_t).astype(jnp.float32)
            alpha, sigma = diffusion.levels(t, x_t)
            x_0_moves = sigma**2 / alpha * gradient
            prediction += scale_at(scale, x_t, t) * x_0_moves / x_0_per_output(diffusion, x_t, t)
            variance = [] if fraction is None else [fraction]
            return jnp.concatenate([prediction, *variance], axis=-1)

        return (lambda x_t, t: network(x_t, t).astype(jnp.float32)) if none else guided

    return _of_trees(made, diffusion.learned_variance)


# ---------------------------------------------------------------------------------- what is shared


def _guided(
    alone: Denoise | None,
    every: Callable[[jax.Array, jax.Array], Sequence[jax.Array]],
    scale: Scale,
    rule: Rule,
    learned_variance: bool,
    mix: Callable[..., tuple[jax.Array, jax.Array]] = lambda towards, away: (towards, away),
) -> Denoise:
    """The rule over two predictions, mixed of those of `every`, or `alone` where the scale is 1."""

    def plain(x_t: jax.Array, t: jax.Array, value: jax.Array) -> jax.Array:
        return one_array(alone(x_t, t)).astype(jnp.float32)

    def guided(x_t: jax.Array, t: jax.Array, value: jax.Array) -> jax.Array:
        predictions = [output.astype(jnp.float32) for output in every(x_t, t)]
        variance = []
        if learned_variance:
            halves = [jnp.split(output, 2, axis=-1) for output in predictions]
            predictions, variance = [half for half, _ in halves], halves[0][1:]
        return jnp.concatenate([rule(*mix(*predictions), value, x_t, t), *variance], axis=-1)

    if not alone or not callable(scale):
        answer = plain if changes_nothing(scale) and alone else guided
        return lambda x_t, t: answer(x_t, t, scale_at(scale, x_t, t))

    def denoise(x_t: jax.Array, t: jax.Array) -> jax.Array:
        value = scale_at(scale, x_t, t)
        return jax.lax.cond(jnp.any(value != 1.0), guided, plain, x_t, t, value)

    return denoise


def _encoded(conds: Sequence[Any], scale: Scale, encode: Callable[[Any], Any]) -> tuple[Any, Any]:
    """The first of n conditions, and all in n b rows, each encoded if the scale lets it be asked.

    None stands for those that are never asked.
    """
    for other in conds[1:]:
        _check_same_shapes(conds[0], other)
    one = changes_nothing(scale)
    first = encode(conds[0]) if one or callable(scale) else None
    return first, None if one else encode(jax.tree.map(interleave, *conds))


def _asking(
    network: Network, n: int, first: Any, rows: Any
) -> tuple[Denoise, Callable[[jax.Array, jax.Array], list[jax.Array]]]:
    """The network under the first condition, and under each of n in one call of n b rows."""

    def every(x_t: jax.Array, t: jax.Array) -> list[jax.Array]:
        output = one_array(network(interleave(*[x_t] * n), interleave(*[t] * n), rows))
        if output.shape[:1] != (n * x_t.shape[0],):
            expected = f"({n * x_t.shape[0]}, ...), one row for each of {n} conditions an example"
            raise wrong("network output's shape", output.shape, expected)
        output = output.reshape(x_t.shape[0], n, *output.shape[1:])
        return [output[:, i] for i in range(n)]

    return lambda x_t, t: network(x_t, t, first), every


Lift = Callable[..., Callable[..., jax.Array]]  # makes a network of arrays of one of pytrees


def _of_trees(made: Callable[[Lift], Denoise], learned_variance: bool) -> Denoise:
    """What `made` makes of networks of arrays, for x_t that are arrays and for pytrees of them."""
    plain = made(lambda network, *_, **__: network)

    def denoise(x_t: Any, t: jax.Array) -> Any:
        if isinstance(x_t, jax.Array | np.ndarray):
            return plain(x_t, t)
        packing = Packing(x_t)

        def lift(network, name="network output", judges=False):
            def packed(x: jax.Array, t: jax.Array, *cond: Any) -> jax.Array:
                if judges:
                    return network(packing.unpack(x), t)
                told = lambda tree, t: network(tree, t, *cond)  # noqa: E731
                return packing.packed(told, learned_variance, name)(x, t)

            return packed

        return packing.unpack_output(made(lift)(packing.pack(x_t, "x_t"), t), learned_variance)

    return denoise


def interleave(*arrays: jax.Array) -> jax.Array:
    """n of `[b, ...]` -> `[n b, ...]`: every first row, every second row, ..."""
    stacked = jnp.stack(arrays, axis=1)
    return stacked.reshape(-1, *stacked.shape[2:])


def _check_same_shapes(cond: Any, null: Any) -> None:
    one, other = (jax.tree_util.tree_flatten_with_path(tree) for tree in (cond, null))
    if one[1] != other[1]:
        raise wrong("null condition's structure", other[1], f"the condition's {one[1]}")
    for (path, a), (_, b) in zip(one[0], other[0], strict=True):
        if jnp.shape(a) != jnp.shape(b):
            field = f"null condition{jax.tree_util.keystr(path)}'s shape"
            do = "broadcast the null over the batch"
            raise wrong(field, jnp.shape(b), f"the condition's {jnp.shape(a)}", do)
