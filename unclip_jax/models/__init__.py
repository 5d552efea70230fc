"""The networks, each beside its frozen config. None of them knows about diffusion."""

from unclip_jax.common import lazy

__all__, __getattr__, __dir__ = lazy.face(
    __name__,
    {
        "ar_prior": "ARPrior ARPriorConfig",
        "canvas": "Canvas CanvasConfig",
        "classifier": "Classifier",
        "clip": "Clip ClipConfig",
        "decoder": "Decoder DecoderConfig",
        "movq": "MoVQ MoVQConfig",
        "prior": "Prior PriorConfig",
        "t5": "T5Config T5Encoder",
        "text_encoder": "TextConfig TextEncoder",
        "unet": "UNet UNetConfig",
    },
)
