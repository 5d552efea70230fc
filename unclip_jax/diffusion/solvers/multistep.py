"""Solvers with memory: one call a step, and the answers of the steps before."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from unclip_jax.diffusion.gaussian import at, q_sample
from unclip_jax.diffusion.grids import even_in_time
from unclip_jax.diffusion.schedules import Process
from unclip_jax.diffusion.solvers.base import Setting, Solver, line, path


def _log_steps(process: Process, before: int) -> list[np.ndarray]:
    """h = lambda_prev - lambda of each step, and of the steps before it; infinite where none is."""
    lam = process.log_snr.astype(np.float64) / 2
    h = np.append(np.append(np.inf, lam[:-1]) - lam, np.full(before, np.inf))
    return [h[k : k + len(lam)] for k in range(before + 1)]


def dpm_solver(setting: Setting) -> Solver:
    """DPM-Solver++(2M), Lu et al. 2022 (arXiv 2211.01095), algorithm 2.

    With h = lambda_prev - lambda it solves DDIM's equation to second order; the memory is the x_0
    before:

        x_prev = (sigma_prev/sigma) x - alpha_prev (exp(-h) - 1) D,
        D = x_0 + w (x_0 - x_0_before),      w = h / h_before / 2.

    The first step has no step before it and the last one ends at lambda = infinity, so both are of
    first order (w = 0); the last therefore returns the network's x_0.

    On whole timesteps that are even in t, w is at most 1/2. There the walk ends with a step in
    lambda several times longer than the one before, over which a straight line through two points
    is no guide: with 5 to 40 steps on a mixture of Gaussians the bound cuts the error three- to
    tenfold. Beyond about 80 steps the rounding of timesteps makes h jump, the bound cuts what it
    should not, and the order is lost: on a Gaussian the error is 1.2e-4 at 160 steps and 1.0e-4 at
    320, where the published w goes from 1.9e-4 to 4.8e-5. Every other grid has the published w.
    """
    process = setting.host
    h, h_before = _log_steps(process, 1)
    whole = setting.diffusion.noise.family == "betas" and not setting.diffusion.continuous
    most = 1.0 if whole and even_in_time(setting.spacing) else np.inf
    weight = np.zeros_like(h)
    weight[1:-1] = np.minimum(h[1:-1] / h_before[1:-1], most) / 2  # first order at both ends
    shrink = process.sigma_prev / process.sigma
    gain = process.alpha_prev * -np.expm1(-h)
    shrink, weight, gain = (setting.table(table) for table in (shrink, weight, gain))

    def step(x_t, memory, ask, i, noise):
        x_0 = ask(x_t, i).x_0
        data = x_0 + at(weight, i, x_t) * (x_0 - memory)
        return at(shrink, i, x_t) * x_t + at(gain, i, x_t) * data, x_0

    return Solver(step, memory=lambda x_T: x_T)


def dpm_solver_sde(setting: Setting) -> Solver:
    """DPM-Solver++(2M) SDE, k-diffusion's `sample_dpmpp_2m_sde` (midpoint) with eta = 1.

    x_prev = (sigma_prev/sigma) exp(-h) x + alpha_prev (1 - exp(-2h)) D
             + sigma_prev sqrt(1 - exp(-2h)) z,             D as in `dpm_solver`, unbounded
    """
    h, h_before = _log_steps(setting.exact, 1)
    with np.errstate(invalid="ignore"):  # from no signal at all, the first step has no history
        weight = np.append(0.0, np.nan_to_num(h[1:] / h_before[1:] / 2))
    return _sde(setting, h, [setting.exact.alpha_prev * -np.expm1(-2 * h) * weight])


def dpm_solver_3m_sde(setting: Setting) -> Solver:
    """DPM-Solver++(3M) SDE, k-diffusion's `sample_dpmpp_3m_sde` with eta = 1: two x_0 before."""
    h, first, second = _log_steps(setting.exact, 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        r_0, r_1 = first / h, second / h
        phi_2 = np.expm1(-2 * h) / (2 * h) + 1
        phi_3 = phi_2 / (2 * h) - 0.5
        near = np.where(np.isinf(first), 0.0, r_0 / (r_0 + r_1))
        newest = (phi_2 * (1 + near) - phi_3 / (r_0 + r_1)) / r_0
        older = (phi_3 / (r_0 + r_1) - phi_2 * near) / r_1
        newest, older = (np.nan_to_num(weight) for weight in (newest, older))
    newest[0] = older[0] = 0.0  # the last step returns x_0
    return _sde(setting, h, [setting.exact.alpha_prev * w for w in (newest, older)])


def _sde(setting: Setting, h: np.ndarray, weights: list[np.ndarray]) -> Solver:
    """The exact step for a constant x_0, and weights of the differences of the x_0 before."""
    exact = setting.exact
    shrink = setting.table(exact.sigma_prev / exact.sigma * np.exp(-h))
    gain = setting.table(exact.alpha_prev * -np.expm1(-2 * h))
    std = setting.table(exact.sigma_prev * np.sqrt(-np.expm1(-2 * h)))
    weights = [setting.table(weight) for weight in weights]

    def step(x_t, memory, ask, i, noise):
        known = (ask(x_t, i).x_0, *memory)
        mean = at(shrink, i, x_t) * x_t + at(gain, i, x_t) * known[0]
        for weight, new, old in zip(weights, known, known[1:], strict=False):
            mean += at(weight, i, x_t) * (new - old)
        return mean + at(std, i, x_t) * noise(), known[:-1]

    return Solver(step, memory=lambda x_T: (x_T,) * len(weights))


def lms(setting: Setting) -> Solver:
    """Linear multistep, k-diffusion's `sample_lms`: Adams-Bashforth of order 4 on any grid.

    The polynomial through the last four slopes, integrated over the step; fewer at the beginning.
    """
    process, way = setting.process, path(setting, setting.exact)
    nodes, gauss = np.polynomial.legendre.leggauss(2)  # exact for a cubic
    weights = np.zeros((4, process.steps))
    for i, (start, end) in enumerate(zip(way.tau, way.tau_prev, strict=True)):
        known = way.tau[i : i + 4]
        tau = (start + end) / 2 + (end - start) / 2 * nodes
        for j, own in enumerate(known):
            others = np.delete(known, j)[:, None]
            basis = np.prod((tau - others) / (own - others), axis=0)
            weights[j, i] = way.scale_prev[i] * (end - start) / 2 * (gauss @ basis)
    weights = [setting.table(weight) for weight in weights[1:]]

    def step(x_t, memory, ask, i, noise):
        here = ask(x_t, i)
        slope, x = way.slope(here), line(process, here, i, x_t)
        for weight, old in zip(weights, memory, strict=True):
            x += at(weight, i, x_t) * (old - slope)
        return x, (slope, *memory[:-1])

    return Solver(step, memory=lambda x_T: (x_T,) * 3)


def unipc(setting: Setting, order: int = 3) -> Solver:
    """UniPC, Zhao et al. 2023 (arXiv 2302.04867), predicting x_0, with B(h) = e^h - 1.

    Each call of the network first corrects the step that led to it, and then predicts the next; the
    first and last steps have a lower order, as in diffusers.
    """
    exact, n = setting.exact, setting.process.steps
    lam = exact.log_snr / 2
    (h,) = _log_steps(exact, 0)
    shrink = setting.table(exact.sigma_prev / exact.sigma)
    gain = setting.table(exact.alpha_prev * -np.expm1(-h))
    ahead, back, newest = np.zeros((order, n)), np.zeros((order, n)), np.zeros(n)
    for i in range(1, n):
        used = min(order, 1 + int(np.isfinite(lam[i + 1 :]).sum()), i + 1)
        if np.isfinite(lam[i]):
            r = np.append((lam[i + 1 : i + used] - lam[i]) / h[i], 1.0)
            predict, correct = _unipc_weights(r, h[i])
            size = exact.alpha_prev[i] * -np.expm1(-h[i])
            ahead[1:used, i] = size * predict / r[:-1]
            back[1:used, i] = size * correct[:-1] / r[:-1]
            newest[i] = size * correct[-1]
    ahead, back = ([setting.table(row) for row in rows[1:]] for rows in (ahead, back))
    newest = setting.table(newest)

    def move(x, i, x_0, before, weights):
        x = at(shrink, i, x) * x + at(gain, i, x) * x_0
        pairs = zip(weights, before, strict=False)
        return x + sum(at(weight, i, x) * (old - x_0) for weight, old in pairs)

    def step(x_t, memory, ask, i, noise):
        start, known = memory
        x_0, j = ask(x_t, i).x_0, jnp.minimum(i + 1, n - 1)
        mended = move(start, j, known[0], known[1:], back) + at(newest, j, x_t) * (x_0 - known[0])
        x = jnp.where(i < n - 1, mended, x_t)
        return move(x, i, x_0, known, ahead), (x, (x_0, *known[:-1]))

    return Solver(step, memory=lambda x_T: (x_T, (x_T,) * order))


def _unipc_weights(r: np.ndarray, h: float) -> tuple[np.ndarray, np.ndarray]:
    """Of the differences at lambda + r h, the last r being 1: predictor `[p - 1]`, corrector `[p]`.

    They solve sum_k w_k r_k^(m-1) = b_m (eqs. 4 to 8); with one unknown 1/2 is taken, as there.
    """
    p, phi, factorial, b = len(r), np.expm1(-h) / -h - 1, 1, []
    for m in range(1, p + 1):
        b.append(phi * factorial / np.expm1(-h))
        factorial *= m + 1
        phi = phi / -h - 1 / factorial
    powers = np.vander(r, p, increasing=True).T
    half = np.array([0.5])
    predict = np.linalg.solve(powers[:-1, :-1], b[:-1]) if p > 2 else half[: p - 1]
    return predict, np.linalg.solve(powers, b) if p > 1 else half


def multistep_inverse(setting: Setting) -> Solver:
    """`dpm_solver`'s step from level i - 1 to i, of second order from the third level on."""
    process, exact = setting.process, setting.exact
    lam = exact.log_snr / 2
    h = np.append(-np.inf, np.diff(lam))
    weight = np.zeros_like(h)
    weight[2:] = np.where(np.isinf(h[2:]), 0.0, h[2:] / h[1:-1] / 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        grow = exact.sigma / exact.sigma_prev
        gain = exact.alpha - exact.alpha_prev * grow
    grow[0] = gain[0] = 0.0
    weight, grow, gain = (setting.table(table) for table in (weight, grow, gain))

    def step(x, memory, ask, i, noise):
        prediction = ask(x, jnp.maximum(i - 1, 0))
        data = prediction.x_0 + at(weight, i, x) * (prediction.x_0 - memory)
        moved = at(grow, i, x) * x + at(gain, i, x) * data
        return jnp.where(i == 0, q_sample(process, x, i, prediction.eps), moved), prediction.x_0

    return Solver(step, memory=lambda x_0: x_0)
