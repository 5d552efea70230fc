"""Samplers: pure functions of `denoise(x_t, t)`, each compiled as one loop.

A sampler walks a `Process` from its noisiest step to x_0. At step i it asks the network, reads the
answer as (x_0, eps, variance), and forms x_{i-1}; how, `solvers` says for each method. The state is
float32 whatever the network computes in (float64 where x_T is, which takes jax_enable_x64).
Guidance is not the samplers' business: `guidance` wraps a network into another `denoise`.

Each example has its own key, folded with the step's number, so that a sample depends on its key
and inputs and, but for rounding, never on its neighbours in the batch (with JAX's default threefry
keys).
Call these functions inside `jax.jit`: methods and steps are static there, eta, guidance scale
and analytic statistics may be traced, so that a new value compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from unclip_jax.common import checks
from unclip_jax.diffusion import grids
from unclip_jax.diffusion.gaussian import (
    Denoise,
    Diffusion,
    Prediction,
    check_keys,
    interpret,
    normal,
    state_dtype,
)
from unclip_jax.diffusion.progress import Loop, whole
from unclip_jax.diffusion.schedules import Process
from unclip_jax.diffusion.solvers import METHODS, Ask, Setting, check_used
from unclip_jax.errors import UserError, wrong


@dataclass(frozen=True)
class Sampling:
    """How to walk back from noise. Hashable: a static argument of `jax.jit`.

    Attributes:
        method: "ddpm", "ddim", "dpm++" (DPM-Solver++(2M)) or "analytic"; see `solvers`.
        spacing: which timesteps to keep: "20", 20, "karras:20", (999, 500, 0), ...; see `grids`.
            An array is kept as a tuple.
        clip_x_0: the data lies in [-clip_x_0, clip_x_0]; 0 for no clipping.
        dynamic_percentile: dynamic thresholding, in percent (Imagen: 99.5); 0 for off.
        last_noise: for "analytic", the largest mean absolute noise that the last noisy step may
            add, in the data's units (Bao et al., appendix F.2: 2/255 to 4/255 for images);
            0 for no limit.

    Raises:
        UserError: a field is out of its range.
    """

    method: str = "ddpm"
    spacing: grids.Spacing = ""
    clip_x_0: float = 0.0
    dynamic_percentile: float = 0.0
    last_noise: float = 0.0

    def __post_init__(self) -> None:
        """Check every field; how many steps there are to keep, only a `Diffusion` knows."""
        object.__setattr__(self, "spacing", grids.read(self.spacing))
        checks.choice("Sampling.method", self.method, METHODS)
        for field in ("clip_x_0", "last_noise", "dynamic_percentile"):
            value = checks.number(f"Sampling.{field}", getattr(self, field), least=0)
            object.__setattr__(self, field, value)
        if self.dynamic_percentile != 0 and not 50 <= self.dynamic_percentile <= 100:
            expected = "0 (off) or percent from 50 to 100, such as 99.5"
            raise wrong("Sampling.dynamic_percentile", self.dynamic_percentile, expected)
        check_used("Sampling.last_noise", self.last_noise, "last_noise", self.method)


def sample(
    denoise: Denoise,
    x_T: jax.Array,
    keys: jax.Array | None,
    diffusion: Diffusion,
    sampling: Sampling,
    *,
    noise: jax.Array | None = None,
    eta: float | jax.Array = 0.0,
    analytic: jax.Array | None = None,
    loop: Loop = whole,
) -> jax.Array:
    """Walk from noise to data.

    Args:
        denoise: the network, perhaps wrapped in guidance.
        x_T: standard normal noise `[b, ...]`, such as `normal(keys, shape)`, whatever the process:
            one of sigmas begins with sigma_max times it.
        keys: typed keys `[b]`, for the noise of the steps; other keys than made `x_T`. None with
            `noise`.
        diffusion: what the network was trained to do.
        sampling: method, steps and clipping.
        noise: what the steps add, instead of keys: float `[b, steps - 1, ...]`, the noisiest
            step's first.
        eta: DDIM's noise, 0 (deterministic) to 1 (DDPM's variance), of any numeric type; may be
            traced, and is then not checked: other methods ignore it.
        analytic: float `[diffusion.steps]` from `analytic.statistic`; other methods than
            "analytic" ignore it.
        loop: what does the steps; `progress.Watchable` passes one that a host can watch.

    Returns:
        x_0, float32 `[b, ...]`; float64 where x_T is.

    Raises:
        UserError: keys, noise, eta, spacing, the statistic or the network's output do not fit.
    """
    if not isinstance(eta, jax.core.Tracer):
        eta = checks.number("eta", eta, least=0, most=1)
        check_used("eta", eta, "eta", sampling.method)
    process = diffusion.process(sampling.spacing, state_dtype(x_T))
    draw = _noise_of_steps(process, x_T, keys, noise)
    options = sampling.clip_x_0, sampling.last_noise, eta, analytic
    setting = Setting(diffusion, process, sampling.spacing, *options)
    solver = METHODS[sampling.method].make(setting)
    ask = _asking(denoise, diffusion, process, sampling.clip_x_0, sampling.dynamic_percentile)

    def step(n: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        i = process.steps - 1 - n  # the noisiest first
        return solver.step(*carry, ask, i, lambda: draw(i))

    start = x_T.astype(state_dtype(x_T)) * diffusion.noise_std
    x_0, _ = loop(step, (start, solver.memory(start)), process.steps)
    return x_0


def invert(
    denoise: Denoise,
    x_0: jax.Array,
    diffusion: Diffusion,
    sampling: Sampling,
    loop: Loop = whole,
) -> jax.Array:
    """Inversion: the noise x_T from which a deterministic method returns to `x_0`.

    Follows the method's equation from data to noise (Dhariwal & Nichol 2021, appendix F; section 3
    of the unCLIP paper). Its error falls as the number of steps grows. Nothing is clipped, since
    clipping cannot be undone.

    Args:
        denoise: the network; use the condition that decoding will use, without guidance.
        x_0: float `[b, ...]`.
        diffusion: what the network was trained to do.
        sampling: its spacing gives the steps; method "ddim" or "dpm++".
        loop: as in `sample`.

    Returns:
        x_T, float32 `[b, ...]`, as `sample` takes it.

    Raises:
        UserError: the method adds noise, so that there is no way back.
    """
    inverse = METHODS[sampling.method].inverse
    if inverse is None:
        expected = "one without noise: it adds noise and cannot be inverted"
        raise wrong("Sampling.method", sampling.method, expected, 'use method="ddim"')
    process = diffusion.process(sampling.spacing, state_dtype(x_0))
    solver = inverse(Setting(diffusion, process, sampling.spacing))
    ask = _asking(denoise, diffusion, process)

    def step(i: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        return solver.step(*carry, ask, i, None)

    start = x_0.astype(state_dtype(x_0))
    x_T, _ = loop(step, (start, solver.memory(start)), process.steps)
    return x_T / diffusion.noise_std


def _asking(
    denoise: Denoise,
    diffusion: Diffusion,
    walked: Process,
    clip_x_0: float = 0.0,
    dynamic_percentile: float = 0.0,
) -> Ask:
    """Call the network at the original timestep of a step, and read its output."""

    def ask(x: jax.Array, i: jax.Array, process: Process = walked) -> Prediction:
        output = denoise(x, jnp.full(x.shape[:1], jnp.asarray(process.timesteps)[i]))
        return interpret(diffusion, process, output, x, i, clip_x_0, dynamic_percentile)

    return ask


def _noise_of_steps(
    process: Process, x_T: jax.Array, keys: jax.Array | None, noise: jax.Array | None
) -> Callable[[jax.Array], jax.Array]:
    """`draw(i)`, the noise that step i adds: drawn from keys, or looked up where it is given."""
    if (keys is None) == (noise is None):
        found = "neither" if keys is None else "both"
        raise UserError(f"keys and noise: got {found}, expected one of them")
    if noise is None:
        check_keys(keys)
        if keys.shape != x_T.shape[:1]:
            raise wrong("keys' shape", keys.shape, f"one per example of x_T: {x_T.shape[:1]}")
        return lambda i: normal(jax.vmap(jax.random.fold_in, (0, None))(keys, i), x_T.shape[1:])
    checks.shape("noise", noise, (x_T.shape[0], process.steps - 1, *x_T.shape[1:]))
    # The last step, i = 0, adds nothing, whatever is looked up for it.
    return lambda i: jnp.take(noise, process.steps - 1 - i, axis=1, mode="clip")
