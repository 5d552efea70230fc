"""GLIDE on emoji: caption to a 64 px picture, with neither CLIP nor prior (arXiv 2112.10741).

    unclip train --config=emoji/glide --workdir=runs/emoji/glide

It takes as long as configs/emoji/decoder.py and is the same without z_i: the decoder's own
Transformer reads the caption, which training leaves out one time in five (section 3.2), so that
sampling can be guided away from none. configs/emoji/upsampler.py makes its pictures large.
"""

from unclip_jax.configs.emoji import decoder


def get_config(variant=""):
    """The config; `:smoke` runs in seconds."""
    config = decoder.get_config(variant)
    config.stage.model.embed_dim = 0
    config.stage.caption_drop = 0.2
    return config
