"""Fine-tune Kandinsky 2.2's decoder: CLIP image embedding to 512 px, 1.25 B parameters.

    unclip train --config=kandinsky/decoder --workdir=runs/mine/decoder \
        --config.init=runs/kandinsky/decoder --config.clip=runs/kandinsky/clip \
        --config.data.name=YOUR_DATA

A chip of 16 GB holds, with adapters of rank 16 on the 125 kernels of attention and linear
layers (7.0 M parameters), 4 pictures at a time, each block recomputed in the backward pass:
5.64 GB, by the compiled step of a v5e. The frozen network in bfloat16 is 2.51 GB of it, MoVQ 0.14
GB, adapters, their average and moments 0.11 GB.

Whole, 20 bytes for each of 1.25 B parameters are 25.1 GB on every chip of a mesh that only splits
the batch, 3.1 GB on each of eight with --config.mesh.fsdp=8, where a step with 4 pictures on each
chip needs 9.59 GB of a v5e.

It trains on squares of 512 px, the size it was made for; --config.stage.sides='(768, 768)' is
another, of 64 px steps, and takes 2.25 times the activations.
"""

import dataclasses

from unclip_jax.configs.kandinsky import base
from unclip_jax.diffusion import Diffusion, Sampling, Schedule
from unclip_jax.models import presets
from unclip_jax.stages import DecoderStage


def published():
    """The stage with the published sizes and schedule, drawing in 100 steps."""
    model, movq = presets.KANDINSKY_DECODER, presets.KANDINSKY_MOVQ
    unet = dataclasses.replace(model.unet, **base.IN_BFLOAT16)
    betas = Schedule("linear", beta_start=0.00085, beta_end=0.012)
    return DecoderStage(
        dataclasses.replace(model, unet=unet),
        Diffusion(schedule=betas, likelihood="gaussian"),
        Sampling("ddpm", "leading:100:1"),
        guidance_scale=4.0,
        autoencoder=dataclasses.replace(movq, dtype="bfloat16"),
        null_picture=True,
    )


def get_config(variant=""):
    """The config; configs/kandinsky/base.py says what the variants are."""
    changes = {"kind": "decoder", "model": {"unet": base.IN_BFLOAT16}, "sides": ()}
    return base.make(changes, variant, published, 4)
