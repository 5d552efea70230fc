"""Faults in what was asked for, which no training can mend."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from unclip_jax.training.doctor.findings import Finding, error
from unclip_jax.training.doctor.workdir import Workdir

# What an average may keep of the random weights that training began with.
INITIAL_SHARE = 0.01

# The paper drops captions half of the time, and nothing more often than that.
MOSTLY_DROPPED = 0.9

# The paper's scale gives embeddings of 1024 dimensions a standard deviation of 0.54.
STD_BAND = (0.5, 2.0)


def examine(run: Workdir) -> Iterator[Finding]:
    """Findings in the settings."""
    yield from average(run)
    yield from drops(run)
    yield from embedding_std(run)


def initial_share(ema_decay: float, ema_warmup: bool, steps: int) -> float:
    """How much of the averaged weights is still what training began with, after `steps` steps.

    The product of the decays of all steps.
    """
    if not ema_warmup:
        return ema_decay**steps
    n = np.arange(steps, dtype=np.float64)
    return float(np.exp(np.sum(np.log(np.minimum(ema_decay, (1 + n) / (10 + n))))))


def average(run: Workdir) -> Iterator[Finding]:
    """The average of the weights, which is what is evaluated and exported."""
    train = run.train
    share = initial_share(train.ema_decay, train.ema_warmup, train.steps)
    if share > INITIAL_SHARE and "init" not in run.description:
        yield error(
            "average_too_slow",
            f"train.ema_decay {train.ema_decay:g} averages over 1 / (1 - decay) ="
            f" {1 / (1 - train.ema_decay):,.0f} steps, and the run has {train.steps:,}: at its end"
            f" {share:.0%} of the averaged weights are still the random ones it began with",
            f"in a new workdir set train.ema_warmup=True, or train.ema_decay to about"
            f" {1 - 10 / max(train.steps, 20):.4g} (a tenth of the run)",
        )


def drops(run: Workdir) -> Iterator[Finding]:
    """How often conditions are dropped, which guidance lives on."""
    stage = run.stage
    used = [f"{name}_drop" for name in stage.drops]
    for name in used:
        value = getattr(stage, name)
        if value > MOSTLY_DROPPED:
            yield error(
                "conditions_dropped",
                f"stage.{name} is {value:g}: only {1 - value:.1%} of the examples show the network"
                " what it is to obey",
                f"train in a new workdir with stage.{name} at most 0.5 (the paper: 0.1 for z_i, 0.5"
                " for captions)",
            )
    scale = getattr(stage, "guidance_scale", 1.0)
    untrained = [name for name in used if getattr(stage, name) == 0.0]
    if untrained and scale != 1.0:
        yield error(
            "guidance_untrained",
            f"stage.guidance_scale is {scale:g}, but with stage.{untrained[0]} 0 training never"
            " drops that condition, so what guidance leads away from is not trained",
            f"sample with guidance_scale 1, or train with stage.{untrained[0]}=0.1",
        )


def embedding_std(run: Workdir) -> Iterator[Finding]:
    """The scale at which the diffusion prior sees embeddings, where the config says it."""
    power = run.stage.data_power(run.description.get("normalisation"))
    if power is None:
        return
    std = power**0.5
    if not STD_BAND[0] <= std <= STD_BAND[1]:
        kind, e = run.description["normalisation"], run.stage.model.embed_dim
        yield error(
            "embedding_std",
            f"normalisation {kind!r} gives unit embeddings of {e} dimensions a standard deviation"
            f" of {std:.3g}, and the noise has 1: at most timesteps there is"
            f" {'nothing but noise to see' if std < 1 else 'hardly any noise to remove'}",
            "train in a new workdir with --config.normalisation=whiten",
        )
