"""CLIP's parameter names beside ours: Hugging Face's, and OpenAI's, which OpenCLIP shares."""

from __future__ import annotations

from unclip_jax.weights.convert.tables import Row, row


def huggingface_vision() -> list[Row]:
    """The image tower of CLIPModel, which is all of CLIPVisionModelWithProjection."""
    theirs = "vision_model"
    return [
        row("projection", "vision_projection", "visual_projection"),
        row("array", "vision/class_token", f"{theirs}.embeddings.class_embedding"),
        row("patches", "vision/patches", f"{theirs}.embeddings.patch_embedding"),
        row("array", "vision/positions", f"{theirs}.embeddings.position_embedding.weight"),
        row("norm", "vision/norm_in", f"{theirs}.pre_layrnorm"),  # spelled so
        row("norm", "vision/norm_out", f"{theirs}.post_layernorm"),
        *_huggingface_blocks("vision", theirs),
    ]


def huggingface_text() -> list[Row]:
    """The text tower of CLIPModel, which is all of CLIPTextModelWithProjection."""
    theirs = "text_model"
    return [
        row("projection", "text_projection", "text_projection"),
        row("embedding", "text/tokens", f"{theirs}.embeddings.token_embedding"),
        row("array", "text/positions", f"{theirs}.embeddings.position_embedding.weight"),
        row("norm", "text/norm_out", f"{theirs}.final_layer_norm"),
        *_huggingface_blocks("text", theirs),
    ]


def huggingface() -> list[Row]:
    """CLIPModel: both towers."""
    return [*huggingface_vision(), *huggingface_text(), row("array", "log_scale", "logit_scale")]


def _huggingface_blocks(ours: str, theirs: str) -> list[Row]:
    ours, theirs = f"{ours}/transformer/blocks", f"{theirs}.encoder.layers.{{i}}"
    return [
        row("norm", f"{ours}/norm_1", f"{theirs}.layer_norm1"),
        row("linear", f"{ours}/qkv", *(f"{theirs}.self_attn.{x}_proj" for x in "qkv")),
        row("output", f"{ours}/out", f"{theirs}.self_attn.out_proj"),
        row("norm", f"{ours}/norm_2", f"{theirs}.layer_norm2"),
        row("linear", f"{ours}/up", f"{theirs}.mlp.fc1"),
        row("linear", f"{ours}/down", f"{theirs}.mlp.fc2"),
    ]


def openai() -> list[Row]:
    """OpenAI's CLIP with a ViT, and OpenCLIP's models of the same form."""
    return [
        row("array", "log_scale", "logit_scale"),
        row("matrix", "vision_projection", "visual.proj"),
        row("matrix", "text_projection", "text_projection"),
        row("array", "vision/class_token", "visual.class_embedding"),
        row("patches", "vision/patches", "visual.conv1"),
        row("array", "vision/positions", "visual.positional_embedding"),
        row("norm", "vision/norm_in", "visual.ln_pre"),
        row("norm", "vision/norm_out", "visual.ln_post"),
        *_openai_blocks("vision", "visual.transformer"),
        row("embedding", "text/tokens", "token_embedding"),
        row("array", "text/positions", "positional_embedding"),
        row("norm", "text/norm_out", "ln_final"),
        *_openai_blocks("text", "transformer"),
    ]


def _openai_blocks(ours: str, theirs: str) -> list[Row]:
    ours, theirs = f"{ours}/transformer/blocks", f"{theirs}.resblocks.{{i}}"
    return [
        row("norm", f"{ours}/norm_1", f"{theirs}.ln_1"),
        row("packed", f"{ours}/qkv", f"{theirs}.attn.in_proj"),
        row("output", f"{ours}/out", f"{theirs}.attn.out_proj"),
        row("norm", f"{ours}/norm_2", f"{theirs}.ln_2"),
        row("linear", f"{ours}/up", f"{theirs}.mlp.c_fc"),
        row("linear", f"{ours}/down", f"{theirs}.mlp.c_proj"),
    ]
