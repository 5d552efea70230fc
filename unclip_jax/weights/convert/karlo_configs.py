"""diffusers' config.json files as our configs, and back.

One direction is written, ours to theirs; the other reads their sizes and then checks every other
field against what the first makes of them. So a field that means something we don't do is an
error, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unclip_jax.common.checks import choice, count, number
from unclip_jax.diffusion.gaussian import Diffusion
from unclip_jax.diffusion.samplers import Sampling
from unclip_jax.errors import UserError, wrong
from unclip_jax.models import DecoderConfig, PriorConfig, UNetConfig

Settings = dict[str, Any]

ATTENDING = "SimpleCrossAttnDownBlock2D"
VARIANCES = ("fixed_small_log", "learned_range")  # those of diffusers' UnCLIPScheduler

# What diffusers takes where a config.json leaves a field out, as older versions of it do.
_PRIOR = {
    "num_attention_heads": 32,
    "attention_head_dim": 64,
    "num_layers": 20,
    "embedding_dim": 768,
    "num_embeddings": 77,
    "additional_embeddings": 4,
    "dropout": 0.0,
    "time_embed_act_fn": "silu",
    "encoder_hid_proj_type": "linear",
    "added_emb_type": "prd",
}
_PRIOR |= dict.fromkeys(("norm_in_type", "embedding_proj_norm_type", "time_embed_dim"))
_PRIOR |= dict.fromkeys(("embedding_proj_dim", "clip_embed_dim"))
_UNET = {
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "dropout": 0.0,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "attention_head_dim": 8,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
}
_UNET |= dict.fromkeys(("sample_size", "time_embedding_dim", "class_embed_type"))
_UNET |= {"num_class_embeds": None}
_SUPER_RES = _UNET | {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownBlock2D", *["AttnDownBlock2D"] * 3],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": [*["AttnUpBlock2D"] * 3, "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "downsample_type": "conv",
    "upsample_type": "conv",
    "add_attention": True,
}
_SUPER_RES |= dict.fromkeys(("attn_norm_num_groups", "num_train_timesteps"))
CONDITIONED = _UNET | {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "addition_embed_type_num_heads": 64,
    "resnet_out_scale_factor": 1.0,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
}
CONDITIONED |= dict.fromkeys(("only_cross_attention", "dual_cross_attention"), False)
CONDITIONED |= dict.fromkeys(("use_linear_projection", "upcast_attention"), False)
CONDITIONED |= dict.fromkeys(("resnet_skip_time_act", "class_embeddings_concat"), False)
CONDITIONED |= dict.fromkeys(("reverse_transformer_layers_per_block", "num_attention_heads"))
CONDITIONED |= dict.fromkeys(("encoder_hid_dim", "encoder_hid_dim_type", "addition_embed_type"))
CONDITIONED |= dict.fromkeys(("addition_time_embed_dim", "time_embedding_act_fn"))
CONDITIONED |= dict.fromkeys(("timestep_post_act", "time_cond_proj_dim", "cross_attention_norm"))
CONDITIONED |= dict.fromkeys(("projection_class_embeddings_input_dim",))
CONDITIONED |= {"mid_block_only_cross_attention": None}
_TEXT_PROJ = {"clip_extra_context_tokens": 4, "clip_embeddings_dim": 768}
_SCHEDULER = {
    "num_train_timesteps": 1000,
    "variance_type": "fixed_small_log",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "prediction_type": "epsilon",
    "beta_schedule": "squaredcos_cap_v2",
}
_PREDICTIONS = {"sample": "x_0", "epsilon": "eps"}
# Of no consequence for weights or pictures: a rate of training, and what no block of Karlo's reads.
_FREE = {"dropout", "downsample_type", "upsample_type"}


# ---------------------------------------------------------------- ours to theirs


def prior_settings(config: PriorConfig) -> Settings:
    """config.json of diffusers' PriorTransformer."""
    return _PRIOR | {
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "num_layers": config.layers,
        "embedding_dim": config.embed_dim,
        "num_embeddings": config.context_length,
    }


def super_res_settings(config: UNetConfig) -> Settings:
    """config.json of diffusers' UNet2DModel."""
    return _SUPER_RES | unet_settings(config) | {"add_attention": False}


def decoder_settings(config: UNetConfig) -> Settings:
    """config.json of diffusers' UNet2DConditionModel."""
    return (
        CONDITIONED
        | unet_settings(config)
        | {
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "attention_head_dim": config.head_channels,
            "cross_attention_dim": config.context_dim,
            "class_embed_type": "identity",
        }
    )


def unet_settings(config: UNetConfig) -> Settings:
    """The fields of a config.json that both classes of U-Net have."""
    levels = range(len(config.channel_mults))
    attends = [config.attends(config.feature_size(level)) for level in levels]
    down = [ATTENDING if a else "ResnetDownsampleBlock2D" for a in attends]
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
        "prediction_type": next(k for k, v in _PREDICTIONS.items() if v == diffusion.prediction),
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
    given = _PRIOR | given
    heads = size(given, "num_attention_heads", where)
    embed_dim = size(given, "embedding_dim", where)
    config = PriorConfig(
        embed_dim=embed_dim,
        width=heads * size(given, "attention_head_dim", where),
        layers=size(given, "num_layers", where),
        heads=heads,
        context_length=size(given, "num_embeddings", where),
        vocab_size=0,
        text_width=embed_dim,
    )
    # What diffusers takes for None may be spelled out.
    spelled = {"embedding_proj_dim": embed_dim, "clip_embed_dim": embed_dim}
    spelled |= {"time_embed_dim": config.width}
    given = {k: None if v and v == spelled.get(k) else v for k, v in given.items()}
    check(given, prior_settings(config), "PriorTransformer", where)
    return config


def read_super_res(given: Mapping[str, Any], where: str) -> UNetConfig:
    """Our config of diffusers' UNet2DModel: convolutions only.

    Raises:
        UserError: as for `read_prior`.
    """
    given = _SUPER_RES | given
    config = UNetConfig(**read_unet(given, where), attention_sizes=())
    # Without attention the width of its heads says nothing.
    check(given | {"attention_head_dim": 8}, super_res_settings(config), "UNet2DModel", where)
    return config


def read_decoder(
    given: Mapping[str, Any], text_proj: Mapping[str, Any], where: str
) -> DecoderConfig:
    """Our config of diffusers' UNet2DConditionModel and UnCLIPTextProjModel.

    Raises:
        UserError: as for `read_prior`, or the two don't fit each other.
    """
    given, text_proj = CONDITIONED | given, _TEXT_PROJ | text_proj
    sizes, types = read_unet(given, where), given["down_block_types"]
    attending = tuple(sizes["image_size"] >> i for i, t in enumerate(types) if t == ATTENDING)
    unet = UNetConfig(
        **sizes,
        attention_sizes=attending,
        head_channels=size(given, "attention_head_dim", where),
        context_dim=size(given, "cross_attention_dim", where),
        dropout=0.1,
    )
    check(given, decoder_settings(unet), "UNet2DConditionModel", where)
    embed_dim = size(text_proj, "clip_embeddings_dim", f"{where}: text_proj")
    config = DecoderConfig(
        unet=unet,
        text_width=embed_dim,
        embed_dim=embed_dim,
        clip_tokens=size(text_proj, "clip_extra_context_tokens", f"{where}: text_proj"),
        use_z_t=True,
        learned_null=True,
    )
    check(text_proj, text_proj_settings(config), "UnCLIPTextProjModel", f"{where}: text_proj")
    return config


def read_scheduler(
    given: Mapping[str, Any], spacing: str, where: str
) -> tuple[Diffusion, Sampling]:
    """Our diffusion and sampling settings of diffusers' UnCLIPScheduler.

    Raises:
        UserError: a field asks for what our diffusion doesn't do.
    """
    given = _SCHEDULER | given
    found = choice(f"{where}: prediction_type", given["prediction_type"], _PREDICTIONS)
    variance = choice(f"{where}: variance_type", given["variance_type"], VARIANCES)
    clip = 0.0
    if given["clip_sample"]:
        clip = number(f"{where}: clip_sample_range", given["clip_sample_range"], above=0)
    diffusion = Diffusion(
        steps=count(f"{where}: num_train_timesteps", given["num_train_timesteps"]),
        schedule="cosine",
        prediction=_PREDICTIONS[found],
        variance=variance,
        loss="hybrid" if variance == "learned_range" else "simple",
    )
    sampling = Sampling(method="ddpm", spacing=spacing, clip_x_0=clip)
    diffusion.process(spacing)
    implied = scheduler_settings(diffusion, sampling)
    check(given | {"clip_sample_range": clip or 1.0}, implied, "UnCLIPScheduler", where)
    return diffusion, sampling


def read_unet(given: Mapping[str, Any], where: str) -> Settings:
    """The sizes that every U-Net's config.json has, as fields of a `UNetConfig`."""
    channels = given["block_out_channels"]
    if not isinstance(channels, list | tuple) or not channels:
        raise wrong(f"{where}: block_out_channels", channels, "a list, one number a level")
    first = count(f"{where}: block_out_channels", channels[0])
    if any(c % first for c in channels):
        raise wrong(f"{where}: block_out_channels", channels, "multiples of the first")
    return {
        "image_size": size(given, "sample_size", where),
        "in_channels": size(given, "in_channels", where),
        "out_channels": size(given, "out_channels", where),
        "channels": channels[0],
        "channel_mults": tuple(c // channels[0] for c in channels),
        "res_blocks": size(given, "layers_per_block", where),
        "groups": size(given, "norm_num_groups", where),
        "scale_shift": given["resnet_time_scale_shift"] == "scale_shift",
    }


def size(given: Mapping[str, Any], field: str, where: str) -> int:
    """A field that is a positive integer."""
    return count(f"{where}: {field}", given.get(field))


def check(given: Mapping[str, Any], implied: Settings, kind: str, where: str) -> None:
    """Raise UserError unless every given field is as `implied`, of this class of diffusers."""

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    choice(f"{where}: _class_name", given.get("_class_name", kind), (kind,))
    for field, value in given.items():
        if field.startswith("_") or field in _FREE:
            continue
        if field not in implied:
            if value:
                raise UserError(
                    f"{where}: field {field!r} is {value!r}, which unclip_jax does not know;"
                    " expected a file as diffusers writes it for such a model"
                )
        elif plain(value) != plain(implied[field]):
            raise UserError(
                f"{where}: {field} is {value!r}, but unclip_jax's networks have {implied[field]!r}"
            )
