"""Tiny random Kandinskys 2.2 as diffusers makes and saves them: the reference, and folders."""

from __future__ import annotations

import dataclasses
import inspect
import warnings

import jax
import numpy as np

from tests import karlo_folders
from tests.karlo_folders import clip_settings, in_double, make, randomise
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.diffusion.gaussian import normal
from unclip_jax.models import ClipConfig, DecoderConfig, MoVQConfig, PriorConfig, UNetConfig
from unclip_jax.stages.conditioning import initial_noise
from unclip_jax.weights.convert import kandinsky_configs, karlo_configs

torch, diffusers = karlo_folders.torch, karlo_folders.diffusers
transformers = karlo_folders.transformers

# As it is published beside the decoder.
DECODER_SCHEDULER = {
    "beta_schedule": "linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "steps_offset": 1,
}
SIDE = 32  # of the pictures, in pixels; sides are multiples of 4, in diffusers of 16


@dataclasses.dataclass(frozen=True)
class Tiny:
    """The sizes of one tiny Kandinsky."""

    clip: ClipConfig
    prior: PriorConfig
    decoder: DecoderConfig
    movq: MoVQConfig


def tiny(in_channels: int = 4) -> Tiny:
    """One level in the U-Net, three in MoVQ; 9 channels fill in what is missing.

    8 follow a hint, of which a latent sees 8 x 8 pixels: MoVQ then has four levels.
    """
    sizes, e = karlo_folders.tiny(12, 3, 35, (1, 2), (5,), 10, 1, "gelu"), 12
    unet = UNetConfig(
        image_size=SIDE // 4,
        in_channels=in_channels,
        out_channels=8,
        channels=16,
        channel_mults=(1,),
        res_blocks=1,
        attention_sizes=(SIDE // 4,),
        any_size=True,
        head_channels=8,
        context_dim=12,
        groups=4,
    )
    decoder = DecoderConfig(
        unet=unet,
        embed_dim=e,
        clip_tokens=32,
        norms=("z_i",),
        tokens_first=True,
        x_channels=4,
        inpaint=in_channels == 9,
        hint=in_channels == 8,
    )
    mults = (1, 1, 1, 2) if decoder.hint else (1, 1, 2)
    movq = {"channels": 32, "channel_mults": mults, "attention_levels": (len(mults) - 1,)}
    return Tiny(sizes.clip, sizes.prior, decoder, MoVQConfig(**movq, res_blocks=1, codes=8))


def unet(channels: int, seed: int):
    """diffusers' U-Net of so many input channels."""
    settings = kandinsky_configs.unet_settings(tiny(channels).decoder)
    return make(diffusers.UNet2DConditionModel, settings, seed)


def movq(sizes: Tiny):
    """diffusers' MoVQ."""
    return make(diffusers.VQModel, kandinsky_configs.movq_settings(sizes.movq), 3)


def components(folder) -> dict:
    """Everything that the pipelines are made of; `folder` holds the tokenizer's files."""
    sizes = tiny()
    text, vision = clip_settings(sizes.clip)
    Tokenizer(sizes.clip.context_length, sizes.clip.vocab_size).save(folder)
    prior = make(diffusers.PriorTransformer, karlo_configs.prior_settings(sizes.prior), 0)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        prior.clip_mean.copy_(torch.randn(1, 12, generator=generator))
        prior.clip_std.copy_(torch.rand(1, 12, generator=generator) + 0.5)
    return {
        "prior": prior,
        "unet": unet(4, 1),
        "inpaint": unet(9, 2),
        "movq": movq(sizes),
        "text_encoder": randomise(
            transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**text)), 5
        ),
        "image_encoder": randomise(
            transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**vision)), 6
        ),
        "tokenizer": transformers.CLIPTokenizer.from_pretrained(folder),
        "image_processor": transformers.CLIPImageProcessor(
            size=sizes.clip.image_size, crop_size=sizes.clip.image_size
        ),
    }


def pipelines(base) -> dict:
    """diffusers' pipelines over the same networks, saved to base/prior, base/decoder, base/inpaint.

    Their schedulers have float64 tables here, and "img2img" the decoder's parts.
    """
    torch.manual_seed(0)
    parts = components(base / "tokenizer")
    decoder = {"scheduler": diffusers.DDPMScheduler(**DECODER_SCHEDULER)}
    x_0 = {"prediction_type": "sample", "clip_sample_range": 5.0}
    prior = {"scheduler": diffusers.UnCLIPScheduler(**x_0)}

    def only(kind, given):
        names = inspect.signature(kind).parameters
        return kind(**{k: v for k, v in given.items() if k in names})

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        filling = decoder | {"unet": parts["inpaint"]}
        made = {
            "prior": only(diffusers.KandinskyV22PriorPipeline, parts | prior),
            "decoder": only(diffusers.KandinskyV22Pipeline, parts | decoder),
            "img2img": only(diffusers.KandinskyV22Img2ImgPipeline, parts | decoder),
            "inpaint": only(diffusers.KandinskyV22InpaintPipeline, parts | filling),
        }
        for name in ("prior", "decoder", "inpaint"):
            made[name].save_pretrained(base / name)
    for pipeline in made.values():
        pipeline.set_progress_bar_config(disable=True)
    in_double(prior["scheduler"])
    betas_in_double(decoder["scheduler"])
    return made


def hinted(base):
    """diffusers' pipeline of a decoder that follows a hint, saved to base/hint."""
    scheduler = diffusers.DDPMScheduler(**DECODER_SCHEDULER)
    pipeline = diffusers.KandinskyV22ControlnetPipeline(unet(8, 4), scheduler, movq(tiny(8)))
    pipeline.save_pretrained(base / "hint")
    pipeline.set_progress_bar_config(disable=True)
    betas_in_double(scheduler)
    return pipeline


def betas_in_double(scheduler) -> None:
    """Give the decoder's scheduler a float64 table."""
    betas = np.linspace(0.00085, 0.012, 1000)
    scheduler.alphas_cumprod = torch.from_numpy(np.cumprod(1 - betas))


def first(x):
    """Channels first, as PyTorch's."""
    return torch.from_numpy(np.array(x if x.ndim < 4 else np.moveaxis(x, -1, 1)))


def noise_of(keys, shape, steps, draws=0):
    """What a stage draws from its keys [b]: x_T, then what each step but the last adds.

    `draws` is the prior's: it splits each key in as many.
    """

    @jax.jit
    def drawn(keys):
        if draws:
            keys = jax.vmap(lambda key: jax.random.split(key, draws))(keys).reshape(-1)
        x_T, step_keys, _ = initial_noise(keys, shape)
        each = [
            normal(jax.vmap(jax.random.fold_in, (0, None))(step_keys, i), shape)
            for i in range(steps - 1, 0, -1)
        ]
        return jax.numpy.stack([x_T, *each], axis=1)

    return np.asarray(drawn(keys))


class Feed:
    """Stands in for diffusers' `randn_tensor`: gives what ours was given, then zeros."""

    def __init__(self, *noises):
        self.left = [noise[:, i] for noise in noises for i in range(noise.shape[1])]

    def __call__(self, shape, **_):
        if not self.left:
            return torch.zeros(tuple(shape))
        found = first(self.left.pop(0))
        assert tuple(found.shape) == tuple(shape)
        return found
