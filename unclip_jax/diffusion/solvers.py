"""Solvers: what one step of each method of `samplers` does.

To add one, write a function that takes a `Setting` and returns a `Solver`, and give it a name in
`METHODS`: `Sampling(method=NAME)` then takes it, and nothing else needs to know. A step is

    step(x_t, memory, ask, i, noise) -> (x at step i - 1, memory)

`x_t`, float32 `[b, ...]`, stands at step i of the process. i is traced and falls to 0, after which
comes x_0. `ask(x, i)` asks the network at step i, as often as the method needs, and returns a
`Prediction` (x_0, eps, log_variance), guided and clipped; `ask(x, j, other)` asks at step j of
another `Process`, for methods that look between the timesteps. `memory`, any pytree, is what a step
leaves to the next; the first finds `Solver.memory(x_T)`. `noise()` draws standard normal noise of
x_t's shape; no method adds any in its last step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.diffusion import analytic
from unclip_jax.diffusion.gaussian import Diffusion, Prediction, at, q_posterior, q_sample
from unclip_jax.diffusion.grids import Spacing
from unclip_jax.diffusion.schedules import Process
from unclip_jax.errors import wrong

Ask = Callable[..., Prediction]
Noise = Callable[[], jax.Array]


class Solver(NamedTuple):
    """One method, made for one walk: its step, and what the first step finds in memory."""

    step: Callable[[jax.Array, Any, Ask, jax.Array, Noise], tuple[jax.Array, Any]]
    memory: Callable[[jax.Array], Any] = lambda x_T: ()


class Setting(NamedTuple):
    """What a solver is made for: a walk, and the options of `Sampling` and `samplers.sample`."""

    diffusion: Diffusion
    process: Process
    spacing: Spacing = ""
    clip_x_0: float = 0.0
    last_noise: float = 0.0
    eta: float | jax.Array = 0.0
    analytic: jax.Array | None = None


def ddpm(setting: Setting) -> Solver:
    """p(x_{i-1} | x_i) = N(posterior mean at the predicted x_0, variance); Ho et al. 2020, alg. 2.

    With whatever variance the network was trained for.
    """
    return _ancestral(setting.process, lambda prediction, i: jnp.exp(prediction.log_variance))


def analytic_dpm(setting: Setting) -> Solver:
    """The same with the optimal variance, which matters in few steps; see `analytic.variance`."""
    process, found, steps = setting.process, setting.analytic, setting.diffusion.steps
    if found is None or found.shape != (steps,):
        shape = None if found is None else found.shape
        expected = f'({steps},) from analytic.statistic for method="analytic"'
        raise wrong("analytic statistic's shape", shape, expected)
    kept = jnp.asarray(found, jnp.float32)[process.timesteps]
    variance = analytic.variance(process, kept, setting.clip_x_0, setting.last_noise)
    return _ancestral(process, lambda prediction, i: variance[i])


def _ancestral(process: Process, variance: Callable[[Prediction, jax.Array], jax.Array]) -> Solver:
    def step(x_t, memory, ask, i, noise):
        prediction = ask(x_t, i)
        mean, _, _ = q_posterior(process, prediction.x_0, x_t, i)
        std = jnp.where(i > 0, jnp.sqrt(variance(prediction, i)), 0.0)
        return mean + std * noise(), memory

    return Solver(step)


def ddim(setting: Setting) -> Solver:
    """Song et al. 2021 (arXiv 2010.02502), eq. 12.

    Goes to alpha_prev x_0 + sqrt(sigma_prev^2 - s^2) eps + s z, with alpha = sqrt(alpha_bar),
    sigma = sqrt(1 - alpha_bar) and s = eta sqrt(beta_tilde). With eta = 0 it is an ordinary
    differential equation, which `ddim_inverse` follows the other way; a plain 0 draws no noise.
    """
    process, eta = setting.process, jnp.asarray(setting.eta, jnp.float32)
    deterministic = not isinstance(setting.eta, jax.core.Tracer) and setting.eta == 0
    # 1 - alpha_bar_prev - beta_tilde eta^2, factored so that nothing cancels near alpha_bar = 1.
    share = process.betas / process.sqrt_one_minus_alpha_bar**2

    def step(x_t, memory, ask, i, noise):
        prediction = ask(x_t, i)
        direction = at(process.sqrt_one_minus_alpha_bar_prev, i, x_t) * jnp.sqrt(
            jnp.maximum(1.0 - eta**2 * at(share, i, x_t), 0.0)
        )
        mean = at(process.sqrt_alpha_bar_prev, i, x_t) * prediction.x_0
        mean += direction * prediction.eps
        if deterministic:
            return mean, memory
        std = eta * jnp.sqrt(at(process.posterior_variance, i, x_t))
        return mean + std * noise(), memory

    return Solver(step)


def ddim_inverse(setting: Setting) -> Solver:
    """x_i = alpha_i x_0 + sigma_i eps, both predicted at the next cleaner step i - 1.

    Dhariwal & Nichol 2021, appendix F. Before the first step, x is x_0 itself.
    """

    def step(x, memory, ask, i, noise):
        prediction = ask(x, jnp.maximum(i - 1, 0))
        clean = jnp.where(i == 0, x, prediction.x_0)
        return q_sample(setting.process, clean, i, prediction.eps), memory

    return Solver(step)


def dpm_solver(setting: Setting) -> Solver:
    """DPM-Solver++(2M), Lu et al. 2022 (arXiv 2211.01095), algorithm 2, bounded.

    With lambda = log(alpha/sigma) and h = lambda_prev - lambda it solves DDIM's equation to second
    order; the memory is the x_0 before:

        x_prev = (sigma_prev/sigma) x - alpha_prev (exp(-h) - 1) D,
        D = x_0 + w (x_0 - x_0_before),      w = min(h / h_before, 1) / 2.

    The first step has no step before it and the last one ends at lambda = infinity, so both are of
    first order (w = 0); the last therefore returns the network's x_0. The published w has no bound.
    But evenly spaced timesteps end with a step in lambda several times longer than the one before,
    over which a straight line through two points is no guide. The bound keeps the order and, with 5
    to 40 steps on a mixture of Gaussians, cuts the error three- to tenfold.
    """
    process = setting.process
    log_ratio = process.log_snr.astype(np.float64) / 2  # lambda
    h = np.append(np.inf, log_ratio[:-1]) - log_ratio
    weight = np.zeros_like(h)
    weight[1:-1] = np.minimum(h[1:-1] / h[2:], 1) / 2  # first order at both ends
    shrink = process.sqrt_one_minus_alpha_bar_prev / process.sqrt_one_minus_alpha_bar
    gain = process.sqrt_alpha_bar_prev * -np.expm1(-h)
    weight, gain = weight.astype(np.float32), gain.astype(np.float32)

    def step(x_t, memory, ask, i, noise):
        x_0 = ask(x_t, i).x_0
        data = x_0 + at(weight, i, x_t) * (x_0 - memory)
        return at(shrink, i, x_t) * x_t + at(gain, i, x_t) * data, x_0

    return Solver(step, memory=lambda x_T: x_T)


class Method(NamedTuple):
    """What `Sampling.method` names.

    Attributes:
        make: the solver.
        inverse: a solver whose step i goes the other way, from step i - 1 (data, where i is 0) to
            step i, i rising; None for a method that adds noise, to which there is no way back.
        uses: the options of `Setting` that it looks at and not every method does.
    """

    make: Callable[[Setting], Solver]
    inverse: Callable[[Setting], Solver] | None = None
    uses: tuple[str, ...] = ()


METHODS = {
    "ddpm": Method(ddpm),
    "ddim": Method(ddim, ddim_inverse, uses=("eta",)),
    "dpm++": Method(dpm_solver, ddim_inverse),
    "analytic": Method(analytic_dpm, uses=("analytic", "last_noise")),
}


def check_used(field: str, value: Any, option: str, method: str) -> None:
    """Raise `UserError` where an option has a value that the method would not look at."""
    users = [name for name, found in METHODS.items() if option in found.uses]
    if value and method not in users:
        choices = " or ".join(f'method="{name}"' for name in users)
        raise wrong(field, value, f"0 for Sampling.method={method!r}", f"use {choices}")
