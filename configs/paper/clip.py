"""The paper's CLIP: ViT-H/16 at 256 px, text 1024 wide and 24 deep.

    unclip train --config=paper/clip --workdir=runs/paper/clip \
        --config.data.name=tfds:YOUR_DATA

The paper gives the learning rate, 3e-4, and trains with SAM, rho 0.1, which halves the speed and
lowers the rank of the embeddings; the other settings are those of Radford et al. 2021.
"""

from unclip_jax.configs.paper import base
from unclip_jax.models import presets
from unclip_jax.stages import ClipStage


def get_config(variant=""):
    """The config; `:smoke` trains a tiny CLIP on emoji in seconds."""
    train = base.train_config(
        batch_size=32768,
        steps=400_000,
        learning_rate=3e-4,
        warmup_steps=2000,
        schedule="cosine",
        b2=0.98,
        eps=1e-6,
        weight_decay=0.2,
        ema_decay=0.999,
        sam_rho=0.1,
    )
    stage = ClipStage(model=base.bfloat16(presets.CLIP_VIT_H16))
    return base.make(stage, train, variant, small=ClipStage(model=presets.CLIP_TINY))
