"""The landmarks of a loss and of an average, by the closed forms they stand for."""

import math

import jax
import numpy as np
import pytest

from unclip_jax.diffusion import gaussian
from unclip_jax.stages.conditioning import random_timesteps
from unclip_jax.training.doctor import settings as asked
from unclip_jax.training.doctor import theory


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
@pytest.mark.parametrize(("power", "shift"), [(1.0, 1.0), (0.3, 1.0), (0.3, 4.0)])
def test_the_landmarks_are_those_of_gaussian_data(prediction, power, shift):
    """For Gaussian data the best denoiser is linear: its error, and that of 0, by simulation."""
    diffusion = gaussian.Diffusion(steps=50, prediction=prediction, timestep_shift=shift)
    process = diffusion.process()
    x_key, noise_key = jax.random.split(jax.random.key(0))
    x_0 = math.sqrt(power) * jax.random.normal(x_key, (50, 20_000))
    noise = jax.random.normal(noise_key, x_0.shape)
    t = np.arange(50)
    x_t = gaussian.q_sample(process, x_0, t, noise)
    target = np.asarray(gaussian.target(diffusion, process, x_0, t, noise), np.float64)
    x_t = np.asarray(x_t, np.float64)
    slope = np.sum(x_t * target, axis=1) / np.sum(x_t**2, axis=1)
    drawn = random_timesteps(jax.random.key(1), 200_000, diffusion)
    often = np.bincount(drawn, minlength=50) / 200_000
    best = often @ np.mean((target - slope[:, None] * x_t) ** 2, axis=1)
    nothing = often @ np.mean(target**2, axis=1)
    assert theory.linear(diffusion, power) == pytest.approx(best, rel=0.02)
    assert theory.ignorant(diffusion, power) == pytest.approx(nothing, rel=0.02)


def test_what_an_average_keeps_of_its_beginning():
    """Against the average itself, of weights that are 1 at first and 0 ever after."""
    for warm in (False, True):
        average = 1.0
        for n in range(60):
            decay = min(0.95, (1 + n) / (10 + n)) if warm else 0.95
            average = decay * average
        assert asked.initial_share(0.95, warm, 60) == pytest.approx(average)
