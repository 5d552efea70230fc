"""Imagen's first upsampler on emoji, 64 px to 256 px: noise-conditioning augmentation, no blur.

    unclip train --config=emoji/imagen_upsampler --workdir=runs/imagen/upsampler

It is configs/emoji/upsampler.py, and takes as long, but for one thing: training noises the
low-resolution picture to a level drawn from 0 to 1 and tells the network which, and sampling noises
it to a low level (arXiv 2205.11487, section 2.4).
"""

from unclip_jax.configs.emoji import upsampler


def get_config(variant=""):
    """The config; `:smoke` runs in seconds."""
    config = upsampler.get_config(variant)
    config.stage.corruption = "none"
    config.stage.noise_max = 1.0
    config.stage.noise_level = 0.1
    config.stage.sampling.dynamic_percentile = 99.5
    return config
