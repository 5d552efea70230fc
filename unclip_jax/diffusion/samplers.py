"""Samplers: pure functions of `denoise(x_t, t)`, each compiled as one loop.

A sampler walks a `Process` from its noisiest step to x_0. At step i it asks the network, reads the
answer as (x_0, eps, variance), and forms x_{i-1}; how, `solvers` says for each method. The state is
float32 whatever the network computes in (float64 where x_T is, which takes jax_enable_x64).
Guidance is not the samplers' business: `guidance` wraps a network into another `denoise`.

    x_0 = sample(denoise, x_T, jax.random.key(0), Diffusion(prediction="v"), steps=20)

The state is an array `[b, ...]`, or any pytree of such arrays, which the network then takes and
returns. Each example has its own key, folded with the step's number, so that a sample depends on
its key and inputs and, but for rounding, never on its neighbours in the batch (with JAX's default
threefry keys).
Call these functions inside `jax.jit`: methods and steps are static there, eta, guidance scale
and analytic statistics may be traced, so that a new value compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.common import checks
from unclip_jax.diffusion.gaussian import (
    Denoise,
    Diffusion,
    Prediction,
    at,
    interpret,
    normal,
    state_dtype,
)
from unclip_jax.diffusion.progress import Loop, whole
from unclip_jax.diffusion.schedules import Process
from unclip_jax.diffusion.solvers import METHODS, ONE_STEP, WITHOUT_MEMORY, Ask, Setting, check_used
from unclip_jax.diffusion.states import Packing, key_each
from unclip_jax.diffusion.walks import Grid as Grid
from unclip_jax.diffusion.walks import Sampling, chosen
from unclip_jax.diffusion.walks import grid_of as grid_of
from unclip_jax.errors import UserError, wrong


def sample(
    denoise: Denoise,
    x_T: Any,
    keys: jax.Array | None,
    diffusion: Diffusion,
    sampling: Sampling | None = None,
    *,
    steps: Any = None,
    noise: Any = None,
    eta: float | jax.Array = 0.0,
    analytic: jax.Array | None = None,
    first: int | jax.Array | None = None,
    grid: Grid | None = None,
    return_trajectory: bool = False,
    remat: bool = False,
    loop: Loop = whole,
) -> Any:
    """Walk from noise to data, or from somewhere on the way.

    Args:
        denoise: the network, perhaps wrapped in guidance.
        x_T: standard normal noise `[b, ...]`, such as `normal(keys, shape)`, whatever the process:
            one of sigmas begins with sigma_max times it. Or a pytree of such arrays.
        keys: for the noise of the steps: one key, which is split, or one for each example `[b]`;
            typed or legacy; other keys than made `x_T`. None with `noise`, or for a method that
            can be inverted, which draws none.
        diffusion: what the network was trained to do.
        sampling: method, steps and clipping; None for DPM-Solver++(2M) in 20 steps.
        steps: in place of the spacing of `sampling`, anything that a spacing may be.
        noise: what the steps add, instead of keys: float `[b, steps - 1, ...]`, the noisiest
            step's first; a pytree of such where x_T is one.
        eta: DDIM's noise, 0 (deterministic) to 1 (DDPM's variance), of any numeric type; may be
            traced, and is then not checked: other methods ignore it.
        analytic: float `[diffusion.steps]` from `analytic.statistic`; other methods than
            "analytic" ignore it.
        first: how many of the noisiest steps to leave out, 0 to all; may be traced, so that another
            number compiles nothing. x_T is then the state that the next step begins with, as
            `noised` or `invert` makes it; 0 is the noisiest step's. For methods without memory.
        grid: times in place of the spacing's, from `grid_of` a spacing with as many. An argument of
            the function that is jitted, so that other times compile nothing.
        return_trajectory: whether to return every state besides, which then is kept.
        remat: whether a gradient computes each step again instead of keeping what it made: the
            memory of one step and of the states, for one more forward pass.
        loop: what does the steps; `progress.Watchable` passes one that a host can watch.

    Returns:
        x_0, float32 `[b, ...]`, float64 where x_T is; a pytree where x_T is one. With
        `return_trajectory`, x_0 and the states `[steps + 1, b, ...]` from x_T to x_0.

    Raises:
        UserError: keys, noise, eta, spacing, the statistic or the network's output do not fit.
    """
    sampling = chosen(diffusion, sampling, steps, "dpm++", 20)
    packing = Packing(x_T)
    denoise = packing.packed(denoise, diffusion.learned_variance)
    x_T = packing.pack(x_T, "x_T")
    noise = None if noise is None else packing.pack(noise, "noise", axes=2)
    if not isinstance(eta, jax.core.Tracer):
        eta = checks.number("eta", eta, least=0, most=1)
        check_used("eta", eta, "eta", sampling.method)
    process = diffusion.process(sampling.spacing, state_dtype(x_T))
    given = None
    if grid is not None:
        process, given = grid.checked(diffusion, sampling, process), iter(grid.tables)
    silent = METHODS[sampling.method].inverse and not isinstance(eta, jax.core.Tracer) and not eta
    draw = _noise_of_steps(process, x_T, keys, noise, bool(silent))
    options = sampling.clip_x_0, sampling.last_noise, eta, analytic
    setting = Setting(diffusion, process, sampling.spacing, *options, given)
    solver = METHODS[sampling.method].make(setting)
    limits = sampling.clip_x_0, sampling.dynamic_percentile, sampling.dynamic_most
    ask = asking(denoise, diffusion, process, limits)

    def step(n: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        i = process.steps - 1 - n  # the noisiest first
        return solver.step(*carry, ask, i, lambda: draw(i))

    step = jax.checkpoint(step, prevent_cse=False) if remat else step
    start = x_T.astype(state_dtype(x_T)) * (diffusion.noise_std if first is None else 1.0)
    carry = start, solver.memory(start)
    if first is not None:
        first, every = _left_out(first, process, sampling, carry[1]), step
        step = lambda n, carry: jax.lax.cond(n < first, lambda _, c: c, every, n, carry)  # noqa: E731
    if not return_trajectory:
        return packing.unpack(loop(step, carry, process.steps)[0])

    x_0, states = _with_states(step, carry, process.steps, loop)
    return packing.unpack(x_0), packing.unpack(states, axes=2)


def _with_states(
    step: Callable[[jax.Array, Any], Any], carry: tuple[jax.Array, Any], steps: int, loop: Loop
) -> tuple[jax.Array, jax.Array]:
    """Where so many steps lead from a carry, and every state on the way `[steps + 1, b, ...]`."""

    def kept(n: jax.Array, carry: tuple[tuple[jax.Array, Any], jax.Array]) -> tuple[Any, jax.Array]:
        states, carry = carry[1], step(n, carry[0])
        return carry, states.at[n + 1].set(carry[0])

    states = jnp.broadcast_to(carry[0][None], (steps + 1, *carry[0].shape))
    (x_0, _), states = loop(kept, (carry, states), steps)
    return x_0, states


def invert(
    denoise: Denoise,
    x_0: Any,
    diffusion: Diffusion,
    sampling: Sampling | None = None,
    loop: Loop = whole,
    *,
    steps: Any = None,
    first: int | jax.Array | None = None,
    iterations: int = 0,
) -> Any:
    """Inversion: the noise x_T from which a deterministic method returns to `x_0`.

    Follows the method's equation from data to noise (Dhariwal & Nichol 2021, appendix F; section 3
    of the unCLIP paper). Its error falls as the number of steps grows. Nothing is clipped, since
    clipping cannot be undone.

    Args:
        denoise: the network; use the condition that decoding will use, without guidance.
        x_0: float `[b, ...]`, or a pytree of such arrays.
        diffusion: what the network was trained to do.
        sampling: its spacing gives the steps; a method without noise. None for "ddim" in 50 steps.
        loop: as in `sample`.
        steps: in place of the spacing of `sampling`.
        first: stop where `sample` begins with the same `first`. Methods with memory are as good
            here as the others.
        iterations: 0 follows the equation, and returns to x_0 the better the more steps there are.
            So many fixed-point iterations a step look for the x that the method's own step leads
            back, so that `sample` returns to x_0 in few steps too (as in AIDI, arXiv 2309.04907);
            it converges where the network's eps changes little over a step, in 5 to 30 iterations.
            For methods without memory: "ddim", "euler", "rf_euler", "heun", "dpm2".

    Returns:
        x_T, float32 `[b, ...]`, or a pytree of such arrays, as `sample` takes it.

    Raises:
        UserError: the method adds noise, so that there is no way back; or it has a memory, and
            iterations are asked for.
    """
    sampling = chosen(diffusion, sampling, steps, "ddim", 50)
    packing = Packing(x_0)
    denoise = packing.packed(denoise, diffusion.learned_variance)
    x_0 = packing.pack(x_0, "x_0")
    inverse = METHODS[sampling.method].inverse
    if inverse is None:
        expected = "one without noise: it adds noise and cannot be inverted"
        raise wrong("Sampling.method", sampling.method, expected, 'use method="ddim"')
    process = diffusion.process(sampling.spacing, state_dtype(x_0))
    setting = Setting(diffusion, process, sampling.spacing)
    solver, forward = inverse(setting), METHODS[sampling.method].make(setting)
    if checks.count("iterations", iterations, least=0) and jax.tree.leaves(forward.memory(x_0)):
        names = " or ".join(f'"{name}"' for name in ONE_STEP)
        expected = f"0 for Sampling.method={sampling.method!r}, whose steps remember others"
        raise wrong("iterations", iterations, expected, f"use {names}")
    # How much wider x is at a level than at the one before, for data of deviation 1.
    wider = np.hypot(process.alpha, process.sigma) / np.hypot(
        process.alpha_prev, process.sigma_prev
    )
    ask = asking(denoise, diffusion, process)

    def step(i: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        x, memory = solver.step(*carry, ask, i, None)

        def nearer(_: int, x: jax.Array) -> jax.Array:
            missed = carry[0] - forward.step(x, (), ask, i, None)[0]
            return x + at(wider, i, x) * missed

        return jax.lax.fori_loop(0, iterations, nearer, x) if iterations else x, memory

    start = x_0.astype(state_dtype(x_0))
    carry = start, solver.memory(start)
    if first is None:
        x_T, _ = loop(step, carry, process.steps)
        return packing.unpack(x_T / diffusion.noise_std)
    last = process.steps - _left_out(first, process, sampling)
    some = lambda i, carry: jax.lax.cond(i < last, step, lambda _, c: c, i, carry)  # noqa: E731
    return packing.unpack(loop(some, carry, process.steps)[0])


def noised(
    x_0: Any,
    noise: Any,
    diffusion: Diffusion,
    sampling: Sampling | None = None,
    *,
    steps: Any = None,
    first: int | jax.Array = 0,
) -> Any:
    """q(x_t | x_0) where `sample` begins with the same `first`: what an edit of x_0 starts from.

    Args:
        x_0: float `[b, ...]`, or a pytree of such arrays.
        noise: standard normal, of the same shapes, such as `normal(keys, shape)`.
        diffusion: what the network was trained to do.
        sampling: as in `sample`.
        steps: as in `sample`.
        first: how many of the noisiest steps are left out; may be traced. All of them leave x_0.

    Raises:
        UserError: a spacing or a number of steps that is not there, or shapes that differ.
    """
    sampling = chosen(diffusion, sampling, steps, "dpm++", 20)
    packing = Packing(x_0)
    x_0, noise = packing.pack(x_0, "x_0"), packing.pack(noise, "noise")
    checks.shape("noise", noise, x_0.shape)
    process = diffusion.process(sampling.spacing, state_dtype(x_0))
    i = process.steps - _left_out(first, process, sampling)
    alpha = np.append(process.alpha_prev[:1], process.alpha)
    sigma = np.append(process.sigma_prev[:1], process.sigma)
    return packing.unpack(at(alpha, i, x_0) * x_0 + at(sigma, i, x_0) * noise)


def _left_out(
    first: int | jax.Array, process: Process, sampling: Sampling, memory: Any = ()
) -> jax.Array:
    """How many steps to leave out, int32; UserError where that is no number of them."""
    if jax.tree.leaves(memory):
        field, names = (
            f"first, for Sampling.method={sampling.method!r}",
            " or ".join(WITHOUT_MEMORY),
        )
        expected = "none: its steps remember those that would be left out"
        raise wrong(field, first, expected, f"use {names}, or a spacing of the times that are left")
    if not isinstance(first, jax.core.Tracer):
        first = checks.count("first", first, least=0)
        if first > process.steps:
            raise wrong("first", first, f"0 to {process.steps}, the number of steps")
    return jnp.asarray(first, jnp.int32)


def asking(
    denoise: Denoise,
    diffusion: Diffusion,
    walked: Process,
    limits: tuple[float, ...] = (),
) -> Ask:
    """Call the network at the original timestep of a step, and read its output."""

    def ask(x: jax.Array, i: jax.Array, process: Process = walked) -> Prediction:
        output = denoise(x, jnp.full(x.shape[:1], jnp.asarray(process.timesteps)[i]))
        return interpret(diffusion, process, output, x, i, *limits)

    return ask


def _noise_of_steps(
    process: Process,
    x_T: jax.Array,
    keys: jax.Array | None,
    noise: jax.Array | None,
    silent: bool,
) -> Callable[[jax.Array], jax.Array]:
    """`draw(i)`, the noise that step i adds: drawn from keys, or looked up where it is given.

    Neither is needed of a silent method, which adds none.
    """
    if silent and keys is None and noise is None:
        return lambda i: jnp.zeros_like(x_T)
    if (keys is None) == (noise is None):
        found = "neither" if keys is None else "both"
        raise UserError(f"keys and noise: got {found}, expected one of them")
    if noise is None:
        keys = key_each(keys, x_T.shape[0])
        return lambda i: normal(jax.vmap(jax.random.fold_in, (0, None))(keys, i), x_T.shape[1:])
    checks.shape("noise", noise, (x_T.shape[0], process.steps - 1, *x_T.shape[1:]))
    # The last step, i = 0, adds nothing, whatever is looked up for it.
    return lambda i: jnp.take(noise, process.steps - 1 - i, axis=1, mode="clip")
