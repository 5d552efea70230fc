"""What the configs that fine-tune Karlo share: three variants, and where everything comes from.

First convert Karlo. Training needs CLIP's image tower, which only the repository for image
variations has, so give both:

    unclip convert karlo kakaobrain/karlo-v1-alpha \
        kakaobrain/karlo-v1-alpha-image-variations --out runs/karlo

Then name your own pairs, a folder or a prepared TFDS data set, and train any stage:

    --config.data.name=tfds:coco_captions --config.data.split=train --config.heldout_split=val \
    --config.data.caption_key=captions/text

Every stage is read from config.init, sizes and diffusion and all, where the conversion above has
put it; config.stage here holds only what differs. The trained stage is in WORKDIR/model. To sample
with it, put it in a folder beside the other stages, which may be links:
runs/mine/{clip,prior,decoder,upsampler_256}.

The variants, the text after the colon (prior.py:whole):

    :lora   (default) low-rank adapters, for one chip of 16 GB
    :whole  all weights, on a mesh of large chips. Training is data parallel: the batch is split
            over the chips, but each holds all of the state, 4 bytes each for weights, average,
            gradient and Adam's two moments, 20 for every parameter
    :smoke  adapters on a tiny Karlo, given by --config.init and --config.clip, and emoji: seconds

The figures of memory are counts of bytes, 1 GB = 1e9; one that is called measured was read off the
program compiled for a TPU v5e of 16 GB. Learning rates and lengths are ours: where to begin, not
what was found best. What any of it reaches on your data has not been measured.
"""

from unclip_jax.configs import base
from unclip_jax.data.datasets import DataConfig
from unclip_jax.training.config import TrainConfig

VARIANTS = ("", "lora", "whole", "smoke")
IN_BFLOAT16 = {"dtype": "bfloat16", "remat": "full"}  # of a network: overrides of its config

COMMON = {
    "warmup_steps": 100,
    "grad_clip": 1.0,
    "log_every": 50,
    "eval_every": 1000,
    "preview_every": 1000,
    "checkpoint_every": 500,
}


def make(stage, variant, *, microbatch, convolutions=False, folder="runs/karlo"):
    """The config that fine-tunes a stage.

    Args:
        stage: its kind, and what differs from the folder's.
        variant: see above.
        microbatch: examples that a chip computes at once.
        convolutions: whether adapters go on convolutions as well.
        folder: where the conversion has put all stages.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}: expected lora, whole or smoke, as in :lora")
    if variant == "whole":
        train = TrainConfig(
            batch_size=256,
            grad_accum=32 // microbatch,  # on eight chips
            steps=20_000,
            learning_rate=1e-5,
            ema_decay=0.9999,
            **COMMON,
        )
        return _config(stage, "YOUR_DATA", train, folder)
    train = TrainConfig(
        batch_size=32,
        grad_accum=32 // microbatch,
        steps=5000,
        learning_rate=1e-4,
        ema_decay=0.999,
        **COMMON,
    )
    smoke = variant == "smoke"
    if smoke:
        stage = stage | {"sampling": {"spacing": "4"}}
    config = _config(stage, "emoji" if smoke else "YOUR_DATA", train, folder)
    config.lora.update(rank=4 if smoke else 16, alpha=16.0, convolutions=convolutions)
    return base.smoke(config) if smoke else config


def _config(stage, data, train, folder):
    kind = stage["kind"]
    folders = {"init": f"{folder}/{'upsampler_256' if kind == 'upsampler' else kind}"}
    if kind != "upsampler":
        folders["clip"] = f"{folder}/clip"
    return base.from_settings(stage, DataConfig(name=data), train, previews=4, **folders)
