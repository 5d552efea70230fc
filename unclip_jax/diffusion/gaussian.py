r"""The mathematics of discrete-time Gaussian diffusion; it knows no network.

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
is a scalar or int32 `[b]`. Arrays are `[b, ...]` of any rank; the mathematics is float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.common import checks
from unclip_jax.diffusion.schedules import SCHEDULES, Process, tables
from unclip_jax.diffusion.thresholding import threshold
from unclip_jax.errors import UserError, wrong

Denoise = Callable[[jax.Array, jax.Array], jax.Array]
"""`denoise(x_t [b, ...], t int32 [b]) -> raw network output`, `t` an original timestep."""

PREDICTIONS = ("eps", "x_0", "v")
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")
LOSSES = ("simple", "hybrid")
LIKELIHOODS = ("8bit", "gaussian")


@dataclass(frozen=True)
class Diffusion:
    """What a network was, or will be, trained to do. Hashable: a static argument of `jax.jit`.

    Attributes:
        steps: length of the training process, at least 1.
        schedule: "cosine" (arXiv 2102.09672, eq. 17; betas at most 0.999) or "linear"
            (1e-4 to 0.02, scaled by 1000/steps).
        prediction: what the network's output means: "eps", "x_0" or "v".
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

    Raises:
        UserError: a field is out of its range.
    """

    steps: int = 1000
    schedule: str = "cosine"
    prediction: str = "eps"
    variance: str = "fixed_small"
    loss: str = "simple"
    min_snr_gamma: float = 0.0
    timestep_shift: float = 1.0
    likelihood: str = "8bit"

    def __post_init__(self) -> None:
        """Check every field."""
        checks.count("Diffusion.steps", self.steps)
        checks.choice("Diffusion.schedule", self.schedule, SCHEDULES)
        checks.choice("Diffusion.prediction", self.prediction, PREDICTIONS)
        checks.choice("Diffusion.variance", self.variance, VARIANCES)
        checks.choice("Diffusion.loss", self.loss, LOSSES)
        checks.choice("Diffusion.likelihood", self.likelihood, LIKELIHOODS)
        checks.number("Diffusion.min_snr_gamma", self.min_snr_gamma, least=0)
        if not checks.number("Diffusion.timestep_shift", self.timestep_shift, least=0):
            raise wrong("Diffusion.timestep_shift", 0, "a positive number", "1 is no shift")
        if self.schedule == "linear" and self.steps <= 20:
            expected = "more than 20 for the linear schedule, whose betas are above 1 otherwise"
            raise wrong("Diffusion.steps", self.steps, expected, 'use schedule="cosine"')
        if self.loss == "hybrid" and not self.learned_variance:
            expected = 'a learned variance with loss="hybrid", which trains one'
            do = 'use variance="learned_range" or loss="simple"'
            raise wrong("Diffusion.variance", self.variance, expected, do)

    @property
    def learned_variance(self) -> bool:
        """Whether the network's last axis is doubled: the prediction, then the variance."""
        return self.variance == "learned_range"

    def timestep_probabilities(self) -> np.ndarray:
        """How often training draws each timestep: float64 [steps], 1 together."""
        edges = np.linspace(0.0, 1.0, self.steps + 1)
        return np.diff(edges / (self.timestep_shift - (self.timestep_shift - 1.0) * edges))

    def process(self, spacing: str = "") -> Process:
        """The process at the kept timesteps; computed once per schedule and spacing.

        Args:
            spacing: "" every step; "250" that many, evenly, both ends included;
                "25,25,25" so many in each of equal sections, the cleanest first;
                "ddim25" an integer stride from timestep 0.

        Raises:
            UserError: the spacing cannot be read, or asks for more steps than there are.
        """
        if not isinstance(spacing, str):
            raise wrong("spacing", spacing, 'a string, such as "250"')
        return tables(self.steps, self.schedule, spacing)


class Prediction(NamedTuple):
    """A network's output in every form a sampler needs; float32, the shape of `x_t`."""

    x_0: jax.Array
    eps: jax.Array
    log_variance: jax.Array


# ------------------------------------------------------------------------- forward process


def at(table: np.ndarray, i: jax.Array, x: jax.Array) -> jax.Array:
    """`table[i]`, shaped to multiply `x`: a scalar for a scalar `i`, `[b, 1, ..., 1]` for `[b]`."""
    value = jnp.asarray(table)[i]
    return value.reshape(value.shape + (1,) * (x.ndim - 1)) if value.ndim else value


def normal(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise, one key per example: float32 `[b, *shape]` from typed keys `[b]`.

    Raises:
        UserError: `keys` is not a one-dimensional array of typed keys.
    """
    check_keys(keys)
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


def levels(process: Process, i: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """sqrt(alpha_bar) and sqrt(1 - alpha_bar) at step i, shaped to multiply `x`."""
    return at(process.sqrt_alpha_bar, i, x), at(process.sqrt_one_minus_alpha_bar, i, x)


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
    if diffusion.prediction == "eps":
        return noise
    if diffusion.prediction == "x_0":
        return x_0
    alpha, sigma = levels(process, i, x_0)
    return alpha * noise - sigma * x_0


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
    alpha, sigma = levels(process, i, x_t)
    if diffusion.prediction == "eps":
        return (x_t - sigma * output) / alpha, output
    if diffusion.prediction == "x_0":
        return output, eps_from_x_0(process, x_t, i, output)
    return alpha * x_t - sigma * output, sigma * x_t + alpha * output


def split_variance(
    diffusion: Diffusion, output: jax.Array, x_t: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """A raw output as float32 prediction and variance channels (None when they are not learned).

    Raises:
        UserError: the output's shape does not fit `x_t` and the kind of variance.
    """
    factor = 2 if diffusion.learned_variance else 1
    expected = (*x_t.shape[:-1], x_t.shape[-1] * factor)
    if output.shape != expected:
        raise wrong(
            "network output's shape",
            output.shape,
            f"{expected} for data of {x_t.shape} and Diffusion.variance={diffusion.variance!r}",
            "change the network's output channels or the variance",
        )
    output = output.astype(jnp.float32)
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

    Returns:
        x_0 within its range, the eps that belongs to that x_0, and the log variance of
        p(x_{t-1} | x_t).

    Raises:
        UserError: the output's shape does not fit.
    """
    prediction, fraction = split_variance(diffusion, output, x_t)
    x_0, eps = predict(diffusion, process, prediction, x_t, i)
    if clip_x_0 or dynamic_percentile:
        x_0 = threshold(x_0, clip_x_0, dynamic_percentile)
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


def check_keys(keys: jax.Array) -> None:
    """Raise `UserError` unless `keys` is `[b]` typed keys."""
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) or keys.ndim != 1:
        raise UserError(
            f"keys: got {keys.dtype}{list(keys.shape)}, expected one typed key per example; make"
            " them with jax.random.split(jax.random.key(0), batch)"
        )
