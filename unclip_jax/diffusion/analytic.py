"""The analytic variance (Bao et al. 2022, arXiv 2201.06503): measured once, for few steps.

    residuals = analytic.init(diffusion)
    for x_0, t, noise in batches:
        residuals = analytic.update(residuals, diffusion, denoise, x_0, t, noise)
    statistic = analytic.statistic(residuals)
    sample(denoise, x_T, keys, diffusion, Sampling("analytic", "64"), analytic=statistic)

`statistic` is how far the network's x_0 is from the truth at each timestep, `variance` what of it
belongs to p(x_{t-1} | x_t).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.diffusion.gaussian import (
    Denoise,
    Diffusion,
    mean_of_dims,
    predict,
    q_sample,
    split_variance,
)
from unclip_jax.diffusion.schedules import Process
from unclip_jax.errors import UserError


class Residuals(NamedTuple):
    """Sums that `statistic` divides.

    `squared_error` and `count` are `[steps]`; `power`, the sum of the mean squares of the data, is
    a scalar.
    """

    squared_error: jax.Array
    count: jax.Array
    power: jax.Array


def init(diffusion: Diffusion) -> Residuals:
    """No observations yet."""
    zeros = jnp.zeros(diffusion.steps)
    return Residuals(zeros, zeros, jnp.zeros(()))


def update(
    residuals: Residuals,
    diffusion: Diffusion,
    denoise: Denoise,
    x_0: jax.Array,
    t: jax.Array,
    noise: jax.Array,
) -> Residuals:
    """Add a batch: x_0 `[b, ...]`, timesteps int32 `[b]`, standard normal noise `[b, ...]`."""
    process = diffusion.process()
    x_0 = x_0.astype(jnp.float32)
    x_t = q_sample(process, x_0, t, noise.astype(jnp.float32))
    prediction, _ = split_variance(diffusion, denoise(x_t, diffusion.times(t)), x_t)
    error = (x_0 - predict(diffusion, process, prediction, x_t, t)[0]) ** 2
    return Residuals(
        residuals.squared_error.at[t].add(mean_of_dims(error)),
        residuals.count.at[t].add(1.0),
        residuals.power + jnp.sum(mean_of_dims(x_0**2)),
    )


def statistic(residuals: Residuals) -> np.ndarray:
    """E ||x_0 - x_0(x_t)||^2 / d at every timestep, float32 `[steps]`, for `samplers.sample`.

    It estimates the mean variance of q(x_0 | x_t). For an optimal network that is
    (1 - Gamma_t) (1 - alpha_bar) / alpha_bar, with Analytic-DPM's Gamma_t = E ||eps(x_t)||^2 / d
    (arXiv 2201.06503). But the residual is the better thing to measure: where alpha_bar is small,
    Gamma is so near 1 that its sampling error, divided by alpha_bar, would swamp the answer; and
    the residual stays right for a network that is not optimal (arXiv 2206.07309).

    The variance of q(x_0 | x_t) is at most that of the data, which bounds the estimate. Timesteps
    that no batch visited are interpolated, in logarithm, between those that were.

    Raises:
        UserError: there are no observations.
    """
    squared_error, count, power = (np.asarray(x, np.float64) for x in residuals)
    seen = np.flatnonzero(count)
    if not len(seen):
        raise UserError("analytic statistic: no observations; call analytic.update first")
    mean = np.minimum(squared_error[seen] / count[seen], power / count.sum())
    log_mean = np.log(np.maximum(mean, 1e-12))
    return np.exp(np.interp(np.arange(len(count)), seen, log_mean)).astype(np.float32)


def variance(
    process: Process, statistic: jax.Array, clip_x_0: float = 0.0, last_noise: float = 0.0
) -> jax.Array:
    """Optimal variance of p(x_{t-1} | x_t), float32 `[n]` (Bao et al. 2022).

    p(x_{t-1} | x_t) closest in KL to the true reverse step has, by the law of total variance, the
    variance beta_tilde + c^2 Var(x_0 | x_t), where c is the posterior mean's coefficient of x_0.
    With (1 - Gamma) (1 - alpha_bar) / alpha_bar for Var(x_0 | x_t) it is theorem 1 of the paper.

    Args:
        process: the process being walked.
        statistic: Var(x_0 | x_t) at its timesteps, `[n]`.
        clip_x_0: data in [-clip_x_0, clip_x_0] has at most the variance clip_x_0^2 (theorem 2);
            0 for no bound.
        last_noise: bound on the mean absolute noise of the last noisy step, sigma sqrt(2/pi);
            0 for none.
    """
    statistic = jnp.minimum(statistic, clip_x_0**2) if clip_x_0 else jnp.asarray(statistic)
    found = process.posterior_variance + process.posterior_mean_x_0**2 * statistic
    if last_noise:
        found = found.at[1:2].min(last_noise**2 * math.pi / 2)
    return found
