"""Fine-tune Karlo's prior: caption to CLIP image embedding, 1.02 B parameters.

    unclip train --config=karlo/prior --workdir=runs/mine/prior \
        --config.init=runs/karlo/prior --config.clip=runs/karlo/clip --config.data.name=YOUR_DATA

A chip holds, with adapters of rank 16 on all 10 kernels (10.8 M parameters; the 20 layers are
stacked): the frozen network in bfloat16, 2.04 GB; adapters, average and moments, 0.17 GB;
CLIP's text tower, 0.49 GB. The step of 16 examples at a time needed 7.6 GB besides CLIP, measured,
when it still made the sum of both and the sum's gradient, 2.04 GB each.

Whole, 20 bytes for each of 1.02 B parameters are 20.4 GB on every chip, and activations: chips of
32 GB or more.
"""

from unclip_jax.configs.karlo import base


def get_config(variant=""):
    """The config; configs/karlo/base.py says what the variants are."""
    stage = {"kind": "prior", "model": base.IN_BFLOAT16}
    return base.make(stage, variant, microbatch=16)
