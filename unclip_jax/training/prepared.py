"""A stage with all that it trains on, as `prepare` makes it and the training loop is handed it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from absl import logging
from jax.sharding import Mesh

from unclip_jax import stages
from unclip_jax.common import config as settings
from unclip_jax.data import batches, datasets
from unclip_jax.data.batches import Batches
from unclip_jax.data.examples import TextEncoder
from unclip_jax.data.records import Source, fingerprints
from unclip_jax.data.tokenizer import Encoder
from unclip_jax.parallel import sharding
from unclip_jax.training.config import TrainConfig
from unclip_jax.training.distillation import Distillation
from unclip_jax.training.heldout import Evaluate, Params, Preview
from unclip_jax.training.lora import Lora
from unclip_jax.training.step import LossFn
from unclip_jax.weights import folder as model_folder
from unclip_jax.weights.known import Known

# Of the data's settings, those that change no batch or follow from the stage.
MACHINE_FIELDS = (
    "cache_dir", "shared_dir", "cache_bytes", "disk_cache_bytes", "read_threads", "bare",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Everything the training loop is handed.

    Attributes:
        stage: what trains.
        init_params: makes the first params; of them, "network" is what trains.
        loss: of those params; the stage's own, but for low-rank adapters.
        source: the training set.
        data: how its images and captions become arrays.
        train: the loop's settings.
        mesh: of all the devices.
        evaluate: figures of the EMA params on held-out data.
        preview: pictures with captions, made with the EMA params.
        export: the params of the stage, made of those that trained.
        save_adapters: writes those that trained alone, where they are adapters; else None.
        description: what a checkpoint or model folder says of itself.
        encoder: the frozen text encoder, where the stage reads its states; or the tokenizer,
            where it is another than this package's.
    """

    stage: stages.Stage
    init_params: Callable[[], Params]
    loss: LossFn
    source: Source
    data: datasets.DataConfig
    train: TrainConfig
    mesh: Mesh
    evaluate: Evaluate
    preview: Preview
    export: Callable[[Params], Params]
    description: dict[str, Any]
    encoder: TextEncoder | Encoder | None
    save_adapters: Callable[[Path, Params, Mapping[str, Any]], None] | None = None

    def complete(self, description: Mapping[str, Any]) -> dict[str, Any]:
        """`complete` of an older version's description; its data's fingerprint as it is now.

        One from before fingerprints knew contents is that of the same names, sizes and captions:
        the pictures are taken for unchanged.
        """
        found, (now, former) = complete(description), fingerprints(self.source)
        if found.get("data_fingerprint") == former != now:
            logging.warning(
                "%s: this run began before fingerprints knew pictures' contents; names, sizes and"
                " captions are as they were, and the pictures are taken for unchanged",
                self.source.name,
            )
            found["data_fingerprint"] = now
        return found

    def save(self, workdir: Path, params: Params, step: int) -> None:
        """Make `workdir`/model, the stage, of what trained; beside CLIP, what it has read.

        Adapters alone go beside it, too, where those trained.
        """
        about = self.description | {"step": step}
        if self.save_adapters is not None:
            self.save_adapters(workdir / "lora.safetensors", params, about)
        model_folder.save_stage(workdir / "model", params=self.export(params), description=about)
        if self.stage.keeps_fingerprint and (known := Known.read(self.data)):
            known.save(workdir)

    def batches(self) -> Batches:
        """The endless training batches: this process's share of each."""
        share = sharding.data_shard(self.mesh)
        sharding.check_batch_size(self.train.batch_size, self.mesh, self.train.grad_accum)
        return batches.batches(
            self.source,
            self.data,
            encoder=self.encoder,
            seed=self.train.seed,
            batch_size=self.train.batch_size // share.count,
            process_index=share.index,
            process_count=share.count,
        )


def complete(description: Mapping[str, Any]) -> dict[str, Any]:
    """What `prepare.describe` said in an older version, with newer fields at their defaults.

    So a run that began before a field was there goes on as if it had been.
    """
    built = {
        "data": settings.build(datasets.DataConfig, description["data"], "checkpoint: data"),
        "train": settings.build(TrainConfig, description["train"], "checkpoint: train"),
    }
    if "lora" in description:
        built["lora"] = settings.build(Lora, description["lora"], "checkpoint: lora")
    if "distillation" in description:
        found = description["distillation"]
        built["distillation"] = settings.build(Distillation, found, "checkpoint: distillation")
    parts = {name: settings.to_dict(part) for name, part in built.items()}
    for name in MACHINE_FIELDS:
        parts["data"].pop(name, None)
    stage = stages.build(description["stage"], "checkpoint: stage")
    return {**description, **parts, "stage": stages.describe(stage)}
