"""What a network may predict, read as x_0 and eps, and what each is to be trained on.

Given x_t = alpha x_0 + sigma eps, every prediction is affine in x_0. With s the data's standard
deviation and r^2 = sigma^2 + alpha^2 s^2:

    eps                                x_0 = (x_t - sigma eps) / alpha
    x_0                                eps = (x_t - alpha x_0) / sigma
    v = alpha eps - sigma x_0          x_0 = alpha x_t - sigma v,  eps = sigma x_t + alpha v
        (Salimans & Ho 2022, arXiv 2202.00512); both over alpha^2 + sigma^2 where that is not 1
    velocity u = eps - x_0             x_0 = (x_t - sigma u) / (alpha + sigma)
        of a flow, whose alpha + sigma = 1: dx_t / dt
    F, EDM's network                   x_0 = (alpha s^2 / r^2) x_t + (sigma s / r) F
        (Karras et al. 2022, arXiv 2206.00364, eq. 7, with x_t / alpha for its x)
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

PREDICTIONS = ("eps", "x_0", "v", "velocity", "F")


def read(
    kind: str,
    output: jax.Array,
    x_t: jax.Array,
    alpha: jax.Array,
    sigma: jax.Array,
    std: float,
    preserving: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The x_0 and the eps that an output stands for.

    Args:
        kind: one of `PREDICTIONS`.
        output: the shape of `x_t`.
        x_t: `[b, ...]`.
        alpha: of the signal in x_t, shaped to multiply it.
        sigma: of the noise.
        std: the data's standard deviation, for "F".
        preserving: whether alpha^2 + sigma^2 is known to be 1.
    """
    if kind == "eps":
        return (x_t - sigma * output) / alpha, output
    if kind == "x_0":
        return output, (x_t - alpha * output) / sigma
    if kind == "v":
        x_0, eps = alpha * x_t - sigma * output, sigma * x_t + alpha * output
        if preserving:
            return x_0, eps
        square = alpha**2 + sigma**2
        return x_0 / square, eps / square
    if kind == "velocity":
        total = alpha + sigma
        return (x_t - sigma * output) / total, (x_t + alpha * output) / total
    spread = jnp.hypot(sigma, alpha * std)
    x_0 = alpha * (std / spread) ** 2 * x_t + sigma * std / spread * output
    return x_0, sigma / spread**2 * x_t - alpha * std / spread * output


def target(
    kind: str, x_0: jax.Array, eps: jax.Array, alpha: jax.Array, sigma: jax.Array, std: float
) -> jax.Array:
    """What a perfect network says of x_t = alpha x_0 + sigma eps; arguments as of `read`."""
    if kind == "eps":
        return eps
    if kind == "x_0":
        return x_0
    if kind == "v":
        return alpha * eps - sigma * x_0
    if kind == "velocity":
        return eps - x_0
    spread = jnp.hypot(sigma, alpha * std)
    return sigma / (std * spread) * x_0 - alpha * std / spread * eps


def gain(
    kind: str, alpha: jax.Array, sigma: jax.Array, std: float, preserving: bool = False
) -> jax.Array:
    """How far x_0 moves with the output at one x_t: the factor of the output in x_0."""
    if kind == "eps":
        return -sigma / alpha
    if kind == "x_0":
        return jnp.ones_like(sigma)
    if kind == "v":
        return -sigma if preserving else -sigma / (alpha**2 + sigma**2)
    if kind == "velocity":
        return -sigma / (alpha + sigma)
    return sigma * std / jnp.hypot(sigma, alpha * std)


def edm(
    network: Callable[[jax.Array, jax.Array], jax.Array], sigma_data: float = 0.5
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """EDM's denoiser D of its raw network F (arXiv 2206.00364, eq. 7).

    Args:
        network: `F(c_in x [b, ...], c_noise [b])`, with c_in = 1 / sqrt(sigma^2 + sigma_data^2)
            and c_noise = log(sigma) / 4.
        sigma_data: the data's standard deviation.

    Returns:
        `denoise(x, sigma [b]) -> c_skip x + c_out F`, which predicts "x_0" where t is sigma.
    """

    def denoise(x: jax.Array, sigma: jax.Array) -> jax.Array:
        wide = sigma.reshape(sigma.shape + (1,) * (x.ndim - 1))
        c_in = jax.lax.rsqrt(wide**2 + sigma_data**2)
        output = network(c_in * x, jnp.log(sigma) / 4)
        return read("F", output, x, jnp.ones_like(wide), wide, sigma_data)[0]

    return denoise
