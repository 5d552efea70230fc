"""What every solver is made of: a setting, a solver, and the coordinates of a walk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from unclip_jax.diffusion.gaussian import Diffusion, Prediction, at
from unclip_jax.diffusion.grids import Spacing
from unclip_jax.diffusion.schedules import Process

Ask = Callable[..., Prediction]
Noise = Callable[[], jax.Array]


class Solver(NamedTuple):
    """One method, made for one walk: its step, and what the first step finds in memory."""

    step: Callable[[jax.Array, Any, Ask, jax.Array, Noise], tuple[jax.Array, Any]]
    memory: Callable[[jax.Array], Any] = lambda x_T: ()


class Setting(NamedTuple):
    """What a solver is made for: a walk, and the options of `Sampling` and `samplers.sample`.

    Steps look up `process`, whose tables may be traced; all else is computed before, of `exact`.
    Of a grid whose values are traced `given` has what was computed, in the order of `table`; where
    it is computed, `taken` collects it.
    """

    diffusion: Diffusion
    process: Process
    spacing: Spacing = ""
    clip_x_0: float = 0.0
    last_noise: float = 0.0
    eta: float | jax.Array = 0.0
    analytic: jax.Array | None = None
    given: Iterator[jax.Array] | None = None
    taken: list[np.ndarray] | None = None

    @property
    def host(self) -> Process:
        """The process in the type of the walk, never traced."""
        return self.diffusion.process(self.spacing, self.process.alpha.dtype)

    @property
    def exact(self) -> Process:
        """The process in float64."""
        return self.diffusion.process(self.spacing, np.float64)

    def table(self, values: Any) -> np.ndarray | jax.Array:
        """Coefficients in the type of the walk; whole numbers stay."""
        if self.given is not None:
            return next(self.given)
        found = np.asarray(values)
        if np.issubdtype(found.dtype, np.floating):
            found = found.astype(self.process.alpha.dtype)
        if self.taken is not None:
            self.taken.append(found)
        return found


class Path(NamedTuple):
    """Coordinates in which a walk is dy/dtau: y = x / scale; tables of each step and where it goes.

    Either tau = sigma / alpha and dy/dtau = eps (EDM's and k-diffusion's), or, for a flow and where
    x_T holds no signal, tau = sigma / (alpha + sigma) and dy/dtau = eps - x_0.
    """

    flow: bool
    scale: np.ndarray
    scale_prev: np.ndarray
    tau: np.ndarray
    tau_prev: np.ndarray

    def slope(self, prediction: Prediction) -> jax.Array:
        """dy/dtau."""
        return prediction.eps - prediction.x_0 if self.flow else prediction.eps


def path(setting: Setting, process: Process) -> Path:
    """The coordinates of a process."""
    noise, exact = setting.diffusion.noise, setting.exact
    flow = noise.family == "flow" or exact.alpha[-1] == 0
    scale = process.alpha + flow * process.sigma
    scale_prev = process.alpha_prev + flow * process.sigma_prev
    return Path(
        bool(flow), scale, scale_prev, process.sigma / scale, process.sigma_prev / scale_prev
    )


def line(process: Process, prediction: Prediction, i: jax.Array, x: jax.Array) -> jax.Array:
    """Straight to where step i goes: first order, and exactly x_0 in the last step."""
    ahead = at(process.alpha_prev, i, x) * prediction.x_0
    return ahead + at(process.sigma_prev, i, x) * prediction.eps
