"""Samplers: pure functions of `denoise(x_t, t)`, each compiled as one loop.

A sampler walks a `Process` from its noisiest step to x_0. At step i it asks the network once,
reads the answer as (x_0, eps, variance), and forms x_{i-1}:

* **ddpm** draws from p(x_{i-1} | x_i) = N(posterior mean at the predicted x_0, variance)
  (Ho et al. 2020, algorithm 2), with whatever variance the network was trained for.
* **analytic** is the same walk with the optimal variance (Bao et al. 2022; see
  `analytic_variance`), which matters when there are few steps.
* **ddim** (Song et al. 2021, arXiv 2010.02502, eq. 12), with sigma = eta sqrt(beta_tilde), goes to
  sqrt(alpha_bar_prev) x_0 + sqrt(1 - alpha_bar_prev - sigma^2) eps + sigma z. With eta = 0 it
  is an ordinary differential equation, which `invert` follows the other way.
* **dpm++** is DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2): with
  alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar), lambda = log(alpha/sigma) and
  h = lambda_prev - lambda, it solves the same equation to second order,

      x_prev = (sigma_prev/sigma) x - alpha_prev (exp(-h) - 1) D,
      D = x_0 + w (x_0 - x_0_before),      w = min(h / h_before, 1) / 2.

  The first step has no step before it and the last one ends at lambda = infinity, so both are
  of first order (w = 0); the last therefore returns the network's x_0. The published w has no
  minimum. But evenly spaced timesteps end with a step in lambda several times longer than the
  one before, over which a straight line through two points is no guide; bounding w keeps the
  order and, with 5 to 40 steps on a mixture of Gaussians, cuts the error three- to tenfold.

No method adds noise in its last step. The state is float32 whatever the network computes in.
Guidance is not the samplers' business: `guidance` wraps a network into another `denoise`.

Each example has its own key, folded with the step's number, so that a sample depends on its key
and inputs and never on its neighbours in the batch (with JAX's default threefry keys).
Call these functions inside `jax.jit`: methods and steps are static there, eta, guidance scale
and analytic statistics may be traced, so that a new value compiles nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.diffusion.gaussian import (
    Denoise,
    Diffusion,
    Prediction,
    at,
    check_choice,
    check_keys,
    interpret,
    normal,
    q_posterior,
    q_sample,
)
from unclip_jax.diffusion.progress import Loop, whole
from unclip_jax.diffusion.schedules import Process
from unclip_jax.errors import UserError

METHODS = ("ddpm", "ddim", "dpm++", "analytic")

_Advance = Callable[
    [jax.Array, Any, Prediction, jax.Array, Callable[[], jax.Array]], tuple[jax.Array, Any]
]


@dataclass(frozen=True)
class Sampling:
    """How to walk back from noise. Hashable: a static argument of `jax.jit`.

    Attributes:
        method: "ddpm", "ddim", "dpm++" (DPM-Solver++(2M)) or "analytic".
        spacing: which timesteps to keep; see `Diffusion.process`.
        clip_x_0: the data lies in [-clip_x_0, clip_x_0]; 0 for no clipping.
        dynamic_percentile: dynamic thresholding, in percent (Imagen: 99.5); 0 for off.
        last_noise: for "analytic", the largest mean absolute noise that the last noisy step may
            add, in the data's units (Bao et al., appendix F.2: 2/255 to 4/255 for images);
            0 for no limit.

    Raises:
        UserError: a field is out of its range.
    """

    method: str = "ddpm"
    spacing: str = ""
    clip_x_0: float = 0.0
    dynamic_percentile: float = 0.0
    last_noise: float = 0.0

    def __post_init__(self) -> None:
        """Check every field but `spacing`, which only a `Diffusion` can judge."""
        check_choice("Sampling.method", self.method, METHODS)
        for field in ("clip_x_0", "last_noise"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"Sampling.{field}={value!r}: expected 0 (off) or a positive bound")
        if self.dynamic_percentile != 0 and not 50 <= self.dynamic_percentile <= 100:
            raise UserError(
                f"Sampling.dynamic_percentile={self.dynamic_percentile!r}: expected 0 (off) or "
                "percent from 50 to 100, such as 99.5"
            )
        if self.last_noise and self.method != "analytic":
            raise UserError(
                f'Sampling.last_noise={self.last_noise!r}: only method="analytic" uses it; set 0'
            )


# -------------------------------------------------------------------------------- sampling


def sample(
    denoise: Denoise,
    x_T: jax.Array,
    keys: jax.Array,
    diffusion: Diffusion,
    sampling: Sampling,
    *,
    eta: float | jax.Array = 0.0,
    analytic: jax.Array | None = None,
    loop: Loop = whole,
) -> jax.Array:
    """Walk from noise to data.

    Args:
        denoise: the network, perhaps wrapped in guidance; called once per step.
        x_T: standard normal noise `[b, ...]`, such as `normal(keys, shape)`.
        keys: typed keys `[b]`, for the noise of the steps; other keys than made `x_T`. Or the
            noise itself, float `[b, steps - 1, ...]`, the noisiest step's first.
        diffusion: what the network was trained to do.
        sampling: method, steps and clipping.
        eta: DDIM's noise, 0 (deterministic) to 1 (DDPM's variance); may be traced.
        analytic: float `[diffusion.steps]` from `losses.analytic_statistic`; other methods than
            "analytic" ignore it.
        loop: what does the steps; `loops.Watchable` passes one that a host can watch.

    Returns:
        x_0, float32 `[b, ...]`.

    Raises:
        UserError: keys, eta, spacing, the statistic or the network's output do not fit.
    """
    process = diffusion.process(sampling.spacing)
    draw = _noise_of_steps(process, keys, x_T)
    advance = _solver(process, diffusion, sampling, eta, analytic)
    x_T = x_T.astype(jnp.float32)

    def step(n: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        x_t, memory = carry
        i = process.steps - 1 - n  # the noisiest first
        prediction = _ask(denoise, diffusion, process, sampling, x_t, i)
        return advance(x_t, memory, prediction, i, lambda: draw(i))

    memory = x_T if sampling.method == "dpm++" else ()
    x_0, _ = loop(step, (x_T, memory), process.steps)
    return x_0


def invert(
    denoise: Denoise,
    x_0: jax.Array,
    diffusion: Diffusion,
    sampling: Sampling,
    loop: Loop = whole,
) -> jax.Array:
    """DDIM inversion: the noise x_T from which DDIM, with eta = 0, returns to `x_0`.

    Follows the deterministic equation from data to noise with the step x_i =
    sqrt(alpha_bar_i) x_0 + sqrt(1 - alpha_bar_i) eps, both predicted at the next cleaner level
    i - 1 (Dhariwal & Nichol 2021, appendix F; section 3 of the unCLIP paper). Its error falls
    as the number of steps grows. Nothing is clipped, since clipping cannot be undone.

    Args:
        denoise: the network; use the condition that decoding will use, without guidance.
        x_0: float `[b, ...]`.
        diffusion: what the network was trained to do.
        sampling: its spacing gives the steps; method "ddim" or "dpm++".
        loop: as in `sample`.

    Returns:
        x_T, float32 `[b, ...]`.

    Raises:
        UserError: the method adds noise, so that there is no way back.
    """
    if sampling.method not in ("ddim", "dpm++"):
        raise UserError(
            f"Sampling.method={sampling.method!r}: it adds noise and cannot be inverted; "
            'use method="ddim"'
        )
    process = diffusion.process(sampling.spacing)
    unclipped = Sampling(method=sampling.method, spacing=sampling.spacing)

    def step(i: jax.Array, x: jax.Array) -> jax.Array:
        prediction = _ask(denoise, diffusion, process, unclipped, x, jnp.maximum(i - 1, 0))
        clean = jnp.where(i == 0, x, prediction.x_0)  # before the first step, x is x_0 itself
        return q_sample(process, clean, i, prediction.eps)

    return loop(step, x_0.astype(jnp.float32), process.steps)


def _ask(
    denoise: Denoise,
    diffusion: Diffusion,
    process: Process,
    sampling: Sampling,
    x_t: jax.Array,
    i: jax.Array,
) -> Prediction:
    """Call the network at the original timestep of step `i`, and read its output."""
    t = jnp.full(x_t.shape[:1], jnp.asarray(process.timesteps)[i])
    output = denoise(x_t, t)
    clipping = sampling.clip_x_0, sampling.dynamic_percentile
    return interpret(diffusion, process, output, x_t, i, *clipping)


def _noise_of_steps(
    process: Process, keys: jax.Array, x_T: jax.Array
) -> Callable[[jax.Array], jax.Array]:
    """`draw(i)`, the noise that step i adds: drawn from keys, or looked up where it is given."""
    if not jnp.issubdtype(keys.dtype, jnp.floating):
        check_keys(keys)
        if x_T.shape[:1] != keys.shape:
            raise UserError(
                f"keys of shape {keys.shape}: expected one per example of x_T, which has"
                f" {x_T.shape}"
            )
        return lambda i: normal(jax.vmap(jax.random.fold_in, (0, None))(keys, i), x_T.shape[1:])
    expected = (x_T.shape[0], process.steps - 1, *x_T.shape[1:])
    if keys.shape != expected:
        raise UserError(
            f"noise of the steps: got shape {keys.shape}, expected {expected}, one for each of"
            f" {process.steps} steps but the last"
        )
    # The last step, i = 0, adds nothing, whatever is looked up for it.
    return lambda i: jnp.take(keys, process.steps - 1 - i, axis=1, mode="clip")


# --------------------------------------------------------------------------------- solvers


def _solver(
    process: Process,
    diffusion: Diffusion,
    sampling: Sampling,
    eta: float | jax.Array,
    analytic: jax.Array | None,
) -> _Advance:
    """The step of one method: (x_t, memory, prediction, i, noise) -> (x_{t-1}, memory)."""
    if isinstance(eta, int | float):
        if not 0 <= eta <= 1:
            raise UserError(f"eta={eta!r}: expected 0 (deterministic) to 1 (DDPM's variance)")
        if eta and sampling.method != "ddim":
            raise UserError(
                f'eta={eta!r}: Sampling.method={sampling.method!r} has no eta; use method="ddim"'
            )
    if sampling.method == "dpm++":
        return _dpm_solver(process)
    if sampling.method == "ddim":
        return _ddim(process, eta)
    if sampling.method == "ddpm":
        return _ancestral(process, None)
    if analytic is None or analytic.shape != (diffusion.steps,):
        found = "none" if analytic is None else f"shape {analytic.shape}"
        raise UserError(
            f"analytic statistic: got {found}, expected shape ({diffusion.steps},) from "
            'losses.analytic_statistic for method="analytic"'
        )
    kept = jnp.asarray(analytic, jnp.float32)[process.timesteps]
    return _ancestral(
        process, analytic_variance(process, kept, sampling.clip_x_0, sampling.last_noise)
    )


def _ancestral(process: Process, variance: jax.Array | None) -> _Advance:
    """Ho et al. 2020, algorithm 2; `variance` `[n]` replaces the predicted one."""

    def advance(x_t, memory, prediction, i, noise):
        mean, _, _ = q_posterior(process, prediction.x_0, x_t, i)
        used = jnp.exp(prediction.log_variance) if variance is None else variance[i]
        return mean + jnp.where(i > 0, jnp.sqrt(used), 0.0) * noise(), memory

    return advance


def _ddim(process: Process, eta: float | jax.Array) -> _Advance:
    """Song et al. 2021, eq. 12; a plain eta of 0 draws no noise."""
    # 1 - alpha_bar_prev - beta_tilde eta^2, factored so that nothing cancels near alpha_bar = 1.
    share = process.betas / process.sqrt_one_minus_alpha_bar**2
    deterministic = isinstance(eta, int | float) and eta == 0
    eta = jnp.asarray(eta, jnp.float32)

    def advance(x_t, memory, prediction, i, noise):
        direction = at(process.sqrt_one_minus_alpha_bar_prev, i, x_t) * jnp.sqrt(
            jnp.maximum(1.0 - eta**2 * at(share, i, x_t), 0.0)
        )
        mean = at(process.sqrt_alpha_bar_prev, i, x_t) * prediction.x_0
        mean += direction * prediction.eps
        if deterministic:
            return mean, memory
        std = eta * jnp.sqrt(at(process.posterior_variance, i, x_t))
        return mean + std * noise(), memory

    return advance


def _dpm_solver(process: Process) -> _Advance:
    """DPM-Solver++(2M), Lu et al. 2022, algorithm 2, bounded; the memory is the last x_0."""
    log_ratio = process.log_snr.astype(np.float64) / 2  # lambda
    h = np.append(np.inf, log_ratio[:-1]) - log_ratio
    weight = np.zeros_like(h)
    weight[1:-1] = np.minimum(h[1:-1] / h[2:], 1) / 2  # first order at both ends
    shrink = process.sqrt_one_minus_alpha_bar_prev / process.sqrt_one_minus_alpha_bar
    gain = process.sqrt_alpha_bar_prev * -np.expm1(-h)
    weight, gain = weight.astype(np.float32), gain.astype(np.float32)

    def advance(x_t, memory, prediction, i, noise):
        x_0 = prediction.x_0
        data = x_0 + at(weight, i, x_t) * (x_0 - memory)
        return at(shrink, i, x_t) * x_t + at(gain, i, x_t) * data, x_0

    return advance


# ------------------------------------------------------------------------ analytic variance


def analytic_variance(
    process: Process, statistic: jax.Array, clip_x_0: float = 0.0, last_noise: float = 0.0
) -> jax.Array:
    """Optimal variance of p(x_{t-1} | x_t), float32 `[n]` (Bao et al. 2022, arXiv 2201.06503).

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
    variance = process.posterior_variance + process.posterior_mean_x_0**2 * statistic
    if last_noise:
        variance = variance.at[1:2].min(last_noise**2 * math.pi / 2)
    return variance
