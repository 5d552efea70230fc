"""What train.py left in a workdir, read and never written."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from unclip_jax import stages
from unclip_jax.common import config as settings
from unclip_jax.common.params import TRAINED
from unclip_jax.data.shards import storage
from unclip_jax.errors import UserError
from unclip_jax.training import writers
from unclip_jax.training.config import TrainConfig
from unclip_jax.weights import folder as model_folder
from unclip_jax.weights import trained

# A third of what docs/training.md shows the outcome of: colours, and coarse shapes.
FEWEST_EXAMPLES = 4_800


@dataclasses.dataclass(frozen=True)
class Workdir:
    """A run as its workdir tells of it.

    Attributes:
        path: the folder, here or in a bucket.
        description: what the run is, as train.py wrote it.
        stage: what trains.
        train: the loop's settings.
        records: of metrics.jsonl, in order.
    """

    path: Path
    description: Mapping[str, Any]
    stage: stages.Stage
    train: TrainConfig
    records: list[dict[str, float]]

    @property
    def in_bucket(self) -> bool:
        """Whether the folder is one of a bucket."""
        return storage.is_address(self.path)

    @functools.cached_property
    def checkpoints(self) -> list[Path]:
        """The folders of whole training checkpoints, the oldest first."""
        found = [path for path in self.path.glob("checkpoints/*") if path.name.isdecimal()]
        if self.in_bucket:  # on a disk, one gets its name when it is whole
            found = [path for path in found if (path / "commit_success.txt").is_file()]
        return sorted(found, key=lambda path: int(path.name))

    @property
    def step(self) -> int:
        """The last step that left a trace."""
        logged = [int(record["step"]) for record in self.records]
        return max(logged + [int(path.name) for path in self.checkpoints], default=0)

    @property
    def done(self) -> float:
        """The fraction of the run that lies behind."""
        return self.step / self.train.steps

    @property
    def examples(self) -> int:
        """How many examples it has learned from, repeats counted."""
        return self.step * self.train.batch_size

    @property
    def short(self) -> bool:
        """Whether it began with random weights, and has not seen enough to draw anything."""
        return self.examples < FEWEST_EXAMPLES and "init" not in self.description

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The steps and values of a metric, float64 [n] each; no step where it is missing."""
        found = [(r["step"], r[name]) for r in self.records if name in r]
        steps, values = zip(*found, strict=True) if found else ((), ())
        return np.asarray(steps, np.float64), np.asarray(values, np.float64)

    def last(self, name: str) -> float | None:
        """The last value of a metric."""
        _, values = self.series(name)
        return float(values[-1]) if len(values) else None

    @functools.cached_property
    def parameters(self) -> int:
        """How many numbers the network has."""
        shapes = jax.eval_shape(self.stage.init, jax.random.key(0))[TRAINED]
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))


def read(workdir: str | Path) -> Workdir:
    """Read a workdir; UserError if it is none, or what lies there cannot be read."""
    path = storage.place(workdir, "--workdir")
    file = path / "description.json"
    if not file.is_file():
        what = "no such folder" if not path.exists() else "no description.json in it"
        raise UserError(
            f"--workdir: {str(path)!r} is no workdir of train.py ({what}); give what train.py was"
            " given as --workdir"
        )
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
        stage, train = description["stage"], description["train"]
    except (ValueError, KeyError, TypeError) as problem:
        raise UserError(
            f"{file}: damaged ({problem}); copy description/metadata from the newest folder in"
            f" {path / 'checkpoints'} over it"
        ) from problem
    return Workdir(
        path=path,
        description=description,
        stage=stages.build(stage, f"{file}: stage"),
        train=settings.build(TrainConfig, train, f"{file}: train"),
        records=writers.read_metrics(path / writers.METRICS_FILE),
    )


def reads_clip(run: Workdir) -> bool:
    """Whether the run stands on a CLIP."""
    return "clip_fingerprint" in run.description


def clip_of_folder(folder: str | Path) -> str | None:
    """The fingerprint of the CLIP in a stage folder or workdir; None if it holds no CLIP."""
    folder = trained.stage_folder(folder)
    if not (folder / model_folder.CONFIG_FILE).is_file():
        return None
    description = model_folder.read_description(folder)
    if description.get("stage", {}).get("kind") != "clip":
        return None
    return description.get("fingerprint") or model_folder.read_fingerprint(folder)
