"""The networks, each beside its frozen config. None of them knows about diffusion."""

from unclip_jax.models.clip import Clip, ClipConfig
from unclip_jax.models.decoder import Decoder, DecoderConfig
from unclip_jax.models.prior import Prior, PriorConfig
from unclip_jax.models.text import TextConfig, TextEncoder
from unclip_jax.models.unet import UNet, UNetConfig

__all__ = [
    "Clip",
    "ClipConfig",
    "Decoder",
    "DecoderConfig",
    "Prior",
    "PriorConfig",
    "TextConfig",
    "TextEncoder",
    "UNet",
    "UNetConfig",
]
