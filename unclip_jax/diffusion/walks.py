"""How to walk from noise to data: a `Sampling`, and a `Grid` whose times may be traced."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.common import checks
from unclip_jax.diffusion import grids
from unclip_jax.diffusion.gaussian import Diffusion
from unclip_jax.diffusion.schedules import Process
from unclip_jax.diffusion.solvers import METHODS, Setting, check_used
from unclip_jax.diffusion.solvers.base import path
from unclip_jax.errors import UserError, wrong


@dataclass(frozen=True)
class Sampling:
    """How to walk back from noise. Hashable: a static argument of `jax.jit`.

    Attributes:
        method: a name of `solvers.METHODS`: "ddpm", "ddim", "dpm++" (DPM-Solver++(2M)), "heun",
            "unipc3", ...
        spacing: which timesteps to keep: "20", 20, "karras:20", (999, 500, 0), ...; see `grids`.
            An array is kept as a tuple.
        clip_x_0: the data lies in [-clip_x_0, clip_x_0]; 0 for no clipping.
        dynamic_percentile: dynamic thresholding, in percent (Imagen: 99.5); 0 for off.
        dynamic_most: the largest size that it scales back from; 0 for no limit.
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
    dynamic_most: float = 0.0

    def __post_init__(self) -> None:
        """Check every field; how many steps there are to keep, only a `Diffusion` knows."""
        object.__setattr__(self, "spacing", grids.read(self.spacing))
        checks.choice("Sampling.method", self.method, METHODS)
        for field in ("clip_x_0", "last_noise", "dynamic_percentile", "dynamic_most"):
            value = checks.number(f"Sampling.{field}", getattr(self, field), least=0)
            object.__setattr__(self, field, value)
        if self.dynamic_percentile != 0 and not 50 <= self.dynamic_percentile <= 100:
            expected = "0 (off) or percent from 50 to 100, such as 99.5"
            raise wrong("Sampling.dynamic_percentile", self.dynamic_percentile, expected)
        if self.dynamic_most and not self.dynamic_percentile:
            expected = "0 without dynamic_percentile"
            raise wrong("Sampling.dynamic_most", self.dynamic_most, expected)
        if 0 < self.dynamic_most < (self.clip_x_0 or 1.0):
            expected = f"0 (no limit) or at least the data's range, {self.clip_x_0 or 1.0:g}"
            raise wrong("Sampling.dynamic_most", self.dynamic_most, expected)
        check_used("Sampling.last_noise", self.last_noise, "last_noise", self.method)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("process", "tables"),
    meta_fields=("diffusion", "method", "flow"),
)
@dataclass(frozen=True)
class Grid:
    """The times of a walk, and all that its solver computes of them: a pytree of small arrays.

    Grids of one method and length are the same to `jax.jit`, so that `sample(grid=...)` with
    another compiles nothing.
    """

    process: Process
    tables: tuple[np.ndarray, ...]
    diffusion: Diffusion
    method: str
    flow: bool

    def checked(self, diffusion: Diffusion, sampling: Sampling, process: Process) -> Process:
        """Its process, if it can stand for the one that would be walked; else `UserError`."""
        own = self.method, self.process.steps, self.flow
        asked = sampling.method, process.steps, has_flow(diffusion, sampling)
        if self.diffusion != diffusion or own != asked:
            raise UserError(
                f"grid: of {own[0]} in {own[1]} steps, expected one of the same diffusion for"
                f" {asked[0]} in {asked[1]}, and either with or without a level that has no signal;"
                " make it with grid_of(diffusion, sampling)"
            )
        if self.process.alpha.dtype != process.alpha.dtype:
            raise wrong("grid's dtype", self.process.alpha.dtype, f"{process.alpha.dtype}, x_T's")
        return self.process


def grid_of(
    diffusion: Diffusion, sampling: Sampling | None = None, *, steps: Any = None, dtype: Any = None
) -> Grid:
    """The grid of a spacing, computed on the host in float64: what `sample(grid=...)` takes.

    Args:
        diffusion: what the network was trained to do.
        sampling: as in `sample`.
        steps: as in `sample`.
        dtype: of the tables, that of the walk's states: float32 unless given.

    Raises:
        UserError: a spacing that is not there.
    """
    sampling = chosen(diffusion, sampling, steps, "dpm++", 20)
    process, taken = diffusion.process(sampling.spacing, dtype or np.float32), []
    options = sampling.clip_x_0, sampling.last_noise, 0.0, jnp.ones(diffusion.steps)
    METHODS[sampling.method].make(
        Setting(diffusion, process, sampling.spacing, *options, taken=taken)
    )
    flow = has_flow(diffusion, sampling)
    return Grid(process, tuple(taken), diffusion, sampling.method, flow)


def has_flow(diffusion: Diffusion, sampling: Sampling) -> bool:
    """Whether solvers walk in the coordinates of a flow, see `solvers.base.Path`."""
    setting = Setting(diffusion, diffusion.process(sampling.spacing), sampling.spacing)
    return path(setting, setting.exact).flow


def chosen(
    diffusion: Any, sampling: Sampling | None, steps: Any, method: str, usual: int
) -> Sampling:
    """How to walk, with what is left out filled in."""
    if not isinstance(diffusion, Diffusion):
        expected = "a Diffusion, which also says what the network predicts"
        do = 'write Diffusion(schedule=..., prediction="eps")'
        raise wrong("diffusion", type(diffusion).__name__, expected, do)
    if sampling is None:
        return Sampling(method, min(usual, diffusion.steps) if steps is None else steps)
    return sampling if steps is None else replace(sampling, spacing=steps)
