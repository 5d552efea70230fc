"""What every config starts from: the parts of a run, as an ml_collections tree.

config.stage          the network, its diffusion and its sampling (unclip_jax.stages)
config.data           the data set (unclip_jax.data.datasets.DataConfig); image size,
                      vocabulary and whether it has labels follow from the stage
config.train          optimizer, EMA, checkpoints, logging (unclip_jax.training.TrainConfig)
config.heldout_split  the data set's split that figures are measured on
config.clip           folder of the trained CLIP that the prior and the decoder stand on
config.canvas         folder of the trained canvas that the decoder sees, "" for none
config.prior          folder of a trained prior, of whose samples for their captions training the
                      decoder or the canvas takes some in place of the real z_i; "" for none
config.prior_share    how often; config.prior_samples are drawn once for each caption, and cached
config.embeddings     folder or URL of the training set's CLIP embeddings, as
                      unclip embed stores them; "" to compute and cache them
config.t5             folder of the T5 whose text states the decoder reads, where it reads any
config.t5_dtype       in which that T5 computes: "float32" or "bfloat16"
config.normalisation  of CLIP's image embeddings: "whiten" (from the data), "scale" (the paper's
                      17.2) or "none"
config.previews       how many captions the preview grid shows
config.init           folder of a trained stage to start from, "" for random params; config.stage
                      then says only what differs, and the normalisation is the folder's
config.mesh           how many devices lie along each axis (parallel.sharding.MeshConfig): copies
                      of the model ("data", -1: as many as are left), devices among which a copy
                      is split ("fsdp"), those among which images are ("spatial"), and those that
                      compute one block together ("tensor"); into how many slices they fall, which
                      only "data" crosses ("slices", 0: TPUs say it)
config.lora           low-rank adapters on what config.init holds (training.lora.Lora); rank 0
                      trains it whole
config.distillation   what config.init holds teaches a copy of itself to draw in few steps
                      (training.distillation.Distillation); steps 0 distils nothing

Everything can be set on the command line: --config.train.learning_rate=1e-4.
"""

import ml_collections

from unclip_jax import stages
from unclip_jax.common import config as settings
from unclip_jax.data.datasets import DataConfig
from unclip_jax.parallel.sharding import MeshConfig
from unclip_jax.training.config import TrainConfig
from unclip_jax.training.distillation import Distillation
from unclip_jax.training.lora import Lora

FOLLOWS_FROM_STAGE = ("image_size", "context_length", "vocab_size", "labels")


def make(stage: stages.Stage, data: DataConfig, train: TrainConfig, **rest):
    """A config from its parts; `rest` are the fields of no part."""
    return from_settings(stages.describe(stage), data, train, **rest)


def from_settings(stage: dict, data: DataConfig, train: TrainConfig, **rest):
    """A config of a stage given as plain settings: with config.init, those that differ."""
    data = {k: v for k, v in settings.to_dict(data).items() if k not in FOLLOWS_FROM_STAGE}
    parts = {
        "stage": stage,
        "data": data,
        "train": settings.to_dict(train),
        "heldout_split": "heldout",
        "clip": "",
        "canvas": "",
        "prior": "",
        "prior_share": 0.5,
        "prior_samples": 2,
        "embeddings": "",
        "t5": "",
        "t5_dtype": "float32",
        "normalisation": "whiten",
        "previews": 16,
        "init": "",
        "lora": settings.to_dict(Lora()),
        "distillation": settings.to_dict(Distillation()),
        "mesh": settings.to_dict(MeshConfig()),
    }
    return ml_collections.ConfigDict(_with_tuples(parts | rest))


def _with_tuples(tree):
    """Lists as tuples, which flags can set: --config.stage.model.channel_mults="(1, 2)"."""
    if isinstance(tree, dict):
        return {name: _with_tuples(part) for name, part in tree.items()}
    return tuple(tree) if isinstance(tree, list) else tree


def smoke(config, **train):
    """The same run in seconds: few steps of training and sampling, tiny batches."""
    steps = train.pop("steps", 4)
    short = {
        "batch_size": 8,
        "steps": steps,
        "warmup_steps": 1,
        "log_every": 2,
        "eval_every": steps,
        "preview_every": steps,
        "checkpoint_every": steps,
        "grad_accum": 1,
    }
    config.train.update(short | train)
    if "sampling" in config.stage:
        config.stage.sampling.spacing = "4"
    config.previews = 4
    return config


def is_smoke(variant: str) -> bool:
    """Whether `variant`, the text after the colon, asks for the smoke run; "" is the full one."""
    if variant not in ("", "smoke"):
        raise ValueError(f"variant {variant!r}: expected nothing or smoke, as in clip.py:smoke")
    return variant == "smoke"
