"""Fine-tune Kandinsky 2.2's prior: caption to CLIP image embedding, 1.03 B parameters.

    unclip train --config=kandinsky/prior --workdir=runs/mine/prior \
        --config.init=runs/kandinsky/prior --config.clip=runs/kandinsky/clip \
        --config.data.name=YOUR_DATA

A chip of 16 GB holds, with adapters of rank 16 on all 10 kernels (10.8 M parameters; the 20
layers are stacked): the frozen network in bfloat16, 2.05 GB; adapters, average and moments,
0.17 GB; CLIP's text tower, 2.78 GB. With the activations of 8 examples at a time, each block
recomputed in the backward pass, that is 5.3 GB, all but the tower by the compiler of a v5e.

Whole, 20 bytes for each of 1.03 B parameters are 20.5 GB on every chip of a mesh that only splits
the batch, 2.6 GB on each of eight with --config.mesh.fsdp=8. There, by the compiler, a step of 256
examples, 8 of them at a time on a chip, needs 4.2 GB of each v5e; CLIP's text tower comes on top.
"""

import dataclasses

from unclip_jax.configs.kandinsky import base
from unclip_jax.diffusion import Diffusion, Sampling
from unclip_jax.models import presets
from unclip_jax.stages import PriorStage


def published():
    """The stage with the published sizes; the files say at what x_0 is clipped."""
    return PriorStage(
        dataclasses.replace(presets.KANDINSKY_PRIOR, **base.IN_BFLOAT16),
        Diffusion(prediction="x_0", variance="fixed_small_log"),
        Sampling("ddpm", "25"),
        draws=1,
        unit_embeddings=False,
        guidance_scale=4.0,
        empty_null=True,
    )


def get_config(variant=""):
    """The config; configs/kandinsky/base.py says what the variants are."""
    return base.make({"kind": "prior", "model": base.IN_BFLOAT16}, variant, published, 8)
