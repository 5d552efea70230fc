r"""The mathematics of Gaussian diffusion; it knows no network.

**Forward process.** Ho et al. 2020 (arXiv 2006.11239) destroy `x_0` in `steps` small steps
q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I). Any step is taken at once (eq. 4), with
alpha_bar_t the product of 1 - beta_s over s <= t:

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps,     eps ~ N(0, I).               (1)

**Three predictions of one thing.** Given x_t, equation (1) makes x_0 and eps affine in each
other, and v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (Salimans & Ho 2022,
arXiv 2202.00512) turns (x_0, eps) by the angle whose cosine is sqrt(alpha_bar):

    x_0 = (x_t - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar)
        = sqrt(alpha_bar) x_t - sqrt(1 - alpha_bar) v
    eps = (x_t - sqrt(alpha_bar) x_0) / sqrt(1 - alpha_bar)
        = sqrt(1 - alpha_bar) x_t + sqrt(alpha_bar) v                                         (2)

With alpha for sqrt(alpha_bar) and sigma for sqrt(1 - alpha_bar), (1) holds for any alpha and sigma
(`schedules`); `predictions` has (2) for them, with two predictions more.

**Posterior.** q(x_{t-1} | x_t, x_0) is, but for a factor, q(x_t | x_{t-1}) q(x_{t-1} | x_0), two
Gaussians in x_{t-1}: precisions add, means add weighted by precision (eqs. 6, 7):

    beta_tilde_t = beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t)
    mean = [sqrt(alpha_bar_{t-1}) beta_t x_0 + sqrt(1 - beta_t) (1 - alpha_bar_{t-1}) x_t]
           / (1 - alpha_bar_t)                                                                 (3)

The reverse process p(x_{t-1} | x_t) puts the predicted x_0 into this mean. Its best variance lies
between beta_tilde (x_0 known) and beta (x_0 ~ N(0, I)); a network may learn where
(Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 15), from channels of its own, w in [-1, 1]:

    log variance = (w + 1)/2 log beta_t + (1 - w)/2 log beta_tilde_t.                          (4)

All of it holds for a process of fewer steps (`schedules`), so a learned variance keeps working; the
network is still handed the *original* timestep.

Conventions: `i` indexes a `Process` (0 is the cleanest step), `t` is an original timestep. Either
is a scalar or int32 `[b]`; t is float where the process's times are. Arrays are `[b, ...]` of any
rank; the mathematics is float32, and float64 where x_t is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.common import checks
from unclip_jax.diffusion import grids, predictions, schedules, states
from unclip_jax.diffusion.predictions import PREDICTIONS
from unclip_jax.diffusion.schedules import Process, Schedule
from unclip_jax.diffusion.thresholding import threshold
from unclip_jax.errors import wrong

Denoise = Callable[[jax.Array, jax.Array], jax.Array]
"""`denoise(x_t [b, ...], t [b]) -> raw network output`: t is an original timestep, int32; float
where the process's times are."""

VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")
LOSSES = ("simple", "hybrid")
LIKELIHOODS = ("8bit", "gaussian")


@dataclass(frozen=True)
class Diffusion:
    """What a network was, or will be, trained to do. Hashable: a static argument of `jax.jit`.

    Attributes:
        steps: length of the training process, at least 1. A schedule with a table of its own has
            the table's length, whether this says so or is left out.
        schedule: "cosine" (arXiv 2102.09672, eq. 17; betas at most 0.999), "linear" (1e-4 to 0.02,
            scaled by 1000/steps), another name, or a `Schedule`.
        prediction: what the network's output means: "eps", "x_0", "v", "velocity" (eps - x_0) or
            "F" (EDM's); see `predictions`.
        variance: of p(x_{t-1}|x_t). "fixed_small" is beta_tilde and "fixed_small_log" the same
            variance under the name that Karlo's checkpoints use; "fixed_large" is beta;
            "learned_range" is equation (4), with the network's last axis twice as long.
        loss: "simple" (mean squared error of the prediction) or "hybrid" (plus 1e-3 of the
            bound, which trains only the learned variance).
        min_snr_gamma: gamma of min-SNR weighting (arXiv 2303.09556), usually 5; 0 turns it off.
        timestep_shift: s moves the timesteps t / steps that are trained on from u, uniform in
            [0, 1), to s u / (1 + (s - 1) u) (as arXiv 2403.03206 does): above 1 more of the
            loss is of noisy examples. Of the cosine schedule the log signal-to-noise ratio falls
            by between 1.5 and 2 times log s. Sampling does not know of it.
        likelihood: L_0 of the bound: "8bit" for images of 256 levels in [-1, 1], "gaussian" for
            the plain density of continuous data such as embeddings.
        continuous: whether a network of a process of betas takes timesteps between the whole ones,
            as float. Grids then ask at the very levels they mean; else at the nearest timesteps.

    Raises:
        UserError: a field is out of its range.
    """

    steps: int = 1000
    schedule: str | Schedule = "cosine"
    prediction: str = "eps"
    variance: str = "fixed_small"
    loss: str = "simple"
    min_snr_gamma: float = 0.0
    timestep_shift: float = 1.0
    likelihood: str = "8bit"
    continuous: bool = False

    def __post_init__(self) -> None:
        """Check every field."""
        checks.count("Diffusion.steps", self.steps)
        self._check_schedule()
        checks.choice("Diffusion.prediction", self.prediction, PREDICTIONS)
        checks.choice("Diffusion.variance", self.variance, VARIANCES)
        checks.choice("Diffusion.loss", self.loss, LOSSES)
        checks.choice("Diffusion.likelihood", self.likelihood, LIKELIHOODS)
        checks.number("Diffusion.min_snr_gamma", self.min_snr_gamma, least=0)
        if not checks.number("Diffusion.timestep_shift", self.timestep_shift, least=0):
            raise wrong("Diffusion.timestep_shift", 0, "a positive number", "1 is no shift")
        if self.loss == "hybrid" and not self.learned_variance:
            expected = 'a learned variance with loss="hybrid", which trains one'
            do = 'use variance="learned_range" or loss="simple"'
            raise wrong("Diffusion.variance", self.variance, expected, do)

    def _check_schedule(self) -> None:
        """Check the schedule beside the steps and the prediction; take the steps of its table."""
        if not isinstance(self.schedule, Schedule):
            names = (*schedules.SCHEDULES, *schedules.CONTINUOUS)
            checks.choice("Diffusion.schedule", self.schedule, names)
        found = self.noise
        if found.table and self.steps != len(found.table):
            if self.steps != type(self).steps:
                expected = f"{len(found.table)}, the length of the schedule's table"
                raise wrong("Diffusion.steps", self.steps, expected, "leave it out")
            object.__setattr__(self, "steps", len(found.table))
        if found.family != "betas":
            return
        most = found.betas(self.steps).max()
        linear = self.schedule == "linear" and self.steps <= 20
        if linear or (most >= 1 and not (found.table and most == 1)):
            if linear:
                expected = "more than 20 for the linear schedule, whose betas are above 1 otherwise"
            else:
                expected = f"more for betas up to {most:.3g}, which have to stay below 1"
            raise wrong("Diffusion.steps", self.steps, expected, 'use schedule="cosine"')
        if self.prediction == "eps" and schedules.levels(found, self.steps).alpha_bar[-1] == 0:
            expected = "one that tells x_0 where x_t holds no signal"
            raise wrong("Diffusion.prediction", "eps", expected, 'use "v" or "x_0"')

    @property
    def noise(self) -> Schedule:
        """The schedule, named or given."""
        return self.schedule if isinstance(self.schedule, Schedule) else Schedule(self.schedule)

    @property
    def learned_variance(self) -> bool:
        """Whether the network's last axis is doubled: the prediction, then the variance."""
        return self.variance == "learned_range"

    def timestep_probabilities(self) -> np.ndarray:
        """How often training draws each timestep: float64 [steps], 1 together."""
        edges = np.linspace(0.0, 1.0, self.steps + 1)
        return np.diff(edges / (self.timestep_shift - (self.timestep_shift - 1.0) * edges))

    def process(self, spacing: Any = "", dtype: Any = np.float32) -> Process:
        """The process at the kept timesteps; computed once per schedule and spacing.

        Args:
            spacing: "" every step; 250 or "250" that many, evenly, both ends included;
                "25,25,25" so many in each of equal sections, the cleanest first; "ddim25" an
                integer stride from timestep 0; "karras:20" so many by a rule; (999, 500, 0) these.
                `grids` has them all.
            dtype: of the tables, float32 or float64.

        Raises:
            UserError: the spacing cannot be read, or asks for more steps than there are.
        """
        kept = grids.read(spacing)
        return grids.tables(self.noise, self.steps, kept, self.continuous, dtype)

    def times(self, i: jax.Array) -> jax.Array:
        """What the network is given at steps i of the whole process."""
        times = self.process().timesteps
        return i if np.issubdtype(times.dtype, np.integer) else jnp.asarray(times)[i]

    def levels(self, t: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """alpha and sigma at the times t, as the network is given them, shaped to multiply `x`."""
        dtype = state_dtype(x)
        if self.noise.family == "betas" and jnp.issubdtype(t.dtype, jnp.integer):
            return levels(self.process(dtype=dtype), t, x)
        t = t.astype(dtype).reshape(t.shape + (1,) * (x.ndim - 1) if t.ndim else t.shape)
        if self.noise.family == "sigmas":
            return jnp.ones_like(t), t
        if self.noise.family == "flow":
            return 1 - t, t
        whole = self.process(dtype=np.float64)
        known = whole.alpha > 0
        tables = (table[known].astype(dtype) for table in (whole.timesteps, whole.log_snr))
        log_snr = jnp.interp(t, *map(jnp.asarray, tables))
        log_snr = jnp.where(~known[-1] & (t == self.steps - 1), -jnp.inf, log_snr)
        return jnp.sqrt(jax.nn.sigmoid(log_snr)), jnp.sqrt(jax.nn.sigmoid(-log_snr))

    def share(self, t: jax.Array) -> jax.Array:
        """How far along training's timesteps t lies, from 0 to 1: t / steps where t counts them."""
        if self.noise.family == "betas":
            return t.astype(jnp.float32) / self.steps
        times = jnp.asarray(self.process().timesteps)
        return jnp.interp(t.astype(jnp.float32), times, jnp.arange(self.steps) / self.steps)

    @property
    def noise_std(self) -> float:
        """The standard deviation that x_T is drawn with: sigma_max of sigmas, else 1."""
        return float(self.process().sigma[-1]) if self.noise.family == "sigmas" else 1.0


class Prediction(NamedTuple):
    """A network's output in every form a sampler needs; the shape and type of `x_t`."""

    x_0: jax.Array
    eps: jax.Array
    log_variance: jax.Array


# ------------------------------------------------------------------------- forward process


def at(table: np.ndarray, i: jax.Array, x: jax.Array) -> jax.Array:
    """`table[i]`, shaped to multiply `x`: a scalar for a scalar `i`, `[b, 1, ..., 1]` for `[b]`."""
    value = jnp.asarray(table)[i]
    return value.reshape(value.shape + (1,) * (x.ndim - 1)) if value.ndim else value


def normal(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise, one key per example: float32 `[b, *shape]` from keys `[b]`.

    Raises:
        UserError: `keys` is not a one-dimensional array of keys, typed or legacy.
    """
    draw = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))
    return draw(states.many_keys(keys))


def levels(process: Process, i: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """alpha and sigma at step i, shaped to multiply `x`."""
    return at(process.alpha, i, x), at(process.sigma, i, x)


def state_dtype(x: jax.Array) -> Any:
    """What is computed in: float32, or float64 where x is."""
    return np.dtype(np.float64 if x.dtype == np.float64 else np.float32)


def q_sample(process: Process, x_0: jax.Array, i: jax.Array, noise: jax.Array) -> jax.Array:
    """x_t ~ q(x_t | x_0), equation (1)."""
    alpha, sigma = levels(process, i, x_0)
    return alpha * x_0 + sigma * noise


def eps_from_x_0(process: Process, x_t: jax.Array, i: jax.Array, x_0: jax.Array) -> jax.Array:
    """Equation (2)."""
    alpha, sigma = levels(process, i, x_t)
    return (x_t - alpha * x_0) / sigma


def target(
    diffusion: Diffusion, process: Process, x_0: jax.Array, i: jax.Array, noise: jax.Array
) -> jax.Array:
    """What a perfect network would predict for x_t = q_sample(process, x_0, i, noise)."""
    alpha, sigma = levels(process, i, x_0)
    std = diffusion.noise.sigma_data
    return predictions.target(diffusion.prediction, x_0, noise, alpha, sigma, std)


def q_posterior(
    process: Process, x_0: jax.Array, x_t: jax.Array, i: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q(x_{t-1} | x_t, x_0), equation (3): mean, then variance and log variance, broadcastable."""
    mean = at(process.posterior_mean_x_0, i, x_t) * x_0 + (
        at(process.posterior_mean_x_t, i, x_t) * x_t
    )
    variance = at(process.posterior_variance, i, x_t)
    return mean, variance, at(process.posterior_log_variance, i, x_t)


# ------------------------------------------------------------------- reading a network's output


def predict(
    diffusion: Diffusion, process: Process, output: jax.Array, x_t: jax.Array, i: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The x_0 and the eps that a prediction, without its variance channels, stands for: (2)."""
    return _read(diffusion, output, x_t, *levels(process, i, x_t))


def predict_at(
    diffusion: Diffusion, output: jax.Array, x_t: jax.Array, t: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The same at t as the network is given it, whole or not."""
    return _read(diffusion, output, x_t, *diffusion.levels(t, x_t))


def _read(diffusion, output, x_t, alpha, sigma):
    noise = diffusion.noise
    kind, preserving = diffusion.prediction, noise.family == "betas"
    return predictions.read(kind, output, x_t, alpha, sigma, noise.sigma_data, preserving)


def split_variance(
    diffusion: Diffusion, output: jax.Array, x_t: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """A raw output as prediction and variance channels (None when they are not learned).

    Both are float32; float64 where x_t is.

    Raises:
        UserError: the output's shape does not fit `x_t` and the kind of variance.
    """
    output = states.one_array(output)
    factor = 2 if diffusion.learned_variance else 1
    expected = (*x_t.shape[:-1], x_t.shape[-1] * factor)
    if output.shape != expected:
        raise wrong(
            "network output's shape",
            output.shape,
            f"{expected} for data of {x_t.shape} and Diffusion.variance={diffusion.variance!r}",
            "change the network's output channels or the variance",
        )
    output = output.astype(state_dtype(x_t))
    if not diffusion.learned_variance:
        return output, None
    return tuple(jnp.split(output, 2, axis=-1))


def interpret(
    diffusion: Diffusion,
    process: Process,
    output: jax.Array,
    x_t: jax.Array,
    i: jax.Array,
    clip_x_0: float = 0.0,
    dynamic_percentile: float = 0.0,
    dynamic_most: float = 0.0,
) -> Prediction:
    """Read a raw network output at step `i` of `process`.

    Args:
        diffusion: what the network predicts.
        process: the process being walked, respaced or not.
        output: `[b, ...]`, any float dtype; its last axis doubled for a learned variance.
        x_t: `[b, ...]`.
        i: int scalar or `[b]`.
        clip_x_0: as `dynamic_percentile`, see `threshold`.
        dynamic_percentile: 0 for off.
        dynamic_most: 0 for no limit.

    Returns:
        x_0 within its range, the eps that belongs to that x_0, and the log variance of
        p(x_{t-1} | x_t).

    Raises:
        UserError: the output's shape does not fit.
    """
    prediction, fraction = split_variance(diffusion, output, x_t)
    x_0, eps = predict(diffusion, process, prediction, x_t, i)
    if clip_x_0 or dynamic_percentile:
        x_0 = threshold(x_0, clip_x_0, dynamic_percentile, dynamic_most)
        eps = eps_from_x_0(process, x_t, i, x_0)
    small = at(process.posterior_log_variance, i, x_t)
    large = at(process.log_betas, i, x_t)
    if fraction is not None:
        log_variance = (fraction + 1) / 2 * large + (1 - fraction) / 2 * small
    else:
        fixed = large if diffusion.variance == "fixed_large" else small
        log_variance = jnp.broadcast_to(fixed, x_t.shape)
    return Prediction(x_0, eps, log_variance)


def mean_of_dims(x: jax.Array) -> jax.Array:
    """Mean over all but the first axis: `[b, ...]` -> `[b]`."""
    return x.reshape(len(x), -1).mean(axis=1)
