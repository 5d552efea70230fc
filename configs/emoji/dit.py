"""The decoder on emoji with a Transformer over patches in place of the U-Net.

    unclip train --config=emoji/dit --workdir=runs/emoji/dit \
        --config.clip=runs/emoji/clip

Without a variant it is DiT (arXiv 2212.09748) on 4x4 patches, predicting v. `:jit` is the plainer
Transformer of arXiv 2511.13720 on 8x8 patches, predicting x_0, with a head over pixels that joins
the patches; `:smoke` runs in seconds.
"""

import dataclasses

from unclip_jax.configs import base
from unclip_jax.configs.emoji.clip import CONTEXT_LENGTH, EMBED_DIM, VOCAB_SIZE
from unclip_jax.data.datasets import DataConfig
from unclip_jax.diffusion import Diffusion, Sampling
from unclip_jax.models.decoder import DecoderConfig
from unclip_jax.models.dit import DiTConfig
from unclip_jax.models.text_encoder import TextConfig
from unclip_jax.stages import DecoderStage
from unclip_jax.training.config import TrainConfig


def get_config(variant=""):
    """The config; `:jit` for the plainer Transformer, `:smoke` runs in seconds."""
    dit = DiTConfig(image_size=64, patch=4, width=192, layers=6, heads=6, context_dim=96)
    if jit := variant == "jit":
        dit = dataclasses.replace(
            dit,
            patch=8,
            bottleneck=96,
            modulation="shared",
            norm="rms",
            mlp="swiglu",
            qk_norm=True,
            rope=True,
            pixel_channels=16,
        )
    stage = DecoderStage(
        model=DecoderConfig(
            unet=dit,
            text=TextConfig(
                vocab_size=VOCAB_SIZE, context_length=CONTEXT_LENGTH, width=96, layers=2, heads=3
            ),
            embed_dim=EMBED_DIM,
        ),
        diffusion=Diffusion(prediction="x_0" if jit else "v", variance="fixed_small"),
        sampling=Sampling(method="dpm++", spacing="12", clip_x_0=1.0),
        guidance_scale=2.0,
    )
    train = TrainConfig(
        batch_size=32,
        steps=1500,
        learning_rate=1e-3,
        warmup_steps=50,
        optimizer="muon",
        schedule="cosine",
        b2=0.99,
        grad_clip=1.0,
        ema_decay=0.995,
        log_every=50,
        eval_every=500,
        preview_every=500,
        checkpoint_every=250,
    )
    config = base.make(stage, DataConfig(name="emoji"), train)
    return config if jit or not base.is_smoke(variant) else base.smoke(config)
