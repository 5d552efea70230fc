"""Tiny random Karlos as diffusers makes and saves them: the reference, and folders to convert."""

from __future__ import annotations

import dataclasses
import inspect
import warnings

import numpy as np
import pytest

from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.models import ClipConfig, DecoderConfig, PriorConfig, UNetConfig
from unclip_jax.weights.convert import karlo_configs

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")


@dataclasses.dataclass(frozen=True)
class Tiny:
    """The sizes of one tiny Karlo."""

    clip: ClipConfig
    prior: PriorConfig
    decoder: DecoderConfig
    super_res: UNetConfig


def tiny(embed_dim, heads, context, mults, attention, size, res_blocks, activation):
    """Sizes that fit each other; nothing in them is a power of two for its own sake."""
    width = 8 * heads
    return Tiny(
        clip=ClipConfig(
            image_size=28,
            patch=7,
            vision_width=24,
            vision_layers=2,
            vision_heads=3,
            text_width=embed_dim,
            text_layers=2,
            text_heads=2,
            vocab_size=600,
            context_length=context,
            embed_dim=embed_dim,
            activation=activation,
        ),
        prior=PriorConfig(
            embed_dim=embed_dim,
            width=width,
            layers=2,
            heads=heads,
            context_length=context,
            vocab_size=0,
            text_width=embed_dim,
        ),
        decoder=DecoderConfig(
            unet=UNetConfig(
                image_size=size,
                channels=24,
                channel_mults=mults,
                res_blocks=res_blocks,
                attention_sizes=attention,
                head_channels=8,
                context_dim=20,
                groups=4,
                dropout=0.1,
            ),
            text_width=embed_dim,
            embed_dim=embed_dim,
            use_z_t=True,
            learned_null=True,
        ),
        super_res=UNetConfig(
            image_size=size * 4,
            in_channels=6,
            out_channels=3,
            channels=12,
            channel_mults=mults,
            res_blocks=1,
            attention_sizes=(),
            scale_shift=False,
            groups=4,
        ),
    )


SIZES = {
    "two levels": tiny(12, 3, 35, (1, 2), (5,), 10, 1, "quick_gelu"),
    "three levels": tiny(20, 2, 33, (1, 2, 3), (12, 6, 3), 12, 2, "gelu"),
}


def randomise(module, seed):
    """Give every parameter noise, so that none is zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter[0].numel() if parameter.ndim else 1
            parameter.add_(0.3 * noise / max(fan_in, 4) ** 0.5)
    return module.eval()


def clip_settings(config: ClipConfig) -> tuple[dict, dict]:
    """Arguments of transformers' CLIPTextConfig and CLIPVisionConfig."""
    shared = {"hidden_act": config.activation, "projection_dim": config.embed_dim}
    text = shared | {
        "hidden_size": config.text_width,
        "intermediate_size": int(config.text_width * config.mlp_ratio),
        "num_hidden_layers": config.text_layers,
        "num_attention_heads": config.text_heads,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "eos_token_id": config.vocab_size - 1,
        "bos_token_id": config.vocab_size - 2,
        "pad_token_id": 0,
    }
    vision = shared | {
        "hidden_size": config.vision_width,
        "intermediate_size": int(
            config.vision_width * (config.vision_mlp_ratio or config.mlp_ratio)
        ),
        "num_hidden_layers": config.vision_layers,
        "num_attention_heads": config.vision_heads,
        "image_size": config.image_size,
        "patch_size": config.patch,
    }
    return text, vision


def make(kind, settings, seed):
    """One network of diffusers', random."""
    return randomise(kind(**settings), seed)


def components(sizes: Tiny, folder) -> dict:
    """Everything that both pipelines are made of; `folder` holds the tokenizer's files."""
    from diffusers.pipelines.unclip import UnCLIPTextProjModel

    text, vision = clip_settings(sizes.clip)
    Tokenizer(sizes.clip.context_length, sizes.clip.vocab_size).save(folder)
    prior = make(diffusers.PriorTransformer, karlo_configs.prior_settings(sizes.prior), 0)
    generator = torch.Generator().manual_seed(9)
    e = sizes.prior.embed_dim
    with torch.no_grad():
        prior.clip_mean.copy_(torch.randn(1, e, generator=generator))
        prior.clip_std.copy_(torch.rand(1, e, generator=generator) + 0.5)
    settings = karlo_configs.super_res_settings(sizes.super_res)
    settings |= {"downsample_type": "resnet", "upsample_type": "resnet"}
    return {
        "prior": prior,
        "decoder": make(
            diffusers.UNet2DConditionModel,
            karlo_configs.decoder_settings(sizes.decoder.unet),
            1,
        ),
        "text_proj": make(UnCLIPTextProjModel, karlo_configs.text_proj_settings(sizes.decoder), 2),
        "super_res_first": make(diffusers.UNet2DModel, settings, 3),
        "super_res_last": make(diffusers.UNet2DModel, settings, 4),
        "text_encoder": randomise(
            transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**text)), 5
        ),
        "image_encoder": randomise(
            transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**vision)), 6
        ),
        "tokenizer": transformers.CLIPTokenizer.from_pretrained(folder),
        "feature_extractor": transformers.CLIPImageProcessor(
            size=sizes.clip.image_size, crop_size=sizes.clip.image_size
        ),
        "prior_scheduler": diffusers.UnCLIPScheduler(
            prediction_type="sample", clip_sample_range=5.0
        ),
        "decoder_scheduler": diffusers.UnCLIPScheduler(variance_type="learned_range"),
        "super_res_scheduler": diffusers.UnCLIPScheduler(),
    }


def in_double(scheduler):
    """The scheduler with its tables in float64.

    In float32 its 1 - alpha_bar[t] / alpha_bar[s] leaves 1 - beta of the first step right to 4 %
    only, which networks of random weights blow up to other pictures.
    """
    scheduler.betas = type(scheduler)(**scheduler.config).betas.double()
    scheduler.alphas = 1.0 - scheduler.betas
    scheduler.alphas_cumprod = torch.cumprod(scheduler.alphas, dim=0)
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    return scheduler


def pipelines(sizes: Tiny, folder):
    """diffusers' text-to-image and image-variation pipelines over the same networks."""
    torch.manual_seed(0)
    parts = components(sizes, folder)

    def only(kind):
        return kind(**{k: v for k, v in parts.items() if k in inspect.signature(kind).parameters})

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text_to_image = only(diffusers.UnCLIPPipeline)
        variations = only(diffusers.UnCLIPImageVariationPipeline)
    for pipeline in (text_to_image, variations):
        pipeline.set_progress_bar_config(disable=True)
    for name in ("prior_scheduler", "decoder_scheduler", "super_res_scheduler"):
        in_double(parts[name])
    return text_to_image, variations


class Noise:
    """Stands in for diffusers' `randn_tensor` in its scheduler, and keeps what it gives."""

    def __init__(self, seed):
        self.rng, self.given = np.random.default_rng(seed), []

    def __call__(self, shape, **_):
        drawn = self.rng.standard_normal(tuple(shape)).astype(np.float32)
        self.given.append(drawn)
        return torch.from_numpy(drawn)
