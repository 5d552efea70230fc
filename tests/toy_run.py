"""A linear model on synthetic data, trained by the real loop; tests also run it as a script."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.parallel import sharding
from unclip_jax.training import init_state, loop, make_optimizer, make_train_step, writers

BATCH = 16
WEIGHTS = np.linspace(-1.0, 1.0, 15, dtype=np.float32).reshape(5, 3)


class Batches:
    """Batch i is a function of i alone; the position is i. `log` keeps the i's handed out."""

    def __init__(self, batch_size=BATCH, poison=None, bad=np.inf, end=None, as_bytes=False):
        self.index, self.batch_size, self.log = 0, batch_size, []
        self.poison, self.bad, self.end, self.as_bytes = poison, bad, end, as_bytes

    def __next__(self):
        if self.index == self.end:
            raise StopIteration
        rng = np.random.default_rng(self.index)
        x = rng.normal(size=(self.batch_size, 5)).astype(np.float32)
        y = x @ WEIGHTS + rng.normal(size=(1, 3)).astype(np.float32)
        if self.index == self.poison:
            y[0, 0] = self.bad
        self.log.append(self.index)
        self.index += 1
        return {"x": x, "y": y}

    def get_state(self):
        return str(self.index).encode() if self.as_bytes else {"index": self.index}

    def set_state(self, states):
        (state,) = states
        self.index = int(state) if self.as_bytes else state["index"]


def init_params():
    return {
        "network": {"kernel": jnp.full((5, 3), 0.1), "bias": jnp.zeros((3,))},
        "normalisation": {"std": jnp.full((3,), 0.7)},
    }


def predict(params, x):
    return x @ params["network"]["kernel"] + params["network"]["bias"][None]


def loss_fn(params, batch, key):
    """Squared error over a std that is constant; no randomness."""
    error = (predict(params, batch["x"]) - batch["y"]) / params["normalisation"]["std"][None]
    return jnp.mean(error**2), {"mae": jnp.mean(jnp.abs(error))}


def noisy_loss_fn(params, batch, key):
    """The same with inputs that noise from `key` disturbs."""
    noise = 0.1 * jax.random.normal(key, batch["x"].shape)
    loss, metrics = loss_fn(params, batch | {"x": batch["x"] + noise}, key)
    return loss, metrics | {"noise": jnp.mean(noise)}


def toy_config(**settings):
    """The settings of the loop."""
    defaults = {
        "batch_size": BATCH,
        "steps": 30,
        "learning_rate": 0.02,
        "schedule": "cosine",
        "warmup_steps": 3,
        "weight_decay": 0.1,
        "ema_decay": 0.9,
        "log_every": 4,
        "checkpoint_every": 10,
    }
    return loop.TrainConfig(**defaults | settings)


def run(workdir, batches=None, loss=noisy_loss_fn, description=None, **settings):
    """Train; keyword arguments go to TrainConfig, or to `train` where it knows them."""
    known = ("complete", "evaluate", "preview", "export", "profile", "step_fn", "ends")
    callbacks = {name: settings.pop(name) for name in known if name in settings}
    config = toy_config(**settings)
    return loop.train(
        loss_fn=loss,
        init_params=init_params,
        batches=batches or Batches(config.batch_size),
        config=config,
        workdir=workdir,
        description=description or {"stage": {"kind": "toy", "layers": 1}},
        **callbacks,
    )


def step_fn(config, loss=loss_fn):
    """A compiled step on all devices."""
    return make_train_step(loss, make_optimizer(config), config, sharding.make_mesh())


def fresh(config):
    """The state that a run begins with."""
    return init_state(init_params(), make_optimizer(config))


def numpy_leaves(state):
    """All arrays of a state, in order."""
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def assert_same(first, second):
    """Bit for bit."""
    for a, b in zip(numpy_leaves(first), numpy_leaves(second), strict=True):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()


def environment(**changes):
    """Of a process that imports this checkout."""
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | changes


def no_curves():
    """Leave out the plots of a script's runs, which take longer than a run of few steps."""
    writers.plot_metrics = lambda workdir: None


if __name__ == "__main__":
    from tests import object_store

    object_store.use()
    no_curves()
    jax.config.update("jax_numpy_rank_promotion", "raise")
    workdir, settings, *save_to = sys.argv[1:]
    final = run(workdir, **json.loads(settings))
    if save_to:
        np.savez(save_to[0], *numpy_leaves(final))
