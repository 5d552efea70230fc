"""Imagen's base model on emoji: a frozen T5 reads the caption (arXiv 2205.11487).

    unclip train --config=emoji/imagen --workdir=runs/emoji/imagen \
        --config.t5=DIR

DIR is a copy of google/t5-v1_1-small: config.json, model.safetensors and tokenizer.json. Another
T5 needs its width in --config.stage.model.text_width (base 768, large 1024, XL 2048, XXL 4096).
It takes as long as configs/emoji/glide.py and about a minute more, for T5's forward passes.

As in the paper, the U-Net attends to T5's states and adds their mean to the timestep's embedding,
training leaves the caption out one time in ten, and sampling thresholds dynamically, which allows
more guidance. Its upsampler is configs/emoji/imagen_upsampler.py; that of the paper reads the
caption as well.
"""

from unclip_jax.configs import base
from unclip_jax.data.datasets import DataConfig
from unclip_jax.diffusion import Diffusion, Sampling
from unclip_jax.models.decoder import DecoderConfig
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
            text_width=512,
            pool_text=True,
        ),
        diffusion=Diffusion(prediction="x_0", variance="fixed_small"),
        sampling=Sampling(method="ddpm", spacing="50", clip_x_0=1.0, dynamic_percentile=99.5),
        caption_drop=0.1,
        guidance_scale=4.0,
        states_length=24,
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
