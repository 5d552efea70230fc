"""The decoder of the box model: z_i and caption to a 64 px picture. 10.0 M parameters.

    unclip styles build --data emoji_art --size 48 64
    unclip train --config=box/decoder --workdir=runs/box/decoder \
        --config.clip=runs/box/clip --config.prior=runs/box/prior \
        --config.canvas=runs/box/canvas

It sees a canvas, 9.9 M parameters more that are frozen, and half of the rows take the prior's own
z_i.

The U-Net works on 4x4 patches, so its first level has a side of 16, and too few features to carry
48 numbers a patch: two small convolutions over pixels (`pixel_channels`) see its input beside its
output. 2.0 GFLOP for each picture trained on (XLA's count), the optimizer's aside.
"""

from unclip_jax.configs.box import base
from unclip_jax.diffusion import Diffusion, Sampling
from unclip_jax.models.decoder import DecoderConfig
from unclip_jax.models.text_encoder import TextConfig
from unclip_jax.models.unet import UNetConfig
from unclip_jax.stages import DecoderStage
from unclip_jax.training.config import TrainConfig


def get_config(variant=""):
    """The config; `:gpu` for an accelerator, `:smoke` runs in seconds."""
    stage = DecoderStage(
        model=DecoderConfig(
            unet=UNetConfig(
                image_size=base.IMAGE_SIZE,
                in_channels=3,
                out_channels=3,
                channels=64,
                channel_mults=(1, 2, 3),
                res_blocks=1,
                attention_sizes=(8, 4),
                head_channels=32,
                context_dim=128,
                patch=4,
                pixel_channels=24,
            ),
            text=TextConfig(
                vocab_size=base.VOCAB_SIZE,
                context_length=base.CONTEXT_LENGTH,
                width=128,
                layers=1,
                heads=4,
            ),
            embed_dim=base.EMBED_DIM,
        ),
        diffusion=Diffusion(prediction="x_0", variance="fixed_small", timestep_shift=1.5),
        sampling=Sampling(method="dpm++", spacing="3", clip_x_0=1.0),
        guidance_scale=1.2,
        caption_drop=0.3,
        z_i_noise=0.15,
        canvas_noise=0.25,
        canvas_z_i_drop=0.1,
        canvas_z_t_drop=0.1,
    ).with_canvas(base.CANVAS)
    train = TrainConfig(
        batch_size=64,
        steps=10_000,
        learning_rate=1.2e-3,
        warmup_steps=100,
        optimizer="muon",
        schedule="cosine",
        b2=0.99,
        grad_clip=1.0,
        ema_decay=0.998,
        log_every=20,
        eval_every=500,
        preview_every=500,
        checkpoint_every=200,
        keep_checkpoints=1,
    )
    gpu = {"batch_size": 256, "steps": 30_000, "warmup_steps": 500, "ema_decay": 0.9995}
    return base.make(stage, train, variant, gpu=gpu)
