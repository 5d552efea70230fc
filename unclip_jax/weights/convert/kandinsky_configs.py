"""The config.json files of Kandinsky's U-Net and MoVQ as our configs, and back.

As `karlo_configs`, which reads its prior: sizes are read, and every other field is checked against
what our network of those sizes has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unclip_jax.common.checks import choice
from unclip_jax.errors import UserError, wrong
from unclip_jax.models import DecoderConfig, MoVQConfig, UNetConfig
from unclip_jax.models.decoder import HINT_CHANNELS
from unclip_jax.models.movq import GROUPS
from unclip_jax.weights.convert.karlo_configs import (
    ATTENDING,
    CONDITIONED,
    Settings,
    check,
    decoder_settings,
    read_unet,
    size,
)

# How z_i comes in: `addition_embed_type` and `encoder_hid_dim_type`, by the version.
_PLAIN, _HINT, _TEXT = ("image", "image_proj"), ("image_hint", "image_proj"), ("text_image",)
_TEXT += ("text_image_proj",)
_TOKENS = {_PLAIN: 32, _HINT: 32, _TEXT: 10}  # that diffusers makes of z_i

_DOWN, _UP = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), ("UpDecoderBlock2D",)
_UP += ("AttnUpDecoderBlock2D",)
# What diffusers takes where a config.json leaves a field out.
_MOVQ = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": [_DOWN[0]],
    "up_block_types": [_UP[0]],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 3,
    "num_vq_embeddings": 256,
    "norm_num_groups": 32,
    "vq_embed_dim": None,
    "norm_type": "group",
    "mid_block_add_attention": True,
    "lookup_from_codebook": False,
    "force_upcast": False,
}
_FREE = ("sample_size", "scaling_factor")  # of MoVQ: nothing that pipelines do reads them


# ---------------------------------------------------------------- ours to theirs


def unet_settings(config: DecoderConfig) -> Settings:
    """config.json of the UNet2DConditionModel that this decoder is.

    Raises:
        UserError: it has none of Kandinsky's forms.
    """
    unet, kind = config.unet, _HINT if config.hint else _TEXT if config.use_z_t else _PLAIN
    plain = isinstance(unet, UNetConfig) and (unet.patch, unet.pixel_channels) == (1, 0)
    plain = plain and unet.emb_dim in (0, 4 * unet.channels)
    if not plain or config != _decoder(unet, kind, config.embed_dim, config.text_width):
        raise UserError(
            "decoder: its network or its conditions are of another form than Kandinsky's, and"
            " diffusers holds no other form over latents; write its sampler with unclip export"
            " program"
        )
    return decoder_settings(unet) | {
        "class_embed_type": None,
        "addition_embed_type": kind[0],
        "encoder_hid_dim_type": kind[1],
        "encoder_hid_dim": config.text_width or config.embed_dim,
    }


def _decoder(
    unet: UNetConfig, kind: tuple[str, ...], embed_dim: int, text_width: int
) -> DecoderConfig:
    """The decoder of one of Kandinsky's forms. Half of the U-Net's output is a variance's."""
    x_channels = unet.out_channels // 2
    return DecoderConfig(
        unet=unet,
        text_width=text_width if kind == _TEXT else 0,
        embed_dim=embed_dim,
        clip_tokens=_TOKENS[kind],
        use_z_t=kind == _TEXT,
        norms=("z_t",) if kind == _TEXT else ("z_i",),
        tokens_first=True,
        x_channels=x_channels,
        inpaint=kind != _HINT and unet.in_channels == 2 * x_channels + 1,
        hint=kind == _HINT,
    )


def movq_settings(config: MoVQConfig) -> Settings:
    """config.json of diffusers' VQModel."""
    levels = range(len(config.channel_mults))
    attends = [level in config.attention_levels for level in levels]
    return _MOVQ | {
        "down_block_types": [_DOWN[a] for a in attends],
        "up_block_types": [_UP[a] for a in attends[::-1]],
        "block_out_channels": [config.channels * m for m in config.channel_mults],
        "layers_per_block": config.res_blocks,
        "latent_channels": config.latent_channels,
        "num_vq_embeddings": config.codes,
        "norm_num_groups": GROUPS,
        "vq_embed_dim": config.latent_channels,
        "norm_type": "spatial",
    }


# ---------------------------------------------------------------- theirs to ours


def read_decoder(given: Mapping[str, Any], where: str) -> DecoderConfig:
    """Our config of diffusers' UNet2DConditionModel, as Kandinsky 2.2 and 2.1 have it.

    Raises:
        UserError: a size is missing, or a field asks for what our decoder doesn't do.
    """
    choice(f"{where}: _class_name", given.get("_class_name"), ("UNet2DConditionModel",))
    given = CONDITIONED | given
    kind = given["addition_embed_type"], given["encoder_hid_dim_type"]
    if kind not in _TOKENS:
        names = "addition_embed_type and encoder_hid_dim_type"
        expected = " or ".join(f"{a!r} and {b!r}" for a, b in _TOKENS)
        raise wrong(f"{where}: {names}", kind, expected, "give a U-Net of Kandinsky 2.1 or 2.2")
    sizes, types = read_unet({**given, "sample_size": _nominal(given)}, where), _types(given, where)
    side = sizes["image_size"]
    unet = UNetConfig(
        **sizes,
        attention_sizes=tuple(side >> i for i, t in enumerate(types) if t == ATTENDING),
        any_size=True,
        head_channels=size(given, "attention_head_dim", where),
        context_dim=size(given, "cross_attention_dim", where),
    )
    width = size(given, "encoder_hid_dim", where)
    x_channels = unet.out_channels // 2
    more = (HINT_CHANNELS,) if kind == _HINT else (0, x_channels + 1)
    channels = [x_channels + m for m in more]
    if unet.out_channels % 2 or unet.in_channels not in channels:
        found = f"{unet.in_channels} and {unet.out_channels}"
        expected = f"{' or '.join(map(str, channels))}, for twice the latents' {x_channels} out"
        raise wrong(f"{where}: in_channels and out_channels", found, expected)
    config = _decoder(unet, kind, unet.context_dim if kind == _TEXT else width, width)
    implied = unet_settings(config) | {"sample_size": given["sample_size"]}
    check(given, implied, "UNet2DConditionModel", where)
    return config


def _nominal(given: Mapping[str, Any]) -> int:
    """The side that levels are named by: the file's, if the levels divide it, else the usual."""
    side, channels = given["sample_size"], given["block_out_channels"]
    halves = 2 ** (len(channels) - 1) if isinstance(channels, list | tuple) else 1
    fits = isinstance(side, int) and not isinstance(side, bool) and side > 0
    return side if fits and side % halves == 0 else max(64, halves)


def _types(given: Mapping[str, Any], where: str) -> list[str]:
    types = given["down_block_types"]
    if not isinstance(types, list | tuple) or len(types) != len(given["block_out_channels"]):
        raise wrong(f"{where}: down_block_types", types, "a list, one for each block_out_channels")
    return list(types)


def read_movq(given: Mapping[str, Any], where: str) -> MoVQConfig:
    """Our config of diffusers' VQModel.

    Raises:
        UserError: a size is missing, or a field asks for what our MoVQ doesn't do.
    """
    choice(f"{where}: _class_name", given.get("_class_name"), ("VQModel",))
    given = _MOVQ | {k: v for k, v in given.items() if k not in _FREE}
    sizes = read_unet({**given, "sample_size": 1, "resnet_time_scale_shift": ""}, where)
    config = MoVQConfig(
        channels=sizes["channels"],
        channel_mults=sizes["channel_mults"],
        res_blocks=sizes["res_blocks"],
        attention_levels=tuple(i for i, t in enumerate(_types(given, where)) if t == _DOWN[1]),
        latent_channels=size(given, "latent_channels", where),
        codes=size(given, "num_vq_embeddings", where),
    )
    if given["vq_embed_dim"] is None:  # diffusers then takes that of the latents
        given["vq_embed_dim"] = config.latent_channels
    check(given, movq_settings(config), "VQModel", where)
    return config
