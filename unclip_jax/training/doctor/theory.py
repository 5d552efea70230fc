"""What loss to expect of a network that has learned nothing, and of the simplest that has.

**Contrastive** (CLIP). With b pairs compared at a time, guessing costs log b nats; less where
pictures or captions repeat, as `train/guess_loss` says.

**Cross-entropy** (autoregressive prior, classifier). Guessing among n costs log n nats.

**Squared error** (diffusion). With x_t = alpha x_0 + sigma eps, and m = E x_0^2 per dimension, the
network that always answers 0 has a mean squared error of

    1 for eps,    m for x_0,    alpha^2 + sigma^2 m for v = alpha eps - sigma x_0.

Knowing m and nothing else of the data, the best is linear in x_t (Wiener). It leaves of x_0

    r = sigma^2 m / (alpha^2 m + sigma^2),

which as an error of eps is r alpha^2 / sigma^2, and of v it is r / sigma^2, since given x_t each of
them says the others (`predictions`). Training draws t uniformly, so all are averaged over all t.
Pixels lie in [-1, 1], where m <= 1; whitened embeddings have m = 1, and unit embeddings of e
dimensions times s have m = s^2 / e. To do better takes structure: what there is to learn begins
there.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from unclip_jax.diffusion import gaussian
from unclip_jax.diffusion.predictions import gain, target
from unclip_jax.training.doctor.findings import TENTH
from unclip_jax.training.doctor.workdir import Workdir


class Band(NamedTuple):
    """Landmarks of a loss.

    Attributes:
        metric: which of the logged figures they are of.
        ignorant: its value for a network that has learned nothing.
        because: where that comes from, in words.
        linear: its value for the best linear denoiser; None where there is no diffusion.
    """

    metric: str
    ignorant: float
    because: str
    linear: float | None = None


def band(run: Workdir) -> Band | None:
    """The landmarks of a run's loss; None where its data have no known scale."""
    stage, train = run.stage, run.train
    if guess := stage.guesses(train.batch_size):
        n, what = guess
        because = f"log {n}, what guessing {what} costs"
        if (known := run.last("train/guess_loss")) is not None and known < (1 - TENTH) * math.log(
            n
        ):
            because = f"what guessing {what} costs, where so many captions or pictures are the same"
            return Band("train/loss", known, because)
        return Band("train/loss", math.log(n), because)
    power = stage.data_power(run.description.get("normalisation"))
    if power is None:
        return None
    diffusion = stage.diffusion
    because = f"the mean squared error per dimension of predicting {diffusion.prediction} as 0"
    return Band("train/mse", ignorant(diffusion, power), because, linear(diffusion, power))


def ignorant(diffusion: gaussian.Diffusion, power: float) -> float:
    """Mean squared error, over the timesteps of training, of the answer 0."""
    signal, noise = signal_and_noise(diffusion)
    zero = np.zeros_like(signal)
    std = diffusion.noise.sigma_data
    of_x_0, of_eps = (
        np.asarray(target(diffusion.prediction, *unit, signal**0.5, noise**0.5, std), np.float64)
        for unit in ((zero + 1, zero), (zero, zero + 1))
    )
    error = of_x_0**2 * power + of_eps**2
    return float(error @ diffusion.timestep_probabilities())


def linear(diffusion: gaussian.Diffusion, power: float) -> float:
    """Mean squared error, over the timesteps of training, of the best linear denoiser."""
    signal, noise = signal_and_noise(diffusion)
    total = signal * power + noise
    std = diffusion.noise.sigma_data
    moved = np.asarray(gain(diffusion.prediction, signal**0.5, noise**0.5, std), np.float64)
    return float(noise * power / total / moved**2 @ diffusion.timestep_probabilities())


def signal_and_noise(diffusion: gaussian.Diffusion) -> tuple[np.ndarray, np.ndarray]:
    """alpha^2 and sigma^2 of every timestep, float64 [steps]."""
    process = diffusion.process()
    return (
        np.asarray(process.sqrt_alpha_bar, np.float64) ** 2,
        np.asarray(process.sqrt_one_minus_alpha_bar, np.float64) ** 2,
    )
