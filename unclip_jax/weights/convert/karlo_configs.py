"""diffusers' config.json files as our configs, and back.

One direction is written, ours to theirs; the other reads their sizes and then checks every other
field against what the first makes of them. So a field that means something we don't do is an
error, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unclip_jax.diffusion.gaussian import Diffusion
from unclip_jax.diffusion.samplers import Sampling
from unclip_jax.errors import UserError
from unclip_jax.models import DecoderConfig, PriorConfig, UNetConfig

Settings = dict[str, Any]

_ATTENDING = "SimpleCrossAttnDownBlock2D"

# Fields that are the same in every network we can be. They may be missing: older versions of
# diffusers didn't write them all, and these are its defaults.
_PRIOR_CONSTANTS = {
    "additional_embeddings": 4,
    "dropout": 0.0,
    "time_embed_act_fn": "silu",
    "norm_in_type": None,
    "embedding_proj_norm_type": None,
    "encoder_hid_proj_type": "linear",
    "added_emb_type": "prd",
    "time_embed_dim": None,
    "embedding_proj_dim": None,
    "clip_embed_dim": None,
}
_UNET_CONSTANTS = {
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "num_class_embeds": None,
}
_SUPER_RES_CONSTANTS = _UNET_CONSTANTS | {
    "mid_block_type": "UNetMidBlock2D",
    "downsample_type": "conv",
    "upsample_type": "conv",
    "attn_norm_num_groups": None,
    "class_embed_type": None,
    "num_train_timesteps": None,
    "attention_head_dim": 8,
}
_DECODER_CONSTANTS = _UNET_CONSTANTS | {
    "only_cross_attention": False,
    "transformer_layers_per_block": 1,
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "num_attention_heads": None,
    "dual_cross_attention": False,
    "use_linear_projection": False,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "addition_embed_type_num_heads": 64,
    "upcast_attention": False,
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "projection_class_embeddings_input_dim": None,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None,
    "cross_attention_norm": None,
}
# Of no consequence for weights or pictures: where a size is only a hint, or a rate of training.
_FREE = {"dropout", "sample_size", "downsample_type", "upsample_type", "attention_head_dim"}


# ---------------------------------------------------------------- ours to theirs


def prior_settings(config: PriorConfig) -> Settings:
    """config.json of diffusers' PriorTransformer."""
    return _PRIOR_CONSTANTS | {
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "num_layers": config.layers,
        "embedding_dim": config.embed_dim,
        "num_embeddings": config.context_length,
    }


def super_res_settings(config: UNetConfig) -> Settings:
    """config.json of diffusers' UNet2DModel."""
    return _SUPER_RES_CONSTANTS | _unet_settings(config) | {"add_attention": False}


def decoder_settings(config: UNetConfig) -> Settings:
    """config.json of diffusers' UNet2DConditionModel."""
    return (
        _DECODER_CONSTANTS
        | _unet_settings(config)
        | {
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "attention_head_dim": config.head_channels,
            "cross_attention_dim": config.context_dim,
            "class_embed_type": "identity",
        }
    )


def _unet_settings(config: UNetConfig) -> Settings:
    levels = range(len(config.channel_mults))
    attends = [config.attends(config.feature_size(level)) for level in levels]
    down = [_ATTENDING if a else "ResnetDownsampleBlock2D" for a in attends]
    up = ["SimpleCrossAttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in attends]
    return {
        "sample_size": config.image_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": [config.channels * m for m in config.channel_mults],
        "layers_per_block": config.res_blocks,
        "norm_num_groups": config.groups,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        "down_block_types": down,
        "up_block_types": up[::-1],
    }


def text_proj_settings(config: DecoderConfig) -> Settings:
    """config.json of diffusers' UnCLIPTextProjModel."""
    return {
        "clip_extra_context_tokens": config.clip_tokens,
        "clip_embeddings_dim": config.embed_dim,
        "time_embed_dim": config.unet.embedding_features,
        "cross_attention_dim": config.unet.context_dim,
    }


def scheduler_settings(diffusion: Diffusion, sampling: Sampling) -> Settings:
    """scheduler_config.json of diffusers' UnCLIPScheduler."""
    return {
        "num_train_timesteps": diffusion.steps,
        "variance_type": diffusion.variance,
        "prediction_type": {"x_0": "sample", "eps": "epsilon"}[diffusion.prediction],
        "beta_schedule": {"cosine": "squaredcos_cap_v2"}[diffusion.schedule],
        "clip_sample": sampling.clip_x_0 > 0,
        "clip_sample_range": sampling.clip_x_0 or 1.0,
    }


# ---------------------------------------------------------------- theirs to ours


def read_prior(given: Mapping[str, Any], where: str) -> PriorConfig:
    """Our config of diffusers' PriorTransformer.

    Raises:
        UserError: a size is missing, or a field asks for what our prior doesn't do.
    """
    heads = _size(given, "num_attention_heads", where)
    embed_dim = _size(given, "embedding_dim", where)
    config = PriorConfig(
        embed_dim=embed_dim,
        width=heads * _size(given, "attention_head_dim", where),
        layers=_size(given, "num_layers", where),
        heads=heads,
        context_length=_size(given, "num_embeddings", where),
        vocab_size=0,
        text_width=embed_dim,
    )
    _check(given, prior_settings(config), where)
    return config


def read_super_res(given: Mapping[str, Any], where: str) -> UNetConfig:
    """Our config of diffusers' UNet2DModel: convolutions only.

    Raises:
        UserError: as for `read_prior`.
    """
    config = UNetConfig(
        **_read_unet(given, where), attention_sizes=(), scale_shift=_scale_shift(given)
    )
    _check(given, super_res_settings(config), where)
    return config


def read_decoder(
    given: Mapping[str, Any], text_proj: Mapping[str, Any], where: str
) -> DecoderConfig:
    """Our config of diffusers' UNet2DConditionModel and UnCLIPTextProjModel.

    Raises:
        UserError: as for `read_prior`, or the two don't fit each other.
    """
    sizes = _read_unet(given, where)
    types = given.get("down_block_types", [])
    attending = tuple(sizes["image_size"] >> i for i, t in enumerate(types) if t == _ATTENDING)
    unet = UNetConfig(
        **sizes,
        attention_sizes=attending,
        head_channels=_size(given, "attention_head_dim", where),
        context_dim=_size(given, "cross_attention_dim", where),
        scale_shift=_scale_shift(given),
        dropout=0.1,
    )
    _check(given, decoder_settings(unet), where)
    embed_dim = _size(text_proj, "clip_embeddings_dim", f"{where}: text_proj")
    config = DecoderConfig(
        unet=unet,
        text_width=embed_dim,
        embed_dim=embed_dim,
        clip_tokens=_size(text_proj, "clip_extra_context_tokens", f"{where}: text_proj"),
        use_z_t=True,
        learned_null=True,
    )
    _check(text_proj, text_proj_settings(config), f"{where}: text_proj")
    return config


def read_scheduler(
    given: Mapping[str, Any], spacing: str, where: str
) -> tuple[Diffusion, Sampling]:
    """Our diffusion and sampling settings of diffusers' UnCLIPScheduler.

    Raises:
        UserError: a field asks for what our diffusion doesn't do.
    """
    predictions = {"sample": "x_0", "epsilon": "eps"}
    found = given.get("prediction_type", "epsilon")
    if found not in predictions:
        raise UserError(f"{where}: prediction_type {found!r}: expected sample or epsilon")
    variance = given.get("variance_type", "fixed_small_log")
    learned = variance == "learned_range"
    diffusion = Diffusion(
        steps=given.get("num_train_timesteps", 1000),
        schedule="cosine",
        prediction=predictions[found],
        variance=variance,
        loss="hybrid" if learned else "simple",
    )
    clip = given.get("clip_sample_range", 1.0) if given.get("clip_sample", True) else 0.0
    sampling = Sampling(method="ddpm", spacing=spacing, clip_x_0=float(clip))
    diffusion.process(spacing)
    _check(given, scheduler_settings(diffusion, sampling), where)
    return diffusion, sampling


def _read_unet(given: Mapping[str, Any], where: str) -> Settings:
    channels = given.get("block_out_channels")
    if not isinstance(channels, list | tuple) or not channels or channels[0] < 1:
        raise UserError(
            f"{where}: block_out_channels {channels!r}: expected a list of channels, one a level"
        )
    if any(c % channels[0] for c in channels):
        raise UserError(
            f"{where}: block_out_channels {channels!r}: expected multiples of the first"
        )
    return {
        "image_size": _size(given, "sample_size", where),
        "in_channels": _size(given, "in_channels", where),
        "out_channels": _size(given, "out_channels", where),
        "channels": channels[0],
        "channel_mults": tuple(c // channels[0] for c in channels),
        "res_blocks": _size(given, "layers_per_block", where),
        "groups": given.get("norm_num_groups", 32),
    }


def _scale_shift(given: Mapping[str, Any]) -> bool:
    return given.get("resnet_time_scale_shift", "default") == "scale_shift"


def _size(given: Mapping[str, Any], field: str, where: str) -> int:
    value = given.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{where}: {field} {value!r}: expected a positive integer")
    return value


def _check(given: Mapping[str, Any], implied: Settings, where: str) -> None:
    """Raise UserError unless every given field is as `implied`; names that begin with _ are not."""

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    for field, value in given.items():
        if field.startswith("_") or field in _FREE:
            continue
        if field not in implied:
            if value:
                raise UserError(
                    f"{where}: field {field!r} is {value!r}, which unclip_jax does not know;"
                    " expected a config.json as diffusers writes it for Karlo"
                )
        elif plain(value) != plain(implied[field]):
            raise UserError(
                f"{where}: {field} is {value!r}, but unclip_jax's networks have {implied[field]!r}"
            )
