"""Consistency distillation: a network that steps from any noise to the data at once.

A network whose x_0 is the same all along a trajectory of the probability flow needs one call
(Song et al. 2023, arXiv 2303.01469). A trained network, the teacher, and one of our solvers give
the trajectory; `distillation_loss` draws the student's x_0 at neighbouring steps together. The
student is then sampled by `Sampling("consistency", steps)` in 1 to 8 steps.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.diffusion.gaussian import (
    Denoise,
    Diffusion,
    at,
    mean_of_dims,
    q_sample,
    state_dtype,
)
from unclip_jax.diffusion.samplers import Sampling, asking
from unclip_jax.diffusion.solvers import METHODS, ONE_STEP, Setting
from unclip_jax.errors import wrong

TEACHERS = tuple(name for name in ONE_STEP if name != "dpm2")  # their steps take one i per example


def distillation_loss(
    diffusion: Diffusion,
    student: Denoise,
    teacher: Denoise,
    x_0: jax.Array,
    i: jax.Array,
    noise: jax.Array,
    sampling: Sampling,
    huber: float | None = None,
) -> jax.Array:
    """How far the student's x_0 at step i is from that at step i - 1 (algorithm 2), `[b]`.

    x at step i is the data under `noise`; the teacher's solver leads to step i - 1, where the
    student's own answer, without a gradient, is the target (with the average of its weights for it,
    as in the paper, training is slower; Song & Dhariwal 2023, arXiv 2310.14189, section 3.2). From
    step 0 the teacher's solver leads to data, which is then the target: so the student's x_0 is
    anchored without the paper's c_skip and c_out, whatever it predicts. What clips x_0 clips every
    target, as it will clip the samples: else targets that are the student's own can run away.

    Args:
        diffusion: what both networks predict.
        student: the network that learns, under its condition.
        teacher: the trained network, perhaps guided: guidance is then learned, too.
        x_0: data `[b, ...]`.
        i: steps of the grid, int32 `[b]`, from 0 to its length - 1.
        noise: standard normal, the shape of x_0.
        sampling: the grid, the solver (one of `TEACHERS`), and what clips x_0.
        huber: c of the pseudo-Huber distance sqrt(d^2 + c^2) - c; None for 0.00054 sqrt(dims)
            (arXiv 2310.14189, section 3.3).

    Returns:
        The distance of each example over sqrt(dims).

    Raises:
        UserError: a solver that does not step example by example.
    """
    check_teacher(sampling)
    process = diffusion.process(sampling.spacing, state_dtype(x_0))
    solver = METHODS[sampling.method].make(Setting(diffusion, process, sampling.spacing))
    limits = sampling.clip_x_0, sampling.dynamic_percentile, sampling.dynamic_most
    ask = asking(student, diffusion, process)
    x = q_sample(process, x_0, i, noise)
    before = solver.step(x, (), asking(teacher, diffusion, process, limits), i, None)[0]
    before = jax.lax.stop_gradient(before)
    there = asking(student, diffusion, process, limits)(before, jnp.maximum(i - 1, 0)).x_0
    target = jnp.where(at(np.arange(process.steps) > 0, i, x), there, before)
    dims = float(np.prod(x.shape[1:]))
    c = 0.00054 if huber is None else huber / dims**0.5
    square = mean_of_dims((ask(x, i).x_0 - jax.lax.stop_gradient(target)) ** 2)
    return jnp.sqrt(square + c**2) - c


def check_teacher(sampling: Sampling) -> None:
    """Raise UserError unless the solver can walk each example from a step of its own."""
    if sampling.method not in TEACHERS:
        raise wrong("method", sampling.method, f"one of {', '.join(TEACHERS)} to teach with")
