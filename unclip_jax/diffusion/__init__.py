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
from unclip_jax.diffusion.guidance import classifier_free, classifier_guided
from unclip_jax.diffusion.losses import training_losses, vlb_bits_per_dim
from unclip_jax.diffusion.progress import Watchable
from unclip_jax.diffusion.samplers import Sampling, invert, sample
from unclip_jax.diffusion.schedules import Process
from unclip_jax.diffusion.solvers import METHODS

__all__ = [
    "METHODS",
    "Denoise",
    "Diffusion",
    "Prediction",
    "Process",
    "Sampling",
    "Watchable",
    "analytic",
    "classifier_free",
    "classifier_guided",
    "interpret",
    "invert",
    "normal",
    "q_posterior",
    "q_sample",
    "sample",
    "training_losses",
    "vlb_bits_per_dim",
]
