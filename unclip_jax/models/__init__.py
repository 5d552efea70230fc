"""The networks, each beside its frozen config. None of them knows about diffusion."""

from unclip_jax.models.ar_prior import ARPrior, ARPriorConfig
from unclip_jax.models.classifier import Classifier
from unclip_jax.models.clip import Clip, ClipConfig
from unclip_jax.models.decoder import Decoder, DecoderConfig
from unclip_jax.models.prior import Prior, PriorConfig
from unclip_jax.models.t5 import T5Config, T5Encoder
from unclip_jax.models.text_encoder import TextConfig, TextEncoder
from unclip_jax.models.unet import UNet, UNetConfig

__all__ = [
    "ARPrior",
    "ARPriorConfig",
    "Classifier",
    "Clip",
    "ClipConfig",
    "Decoder",
    "DecoderConfig",
    "Prior",
    "PriorConfig",
    "T5Config",
    "T5Encoder",
    "TextConfig",
    "TextEncoder",
    "UNet",
    "UNetConfig",
]
