"""A whole model small enough to compile in seconds, with random params."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests import networks
from unclip_jax import stages
from unclip_jax.common.params import fingerprint
from unclip_jax.diffusion.samplers import Sampling
from unclip_jax.models.canvas import CanvasConfig
from unclip_jax.models.clip import ClipConfig
from unclip_jax.models.decoder import DecoderConfig
from unclip_jax.models.prior import PriorConfig
from unclip_jax.models.text_encoder import TextConfig
from unclip_jax.models.unet import UNetConfig
from unclip_jax.pipeline.unclip import UnCLIP
from unclip_jax.weights.trained import Part

VOCAB, CONTEXT, DIM = 600, 12, 8

CLIP = stages.ClipStage(
    model=ClipConfig(
        image_size=16, patch=8, vision_width=16, vision_layers=1, vision_heads=2, text_width=16,
        text_layers=1, text_heads=2, vocab_size=VOCAB, context_length=CONTEXT, embed_dim=DIM,
    )
)  # fmt: skip
PRIOR = stages.PriorStage(
    model=PriorConfig(
        embed_dim=DIM, width=16, layers=1, heads=2, context_length=CONTEXT, vocab_size=VOCAB,
        text_width=0,
    ),
    sampling=Sampling(method="ddpm", spacing="4"),
    guidance_scale=1.5,
)  # fmt: skip
# One level, which compiles in two thirds of the time; the upsampler has two.
DECODER = stages.DecoderStage(
    model=DecoderConfig(
        unet=UNetConfig(
            image_size=16, out_channels=6, channels=16, channel_mults=(1,), res_blocks=1,
            attention_sizes=(16,), head_channels=8, context_dim=16, groups=8,
        ),
        text=TextConfig(vocab_size=VOCAB, context_length=CONTEXT, width=16, layers=1, heads=2),
        embed_dim=DIM,
    ),
    sampling=Sampling(method="ddpm", spacing="4", clip_x_0=1.0),
)  # fmt: skip
CANVAS = stages.CanvasStage(
    model=CanvasConfig(embed_dim=DIM, width=16, layers=1, size=8), image_size=16
)
ON_CANVAS = DECODER.with_canvas(CANVAS.model)
UPSAMPLER = stages.UpsamplerStage(
    model=UNetConfig(
        image_size=32, in_channels=6, out_channels=3, channels=16, channel_mults=(1, 2),
        res_blocks=1, attention_sizes=(), groups=8,
    ),
    low_size=16,
    sampling=Sampling(method="ddim", spacing="3", clip_x_0=1.0),
    crop=0.5,
)  # fmt: skip


@functools.cache
def params(stage, seed: int = 0):
    """Params of a stage, every leaf of its network random, so that nothing is zero and unheard.

    NumPy draws them: compiling a network's initialisation takes longer than most tests.
    """
    key = jax.random.key(seed)
    beside = jax.jit(lambda key: {k: v for k, v in stage.init(key).items() if k != "network"})
    return beside(key) | {
        "network": networks.random(jax.eval_shape(stage.init, key)["network"], seed)
    }


@functools.cache
def model() -> UnCLIP:
    """A whole model whose parts belong together."""
    clip = params(CLIP)
    about = {"clip_fingerprint": fingerprint(clip)}

    def part(stage, tree, **more) -> Part:
        return Part(stage, tree, {"stage": stages.describe(stage)} | more)

    return UnCLIP(
        clip=part(CLIP, clip),
        prior=part(PRIOR, params(PRIOR, 1), **about),
        decoder=part(DECODER, params(DECODER, 2), **about),
        upsamplers=(part(UPSAMPLER, params(UPSAMPLER, 3)),),
    )


def batch(size: int, image_size: int, seed: int = 0) -> dict:
    """A training batch of noise with everything that any stage reads."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB - 2, (size, CONTEXT))
    tokens[:, 0], tokens[:, CONTEXT - 4 :] = VOCAB - 2, 0
    tokens[:, CONTEXT - 5] = VOCAB - 1
    return {
        "image": jnp.asarray(rng.integers(0, 256, (size, image_size, image_size, 3)), jnp.uint8),
        "tokens": jnp.asarray(tokens, jnp.int32),
        "z_i": jnp.asarray(rng.normal(size=(size, DIM)), jnp.float32),
        "z_t": jnp.asarray(rng.normal(size=(size, DIM)), jnp.float32),
    }


@functools.partial(jax.jit, static_argnames=("stage", "method"))
def call(stage, method: str, *args, **settings):
    """A method of a stage, compiled: eager networks compile every operation alone."""
    return getattr(stage, method)(*args, **settings)
