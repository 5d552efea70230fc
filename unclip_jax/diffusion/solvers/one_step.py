"""Solvers without memory: ancestral sampling, DDIM, and those that ask twice a step."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.diffusion import analytic
from unclip_jax.diffusion.gaussian import Prediction, at, q_posterior, q_sample
from unclip_jax.diffusion.schedules import Process, times_of
from unclip_jax.diffusion.solvers.base import Setting, Solver, line, path
from unclip_jax.errors import wrong


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
    found, times = jnp.asarray(found, jnp.float32), jnp.asarray(process.timesteps)
    if jnp.issubdtype(times.dtype, jnp.integer):
        kept = found[times]
    else:  # in logarithm, between the timesteps it was measured at
        where = setting.diffusion.share(times) * steps
        kept = jnp.exp(jnp.interp(where, jnp.arange(steps), jnp.log(found)))
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

    It is Euler's method, in x / alpha over sigma / alpha (k-diffusion's `sample_euler`) and in x
    over t of a flow alike; with eta = 1 it is k-diffusion's `sample_euler_ancestral`.
    """
    process, eta = setting.process, jnp.asarray(setting.eta, jnp.float32)
    deterministic = not isinstance(setting.eta, jax.core.Tracer) and setting.eta == 0
    # 1 - alpha_bar_prev - beta_tilde eta^2, factored so that nothing cancels near alpha_bar = 1.
    share = process.betas / process.sigma**2

    def step(x_t, memory, ask, i, noise):
        prediction = ask(x_t, i)
        direction = at(process.sigma_prev, i, x_t) * jnp.sqrt(
            jnp.maximum(1.0 - eta**2 * at(share, i, x_t), 0.0)
        )
        mean = at(process.alpha_prev, i, x_t) * prediction.x_0
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


def consistency(setting: Setting) -> Solver:
    """x_0, and noise again up to the next level (Song et al. 2023, arXiv 2303.01469, algorithm 1).

    For a network that was distilled to know x_0 in one call; k-diffusion's `sample_lcm`.
    """
    process = setting.process

    def step(x_t, memory, ask, i, noise):
        clean = at(process.alpha_prev, i, x_t) * ask(x_t, i).x_0
        return clean + at(process.sigma_prev, i, x_t) * noise(), memory

    return Solver(step)


# ------------------------------------------------------------ second order, two calls a step


def heun(setting: Setting) -> Solver:
    """Heun's method (Karras et al. 2022, arXiv 2206.00364, algorithm 1 without noise).

    The mean of the slopes at both ends of a step; the last step, which ends at x_0, has one.
    """
    process, way = setting.process, path(setting, setting.exact)
    half = setting.table(way.scale_prev * (way.tau_prev - way.tau) / 2)

    def step(x_t, memory, ask, i, noise):
        here = ask(x_t, i)

        def mend(x):
            return x + at(half, i, x) * (way.slope(ask(x, i - 1)) - way.slope(here))

        x = line(process, here, i, x_t)
        if jnp.ndim(i):  # a step of its own for each example: `consistency`
            return jnp.where(at(np.arange(process.steps) > 0, i, x), mend(x), x), memory
        return jax.lax.cond(i > 0, mend, lambda x: x, x), memory

    return Solver(step)


def dpm2(setting: Setting) -> Solver:
    """DPM-Solver-2 as in k-diffusion's `sample_dpm_2`: the slope in the middle, in log sigma.

    Where the network is given whole timesteps, the middle is the nearest one, and the slope there
    is drawn out in a straight line from the first to where the middle would be.
    """
    process, exact, noise = setting.process, setting.exact, setting.diffusion.noise
    if process.steps == 1:
        return ddim(setting)
    way = path(setting, exact)
    tau = np.sqrt(way.tau[1:] * way.tau_prev[1:])
    ratio = tau / (1 - tau) if way.flow else tau
    times = times_of(noise, setting.diffusion.steps, ratio)
    whole = np.issubdtype(process.timesteps.dtype, np.integer)
    if whole:
        kept = exact.timesteps
        times = np.clip(np.round(times), kept[:-1], kept[1:] - 1)
    middle = setting.diffusion.process(tuple(times.tolist()), np.float64)
    between = path(setting, middle)
    length = way.tau_prev[1:] - way.tau[1:]
    weight = length / (2 * (between.tau - way.tau[1:])) if whole else np.ones(len(length))
    pull = setting.table(np.append(0.0, way.scale_prev[1:] * length * weight))
    alpha, sigma = (setting.table(np.append(0.0, t)) for t in (middle.alpha, middle.sigma))
    middle = setting.diffusion.process(tuple(times.tolist()), process.alpha.dtype)
    middle = Process(*map(setting.table, middle))

    def step(x_t, memory, ask, i, noise):
        here = ask(x_t, i)

        def mend(x):
            halfway = at(alpha, i, x) * here.x_0 + at(sigma, i, x) * here.eps
            there = ask(halfway, i - 1, middle)
            return x + at(pull, i, x) * (way.slope(there) - way.slope(here))

        return jax.lax.cond(i > 0, mend, lambda x: x, line(process, here, i, x_t)), memory

    return Solver(step)


def heun_inverse(setting: Setting) -> Solver:
    """Heun's method from level i - 1 to i; to the first level from data, with eps asked there."""
    process, way = setting.process, path(setting, setting.exact)
    half = setting.table(way.scale * (way.tau - way.tau_prev) / 2)

    def step(x, memory, ask, i, noise):
        here = ask(x, jnp.maximum(i - 1, 0))
        guess = q_sample(process, jnp.where(i == 0, x, here.x_0), i, here.eps)
        there = ask(guess, i)
        mended = guess + at(half, i, x) * (way.slope(there) - way.slope(here))
        return jnp.where(i == 0, q_sample(process, x, i, there.eps), mended), memory

    return Solver(step)
