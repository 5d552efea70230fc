"""What the configs of the box model share: sizes that its stages agree on, variants.

All stages together have 29.3 M parameters, 59 MB in bf16: the canvas is part of the decoder.
configs/box/train.sh trains them in order and resumes. The variants, the text after the colon
(clip.py:gpu):

    (none)  float32 and small batches, for CPU cores and patience
    :gpu    bfloat16, larger batches, more of them: one accelerator
    :smoke  seconds, on the plain emoji, which need no art fetched

Sizes, data and batches may not change in a workdir (docs/training.md says what may); a run begun on
a CPU goes on with the same variant.
"""

import dataclasses

from unclip_jax.configs import base
from unclip_jax.data.datasets import DataConfig
from unclip_jax.models.canvas import CanvasConfig
from unclip_jax.weights.trained import in_dtype

VARIANTS = ("", "gpu", "smoke")

CONTEXT_LENGTH = 28  # the longest caption of the data set has 27 tokens
VOCAB_SIZE = 4096
EMBED_DIM = 192
IMAGE_SIZE = 64  # of what the decoder draws

CANVAS = CanvasConfig(
    embed_dim=EMBED_DIM, width=512, layers=0, size=32, centres=9270
)  # as many as it has pictures

DATA = DataConfig(name="emoji_art")


def make(stage, train, variant, *, gpu, data=DATA):
    """A stage's config.

    Args:
        stage: for any device.
        train: the loop's settings without a variant.
        variant: see above.
        gpu: those of them that differ with :gpu.
        data: the data set.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}: expected nothing, gpu or smoke, as in clip.py:gpu")
    if variant == "smoke":
        return base.smoke(base.make(stage, dataclasses.replace(data, name="emoji"), train))
    if variant == "gpu":
        stage, train = in_dtype(stage, "bfloat16"), dataclasses.replace(train, **gpu)
    return base.make(stage, data, train)
