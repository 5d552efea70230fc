"""Fine-tune Karlo's decoder: CLIP image embedding and caption to 64 px, 0.89 B parameters.

    unclip train --config=karlo/decoder --workdir=runs/mine/decoder \
        --config.init=runs/karlo/decoder --config.clip=runs/karlo/clip --config.data.name=YOUR_DATA

A chip holds, with adapters of rank 16 on the 127 kernels of attention and linear layers (5.9 M
parameters): the frozen network in bfloat16, 1.79 GB; adapters, average and moments, 0.10 GB; CLIP's
text tower, 0.49 GB. That is 2.4 GB. Activations of 8 examples at a time, each block recomputed in
the backward pass, come to 2 or 3 GB by estimate, not measured.

Whole, 20 bytes for each of 0.89 B parameters are 17.9 GB on every chip, and activations: chips of
32 GB or more.
"""

from unclip_jax.configs.karlo import base


def get_config(variant=""):
    """The config; configs/karlo/base.py says what the variants are."""
    stage = {"kind": "decoder", "model": {"unet": base.IN_BFLOAT16}}
    return base.make(stage, variant, microbatch=8)
