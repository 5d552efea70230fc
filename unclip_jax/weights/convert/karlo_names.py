"""Karlo's parameter names beside ours, in diffusers' layout and in the original one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from unclip_jax.models import DecoderConfig, UNetConfig
from unclip_jax.weights.convert.tables import Row, named, row, under

# ---------------------------------------------------------------- prior


def diffusers_prior() -> list[Row]:
    """PriorTransformer: our stage's params from all of its tensors."""
    blocks, theirs = "transformer/blocks", "transformer_blocks.{i}"
    network = [
        row("array_1", "positions", "positional_embedding"),
        row("array_11", "query", "prd_embedding"),
        row("linear", "time/linear_1", "time_embedding.linear_1"),
        row("linear", "time/linear_2", "time_embedding.linear_2"),
        row("linear", "z_i_in", "proj_in"),
        row("linear", "z_t_in", "embedding_proj"),
        row("linear", "text_in", "encoder_hidden_states_proj"),
        row("norm", f"{blocks}/norm_1", f"{theirs}.norm1"),
        row("linear", f"{blocks}/qkv", *(f"{theirs}.attn1.to_{x}" for x in "qkv")),
        row("output", f"{blocks}/out", f"{theirs}.attn1.to_out.0"),
        row("norm", f"{blocks}/norm_2", f"{theirs}.norm3"),
        row("linear", f"{blocks}/up", f"{theirs}.ff.net.0.proj"),
        row("linear", f"{blocks}/down", f"{theirs}.ff.net.2"),
        row("norm", "norm_out", "norm_out"),
        row("linear", "out", "proj_to_clip_embeddings"),
    ]
    return [
        *under("network", network),
        row("array_1", "normalisation/mean", "clip_mean"),
        row("array_1", "normalisation/std", "clip_std"),
    ]


def original_prior() -> list[Row]:
    """Karlo's own prior, and the two tensors of its statistics file, "0" and "1"."""
    blocks, theirs = "transformer/blocks", "transformer.resblocks.{i}"
    network = [
        row("array_1", "positions", "positional_embedding"),
        row("array_11", "query", "prd_emb"),
        row("linear", "time/linear_1", "time_embed.0"),
        row("linear", "time/linear_2", "time_embed.2"),
        row("linear", "z_i_in", "clip_img_proj"),
        row("linear", "z_t_in", "text_emb_proj"),
        row("linear", "text_in", "text_enc_proj"),
        row("norm", f"{blocks}/norm_1", f"{theirs}.ln_1"),
        row("heads", f"{blocks}/qkv", f"{theirs}.attn.c_qkv"),
        row("output", f"{blocks}/out", f"{theirs}.attn.c_proj"),
        row("norm", f"{blocks}/norm_2", f"{theirs}.ln_2"),
        row("linear", f"{blocks}/up", f"{theirs}.mlp.c_fc"),
        row("linear", f"{blocks}/down", f"{theirs}.mlp.c_proj"),
        row("norm", "norm_out", "final_ln"),
        row("linear", "out", "out_proj"),
    ]
    return [
        *under("network", network),
        row("array", "normalisation/mean", "stats.0"),
        row("array", "normalisation/std", "stats.1"),
    ]


# ---------------------------------------------------------------- U-Nets


class _Block(NamedTuple):
    """One block of a U-Net, in the order of the forward pass within each part.

    Attributes:
        ours: its name in our tree.
        part: "down", "halve", "middle", "up" or "double".
        level: 0 is the full size; 0 for the middle.
        index: among the blocks of its level and part.
        skip: whether its residual branch changes the channels.
        attends: whether attention follows.
    """

    ours: str
    part: str
    level: int = 0
    index: int = 0
    skip: bool = False
    attends: bool = False

    @property
    def attention(self) -> str:
        """Our name of the attention that follows."""
        if self.part == "middle":
            return "middle_attention"
        return f"{self.part}_{self.level}_attention_{self.index}"


def _blocks(config: UNetConfig) -> Iterator[_Block]:
    mults, last = config.channel_mults, len(config.channel_mults) - 1
    for level, mult in enumerate(mults):
        attends = config.attends(config.feature_size(level))
        for i in range(config.res_blocks):
            changes = i == 0 and mult != mults[max(level - 1, 0)]
            yield _Block(f"down_{level}_res_{i}", "down", level, i, changes, attends)
        for i in range(config.res_blocks + 1):
            yield _Block(f"up_{level}_res_{i}", "up", level, i, True, attends)
        if level < last:
            yield _Block(f"down_{level}_halve", "halve", level)
        if level > 0:
            yield _Block(f"up_{level}_double", "double", level)
    for i in range(2):
        attends = i == 0 and bool(config.attention_sizes)
        yield _Block(f"middle_res_{i}", "middle", 0, i, False, attends)


def diffusers_unet(config: UNetConfig) -> list[Row]:
    """UNet2DConditionModel and UNet2DModel."""
    table = [
        row("conv", "conv_in", "conv_in"),
        row("linear", "time/linear_1", "time_embedding.linear_1"),
        row("linear", "time/linear_2", "time_embedding.linear_2"),
        row("norm", "norm_out", "conv_norm_out"),
        row("conv", "conv_out", "conv_out"),
    ]
    last = len(config.channel_mults) - 1
    for block in _blocks(config):
        down, up = f"down_blocks.{block.level}", f"up_blocks.{last - block.level}"
        side = {"down": down, "up": up, "middle": "mid_block"}.get(block.part, "")
        theirs = {
            "halve": f"{down}.downsamplers.0",
            "double": f"{up}.upsamplers.0",
        }.get(block.part, f"{side}.resnets.{block.index}")
        table += [
            row("norm", f"{block.ours}/norm_1", f"{theirs}.norm1"),
            row("conv", f"{block.ours}/conv_1", f"{theirs}.conv1"),
            row("linear", f"{block.ours}/emb", f"{theirs}.time_emb_proj"),
            row("norm", f"{block.ours}/norm_2", f"{theirs}.norm2"),
            row("conv", f"{block.ours}/conv_2", f"{theirs}.conv2"),
        ]
        if block.skip:
            table.append(row("linear_2d", f"{block.ours}/skip", f"{theirs}.conv_shortcut"))
        if block.attends:
            ours, theirs = block.attention, f"{side}.attentions.{block.index}"
            added = [f"{theirs}.add_{x}_proj" for x in "kv"]
            table += [
                row("norm", f"{ours}/norm", f"{theirs}.group_norm"),
                row("linear", f"{ours}/qkv", *(f"{theirs}.to_{x}" for x in "qkv")),
                row("linear", f"{ours}/context_kv", *added),
                row("output", f"{ours}/out", f"{theirs}.to_out.0"),
            ]
    return table


def original_unet(config: UNetConfig) -> list[Row]:
    """Karlo's own U-Nets, with the numbering of guided-diffusion."""
    table = [
        row("conv", "conv_in", "input_blocks.0.0"),
        row("linear", "time/linear_1", "time_embed.0"),
        row("linear", "time/linear_2", "time_embed.2"),
        row("norm", "norm_out", "out.0"),
        row("conv", "conv_out", "out.2"),
    ]
    for block in _blocks(config):
        prefix, first = _original_place(config, block)
        theirs = f"{prefix}.{first}"
        table += [
            row("norm", f"{block.ours}/norm_1", f"{theirs}.in_layers.0"),
            row("conv", f"{block.ours}/conv_1", f"{theirs}.in_layers.2"),
            row("linear", f"{block.ours}/emb", f"{theirs}.emb_layers.1"),
            row("norm", f"{block.ours}/norm_2", f"{theirs}.out_layers.0"),
            row("conv", f"{block.ours}/conv_2", f"{theirs}.out_layers.3"),
        ]
        if block.skip:
            table.append(row("linear_2d", f"{block.ours}/skip", f"{theirs}.skip_connection"))
        if block.attends:
            ours, theirs = block.attention, f"{prefix}.{first + 1}"
            table += [
                row("norm", f"{ours}/norm", f"{theirs}.norm"),
                row("heads_1d", f"{ours}/qkv", f"{theirs}.qkv"),
                row("heads_1d", f"{ours}/context_kv", f"{theirs}.encoder_kv"),
                row("output_1d", f"{ours}/out", f"{theirs}.proj_out"),
            ]
    return table


def _original_place(config: UNetConfig, block: _Block) -> tuple[str, int]:
    """The numbered block that holds one of ours, and our block's place in it.

    Block 0 of the way down is the first convolution; then each level has its residual blocks and
    one that halves. On the way up, what doubles stands last in its level's last block.
    """
    n, last = config.res_blocks, len(config.channel_mults) - 1
    up = (last - block.level) * (n + 1)
    attends = config.attends(config.feature_size(block.level))
    return {
        "down": (f"input_blocks.{1 + block.level * (n + 1) + block.index}", 0),
        "halve": (f"input_blocks.{(block.level + 1) * (n + 1)}", 0),
        "middle": ("middle_block", block.index * (2 if config.attention_sizes else 1)),
        "up": (f"output_blocks.{up + block.index}", 0),
        "double": (f"output_blocks.{up + n}", 2 if attends else 1),
    }[block.part]


# ---------------------------------------------------------------- decoder, super-resolution


def diffusers_decoder(config: DecoderConfig) -> list[Row]:
    """UNet2DConditionModel, and UnCLIPTextProjModel under "text_proj."."""
    time = "clip_image_embeddings_project_to_time_embeddings"
    text_proj = [
        row("array", "null_z_i", "learned_classifier_free_guidance_embeddings"),
        row("linear", "z_t_to_emb", "embedding_proj"),
        row("linear", "z_i_to_emb", time),
        row("linear", "z_i_to_context", "clip_extra_context_tokens_proj"),
        row("linear", "text_to_context", "encoder_hidden_states_proj"),
        row("norm", "text_norm", "text_encoder_hidden_states_norm"),
    ]
    return under("unet", diffusers_unet(config.unet)) + named("text_proj.", text_proj)


def original_decoder(config: DecoderConfig) -> list[Row]:
    """Karlo's own decoder."""
    return [
        *under("unet", original_unet(config.unet)),
        row("array", "null_z_i", "cf_param"),
        row("linear", "z_t_to_emb", "text_feat_proj"),
        row("linear", "z_i_to_emb", "clip_emb"),
        row("linear", "z_i_to_context", "clip_tok_proj"),
        row("linear", "text_to_context", "text_seq_proj.0"),
        row("norm", "text_norm", "text_seq_proj.1"),
    ]


def diffusers_super_res(config: UNetConfig) -> list[Row]:
    """Two UNet2DModels: "first." for every step but the last, "last." for that."""
    unet = diffusers_unet(config)
    return under("network", named("first.", unet)) + under("last_network", named("last.", unet))


def original_super_res(config: UNetConfig) -> list[Row]:
    """Karlo's own super-resolution: both networks are in one file."""
    unet = original_unet(config)
    first, last = named("model_first_steps.", unet), named("model_last_step.", unet)
    return under("network", first) + under("last_network", last)
