"""Network sizes with names: CLIP's, T5's, the paper's (table 3), Karlo's, Kandinsky's.

They are constants. `dataclasses.replace(PAPER_PRIOR, dtype="bfloat16")` makes a variant.
"""

from __future__ import annotations

from dataclasses import replace

from unclip_jax.models.ar_prior import ARPriorConfig
from unclip_jax.models.clip import ClipConfig
from unclip_jax.models.decoder import DecoderConfig
from unclip_jax.models.movq import MoVQConfig
from unclip_jax.models.prior import PriorConfig
from unclip_jax.models.t5 import T5Config
from unclip_jax.models.text_encoder import TextConfig
from unclip_jax.models.unet import UNetConfig

# CLIP. B/32 and L/14 are OpenAI's; H/14 is OpenCLIP's; H/16 at 256 px is the paper's, whose text
# tower is 1024 wide and 24 deep.
# fmt: off
CLIP_VIT_L14 = ClipConfig()
CLIP_VIT_B32 = ClipConfig(
    patch=32, vision_width=768, vision_layers=12, vision_heads=12,
    text_width=512, text_heads=8, embed_dim=512,
)
CLIP_VIT_H14 = ClipConfig(
    vision_width=1280, vision_layers=32, vision_heads=16,
    text_width=1024, text_layers=24, text_heads=16, embed_dim=1024, activation="gelu",
)
CLIP_VIT_H16 = replace(CLIP_VIT_H14, image_size=256, patch=16)
CLIP_TINY = ClipConfig(
    image_size=32, patch=8, vision_width=128, vision_layers=4, vision_heads=4,
    text_width=128, text_layers=4, text_heads=4, embed_dim=128, activation="gelu",
)

# T5 v1.1's encoders. Imagen's is XXL.
T5_V1_1_XXL = T5Config()
T5_V1_1_XL = T5Config(width=2048, heads=32, mlp_width=5120)
T5_V1_1_LARGE = T5Config(width=1024, heads=16, mlp_width=2816)
T5_V1_1_BASE = T5Config(width=768, layers=12, heads=12, mlp_width=2048)
T5_V1_1_SMALL = T5Config(width=512, layers=8, heads=6, mlp_width=1024)

# The paper. Its priors embed the caption's tokens themselves; its decoder has its own caption
# Transformer, of 1.2 B of the decoder's 3.5 B parameters. The autoregressive prior reads 384
# tokens: 64 of the caption, z_t, the dot product's and all of the 319 codes but the last.
PAPER_PRIOR = PriorConfig(
    embed_dim=1024, width=2048, layers=24, heads=32, context_length=256, vocab_size=49408,
    text_width=0,
)
PAPER_AR_PRIOR = ARPriorConfig(
    embed_dim=1024, width=1664, layers=24, heads=26, context_length=64, vocab_size=49408,
    code_dims=319, buckets=1024, dot_buckets=1024,
)
PAPER_DECODER = DecoderConfig(
    unet=UNetConfig(
        image_size=64, in_channels=3, out_channels=6, channels=512, channel_mults=(1, 2, 3, 4),
        res_blocks=3, attention_sizes=(32, 16, 8), head_channels=64, dropout=0.1, context_dim=2048,
    ),
    text=TextConfig(vocab_size=49408, context_length=256, width=2048, layers=24, heads=32),
    embed_dim=1024,
)
PAPER_UPSAMPLER_256 = UNetConfig(
    image_size=256, in_channels=6, out_channels=3, channels=320, channel_mults=(1, 2, 3, 4),
    res_blocks=3, attention_sizes=(), dropout=0.1,
)
PAPER_UPSAMPLER_1024 = UNetConfig(
    image_size=1024, in_channels=6, out_channels=3, channels=192,
    channel_mults=(1, 1, 2, 2, 4, 4), res_blocks=2, attention_sizes=(),
)

# Karlo-v1-alpha. Captions come as the states of CLIP ViT-L/14, 768 wide, for 77 tokens.
KARLO_PRIOR = PriorConfig(
    embed_dim=768, width=2048, layers=20, heads=32, context_length=77, text_width=768
)
KARLO_DECODER = DecoderConfig(
    unet=replace(PAPER_DECODER.unet, channels=320, context_dim=1536),
    text_width=768, embed_dim=768, use_z_t=True, learned_null=True,
)
KARLO_SUPER_RES = UNetConfig(
    image_size=256, in_channels=6, out_channels=3, channels=320, channel_mults=(1, 2, 3, 4),
    res_blocks=3, attention_sizes=(), scale_shift=False,
)

# Kandinsky 2.2, over latents of MoVQ, an eighth of a picture's side; 512 px is the size in its
# files. Its CLIP is OpenCLIP's ViT-bigG/14, whose image tower's perceptrons are 8192 wide.
CLIP_VIT_BIGG14 = ClipConfig(
    vision_width=1664, vision_layers=48, vision_heads=16, vision_mlp_ratio=8192 / 1664,
    text_width=1280, text_layers=32, text_heads=20, embed_dim=1280, activation="gelu",
)
KANDINSKY_PRIOR = replace(KARLO_PRIOR, embed_dim=1280, text_width=1280)
KANDINSKY_DECODER = DecoderConfig(
    unet=UNetConfig(
        image_size=64, in_channels=4, out_channels=8, channels=384, channel_mults=(1, 2, 3, 4),
        res_blocks=3, attention_sizes=(32, 16, 8), any_size=True, context_dim=768,
    ),
    embed_dim=1280, clip_tokens=32, norms=("z_i",), tokens_first=True, x_channels=4,
)
KANDINSKY_INPAINTER = replace(
    KANDINSKY_DECODER, unet=replace(KANDINSKY_DECODER.unet, in_channels=9), inpaint=True
)
KANDINSKY_HINTED = replace(
    KANDINSKY_DECODER, unet=replace(KANDINSKY_DECODER.unet, in_channels=8), hint=True
)
KANDINSKY_MOVQ = MoVQConfig()

# Kandinsky 2.1: its prior is Karlo's, for the captions of a multilingual text encoder.
KANDINSKY_2_1_DECODER = replace(
    KANDINSKY_DECODER, embed_dim=768, clip_tokens=10, text_width=1024, use_z_t=True,
    norms=("z_t",),
)
