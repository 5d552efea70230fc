"""ADM on emoji: one of ten groups to a 64 px picture (arXiv 2105.05233).

    unclip train --config=emoji/class_decoder --workdir=runs/adm/decoder

It takes as long as configs/emoji/decoder.py and is the same, with a group's embedding in place of
z_i and caption. Its cascade is configs/emoji/upsampler.py, its guide configs/emoji/classifier.py;
unclip class_conditional samples all three together. Training leaves the class out one
time in ten, so that it can also be guided without a classifier: ADM's was not trained so.
"""

from unclip_jax.configs.emoji import decoder
from unclip_jax.data.emoji.catalogue import groups


def get_config(variant=""):
    """The config; `:smoke` runs in seconds."""
    config = decoder.get_config(variant)
    config.stage.model.text = None
    config.stage.model.embed_dim = 0
    config.stage.model.num_classes = len(groups())
    config.stage.model.unet.context_dim = 0
    config.stage.guidance_scale = 1.0
    return config
