"""What the stages that denoise share: their loss, and how their networks are applied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from unclip_jax.diffusion import gaussian
from unclip_jax.diffusion.losses import training_losses
from unclip_jax.stages.conditioning import Params, random_timesteps

# x_0 [b, ...], and what makes `denoise(x_t, t)` of params and a guidance scale.
Denoising = tuple[jax.Array, Callable[[Params, float], gaussian.Denoise]]


def denoising_loss(
    diffusion: gaussian.Diffusion,
    denoise: gaussian.Denoise,
    x_0: jax.Array,
    t_key: jax.Array,
    noise_key: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of x_0 [b, ...] noised to random timesteps, and the means of its other terms."""
    terms = training_losses(
        diffusion,
        denoise,
        x_0,
        random_timesteps(t_key, len(x_0), diffusion),
        jax.random.normal(noise_key, x_0.shape),
    )
    means = {name: jnp.mean(value) for name, value in terms.items()}
    return means.pop("loss"), means


def dropout(key: jax.Array | None) -> dict[str, Any]:
    """How a network with dropout is applied: without a key, as when sampling."""
    return {"deterministic": key is None, "rngs": {} if key is None else {"dropout": key}}
