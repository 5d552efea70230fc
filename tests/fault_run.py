"""A run with a state of some megabytes, for disks that are full; tests run it as a script.

python fault_run.py WORKDIR SETTINGS [LIMIT]: no file may grow beyond LIMIT bytes.
"""

from __future__ import annotations

import json
import resource

import jax.numpy as jnp

from tests import toy_run
from unclip_jax.errors import run_command
from unclip_jax.training import loop

WIDE = 60_000


def init_params():
    """0.96 MB, of which a checkpoint holds four copies."""
    return {"network": {"kernel": jnp.linspace(0.0, 1.0, 4 * WIDE).reshape(4, WIDE)}}


def loss_fn(params, batch, key):
    """Small products of noise: bytes that no compression makes fewer."""
    return jnp.mean((batch["x"][:, :4] @ params["network"]["kernel"]) ** 2), {}


def main(argv):
    """Train."""
    workdir, settings, *limit = argv
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit[0]), resource.RLIM_INFINITY))
    config = loop.TrainConfig(**{"batch_size": toy_run.BATCH} | json.loads(settings))
    loop.train(
        loss_fn=loss_fn,
        init_params=init_params,
        batches=toy_run.Batches(),
        config=config,
        workdir=workdir,
        description={"stage": {"kind": "wide"}},
    )


if __name__ == "__main__":
    toy_run.no_curves()
    run_command(main)
