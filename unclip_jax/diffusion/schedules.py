"""Noise schedules, and the processes of fewer steps that samplers walk: tables, computed once.

A schedule is the betas of every step; the products of 1 - beta are alpha_bar. Keeping a subset of
the timesteps keeps alpha_bar there, and 1 - beta becomes the ratio of neighbouring kept alpha_bar:
a shorter process of the same kind.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

import numpy as np

from unclip_jax.errors import wrong

SCHEDULES = ("cosine", "linear")

MAX_BETA = 0.999


class Process(NamedTuple):
    """Tables of one, possibly respaced, process: read-only float32 `[n]`, `timesteps` int32 `[n]`.

    Computed in float64, so that 1 - alpha_bar is exact at both ends. `_prev` is the next cleaner
    kept step, where alpha_bar_prev[0] = 1. `posterior_log_variance[0]` would be log 0; it holds
    the next step's, as in Ho et al. (and log beta if there is no next).
    """

    timesteps: np.ndarray
    betas: np.ndarray
    alpha_bar: np.ndarray
    alpha_bar_prev: np.ndarray
    sqrt_alpha_bar: np.ndarray
    sqrt_one_minus_alpha_bar: np.ndarray
    sqrt_alpha_bar_prev: np.ndarray
    sqrt_one_minus_alpha_bar_prev: np.ndarray
    log_snr: np.ndarray
    posterior_mean_x_0: np.ndarray
    posterior_mean_x_t: np.ndarray
    posterior_variance: np.ndarray
    posterior_log_variance: np.ndarray
    log_betas: np.ndarray

    @property
    def steps(self) -> int:
        """Number of kept timesteps."""
        return len(self.timesteps)


def schedule_betas(steps: int, schedule: str) -> np.ndarray:
    """Betas of the full process, float64 `[steps]`."""
    if schedule == "linear":
        return np.linspace(1e-4, 0.02, steps, dtype=np.float64) * (1000 / steps)
    fraction = np.arange(steps + 1, dtype=np.float64) / steps
    alpha_bar = np.cos((fraction + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], MAX_BETA)


def spaced_timesteps(steps: int, spacing: str) -> np.ndarray:
    """The timesteps that a spacing keeps, rising, int32 `[n]`; see `Diffusion.process`.

    One section of n steps keeps round(i (size - 1) / (n - 1)); one step alone keeps the noisiest
    timestep of its section, because that is where sampling starts.

    Raises:
        UserError: the spacing cannot be read, or asks for more steps than there are.
    """
    if spacing == "":
        return np.arange(steps, dtype=np.int32)
    if stride := re.fullmatch(r"ddim([0-9]+)", spacing):
        return _strided_timesteps(steps, int(stride[1]))
    if not re.fullmatch(r"[0-9]+(,[0-9]+)*", spacing):
        raise wrong("spacing", spacing, '"" (every step), "250", "25,25,25" or "ddim25"')
    counts = [int(count) for count in spacing.split(",")]
    sections = np.array_split(np.arange(steps, dtype=np.int32), len(counts))
    for count, section in zip(counts, sections, strict=True):
        if not 1 <= count <= len(section):
            most = len(section)
            expected = f"1 to {most} of each section's {most} timesteps ({steps} in all)"
            raise wrong("spacing", spacing, expected)
    return np.concatenate([_even(*pair) for pair in zip(sections, counts, strict=True)])


def _even(section: np.ndarray, count: int) -> np.ndarray:
    """So many timesteps of a section, evenly."""
    if count == 1:
        return section[-1:]
    return section[np.round(np.arange(count) * ((len(section) - 1) / (count - 1))).astype(np.int32)]


def _strided_timesteps(steps: int, count: int) -> np.ndarray:
    """Timesteps 0, s, 2s, ... for the smallest integer stride s that gives exactly `count`."""
    for stride in range(1, steps):
        if count > 1 and len(range(0, steps, stride)) == count:
            return np.arange(0, steps, stride, dtype=np.int32)
    raise wrong(
        "spacing",
        f"ddim{count}",
        f"a number, 2 or more, that an integer stride over {steps} timesteps keeps exactly",
        f'choose a divisor of {steps}, or spacing="{max(count, 1)}"',
    )


@functools.lru_cache(maxsize=128)
def tables(steps: int, schedule: str, spacing: str = "") -> Process:
    """The process at the kept timesteps; `Diffusion.process` says what a spacing is.

    Raises:
        UserError: the spacing cannot be read, or asks for more steps than there are.
    """
    timesteps = spaced_timesteps(steps, spacing)
    alpha_bar = np.cumprod(1 - schedule_betas(steps, schedule))[timesteps]
    alpha_bar_prev = np.append(1.0, alpha_bar[:-1])
    alphas = alpha_bar / alpha_bar_prev
    betas = 1 - alphas
    posterior_variance = betas * (1 - alpha_bar_prev) / (1 - alpha_bar)
    log_betas = np.log(betas)
    first = np.log(posterior_variance[1:2]) if len(betas) > 1 else log_betas
    exact = dict(
        betas=betas,
        alpha_bar=alpha_bar,
        alpha_bar_prev=alpha_bar_prev,
        sqrt_alpha_bar=np.sqrt(alpha_bar),
        sqrt_one_minus_alpha_bar=np.sqrt(1 - alpha_bar),
        sqrt_alpha_bar_prev=np.sqrt(alpha_bar_prev),
        sqrt_one_minus_alpha_bar_prev=np.sqrt(1 - alpha_bar_prev),
        log_snr=np.log(alpha_bar) - np.log1p(-alpha_bar),
        posterior_mean_x_0=np.sqrt(alpha_bar_prev) * betas / (1 - alpha_bar),
        posterior_mean_x_t=np.sqrt(alphas) * (1 - alpha_bar_prev) / (1 - alpha_bar),
        posterior_variance=posterior_variance,
        posterior_log_variance=np.append(first, np.log(posterior_variance[1:])),
        log_betas=log_betas,
    )
    rounded = {name: table.astype(np.float32) for name, table in exact.items()}
    for table in (timesteps, *rounded.values()):
        table.setflags(write=False)  # the cache hands the same arrays to everyone
    return Process(timesteps=timesteps, **rounded)
