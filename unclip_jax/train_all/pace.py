"""How long a step takes on this machine: a few are timed, with real batches and random weights."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import jax
import numpy as np

from unclip_jax import stages
from unclip_jax.common import config as settings
from unclip_jax.common.params import TRAINED
from unclip_jax.data import batches, datasets
from unclip_jax.parallel import sharding
from unclip_jax.training.inputs import data_for
from unclip_jax.training.optimizers import make_optimizer
from unclip_jax.training.prepare import Settings, mesh_for
from unclip_jax.training.step import (
    StepFn,
    about_to_compile,
    make_train_step,
    random_params,
    sharded_state,
)

LEAST_SECONDS = 1.0  # that are timed, in so many steps at most
MOST_STEPS = 10


@dataclasses.dataclass(frozen=True)
class Pace:
    """What training a stage costs here.

    Attributes:
        parameters: of its network.
        batch_size: examples in a step.
        compiling: seconds until the first step is done.
        step: seconds that each further one takes.
    """

    parameters: int
    batch_size: int
    compiling: float
    step: float


def measure(config, tell: Callable[[int, float], None]) -> tuple[Pace, StepFn]:
    """Time a few steps of what a config trains; the compiled step serves its training, too.

    CLIP need not be there: embeddings are drawn at random. `tell(parameters, seconds)` is called
    before the step is compiled, with about how long that takes.
    """
    given = settings.build(Settings, config, "config")
    stage = stages.build(given.stage)
    mesh = mesh_for(given, stage)
    optimizer = make_optimizer(given.train)
    began = time.monotonic()
    params = random_params(stage.init, jax.random.key(0))
    state = sharded_state(params, optimizer, given.train, mesh)
    step_fn = make_train_step(stage.loss, optimizer, given.train, mesh)
    batch = sharding.shard_batch(_batch(given, stage), mesh)
    count = sum(x.size for x in jax.tree.leaves(params[TRAINED]))
    tell(count, about_to_compile(step_fn, state, batch))
    for _ in range(2):  # both compile
        state, metrics = step_fn(state, batch)
        jax.block_until_ready(metrics)
    compiled = time.monotonic()
    steps = 0
    while steps < MOST_STEPS and (steps < 2 or time.monotonic() - compiled < LEAST_SECONDS):
        state, metrics = step_fn(state, batch)
        jax.block_until_ready(metrics)
        steps += 1
    took = (time.monotonic() - compiled) / steps
    pace = Pace(count, given.train.batch_size, max(0.0, compiled - began - 2 * took), took)
    return pace, step_fn


def _batch(given: Settings, stage: stages.Stage) -> dict[str, np.ndarray]:
    """A batch as the stage's training reads it."""
    data = data_for(stage, given.data)
    size = given.train.batch_size
    batch = next(batches.batches(datasets.load(data), data, seed=0, batch_size=size))
    rng = np.random.default_rng(0)
    for name, field in stage.batch_spec(size).items():
        if name not in batch:
            batch[name] = rng.normal(size=field.shape).astype(field.dtype)
    return batch
