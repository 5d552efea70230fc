"""The paper's decoder: 3.5 B parameters at 64 px, 250 sampling steps with learned variance.

    unclip train --config=paper/decoder --workdir=runs/paper/decoder \
        --config.clip=runs/paper/clip --config.data.name=tfds:YOUR_DATA
"""

import dataclasses

from unclip_jax.configs.paper import base
from unclip_jax.diffusion import Diffusion, Sampling
from unclip_jax.models import presets
from unclip_jax.models.decoder import DecoderConfig
from unclip_jax.models.text_encoder import TextConfig
from unclip_jax.stages import DecoderStage


def get_config(variant=""):
    """The config; `:smoke` trains a tiny decoder on emoji in seconds, with --config.clip."""
    train = base.train_config(
        batch_size=2048,
        steps=800_000,
        learning_rate=1.2e-4,
        b2=0.999,
        eps=1e-8,
        ema_decay=0.9999,
    )
    stage = DecoderStage(
        model=base.bfloat16(presets.PAPER_DECODER),
        diffusion=Diffusion(
            steps=1000,
            schedule="cosine",
            prediction="eps",
            variance="learned_range",
            loss="hybrid",
        ),
        sampling=Sampling(method="ddpm", spacing="250", clip_x_0=1.0),
        z_i_drop=0.1,
        caption_drop=0.5,
    )
    tiny = DecoderConfig(
        unet=dataclasses.replace(
            presets.PAPER_DECODER.unet,
            channels=32,
            channel_mults=(1, 2),
            res_blocks=1,
            attention_sizes=(8,),
            head_channels=32,
            context_dim=64,
            patch=4,
        ),
        text=TextConfig(context_length=32, width=64, layers=1, heads=2),
        embed_dim=presets.CLIP_TINY.embed_dim,
    )
    small = dataclasses.replace(
        stage, model=tiny, sampling=dataclasses.replace(stage.sampling, spacing="10")
    )
    return base.make(stage, train, variant, small=small, normalisation="scale")
