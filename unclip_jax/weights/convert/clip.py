"""CLIP as Hugging Face, OpenCLIP and OpenAI publish it, to our CLIP stage.

part = load("openai/clip-vit-large-patch14")          # a folder of transformers' CLIPModel
part = load("laion/CLIP-ViT-H-14")                    # a folder of OpenCLIP
part = load("ViT-L-14.pt")                            # OpenAI's own file
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from unclip_jax import stages
from unclip_jax.common.params import fingerprint
from unclip_jax.errors import UserError
from unclip_jax.models import ClipConfig
from unclip_jax.models.clip import MAX_LOG_SCALE
from unclip_jax.stages import ClipStage
from unclip_jax.weights.convert import clip_names
from unclip_jax.weights.convert.folders import read_json, weights_in
from unclip_jax.weights.convert.tables import Row, Tensors, to_ours
from unclip_jax.weights.convert.tensor_files import open_tensors
from unclip_jax.weights.trained import Part

OPENCLIP_CONFIG = "open_clip_config.json"
OPENCLIP_STEMS = ("open_clip_model", "open_clip_pytorch_model")
_OPENAI_HEAD = 64  # features of a head in every ViT that OpenAI published

# What some files keep besides the weights: constants that follow from the sizes.
_CONSTANTS = ("input_resolution", "context_length", "vocab_size", "position_ids", "attn_mask")


def load(source: str | Path, *, dtype: str = "", unit_embeddings: bool = True) -> Part:
    """Read a CLIP.

    Args:
        source: a folder of transformers' CLIPModel, CLIPTextModelWithProjection or
            CLIPVisionModelWithProjection, a folder of OpenCLIP, or OpenAI's file.
        dtype: of the weights; "" stands for the narrowest that holds all of theirs.
        unit_embeddings: whether z_i and z_t have length one, see `ClipStage`.

    Returns:
        a CLIP stage with params of NumPy arrays.

    Raises:
        UserError: not a CLIP that our networks can be, or a damaged file.
    """
    source = Path(source).expanduser()
    if source.is_dir() and (source / OPENCLIP_CONFIG).is_file():
        config = _openclip_config(read_json(source / OPENCLIP_CONFIG), str(source))
        weights = weights_in(source, OPENCLIP_STEMS)
    elif source.is_dir():
        return load_huggingface([source], dtype=dtype, unit_embeddings=unit_embeddings)
    else:
        config, weights = None, source
    with open_tensors(weights) as opened:
        tensors = Tensors(opened.shapes, opened.read, str(weights))
        if config is None:
            config = _openai_config(tensors)
        return _part(config, clip_names.openai(), tensors, dtype, unit_embeddings)


def load_huggingface(
    folders: Sequence[Path], *, dtype: str = "", unit_embeddings: bool = True
) -> Part:
    """Both towers from one folder, or one tower from each of two (Karlo for image variations).

    Towers that were cut apart have lost the temperature, which only training uses; it is then 100,
    where OpenAI's training ended.

    Raises:
        UserError: as for `load`, or two towers of different embedding sizes.
    """
    towers: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        tensors = Tensors({}, {}.__getitem__, "CLIP")
        for folder in folders:
            towers |= _towers(read_json(folder / "config.json"), str(folder / "config.json"))
            path = weights_in(folder)
            opened = stack.enter_context(open_tensors(path))
            found = Tensors(opened.shapes, opened.read, str(path))
            tensors = tensors.join(found, "") if tensors.shapes else found
        config = _huggingface_config(towers, tensors.origin)
        if config.towers == "both" and len(folders) > 1:
            scale = Tensors.of({"logit_scale": np.float32(MAX_LOG_SCALE)}, "no temperature")
            tensors = tensors.join(scale, "")
        table = {
            "both": clip_names.huggingface,
            "text": clip_names.huggingface_text,
            "image": clip_names.huggingface_vision,
        }[config.towers]()
        return _part(config, table, tensors, dtype, unit_embeddings)


def _part(
    config: ClipConfig, table: list[Row], tensors: Tensors, dtype: str, unit_embeddings: bool
) -> Part:
    """The stage, its params, and a description that names it by its fingerprint."""
    stage = ClipStage(model=config, unit_embeddings=unit_embeddings)
    target = jax.eval_shape(stage.init, jax.random.key(0))["network"]
    kept = tensors.select(lambda n: None if n.rsplit(".", 1)[-1] in _CONSTANTS else n)
    params = {"network": to_ours(table, kept, target, dtype)}
    description = {
        "stage": stages.describe(stage),
        "converted_from": tensors.origin,
        "fingerprint": fingerprint(params),
    }
    return Part(stage, params, description)


# ---------------------------------------------------------------- their settings


def _towers(settings: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """The settings of each tower in one config.json of transformers."""
    kind = settings.get("model_type", "")
    if kind == "clip":
        found = {}
        for tower, name in (("text", "text_config"), ("image", "vision_config")):
            part = settings.get(name) or settings.get(f"{name}_dict")
            if not isinstance(part, dict):
                raise UserError(f"{where}: no {name}; expected the config.json of a CLIPModel")
            found[tower] = _DEFAULTS[tower] | part
            found[tower]["projection_dim"] = settings.get("projection_dim", 512)
        return found
    for tower, name in (("text", "clip_text_model"), ("image", "clip_vision_model")):
        if kind == name:
            return {tower: _DEFAULTS[tower] | dict(settings)}
    raise UserError(
        f"{where}: model_type {kind!r}: expected clip, clip_text_model or clip_vision_model"
    )


# What transformers takes for fields that a config.json leaves out.
_DEFAULTS = {
    "text": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "projection_dim": 512,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    "image": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
        "num_channels": 3,
        "projection_dim": 512,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
}


def _huggingface_config(towers: Mapping[str, Mapping[str, Any]], where: str) -> ClipConfig:
    """Our config of what the towers' settings have in common and of what each has."""

    def same(field: str) -> Any:
        found = {tower: settings[field] for tower, settings in towers.items()}
        if len(set(found.values())) != 1:
            raise UserError(f"{where}: the towers differ in {field}: {found}; expected one value")
        return next(iter(found.values()))

    if same("layer_norm_eps") != 1e-5:
        raise UserError(f"{where}: layer_norm_eps {same('layer_norm_eps')!r}: expected 1e-05")
    ratios = {
        settings["intermediate_size"] / settings["hidden_size"] for settings in towers.values()
    }
    if len(ratios) != 1:
        raise UserError(
            f"{where}: intermediate_size / hidden_size is {sorted(ratios)}; expected the same ratio"
            " in both towers"
        )
    sizes: dict[str, Any] = {}
    if text := towers.get("text"):
        sizes |= {
            "text_width": text["hidden_size"],
            "text_layers": text["num_hidden_layers"],
            "text_heads": text["num_attention_heads"],
            "vocab_size": text["vocab_size"],
            "context_length": text["max_position_embeddings"],
        }
    if image := towers.get("image"):
        if image["num_channels"] != 3:
            raise UserError(f"{where}: num_channels {image['num_channels']!r}: expected 3")
        sizes |= {
            "image_size": image["image_size"],
            "patch": image["patch_size"],
            "vision_width": image["hidden_size"],
            "vision_layers": image["num_hidden_layers"],
            "vision_heads": image["num_attention_heads"],
        }
    return ClipConfig(
        **sizes,
        towers="both" if len(towers) == 2 else next(iter(towers)),
        embed_dim=same("projection_dim"),
        activation=same("hidden_act"),
        mlp_ratio=ratios.pop(),
    )


def _openclip_config(settings: Mapping[str, Any], where: str) -> ClipConfig:
    """Our config of an open_clip_config.json.

    Raises:
        UserError: a field is missing, or a tower is of another kind than a plain ViT or text
            Transformer.
    """
    model = settings.get("model_cfg")
    if not isinstance(model, dict):
        raise UserError(f"{where}: no model_cfg; expected OpenCLIP's {OPENCLIP_CONFIG}")
    image, text = dict(model.get("vision_cfg") or {}), dict(model.get("text_cfg") or {})
    known = {
        "vision_cfg": (image, {"image_size", "layers", "width", "head_width", "patch_size"}),
        "text_cfg": (text, {"context_length", "vocab_size", "width", "heads", "layers"}),
    }
    for name, (given, fields) in known.items():
        missing = sorted(fields - {"head_width"} - set(given))
        unknown = sorted(field for field in set(given) - fields if given[field])
        if missing or unknown:
            raise UserError(
                f"{where}: {name} lacks {missing} and has {unknown}, which unclip_jax does not"
                " know; expected a plain ViT with OpenAI's text Transformer"
            )
    return ClipConfig(
        image_size=image["image_size"],
        patch=image["patch_size"],
        vision_width=image["width"],
        vision_layers=image["layers"],
        vision_heads=image["width"] // image.get("head_width", _OPENAI_HEAD),
        text_width=text["width"],
        text_layers=text["layers"],
        text_heads=text["heads"],
        vocab_size=text["vocab_size"],
        context_length=text["context_length"],
        embed_dim=model["embed_dim"],
        activation="quick_gelu" if model.get("quick_gelu") else "gelu",
    )


def _openai_config(tensors: Tensors) -> ClipConfig:
    """Our config from the shapes in OpenAI's file: QuickGELU, and 64 features a head."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors.shapes:
            raise UserError(
                f"{tensors.origin}: no tensor {name!r}; expected OpenAI's CLIP with a ViT, or give"
                " the folder of a Hugging Face or OpenCLIP model, with its settings"
            )
        return tensors.shapes[name].shape

    def layers(prefix: str) -> int:
        end = ".ln_1.weight"
        return sum(n.startswith(f"{prefix}.resblocks.") and n.endswith(end) for n in tensors.shapes)

    vision_width, _, patch, _ = shape("visual.conv1.weight")
    text_width, embed_dim = shape("text_projection")
    return ClipConfig(
        image_size=patch * round((shape("visual.positional_embedding")[0] - 1) ** 0.5),
        patch=patch,
        vision_width=vision_width,
        vision_layers=layers("visual.transformer"),
        vision_heads=vision_width // _OPENAI_HEAD,
        text_width=text_width,
        text_layers=layers("transformer"),
        text_heads=text_width // _OPENAI_HEAD,
        vocab_size=shape("token_embedding.weight")[0],
        context_length=shape("positional_embedding")[0],
        embed_dim=embed_dim,
        activation="quick_gelu",
    )
