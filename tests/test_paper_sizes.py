"""Parameter counts of every named size, from `eval_shape`, beside the published ones.

The paper gives one digit ("1 B", "700 M") or two ("3.5 B"). Ours round to the same digit:

- Diffusion prior, 1.33 B against "1 B": 24 blocks of 12 * 2048^2 parameters are 1.21 B, and a
  vocabulary of 49408 tokens 2048 wide is 0.10 B more. The test counts these by hand.
- Decoder, 3.56 B against "3.5 B": GLIDE counts a 1.2 B text Transformer, which is its blocks
  alone; its token embeddings are another 0.10 B. The U-Net is GLIDE's 2.3 B.
- Upsamplers, 730 M and 282 M against "700 M" and "300 M".

CLIP B/32 and L/14 equal OpenAI's and H/14 OpenCLIP's to the last parameter. H/16 differs from
H/14 only in its patches, 16 px in place of 14, for both sizes make a grid of 16 x 16.

Karlo's networks equal its checkpoints to the last parameter. The prior's `clip_mean` and
`clip_std`, which diffusers stores among its parameters, are data, not part of our network.
"""

import jax.numpy as jnp
import pytest

from tests.networks import shapes, size
from unclip_jax.models import Clip, Decoder, Prior, UNet, presets

T = jnp.zeros((1,), jnp.int32)


def clip_params(config):
    images = jnp.zeros((1, config.image_size, config.image_size, 3))
    return shapes(Clip(config), images, jnp.zeros((1, config.context_length), jnp.int32))


def text_inputs(length, width):
    """Tokens, or states where there is a width."""
    return jnp.zeros((1, length, width)) if width else jnp.zeros((1, length), jnp.int32)


def prior_params(config):
    z, mask = jnp.zeros((1, config.embed_dim)), jnp.ones((1, config.context_length), bool)
    return shapes(
        Prior(config), z, T, z, text_inputs(config.context_length, config.text_width), mask
    )


def decoder_params(config):
    length, z = config.text.context_length if config.text else 77, jnp.zeros((1, config.embed_dim))
    text = text_inputs(length, config.text_width)
    cond = {"z_i": z, "z_t": z, "text_mask": jnp.ones((1, length), bool)}
    cond["text_states" if config.text_width else "tokens"] = text
    return shapes(Decoder(config), jnp.zeros((1, 64, 64, 3)), T, cond)


def unet_params(config):
    return shapes(UNet(config), jnp.zeros((1, 64, 64, config.in_channels)), T)


def rounded(count, digits):
    return float(f"{count:.{digits - 1}e}")


def report(name, count, published):
    print(f"{name:<24}{count:>16,}{published:>16}")


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("CLIP_VIT_B32", 151_277_313),
        ("CLIP_VIT_L14", 427_616_513),
        ("CLIP_VIT_H14", 986_109_441),
        ("CLIP_VIT_H16", 986_109_441 + 1280 * 3 * (16**2 - 14**2)),
    ],
)
def test_clip(name, published):
    count = size(clip_params(getattr(presets, name)))
    report(name, count, f"{published:,}")
    assert count == published


def test_paper_clip_towers():
    """Section 2 and appendix C: ViT-H/16 at 256 px, 32 deep, 1280 wide; text 24 deep, 1024 wide."""
    params = clip_params(presets.CLIP_VIT_H16)
    assert params["vision"]["positions"].shape == (16 * 16 + 1, 1280)
    assert params["vision"]["transformer"]["blocks"]["up"]["kernel"].shape == (32, 1280, 5120)
    assert params["text"]["transformer"]["blocks"]["up"]["kernel"].shape == (24, 1024, 4096)


def test_paper_prior():
    config = presets.PAPER_PRIOR
    count = size(prior_params(config))
    report("PAPER_PRIOR", count, "1 B")
    d, e, v = 2048, 1024, 49408
    by_hand = 24 * 12 * d**2 + v * d + 2 * d**2 + 3 * d * e + 260 * d
    assert abs(count / by_hand - 1) < 0.01
    assert rounded(count, 1) == 1e9


def test_paper_decoder():
    params = decoder_params(presets.PAPER_DECODER)
    blocks = size(params["text"]["transformer"])
    report("PAPER_DECODER", size(params), "3.5 B")
    report("  text blocks", blocks, "1.2 B")
    report("  text embeddings", size(params["text"]) - blocks, "")
    report("  U-Net", size(params["unet"]), "2.3 B")
    assert abs(size(params) / 3.5e9 - 1) < 0.02
    assert abs(blocks / (24 * 12 * 2048**2) - 1) < 0.01
    assert rounded(blocks, 2) == 1.2e9
    assert abs(size(params["unet"]) / 2.3e9 - 1) < 0.03


@pytest.mark.parametrize(
    ("name", "published"), [("PAPER_UPSAMPLER_256", 700), ("PAPER_UPSAMPLER_1024", 300)]
)
def test_paper_upsamplers(name, published):
    config = getattr(presets, name)
    params = unet_params(config)
    report(name, size(params), f"{published} M")
    assert rounded(size(params), 1) == published * 1e6
    assert not [key for key in params if "attention" in key]


def test_karlo():
    prior, decoder = prior_params(presets.KARLO_PRIOR), decoder_params(presets.KARLO_DECODER)
    super_res = unet_params(presets.KARLO_SUPER_RES)
    report("KARLO_PRIOR", size(prior), "1,022,028,544")
    report("KARLO_DECODER", size(decoder), "893,318,086")
    report("KARLO_SUPER_RES", size(super_res), "691,579,523")
    assert size(prior) == 1_022_028_544
    assert size(prior) + 2 * 768 == 1_022_030_080  # with the mean and std of z_i
    assert size(decoder) == 893_318_086
    assert size(decoder["unet"]) == 885_439_686  # diffusers' decoder; the rest is its text_proj
    assert size(super_res) == 691_579_523


def test_tiny_clip_is_tiny():
    count = size(clip_params(presets.CLIP_TINY))
    report("CLIP_TINY", count, "")
    assert count < 10e6
