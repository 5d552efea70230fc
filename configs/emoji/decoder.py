"""The decoder on emoji: CLIP image embedding and caption to a 64 px picture.

    unclip train --config=emoji/decoder --workdir=runs/emoji/decoder \
        --config.clip=runs/emoji/clip

About four minutes on two CPU cores. What it reaches: docs/training.md.
The U-Net works on 4x4 patches (its `patch`), which makes 64 px as cheap as 16. It predicts x_0 with
a fixed variance: after so little training that gives blurred pictures, where v gives noisy ones,
and a variance learned beside so poor an x_0 grows without bound. The paper's decoder learns its
variance: configs/paper/decoder.py.
"""

from unclip_jax.configs import base
from unclip_jax.configs.emoji.clip import CONTEXT_LENGTH, EMBED_DIM, VOCAB_SIZE
from unclip_jax.data.datasets import DataConfig
from unclip_jax.diffusion import Diffusion, Sampling
from unclip_jax.models.decoder import DecoderConfig
from unclip_jax.models.text_encoder import TextConfig
from unclip_jax.models.unet import UNetConfig
from unclip_jax.stages import DecoderStage
from unclip_jax.training.config import TrainConfig


def get_config(variant=""):
    """The config; `:smoke` runs in seconds."""
    stage = DecoderStage(
        model=DecoderConfig(
            unet=UNetConfig(
                image_size=64,
                in_channels=3,
                out_channels=3,
                channels=64,
                channel_mults=(1, 1, 2),
                res_blocks=1,
                attention_sizes=(8, 4),
                head_channels=32,
                context_dim=96,
                patch=4,
            ),
            text=TextConfig(
                vocab_size=VOCAB_SIZE, context_length=CONTEXT_LENGTH, width=96, layers=2, heads=3
            ),
            embed_dim=EMBED_DIM,
        ),
        diffusion=Diffusion(prediction="x_0", variance="fixed_small"),
        sampling=Sampling(method="ddpm", spacing="50", clip_x_0=1.0),
        guidance_scale=2.0,
    )
    train = TrainConfig(
        batch_size=32,
        steps=450,
        learning_rate=1e-3,
        warmup_steps=50,
        schedule="cosine",
        b2=0.99,
        grad_clip=1.0,
        ema_decay=0.995,
        log_every=50,
        eval_every=1000,
        preview_every=1000,
        checkpoint_every=250,
    )
    config = base.make(stage, DataConfig(name="emoji"), train)
    return base.smoke(config) if base.is_smoke(variant) else config
