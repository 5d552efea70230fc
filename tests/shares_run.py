"""One process of several that draw together; tests run it as a script.

    python tests/shares_run.py FOLDER [COORDINATOR PROCESSES PROCESS]

Draws pictures that depend on their number alone, joins them, and measures moments; the lead writes
FOLDER/drawn.npz, every process which batches it drew into FOLDER/drew-PROCESS.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np

from unclip_jax.evaluate.pictures import with_moments
from unclip_jax.metrics.vectors import Vectors
from unclip_jax.parallel import distributed
from unclip_jax.pipeline.drawing import Kept, in_batches, keeping

PICTURES, BATCH = 30_000, 64


def draw(drew: list[int]):
    """A picture for every number: uint8 [4, 4, 3]."""

    def make(rows: np.ndarray) -> np.ndarray:
        drew.append(int(rows[0]))
        return np.stack([np.full((4, 4, 3), row * 7919 % 251, np.uint8) for row in rows])

    return make


def main(arguments: list[str]) -> None:
    folder, *processes = arguments
    if processes:
        address, count, index = processes
        distributed.initialize("auto", address, int(count), int(index))
    folder, drew = Path(folder), []
    with keeping(Kept(folder / "kept", ["test"])):
        pictures = in_batches(PICTURES, BATCH, draw(drew))
    features = pictures.reshape(len(pictures), -1).astype(np.float32) / 255
    moments = with_moments(Vectors(features[:, :2], features)).moments
    (folder / f"drew-{jax.process_index()}.json").write_text(json.dumps(drew))
    if distributed.is_lead():
        arrays = {"pictures": pictures, "mean": moments.mean, "scatter": moments.scatter}
        np.savez(folder / "drawn.npz", **arrays)


if __name__ == "__main__":
    main(sys.argv[1:])
