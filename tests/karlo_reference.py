"""PyTorch's parameter names beside ours, and the layouts between the two.

A table is a list of rows (kind, our path, their names). A kind says which arrays belong to a
layer and how they are laid out. "{i}" in their names counts the layers of a scanned stack.
"""

from __future__ import annotations

import jax
import numpy as np

from unclip_jax.models import ClipConfig, DecoderConfig, UNetConfig

Row = tuple[str, str, tuple[str, ...]]


def _linear(*weights):
    """`[out, in]` weights to one `[in, ..., out]` kernel; several go side by side."""
    return np.stack([w.T for w in weights], axis=1)


def _vectors(*vectors):
    return np.stack(vectors)


# kind: our leaf, their suffix, and their arrays to ours up to a reshape.
KINDS = {
    "linear": (("kernel", ".weight", _linear), ("bias", ".bias", _vectors)),
    "projection": (("kernel", ".weight", _linear),),
    "conv": (
        ("kernel", ".weight", lambda w: w.transpose(2, 3, 1, 0)),
        ("bias", ".bias", _vectors),
    ),
    "patches": (("kernel", ".weight", lambda w: w.transpose(2, 3, 1, 0)),),
    "norm": (("scale", ".weight", _vectors), ("bias", ".bias", _vectors)),
    "embedding": (("embedding", ".weight", _vectors),),
    "array": (("", "", _vectors),),
}


def row(kind: str, ours: str, *theirs: str) -> Row:
    return kind, ours, theirs


def convert(table: list[Row], state: dict, target):
    """A tree like `target` from their `state`; every leaf and every name is used exactly once."""
    state = {name: np.asarray(value) for name, value in state.items()}
    wanted = {
        "/".join(key.key for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(target)
    }
    used, leaves = [], {}
    for kind, ours, theirs in table:
        for leaf, suffix, layout in KINDS[kind]:
            path = f"{ours}/{leaf}" if leaf else ours
            shape = wanted[path].shape
            scanned = "{i}" in theirs[0]
            layers = []
            for i in range(shape[0]) if scanned else [0]:
                names = [name.format(i=i) + suffix for name in theirs]
                used += names
                layers.append(layout(*(state[name] for name in names)))
            assert path not in leaves, path
            assert np.stack(layers).size == np.prod(shape), (path, shape)
            leaves[path] = np.stack(layers).reshape(shape)
    assert sorted(used) == sorted(state), set(used) ^ set(state)
    assert set(leaves) == set(wanted), set(leaves) ^ set(wanted)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: leaves["/".join(key.key for key in path)], target
    )


def under(prefix: str, table: list[Row]) -> list[Row]:
    """The same table for a network that is part of ours, under `prefix`."""
    return [(kind, f"{prefix}/{ours}", theirs) for kind, ours, theirs in table]


def prior_table() -> list[Row]:
    """diffusers' PriorTransformer, without its clip_mean and clip_std."""
    blocks, theirs = "transformer/blocks", "transformer_blocks.{i}"
    return [
        row("array", "positions", "positional_embedding"),
        row("array", "query", "prd_embedding"),
        row("linear", "time/linear_1", "time_embedding.linear_1"),
        row("linear", "time/linear_2", "time_embedding.linear_2"),
        row("linear", "z_i_in", "proj_in"),
        row("linear", "z_t_in", "embedding_proj"),
        row("linear", "text_in", "encoder_hidden_states_proj"),
        row("norm", f"{blocks}/norm_1", f"{theirs}.norm1"),
        row("linear", f"{blocks}/qkv", *(f"{theirs}.attn1.to_{x}" for x in "qkv")),
        row("linear", f"{blocks}/out", f"{theirs}.attn1.to_out.0"),
        row("norm", f"{blocks}/norm_2", f"{theirs}.norm3"),
        row("linear", f"{blocks}/up", f"{theirs}.ff.net.0.proj"),
        row("linear", f"{blocks}/down", f"{theirs}.ff.net.2"),
        row("norm", "norm_out", "norm_out"),
        row("linear", "out", "proj_to_clip_embeddings"),
    ]


def unet_table(config: UNetConfig) -> list[Row]:
    """diffusers' UNet2DConditionModel and UNet2DModel."""
    table = [
        row("conv", "conv_in", "conv_in"),
        row("linear", "time/linear_1", "time_embedding.linear_1"),
        row("linear", "time/linear_2", "time_embedding.linear_2"),
        row("norm", "norm_out", "conv_norm_out"),
        row("conv", "conv_out", "conv_out"),
    ]

    def res(ours: str, theirs: str, skip: bool = False) -> None:
        table.extend(
            [
                row("norm", f"{ours}/norm_1", f"{theirs}.norm1"),
                row("conv", f"{ours}/conv_1", f"{theirs}.conv1"),
                row("linear", f"{ours}/emb", f"{theirs}.time_emb_proj"),
                row("norm", f"{ours}/norm_2", f"{theirs}.norm2"),
                row("conv", f"{ours}/conv_2", f"{theirs}.conv2"),
            ]
        )
        if skip:
            table.append(row("conv", f"{ours}/skip", f"{theirs}.conv_shortcut"))

    def attend(ours: str, theirs: str) -> None:
        added = [f"{theirs}.add_{x}_proj" for x in "kv"]
        table.extend(
            [
                row("norm", f"{ours}/norm", f"{theirs}.group_norm"),
                row("linear", f"{ours}/qkv", *(f"{theirs}.to_{x}" for x in "qkv")),
                row("linear", f"{ours}/context_kv", *added),
                row("linear", f"{ours}/out", f"{theirs}.to_out.0"),
            ]
        )

    mults, last = config.channel_mults, len(config.channel_mults) - 1
    for level, mult in enumerate(mults):
        attends = config.attends(config.feature_size(level))
        down, up = f"down_blocks.{level}", f"up_blocks.{last - level}"
        for i in range(config.res_blocks):
            changes = i == 0 and mult != mults[max(level - 1, 0)]
            res(f"down_{level}_res_{i}", f"{down}.resnets.{i}", changes)
            if attends:
                attend(f"down_{level}_attention_{i}", f"{down}.attentions.{i}")
        for i in range(config.res_blocks + 1):
            res(f"up_{level}_res_{i}", f"{up}.resnets.{i}", True)
            if attends:
                attend(f"up_{level}_attention_{i}", f"{up}.attentions.{i}")
        if level < last:
            res(f"down_{level}_halve", f"{down}.downsamplers.0")
        if level > 0:
            res(f"up_{level}_double", f"{up}.upsamplers.0")
    for i in range(2):
        res(f"middle_res_{i}", f"mid_block.resnets.{i}")
    if config.attention_sizes:
        attend("middle_attention", "mid_block.attentions.0")
    return table


def decoder_table(config: DecoderConfig) -> list[Row]:
    """diffusers' UNet2DConditionModel, and its UnCLIPTextProjModel under "text_proj."."""
    time = "clip_image_embeddings_project_to_time_embeddings"
    rows = [
        row("array", "null_z_i", "text_proj.learned_classifier_free_guidance_embeddings"),
        row("linear", "z_t_to_emb", "text_proj.embedding_proj"),
        row("linear", "z_i_to_emb", f"text_proj.{time}"),
        row("linear", "z_i_to_context", "text_proj.clip_extra_context_tokens_proj"),
        row("linear", "text_to_context", "text_proj.encoder_hidden_states_proj"),
        row("norm", "text_norm", "text_proj.text_encoder_hidden_states_norm"),
    ]
    return under("unet", unet_table(config.unet)) + rows


def clip_table() -> list[Row]:
    """transformers' CLIPModel."""

    def tower(ours: str, theirs: str) -> list[Row]:
        ours, theirs = f"{ours}/transformer/blocks", f"{theirs}.encoder.layers.{{i}}"
        return [
            row("norm", f"{ours}/norm_1", f"{theirs}.layer_norm1"),
            row("linear", f"{ours}/qkv", *(f"{theirs}.self_attn.{x}_proj" for x in "qkv")),
            row("linear", f"{ours}/out", f"{theirs}.self_attn.out_proj"),
            row("norm", f"{ours}/norm_2", f"{theirs}.layer_norm2"),
            row("linear", f"{ours}/up", f"{theirs}.mlp.fc1"),
            row("linear", f"{ours}/down", f"{theirs}.mlp.fc2"),
        ]

    vision, text = "vision_model", "text_model"
    return [
        row("array", "log_scale", "logit_scale"),
        row("projection", "vision_projection", "visual_projection"),
        row("projection", "text_projection", "text_projection"),
        row("array", "vision/class_token", f"{vision}.embeddings.class_embedding"),
        row("patches", "vision/patches", f"{vision}.embeddings.patch_embedding"),
        row("array", "vision/positions", f"{vision}.embeddings.position_embedding.weight"),
        row("norm", "vision/norm_in", f"{vision}.pre_layrnorm"),
        row("norm", "vision/norm_out", f"{vision}.post_layernorm"),
        row("embedding", "text/tokens", f"{text}.embeddings.token_embedding"),
        row("array", "text/positions", f"{text}.embeddings.position_embedding.weight"),
        row("norm", "text/norm_out", f"{text}.final_layer_norm"),
        *tower("vision", vision),
        *tower("text", text),
    ]


# ---------------------------------------------------------------- their configs, from ours


def prior_kwargs(config) -> dict:
    """Arguments of diffusers' PriorTransformer."""
    return {
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "num_layers": config.layers,
        "embedding_dim": config.embed_dim,
        "num_embeddings": config.context_length,
    }


def unet_kwargs(config: UNetConfig) -> dict:
    """Arguments of diffusers' UNet2DConditionModel, or UNet2DModel where nothing attends."""
    levels = range(len(config.channel_mults))
    attends = [config.attends(config.feature_size(level)) for level in levels]
    down = ["SimpleCrossAttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attends]
    up = ["SimpleCrossAttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in attends]
    kwargs = {
        "sample_size": config.image_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": tuple(config.channels * m for m in config.channel_mults),
        "layers_per_block": config.res_blocks,
        "norm_num_groups": config.groups,
        "norm_eps": 1e-5,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
    }
    if not config.attention_sizes:
        no_attention = {"add_attention": False, "downsample_type": "resnet"}
        blocks = {"down_block_types": tuple(down), "up_block_types": tuple(up[::-1])}
        return kwargs | no_attention | blocks | {"upsample_type": "resnet"}
    return kwargs | {
        "down_block_types": tuple(down),
        "up_block_types": tuple(up[::-1]),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "attention_head_dim": config.head_channels,
        "cross_attention_dim": config.context_dim,
        "class_embed_type": "identity",
    }


def text_proj_kwargs(config: DecoderConfig) -> dict:
    """Arguments of diffusers' UnCLIPTextProjModel."""
    return {
        "clip_extra_context_tokens": config.clip_tokens,
        "clip_embeddings_dim": config.embed_dim,
        "time_embed_dim": config.unet.embedding_features,
        "cross_attention_dim": config.unet.context_dim,
    }


def clip_kwargs(config: ClipConfig) -> dict:
    """Arguments of transformers' CLIPConfig."""
    shared = {"hidden_act": config.activation, "projection_dim": config.embed_dim}
    return {
        "projection_dim": config.embed_dim,
        "vision_config": shared
        | {
            "hidden_size": config.vision_width,
            "intermediate_size": int(config.vision_width * config.mlp_ratio),
            "num_hidden_layers": config.vision_layers,
            "num_attention_heads": config.vision_heads,
            "image_size": config.image_size,
            "patch_size": config.patch,
        },
        "text_config": shared
        | {
            "hidden_size": config.text_width,
            "intermediate_size": int(config.text_width * config.mlp_ratio),
            "num_hidden_layers": config.text_layers,
            "num_attention_heads": config.text_heads,
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.context_length,
            "eos_token_id": config.vocab_size - 1,
            "bos_token_id": config.vocab_size - 2,
            "pad_token_id": 0,
        },
    }
