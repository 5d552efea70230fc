"""Fine-tune Karlo's upsampler from 64 to 256 px, 0.69 B parameters.

    unclip train --config=karlo/upsampler --workdir=runs/mine/upsampler_256 \
        --config.init=runs/karlo/upsampler_256 --config.data.name=YOUR_DATA

It has no attention and few linear layers, so its convolutions have adapters as well: 131 kernels,
13.3 M parameters of rank 16. The network of the last step, trained adversarially, stays as it is.

A chip holds: both frozen networks in bfloat16, 2.77 GB; adapters, average and moments, 0.21 GB.
That is 3.0 GB. Activations of 8 crops of 64 px at a time, each block recomputed in the backward
pass, come to about 3 GB by estimate, not measured: adapted convolutions compute in float32.

Whole, 20 bytes for each of 0.69 B parameters are 13.8 GB on every chip, the network of the last
step 2.8 GB in float32, and activations: chips of 24 GB or more.
"""

from unclip_jax.configs.karlo import base


def get_config(variant=""):
    """The config; configs/karlo/base.py says what the variants are."""
    stage = {"kind": "upsampler", "model": base.IN_BFLOAT16}
    return base.make(stage, variant, microbatch=8, convolutions=True)
