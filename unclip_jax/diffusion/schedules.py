"""Noise processes: how much signal and how much noise is left at each time, as tables.

Every process is x_t = alpha_t x_0 + sigma_t eps, and `Schedule` names one. What a network is told
of t depends on the family:

    betas    alpha^2 = alpha_bar, the product of 1 - beta; sigma^2 = 1 - alpha_bar. t counts steps.
    sigmas   alpha = 1 (variance exploding: EDM, k-diffusion). t is sigma.
    flow     alpha = 1 - t, sigma = t (rectified flow, flow matching). t lies in (0, 1].

A sampler walks a `Process`: the levels at the times that a grid (`grids`) keeps. Keeping a subset
of the timesteps keeps alpha and sigma there, and a step's own noise follows from the ratio of
neighbours: a shorter process of the same kind.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from unclip_jax.common import checks
from unclip_jax.errors import wrong

SCHEDULES = ("cosine", "linear", "scaled_linear", "sigmoid")
CONTINUOUS = ("edm", "flow")
OWN = ("betas", "alpha_bar", "sigmas")

BETA_ENDS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012), "sigmoid": (1e-4, 0.02)}
MAX_BETA = 0.999


@dataclass(frozen=True)
class Schedule:
    """A noise process. Hashable, and plain data that a config can hold.

        Schedule("scaled_linear")                       # Stable Diffusion's
        Schedule("linear", zero_terminal_snr=True)
        Schedule.own("alpha_bar", my_array)
        Schedule("edm", sigma_max=80.0)
        Schedule("flow", shift=3.0)                     # Stable Diffusion 3's

    Attributes:
        name: of betas: "cosine" (arXiv 2102.09672, eq. 17; betas at most 0.999), "linear",
            "scaled_linear" (linear in sqrt(beta)) or "sigmoid"; the last three are scaled by
            1000/steps. "edm" (arXiv 2206.00364: sigmas, t is sigma). "flow" (arXiv 2209.03003,
            2210.02747). "betas", "alpha_bar", "sigmas": your own table.
        beta_start: first beta before scaling; None for the usual one (1e-4; scaled_linear 0.00085).
        beta_end: last beta before scaling; None for the usual one (0.02; scaled_linear 0.012).
        table: of your own; the cleanest first.
        sigma_min: of "edm".
        sigma_max: of "edm".
        rho: of "edm": how its levels lie between the two (eq. 5 there).
        sigma_data: the data's standard deviation, for the prediction "F".
        shift: of "flow": s moves time u, even, to s u / (1 + (s - 1) u) (arXiv 2403.03206, eq. 23).
        zero_terminal_snr: whether betas are rescaled so that x_T holds no signal at all
            (arXiv 2305.08891, algorithm 1).

    Raises:
        UserError: a field is out of its range, or given to a schedule that has no use for it.
    """

    name: str = "cosine"
    beta_start: float | None = None
    beta_end: float | None = None
    table: tuple[float, ...] = ()
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    sigma_data: float = 0.5
    shift: float = 1.0
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        """Check every field."""
        checks.choice("Schedule.name", self.name, (*SCHEDULES, *CONTINUOUS, *OWN))
        for field in ("sigma_min", "sigma_max", "rho", "sigma_data", "shift"):
            checks.number(f"Schedule.{field}", getattr(self, field), above=0)
        for field, names in (
            *((end, tuple(BETA_ENDS)) for end in ("beta_start", "beta_end")),
            *((field, ("edm",)) for field in ("sigma_min", "sigma_max", "rho")),
            ("shift", ("flow",)),
            ("table", OWN),
            ("zero_terminal_snr", (*SCHEDULES, "betas", "alpha_bar")),
        ):
            if getattr(self, field) != getattr(Schedule, field) and self.name not in names:
                given, use = getattr(self, field), " or ".join(map(repr, names))
                raise wrong(f"Schedule.{field}", given, f"none for {self.name!r}", f"use {use}")
        for field in ("beta_start", "beta_end"):
            if getattr(self, field) is not None:
                checks.number(f"Schedule.{field}", getattr(self, field), above=0)
        if self.sigma_max <= self.sigma_min:
            raise wrong("Schedule.sigma_max", self.sigma_max, f"above sigma_min={self.sigma_min}")
        if self.name in OWN:
            _check_table(self.name, self.table)

    @classmethod
    def own(cls, name: str, table: Iterable[float], **fields: Any) -> Schedule:
        """A schedule of your own: "betas", "alpha_bar" or "sigmas", as an array of numbers.

        Sigmas may fall, and end in 0, as k-diffusion's do: the 0 is the data, and no level.

        Raises:
            UserError: the table is none of its kind.
        """
        values = np.asarray(list(table), np.float64)
        if name == "sigmas" and len(values) > 1 and values[0] > values[-1]:
            values = values[::-1]
        if name == "sigmas" and len(values) > 1 and values[0] == 0:
            values = values[1:]
        return cls(name, table=tuple(values.tolist()), **fields)

    @property
    def family(self) -> str:
        """What t means: "betas", "sigmas" or "flow"; see the head of the file."""
        return {"edm": "sigmas", "sigmas": "sigmas", "flow": "flow"}.get(self.name, "betas")

    def betas(self, steps: int) -> np.ndarray:
        """Betas of the whole process, float64 `[steps]`, before any rescaling."""
        if self.name == "betas":
            return np.asarray(self.table)
        if self.name == "alpha_bar":
            alpha_bar = np.asarray(self.table)
            return 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])
        if self.name == "cosine":
            fraction = np.arange(steps + 1, dtype=np.float64) / steps
            alpha_bar = np.cos((fraction + 0.008) / 1.008 * np.pi / 2) ** 2
            return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], MAX_BETA)
        usual = BETA_ENDS[self.name]
        start, end = (a or b for a, b in zip((self.beta_start, self.beta_end), usual, strict=True))
        if self.name == "scaled_linear":
            betas = np.linspace(start**0.5, end**0.5, steps, dtype=np.float64) ** 2
        elif self.name == "sigmoid":
            betas = (end - start) / (1 + np.exp(-np.linspace(-6, 6, steps))) + start
        else:
            betas = np.linspace(start, end, steps, dtype=np.float64)
        return betas * (1000 / steps)


def _check_table(name: str, table: tuple[float, ...]) -> None:
    """Raise `UserError` unless the table is one of its kind."""
    values = np.asarray(table, np.float64)
    field, ok = f"Schedule.table of {name}", values.ndim == 1 and len(values) > 0
    if name == "betas":
        ok, expected = ok and bool(np.all((values > 0) & (values < 1))), "numbers above 0, below 1"
    elif name == "alpha_bar":
        falls = np.all(np.diff(values) < 0) and np.all((values >= 0) & (values < 1))
        ok, expected = ok and bool(falls), "numbers that fall from below 1 to 0 or more"
    else:
        ok = ok and bool(np.all(np.diff(values) > 0) and np.all((values > 0) & (values < np.inf)))
        expected = "numbers above 0 that rise, or fall (Schedule.own reverses them)"
    if not ok:
        raise wrong(field, table if len(table) < 9 else (*table[:8], ...), expected)


class Process(NamedTuple):
    """Tables of the levels a sampler walks, the cleanest first: read-only, float `[n]`.

    Computed in float64, so that sigma is exact at both ends. `timesteps` is what the network is
    given: int32, or float where the times are. `_prev` is the next cleaner kept level, where
    alpha_prev[0] = 1 and sigma_prev[0] = 0. `betas` is the variance of q(x_t | x_prev), and
    `alpha_bar` is alpha^2. `posterior_log_variance[0]` would be log 0; it holds the next step's,
    as in Ho et al. (and log beta if there is no next).
    """

    timesteps: np.ndarray
    betas: np.ndarray
    alpha_bar: np.ndarray
    alpha_bar_prev: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    alpha_prev: np.ndarray
    sigma_prev: np.ndarray
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

    # What the levels are called where alpha^2 + sigma^2 = 1.
    sqrt_alpha_bar = property(lambda self: self.alpha)
    sqrt_one_minus_alpha_bar = property(lambda self: self.sigma)
    sqrt_alpha_bar_prev = property(lambda self: self.alpha_prev)
    sqrt_one_minus_alpha_bar_prev = property(lambda self: self.sigma_prev)


class Levels(NamedTuple):
    """Signal and noise of a whole process: float64 `[steps]` each, the cleanest first."""

    times: np.ndarray
    alpha_bar: np.ndarray  # alpha^2
    variance: np.ndarray  # sigma^2

    @property
    def ratio(self) -> np.ndarray:
        """sigma / alpha, infinite where there is no signal."""
        with np.errstate(divide="ignore"):
            return np.sqrt(self.variance / self.alpha_bar)


@functools.lru_cache(maxsize=128)
def levels(schedule: Schedule, steps: int) -> Levels:
    """The levels of every step of training."""
    if schedule.family != "betas":
        times = times_at(schedule, steps, np.arange(steps))
        return Levels(times, *levels_at(schedule, steps, times))
    alpha_bar = np.cumprod(1 - schedule.betas(steps))
    if schedule.zero_terminal_snr and alpha_bar[-1] > 0:
        root = np.sqrt(alpha_bar)
        alpha_bar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    return Levels(np.arange(steps, dtype=np.int32), alpha_bar, 1 - alpha_bar)


def levels_at(schedule: Schedule, steps: int, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """alpha^2 and sigma^2 at times of any kind: float64.

    Between two timesteps of betas log SNR is linear in t, as in k-diffusion.
    """
    if schedule.family == "sigmas":
        return np.ones(len(times)), times**2
    if schedule.family == "flow":
        return (1 - times) ** 2, times**2
    whole = levels(schedule, steps)
    if np.issubdtype(times.dtype, np.integer):
        return whole.alpha_bar[times], whole.variance[times]
    known = whole.alpha_bar > 0
    log_snr = np.interp(times, whole.times[known], -2 * np.log(whole.ratio[known]))
    silent = ~known[-1] & (times == steps - 1)  # the one step that may hold no signal
    alpha_bar = np.where(silent, 0.0, 1 / (1 + np.exp(-log_snr)))
    return alpha_bar, np.where(silent, 1.0, 1 / (1 + np.exp(log_snr)))


def times_at(schedule: Schedule, steps: int, positions: np.ndarray) -> np.ndarray:
    """The times at positions from 0 to steps - 1 along the whole process: float64."""
    if schedule.name == "edm":
        low, high = (s ** (1 / schedule.rho) for s in (schedule.sigma_min, schedule.sigma_max))
        along = positions / (steps - 1) if steps > 1 else np.ones(len(positions))
        return (high + (1 - along) * (low - high)) ** schedule.rho
    if schedule.name == "sigmas":
        return np.exp(np.interp(positions, np.arange(steps), np.log(schedule.table)))
    if schedule.family == "flow":
        even = (positions + 1) / steps
        return schedule.shift * even / (1 + (schedule.shift - 1) * even)
    return np.asarray(positions, np.float64)


def times_of(schedule: Schedule, steps: int, ratio: np.ndarray) -> np.ndarray:
    """The times at which sigma / alpha has these values: float64."""
    if schedule.family == "sigmas":
        return ratio
    if schedule.family == "flow":
        return ratio / (1 + ratio)
    whole = levels(schedule, steps)
    known = np.isfinite(whole.ratio)
    return np.interp(np.log(ratio), np.log(whole.ratio[known]), whole.times[known])


def process_at(
    times: np.ndarray, alpha_bar: np.ndarray, variance: np.ndarray, preserving: bool, dtype: Any
) -> Process:
    """The tables of a walk over levels: alpha^2 and sigma^2, the cleanest first.

    Args:
        times: what the network is given.
        alpha_bar: float64 `[n]`.
        variance: float64 `[n]`.
        preserving: whether the two are 1 together, so that a step's variance is 1 less a ratio.
        dtype: of the tables.
    """
    alpha_bar_prev = np.append(1.0, alpha_bar[:-1])
    variance_prev = np.append(0.0, variance[:-1])
    kept = alpha_bar / alpha_bar_prev
    betas = 1 - kept if preserving else variance - kept * variance_prev
    posterior_variance = betas * variance_prev / variance
    with np.errstate(divide="ignore"):  # log 0 where x_T holds no signal
        log_alpha_bar = np.log(alpha_bar)
    log_betas = np.log(betas)
    first = np.log(posterior_variance[1:2]) if len(betas) > 1 else log_betas
    exact = dict(
        betas=betas,
        alpha_bar=alpha_bar,
        alpha_bar_prev=alpha_bar_prev,
        alpha=np.sqrt(alpha_bar),
        sigma=np.sqrt(variance),
        alpha_prev=np.sqrt(alpha_bar_prev),
        sigma_prev=np.sqrt(variance_prev),
        log_snr=log_alpha_bar - (np.log1p(-alpha_bar) if preserving else np.log(variance)),
        posterior_mean_x_0=np.sqrt(alpha_bar_prev) * betas / variance,
        posterior_mean_x_t=np.sqrt(kept) * variance_prev / variance,
        posterior_variance=posterior_variance,
        posterior_log_variance=np.append(first, np.log(posterior_variance[1:])),
        log_betas=log_betas,
    )
    rounded = {name: table.astype(dtype) for name, table in exact.items()}
    whole = np.issubdtype(times.dtype, np.integer)
    times = times.astype(np.int32 if whole else dtype)
    for table in (times, *rounded.values()):
        table.setflags(write=False)  # the cache hands the same arrays to everyone
    return Process(timesteps=times, **rounded)
