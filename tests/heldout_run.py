"""Held-out figures and previews of tiny stages by all processes of a run; tests run it as a script.

    python tests/heldout_run.py FILE [COORDINATOR PROCESSES PROCESS]

The lead writes FILE.npz: every figure, and the previews' pictures.
"""

from __future__ import annotations

import sys

import jax
import numpy as np

from tests import tiny
from unclip_jax.parallel import distributed, sharding
from unclip_jax.training import heldout

STAGES = {"clip": tiny.CLIP, "prior": tiny.PRIOR, "upsampler": tiny.UPSAMPLER}
PAIRS = 8


class Ready(heldout.Held):
    """Held-out pairs that are there already."""

    def __init__(self, arrays):
        self.__dict__ |= {
            "arrays": arrays,
            "preview": {name: array[:4] for name, array in arrays.items()},
            "captions": [f"picture {i}" for i in range(4)],
        }

    def caption(self, index):
        return [f"picture {i}" for i in index]


def pairs(stage):
    """A batch of the stage's, with what figures and previews read beside it."""
    size = getattr(stage, "image_size", 16)
    batch = tiny.batch(PAIRS, size) | {"index": np.arange(PAIRS, dtype=np.int32)}
    return {name: np.asarray(array) for name, array in batch.items()}


def main(arguments: list[str]) -> None:
    file, *processes = arguments
    mesh, found = None, {}
    if processes:
        address, count, index = processes
        distributed.initialize("auto", address, int(count), int(index))
        mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2))
    for name, stage in STAGES.items():
        params = tiny.params(stage)
        if mesh is not None:
            host = jax.tree.map(np.asarray, params)
            params = sharding.place(host, sharding.tree_shardings(host, mesh))
        evaluate, preview = heldout.figures(stage, Ready(pairs(stage)))
        for figure, value in evaluate(params, 0).items():
            found[f"{name}/{figure}"] = value
        found[f"{name}/preview"] = np.stack([image for image, _ in preview(params, 0)])
    if distributed.is_lead():
        np.savez(file, **found)


if __name__ == "__main__":
    main(sys.argv[1:])
