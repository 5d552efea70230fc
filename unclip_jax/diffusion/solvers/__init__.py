"""Solvers: what one step of each method of `samplers` does.

`one_step` has those without memory, `multistep` those that remember. To add one, write a function
that takes a `Setting` and returns a `Solver`, and give it a name in `METHODS`:
`Sampling(method=NAME)` then takes it, and nothing else needs to know. A step is

    step(x_t, memory, ask, i, noise) -> (x at step i - 1, memory)

`x_t`, float32 `[b, ...]`, stands at step i of the process. i is traced and falls to 0, after which
comes x_0. `ask(x, i)` asks the network at step i, as often as the method needs, and returns a
`Prediction` (x_0, eps, log_variance), guided and clipped; `ask(x, j, other)` asks at step j of
another `Process`, for methods that look between the timesteps. `memory`, any pytree, is what a step
leaves to the next; the first finds `Solver.memory(x_T)`. `noise()` draws standard normal noise of
x_t's shape; no method adds any in its last step.

Notation: x = alpha x_0 + sigma eps at step i, alpha_prev and sigma_prev where it goes, and
lambda = log(alpha / sigma). What depends on the walk alone is computed before it, in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from unclip_jax.diffusion.solvers.base import Ask as Ask
from unclip_jax.diffusion.solvers.base import Setting, Solver
from unclip_jax.diffusion.solvers.multistep import (
    dpm_solver,
    dpm_solver_3m_sde,
    dpm_solver_sde,
    lms,
    multistep_inverse,
    unipc,
)
from unclip_jax.diffusion.solvers.one_step import (
    analytic_dpm,
    consistency,
    ddim,
    ddim_inverse,
    ddpm,
    dpm2,
    heun,
    heun_inverse,
)
from unclip_jax.errors import wrong


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
    "euler": Method(lambda setting: ddim(setting._replace(eta=0.0)), ddim_inverse),
    "rf_euler": Method(lambda setting: ddim(setting._replace(eta=0.0)), ddim_inverse),
    "euler_ancestral": Method(lambda setting: ddim(setting._replace(eta=1.0))),
    "consistency": Method(consistency),
    "heun": Method(heun, heun_inverse),
    "dpm2": Method(dpm2, heun_inverse),
    "dpm++_2m_sde": Method(dpm_solver_sde),
    "dpm++_3m_sde": Method(dpm_solver_3m_sde),
    "lms": Method(lms, multistep_inverse),
    "unipc2": Method(functools.partial(unipc, order=2), multistep_inverse),
    "unipc3": Method(functools.partial(unipc, order=3), multistep_inverse),
}


ONE_STEP = ("ddim", "euler", "rf_euler", "heun", "dpm2")  # without noise and without memory
WITHOUT_MEMORY = (*ONE_STEP, "ddpm", "analytic", "euler_ancestral", "consistency")


def check_used(field: str, value: Any, option: str, method: str) -> None:
    """Raise `UserError` where an option has a value that the method would not look at."""
    users = [name for name, found in METHODS.items() if option in found.uses]
    if value and method not in users:
        choices = " or ".join(f'method="{name}"' for name in users)
        raise wrong(field, value, f"0 for Sampling.method={method!r}", f"use {choices}")
