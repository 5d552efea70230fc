"""diffusers' names of Kandinsky's parameters beside ours. The prior's are those of Karlo's."""

from __future__ import annotations

from collections.abc import Iterator

from unclip_jax.models import DecoderConfig, MoVQConfig
from unclip_jax.models.decoder import HINT
from unclip_jax.weights.convert.karlo_names import diffusers_unet
from unclip_jax.weights.convert.tables import Row, named, row, under


def decoder(config: DecoderConfig) -> list[Row]:
    """UNet2DConditionModel with Kandinsky's projections: of 2.2, plain, 9-channel or hint; of 2.1.

    What has another form than these has leaves that no row names.
    """
    emb, context = "add_embedding", "encoder_hid_proj"
    table = [
        *under("unet", diffusers_unet(config.unet)),
        row("linear", "z_i_to_emb", f"{emb}.image_proj"),
        row("linear", "z_i_to_context", f"{context}.image_embeds"),
    ]
    if "z_i" in config.norms:
        table.append(row("norm", "z_i_emb_norm", f"{emb}.image_norm"))
        table.append(row("norm", "z_i_context_norm", f"{context}.norm"))
    if config.hint:
        block = f"{emb}.input_hint_block"  # in which SiLUs are counted, too
        table += [row("conv", f"hint/hint_{i}", f"{block}.{2 * i}") for i in range(len(HINT))]
    if config.use_z_t:
        table.append(row("linear", "z_t_to_emb", f"{emb}.text_proj"))
        table.append(row("norm", "z_t_norm", f"{emb}.text_norm"))
    if config.text_width:
        table.append(row("linear", "text_to_context", f"{context}.text_proj"))
    return table


def movq(config: MoVQConfig) -> list[Row]:
    """VQModel with spatial norms."""
    return [
        row("linear_2d", "quant", "quant_conv"),
        row("linear_2d", "post_quant", "post_quant_conv"),
        row("embedding", "codebook", "quantize.embedding"),
        *under("encoder", named("encoder.", list(_way(config, up=False)))),
        *under("decoder", named("decoder.", list(_way(config, up=True)))),
    ]


def _way(config: MoVQConfig, up: bool) -> Iterator[Row]:
    levels = len(config.channel_mults)
    yield row("conv", "conv_in", "conv_in")
    yield row("conv", "conv_out", "conv_out")
    yield from _norm("norm_out", "conv_norm_out", up)
    for i in (0, 1):
        yield from _residual(f"middle_res_{i}", f"mid_block.resnets.{i}", up, skip=False)
    yield from _attention("middle_attention", "mid_block.attentions.0", up)
    for level, mult in enumerate(config.channel_mults):
        before = config.channel_mults[min(level + 1, levels - 1) if up else max(level - 1, 0)]
        side = f"up_blocks.{levels - 1 - level}" if up else f"down_blocks.{level}"
        for i in range(config.res_blocks + up):
            ours, skip = f"level_{level}", i == 0 and mult != before
            yield from _residual(f"{ours}/res_{i}", f"{side}.resnets.{i}", up, skip)
            if level in config.attention_levels:
                yield from _attention(f"{ours}/attention_{i}", f"{side}.attentions.{i}", up)
        if level < levels - 1 and not up:
            yield row("conv", f"level_{level}/halve", f"{side}.downsamplers.0.conv")
        if level > 0 and up:
            yield row("conv", f"level_{level}/double", f"{side}.upsamplers.0.conv")


def _residual(ours: str, theirs: str, up: bool, skip: bool) -> Iterator[Row]:
    for i in (1, 2):
        yield from _norm(f"{ours}/norm_{i}", f"{theirs}.norm{i}", up)
        yield row("conv", f"{ours}/conv_{i}", f"{theirs}.conv{i}")
    if skip:
        yield row("linear_2d", f"{ours}/skip", f"{theirs}.conv_shortcut")


def _attention(ours: str, theirs: str, up: bool) -> Iterator[Row]:
    yield from _norm(f"{ours}/norm", f"{theirs}.{'spatial' if up else 'group'}_norm", up)
    yield row("linear", f"{ours}/qkv", *(f"{theirs}.to_{x}" for x in "qkv"))
    yield row("linear", f"{ours}/out", f"{theirs}.to_out.0")


def _norm(ours: str, theirs: str, spatial: bool) -> Iterator[Row]:
    yield row("norm", f"{ours}/norm", f"{theirs}.norm_layer" if spatial else theirs)
    if spatial:
        yield row("linear_2d", f"{ours}/z_scale", f"{theirs}.conv_y")
        yield row("linear_2d", f"{ours}/z_shift", f"{theirs}.conv_b")
