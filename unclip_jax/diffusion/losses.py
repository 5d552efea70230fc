"""What a diffusion model is trained on and measured by.

**Simple.** The mean squared error of whatever the network predicts (Ho et al. 2020, eq. 14),
optionally with min-SNR weights (Hang et al. 2023, arXiv 2303.09556).

**Bound.** With L_T = KL(q(x_T | x_0) || N(0, I)), L_0 = -log p(x_0 | x_1) and, between them,
L_t = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), the chain gives (Ho et al., eq. 5)

    -log p(x_0) <= L_T + sum_t L_t + L_0.                                                      (1)

**Hybrid.** L_simple leaves a learned variance without a gradient, so L_simple + 1e-3 L_vlb adds the
bound, with the mean's gradient stopped inside it (Nichol & Dhariwal 2021, eq. 16).

Notation and shapes are those of `unclip_jax.diffusion.gaussian`; all of it is float32.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.diffusion import grids
from unclip_jax.diffusion.gaussian import (
    Denoise,
    Diffusion,
    interpret,
    mean_of_dims,
    normal,
    q_posterior,
    q_sample,
    split_variance,
    target,
)
from unclip_jax.diffusion.predictions import gain
from unclip_jax.diffusion.schedules import Process
from unclip_jax.diffusion.states import key_each
from unclip_jax.errors import wrong

VLB_WEIGHT = 1e-3
"""lambda of L_hybrid = L_simple + lambda L_vlb (arXiv 2102.09672, eq. 16)."""


def normal_kl(
    mean_q: jax.Array, log_variance_q: jax.Array, mean_p: jax.Array, log_variance_p: jax.Array
) -> jax.Array:
    """KL(N(mean_q, variance_q) || N(mean_p, variance_p)) of each element, in nats."""
    gap = log_variance_q - log_variance_p
    return 0.5 * (jnp.exp(gap) - 1 - gap + (mean_q - mean_p) ** 2 * jnp.exp(-log_variance_p))


def gaussian_log_likelihood(x: jax.Array, mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    """Log density of each element under N(mean, variance), in nats."""
    square = (x - mean) ** 2 * jnp.exp(-log_variance)
    return -0.5 * (square + log_variance + math.log(2 * math.pi))


def discretized_log_likelihood(x: jax.Array, mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    """Log probability of each 8-bit level under N(mean, variance), in nats (Ho et al., eq. 13).

    Level k of 256 lies at -1 + 2k/255 and owns the interval half a level to either side; the
    outermost two own everything beyond, so the 256 probabilities sum to 1. Taken in logarithms
    from whichever tail is thinner, it is finite however far `mean` is from `x`.
    """
    scale = jnp.exp(-0.5 * log_variance)
    below, above = (x - mean - 1 / 255) * scale, (x - mean + 1 / 255) * scale
    far, near = -jnp.abs(x - mean) * scale - scale / 255, -jnp.abs(x - mean) * scale + scale / 255
    log_far, log_near = jax.scipy.special.log_ndtr(far), jax.scipy.special.log_ndtr(near)
    ratio = jnp.minimum(log_far - log_near, -1e-7)
    inside = log_near + jnp.log(-jnp.expm1(ratio))
    upper = jnp.where(x > 0.999, jax.scipy.special.log_ndtr(-below), inside)
    return jnp.where(x < -0.999, jax.scipy.special.log_ndtr(above), upper)


def vlb_terms(
    diffusion: Diffusion,
    process: Process,
    output: jax.Array,
    x_0: jax.Array,
    x_t: jax.Array,
    i: jax.Array,
    clip_x_0: float = 0.0,
) -> jax.Array:
    """One term of the bound (1) per example, bits per dimension `[b]`: L_0 where i = 0."""
    prediction = interpret(diffusion, process, output, x_t, i, clip_x_0)
    mean, _, _ = q_posterior(process, prediction.x_0, x_t, i)
    true_mean, _, true_log_variance = q_posterior(process, x_0, x_t, i)
    kl = normal_kl(true_mean, true_log_variance, mean, prediction.log_variance)
    discrete = diffusion.likelihood == "8bit"
    log_likelihood = discretized_log_likelihood if discrete else gaussian_log_likelihood
    nats = jnp.where(
        jnp.broadcast_to(i, x_t.shape[:1]) == 0,
        -mean_of_dims(log_likelihood(x_0, mean, prediction.log_variance)),
        mean_of_dims(kl),
    )
    return nats / math.log(2)


def training_losses(
    diffusion: Diffusion, denoise: Denoise, x_0: jax.Array, t: jax.Array, noise: jax.Array
) -> dict[str, jax.Array]:
    """The training loss of each example.

    Args:
        diffusion: what to train.
        denoise: the network; see `Denoise`.
        x_0: float `[b, ...]`.
        t: int32 `[b]`, timesteps in [0, steps); the network is given the process's times there.
        noise: standard normal, the shape of `x_0`.

    Returns:
        float32 `[b]` each: "loss" to minimise; "mse", the unweighted mean squared error of the
        prediction; and for the hybrid loss "vlb", a one-sample estimate of the bound in bits per
        dimension (without L_T, which no parameter can change). Its gradient reaches only the
        variance channels.

    Raises:
        UserError: `x_0` is not floating point, the output does not fit, or the variance is
            learned but the loss would not train it.
    """
    if not jnp.issubdtype(x_0.dtype, jnp.floating):
        raise wrong("x_0's dtype", x_0.dtype.name, "floating point", "scale images to ±1")
    if diffusion.learned_variance and diffusion.loss != "hybrid":
        expected = 'one that trains the variance channels of variance="learned_range"'
        raise wrong("Diffusion.loss", diffusion.loss, expected, 'use loss="hybrid"')
    process = diffusion.process()
    x_0, noise = x_0.astype(jnp.float32), noise.astype(jnp.float32)
    x_t = q_sample(process, x_0, t, noise)
    output = denoise(x_t, diffusion.times(t))
    prediction, fraction = split_variance(diffusion, output, x_t)
    mse = mean_of_dims((prediction - target(diffusion, process, x_0, t, noise)) ** 2)
    terms = {"loss": min_snr_weight(diffusion, process, t) * mse, "mse": mse}
    if diffusion.loss == "hybrid":
        frozen = jnp.concatenate([jax.lax.stop_gradient(prediction), fraction], axis=-1)
        terms["vlb"] = diffusion.steps * vlb_terms(diffusion, process, frozen, x_0, x_t, t)
        terms["loss"] += VLB_WEIGHT * terms["vlb"]
    return terms


def min_snr_weight(diffusion: Diffusion, process: Process, i: jax.Array) -> jax.Array:
    """Weight of the squared error at step `i`: min(SNR, gamma) of x_0's, whatever is predicted.

    By equation (2) the squared error of eps is SNR times that of x_0, and v's is SNR + 1 times,
    so they are weighted by min(SNR, gamma)/SNR and min(SNR, gamma)/(SNR + 1); others
    by the square of their `gain`.
    """
    log_snr = jnp.asarray(process.log_snr)[i]
    if not diffusion.min_snr_gamma:
        return jnp.ones_like(log_snr)
    log_gamma = math.log(diffusion.min_snr_gamma)
    if diffusion.prediction == "eps":
        return jnp.exp(jnp.minimum(0.0, log_gamma - log_snr))
    weight = jnp.exp(jnp.minimum(log_snr, log_gamma))
    if diffusion.prediction != "x_0":
        alpha, sigma = jnp.asarray(process.alpha)[i], jnp.asarray(process.sigma)[i]
        noise, kind = diffusion.noise, diffusion.prediction
        weight *= gain(kind, alpha, sigma, noise.sigma_data, noise.family == "betas") ** 2
    return weight


def vlb_bits_per_dim(
    diffusion: Diffusion,
    denoise: Denoise,
    x_0: jax.Array,
    keys: jax.Array,
    spacing: grids.Spacing = "",
    clip_x_0: float = 0.0,
) -> dict[str, jax.Array]:
    """The bound (1) on -log p(x_0) over a whole trajectory, in bits per dimension.

    Args:
        diffusion: what the network was trained to do; `likelihood` chooses L_0.
        denoise: the network; called once per step inside one `lax.scan`.
        x_0: float `[b, ...]`.
        keys: one key, or one for each example `[b]`, for the noise of each step.
        spacing: see `Diffusion.process`.
        clip_x_0: see `threshold`.

    Returns:
        "total" `[b]`, "prior" `[b]` (L_T) and "terms" `[b, n]` (L_0 first).

    Raises:
        UserError: bad spacing, keys or output shape.
    """
    keys = key_each(keys, len(x_0))
    process = diffusion.process(spacing)
    x_0 = x_0.astype(jnp.float32)

    def term(_: None, i: jax.Array) -> tuple[None, jax.Array]:
        noise = normal(jax.vmap(jax.random.fold_in, (0, None))(keys, i), x_0.shape[1:])
        x_t = q_sample(process, x_0, i, noise)
        t = jnp.full(x_0.shape[:1], jnp.asarray(process.timesteps)[i])
        output = denoise(x_t, t)
        return None, vlb_terms(diffusion, process, output, x_0, x_t, i, clip_x_0)

    _, terms = jax.lax.scan(term, None, jnp.arange(process.steps))
    std = diffusion.noise_std
    log_variance = 2 * np.log(process.sigma[-1] / std)
    prior = normal_kl(process.alpha[-1] / std * x_0, log_variance, 0.0, 0.0)
    prior = mean_of_dims(prior) / math.log(2)
    return {"total": prior + terms.sum(axis=0), "prior": prior, "terms": terms.T}
