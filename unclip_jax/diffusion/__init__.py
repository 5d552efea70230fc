"""Diffusion mathematics that knows no network: jax and NumPy alone."""

from unclip_jax.diffusion import analytic
from unclip_jax.diffusion.gaussian import (
    Denoise,
    Diffusion,
    Prediction,
    interpret,
    normal,
    q_posterior,
    q_sample,
)
from unclip_jax.diffusion.guidance import (
    autoguided,
    classifier_free,
    classifier_guided,
    composed,
    perpendicular,
)
from unclip_jax.diffusion.losses import training_losses, vlb_bits_per_dim
from unclip_jax.diffusion.predictions import edm
from unclip_jax.diffusion.progress import Watchable
from unclip_jax.diffusion.rules import (
    apg,
    interval,
    per_step,
    rescaled,
    rising,
    zero_init,
    zero_star,
)
from unclip_jax.diffusion.samplers import Grid, Sampling, grid_of, invert, noised, sample
from unclip_jax.diffusion.schedules import Process, Schedule
from unclip_jax.diffusion.solvers import METHODS

__all__ = [
    "METHODS",
    "Denoise",
    "Diffusion",
    "Grid",
    "Prediction",
    "Process",
    "Sampling",
    "Schedule",
    "Watchable",
    "analytic",
    "apg",
    "autoguided",
    "classifier_free",
    "classifier_guided",
    "composed",
    "edm",
    "grid_of",
    "interpret",
    "interval",
    "invert",
    "noised",
    "normal",
    "per_step",
    "perpendicular",
    "q_posterior",
    "q_sample",
    "rescaled",
    "rising",
    "sample",
    "training_losses",
    "vlb_bits_per_dim",
    "zero_init",
    "zero_star",
]
