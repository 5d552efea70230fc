"""What guidance makes of two predictions, and how strong it is when.

A rule makes one prediction of one to lead towards and one to lead away from, given the scale w.
`linear`, the plain one, is towards + (w - 1) (towards - away); `apg`, `zero_star` and `rescaled`
mend it where w is large. They stack: `rescaled(0.7, zero_star(apg(diffusion)))`.

The scale is a number, one per example, or a function of t; `interval`, `rising` and `per_step` make
such functions.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from unclip_jax.diffusion.gaussian import Denoise, Diffusion, predict_at
from unclip_jax.errors import UserError, wrong

Scale = float | jax.Array | Callable[[jax.Array], jax.Array]
"""A scalar, one per example `[b]`, or a function that makes either of t `[b]`. 1 is no guidance.

A 1 that is not traced asks for one prediction. So does a function at every step at which it is 1
for all examples; the choice is made on the device (`vmap` has no branches, and computes both).
"""

Rule = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
"""`rule(towards, away, scale, x_t, t) -> guided`, all float32 `[b, ...]` but t `[b]`.

The scale is shaped to multiply `x_t`; at scale 1 a rule returns `towards`.
"""


def linear(towards, away, scale, x_t, t):
    """The plain `Rule`: towards + (scale - 1) (towards - away).

    It is the same for every prediction, which differ by affine maps at given x_t.
    """
    return towards + (scale - 1.0) * (towards - away)


# ------------------------------------------------------------------------------------- the rule


def apg(
    diffusion: Diffusion | None = None,
    parallel: float | jax.Array = 0.0,
    norm: float | jax.Array = 0.0,
) -> Rule:
    """Adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416), without its momentum.

    Of the step d = towards - away, in x_0, the part along `towards` saturates colours and the rest
    makes the picture better. So d is shortened to `norm`, and its part along `towards` counts
    `parallel` times.

    Args:
        diffusion: what the network predicts; None takes the steps in the prediction itself, as
            diffusers does.
        parallel: eta of the paper, 0 to 1; 1 keeps all of the step.
        norm: the longest step, r of the paper, a length over all of an example; a plain 0 is no
            limit.
    """
    limited = not (isinstance(norm, numbers.Real) and norm == 0)

    def rule(towards, away, scale, x_t, t):
        clean, gain = towards, 1.0
        if diffusion is not None:
            clean, _ = predict_at(diffusion, towards, x_t, t)
            gain = x_0_per_output(diffusion, x_t, t)
        step = (towards - away) * gain
        if limited:
            length = jnp.sqrt(jnp.maximum(dot(step, step), 1e-24))
            step = step * jnp.minimum(1.0, norm / length)
        lengthwise = along(step, clean)
        step = step - (1.0 - parallel) * lengthwise
        return towards + (scale - 1.0) * step / gain

    return rule


def zero_star(rule: Rule = linear) -> Rule:
    """CFG-Zero* (Fan et al. 2025, arXiv 2503.18886): away from s away, of the best s.

    s = <towards, away> / <away, away> brings the two as near as a factor can. The paper's other
    half, which skips the first steps, is `zero_init`.
    """

    def starred(towards, away, scale, x_t, t):
        return rule(towards, along(towards, away), scale, x_t, t)

    return starred


def rescaled(phi: float | jax.Array, rule: Rule = linear) -> Rule:
    """CFG-rescale (Lin et al. 2023, arXiv 2305.08891, section 3.4), against overexposure.

    The guided prediction gets back the standard deviation that `towards` has over an example; phi
    of that, 0 to 1 (the paper's is 0.7), and 1 - phi as the rule made it.
    """

    def back(towards, away, scale, x_t, t):
        guided = rule(towards, away, scale, x_t, t)
        ratio = jnp.sqrt(_variance(towards) / _variance(guided))
        return guided * (phi * ratio + (1.0 - phi))

    return back


def zero_init(denoise: Denoise, first: int | jax.Array) -> Denoise:
    """The zero-init of CFG-Zero* (arXiv 2503.18886, section 4.2): 0 at timesteps from `first` on.

    Meant for the first one or two steps of a network that predicts a velocity or v, under which x
    then all but stands still. The network is not called there.
    """

    def denoised(x_t: jax.Array, t: jax.Array) -> jax.Array:
        def kept(output: jax.Array) -> jax.Array:
            return shaped(t < first, output, "t") * output.astype(jnp.float32)

        def some(x_t: jax.Array, t: jax.Array) -> jax.Array:
            return jax.tree.map(kept, denoise(x_t, t))

        def none(x_t: jax.Array, t: jax.Array) -> jax.Array:
            made = jax.eval_shape(some, x_t, t)
            return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), made)

        return jax.lax.cond(jnp.all(t >= first), none, some, x_t, t)

    return denoised


# ------------------------------------------------------------------------------------ the scale


def interval(
    scale: Scale,
    diffusion: Diffusion,
    sigma: tuple[float, float] | None = None,
    log_snr: tuple[float, float] | None = None,
) -> Scale:
    """Guidance in a limited interval (Kynkäänniemi et al. 2024, arXiv 2404.07724).

    Args:
        scale: inside of the interval; outside it is 1.
        diffusion: what says how noisy x_t is at t.
        sigma: from above the first to the second noise level, the noise's standard deviation over
            the data's factor: sqrt((1 - alpha_bar) / alpha_bar). May be traced.
        log_snr: the same as log(alpha_bar / (1 - alpha_bar)), in place of sigma: from the first
            to below the second.

    Raises:
        UserError: not exactly one of sigma and log_snr is given.
    """
    if (sigma is None) == (log_snr is None):
        found = "neither" if sigma is None else "both"
        raise UserError(f"sigma and log_snr: got {found}, expected one of them")
    if log_snr is None:
        least, most = (-2.0 * jnp.log(jnp.float32(bound)) for bound in reversed(sigma))
    else:
        least, most = log_snr

    def limited(t: jax.Array) -> jax.Array:
        alpha, sigma = diffusion.levels(t, t)
        ratio = 2.0 * (jnp.log(alpha) - jnp.log(sigma))
        inside = scale(t) if callable(scale) else jnp.asarray(scale, jnp.float32)
        return jnp.where((least <= ratio) & (ratio < most), inside, 1.0)

    return limited


def rising(scale: float | jax.Array, diffusion: Diffusion, least: float | jax.Array = 0.0) -> Scale:
    """A scale that rises as the noise falls (Wang et al. 2024, arXiv 2404.13040).

    The paper's linear schedule, 1 + 2 (1 - t / T) (scale - 1), whose mean over t is `scale`; or its
    clamped one, in which the factor 2 (1 - t / T) is never less than `least`.
    """

    def risen(t: jax.Array) -> jax.Array:
        share = 2.0 * (1.0 - diffusion.share(t))
        extra = jnp.asarray(scale, jnp.float32) - 1.0
        return 1.0 + extra * jnp.maximum(share, least)

    return risen


def per_step(scales: Sequence[float] | jax.Array, timesteps: Sequence[int] | jax.Array) -> Scale:
    """The scale of every step, the noisiest first; straight lines between their timesteps.

    Args:
        scales: `[n]`, may be traced.
        timesteps: of the steps, rising, `[n]`: `diffusion.process(spacing).timesteps`.

    Raises:
        UserError: there are more of one than of the other.
    """
    values, points = jnp.asarray(scales, jnp.float32), jnp.asarray(timesteps, jnp.float32)
    if values.shape != points.shape or values.ndim != 1:
        raise wrong("scales' shape", values.shape, f"one for each step: {points.shape}")
    return lambda t: jnp.interp(t.astype(jnp.float32), points, values[::-1])


# ---------------------------------------------------------------------------- example by example


def scale_at(scale: Scale, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """The scale at t, float32, shaped to multiply `x_t`."""
    return shaped(scale(t) if callable(scale) else scale, x_t, "guidance scale")


def shaped(scale: float | jax.Array, x: jax.Array, field: str) -> jax.Array:
    """A scalar or `[b]` as float32, shaped to multiply `x`."""
    value = jnp.asarray(scale, jnp.float32)
    if value.shape not in ((), x.shape[:1]):
        expected = f"a scalar or one per example {x.shape[:1]}"
        raise wrong(f"{field}'s shape", value.shape, expected)
    return value.reshape(value.shape + (1,) * (x.ndim - 1)) if value.ndim else value


def x_0_per_output(diffusion: Diffusion, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """By how much x_0 moves with the prediction at given x_t, `[b, 1, ..., 1]`."""
    one = jnp.ones((x_t.shape[0],) + (1,) * (x_t.ndim - 1))
    return predict_at(diffusion, one, jnp.zeros_like(one), t)[0]


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Inner product of each example, `[b, 1, ..., 1]`."""
    return jnp.sum(a * b, axis=tuple(range(1, a.ndim)), keepdims=True)


def along(a: jax.Array, b: jax.Array) -> jax.Array:
    """The part of `a` along `b`, example by example."""
    return dot(a, b) / jnp.maximum(dot(b, b), 1e-24) * b


def _variance(x: jax.Array) -> jax.Array:
    """Variance over each example, above 0: `[b, 1, ..., 1]`."""
    return jnp.maximum(jnp.var(x, axis=tuple(range(1, x.ndim)), keepdims=True), 1e-24)
