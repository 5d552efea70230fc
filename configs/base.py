"""What every config starts from: the parts of a run, as an ml_collections tree.

config.stage          the network, its diffusion and its sampling (unclip_jax.stages)
config.data           the data set (unclip_jax.data.datasets.DataConfig); image size and vocabulary
                      follow from the stage
config.train          optimizer, EMA, checkpoints, logging (unclip_jax.training.TrainConfig)
config.heldout_split  the data set's split that figures are measured on
config.clip           folder of the trained CLIP that the prior and the decoder stand on
config.normalisation  of CLIP's image embeddings: "whiten" (from the data), "scale" (the paper's
                      17.2) or "none"
config.previews       how many captions the preview grid shows

Everything can be set on the command line: --config.train.learning_rate=1e-4.
"""

import ml_collections

from unclip_jax import config as settings
from unclip_jax import stages
from unclip_jax.data.datasets import DataConfig
from unclip_jax.train_config import TrainConfig

FOLLOWS_FROM_STAGE = ("image_size", "context_length", "vocab_size")


def make(stage: stages.Stage, data: DataConfig, train: TrainConfig, **rest):
    """A config from its parts; `rest` are the fields of no part."""
    data = {k: v for k, v in settings.to_dict(data).items() if k not in FOLLOWS_FROM_STAGE}
    parts = {
        "stage": stages.describe(stage),
        "data": data,
        "train": settings.to_dict(train),
        "heldout_split": "heldout",
        "clip": "",
        "normalisation": "whiten",
        "previews": 16,
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
