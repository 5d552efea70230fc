"""What public CLIPs say of themselves, as our `ClipConfig`.

By Hugging Face's config.json, OpenCLIP's open_clip_config.json, or the shapes in a file alone. Each
field that changes an embedding is honoured, or refused by its name where we compute something else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unclip_jax.common.checks import choice, count
from unclip_jax.data.images import INTERPOLATIONS, RESIZE_MODES
from unclip_jax.data.tokenizer import VOCAB_SIZE, FileTokenizer
from unclip_jax.errors import UserError, wrong
from unclip_jax.models import ClipConfig
from unclip_jax.weights.convert import huggingface
from unclip_jax.weights.convert.folders import read_json
from unclip_jax.weights.convert.tables import Tensors

OPENCLIP_FILE = "open_clip_config.json"
PIXEL_FILES = (huggingface.PIXELS_FILE, huggingface.PROCESSOR_FILE, OPENCLIP_FILE)

# Features of a head. All text towers have 64.
_HEAD = 64
_HEADS = {"ViT-B-32": 64, "ViT-B-16": 64, "ViT-L-14": 64, "ViT-L-14-336": 64, "ViT-H-14": 80}
_HEADS |= {"ViT-g-14": 88, "ViT-bigG-14": 104}
_WIDTHS = {768: 64, 1024: 64, 1280: 80, 1408: 88, 1664: 104, 1792: 112}  # of published towers
_QUICK = "-quickgelu"
# What a file may be said to be. OpenCLIP's have GELU, OpenAI's and those named so QuickGELU.
ARCHS = ("openai", *_HEADS, *(name + _QUICK for name in _HEADS))

# A constant that is in OpenAI's files alone.
OPENAI_MARK = "input_resolution"

# OpenCLIP's fields that we read, and its defaults.
_VISION = {"image_size": 224, "layers": 12, "width": 768, "patch_size": 16}
_VISION |= {"head_width": _HEAD, "mlp_ratio": 4.0}
_TEXT = {"context_length": 77, "vocab_size": VOCAB_SIZE, "width": 512, "heads": 8, "layers": 12}
_TEXT |= {"mlp_ratio": 4.0}
# Its other fields that may have a value: that of a plain ViT or OpenAI's text Transformer, ...
_PLAIN = {"pool_type": ("tok", "argmax"), "pos_embed_type": ("learnable",)}
_PLAIN |= {"proj_type": ("linear",)}
# ... or any, since only training or another kind of tower reads it.
_FREE = {"patch_dropout", "attn_pooler_queries", "attn_pooler_heads", "eos_id", "pad_id"}
_FREE |= {"hf_model_pretrained", "timm_pool", "timm_proj", "timm_drop", "timm_drop_path"}
_MODEL = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "cast_dtype"}
_MODEL |= {"init_logit_scale", "output_dict"}


# ---------------------------------------------------------------- Hugging Face


def towers(path: Path) -> dict[str, Any]:
    """The settings of each tower in one config.json, by our names of the towers."""
    kinds = {"clip": "both", "clip_text_model": "text", "clip_vision_model": "image"}
    found = huggingface.read_config(path, tuple(kinds))
    if kinds[found.model_type] != "both":
        return {kinds[found.model_type]: found}
    both = {"text": found.text_config, "image": found.vision_config}
    for settings in both.values():  # the towers' own are those of the towers cut apart
        settings.projection_dim = found.projection_dim
    return both


def of_towers(
    settings: Mapping[str, Any], pixels: Path, encoder: FileTokenizer | None, where: str
) -> ClipConfig:
    """Our config of what the towers' settings have in common and of what each has.

    Args:
        settings: as `towers` gives them.
        pixels: the folder that may say how pictures are prepared.
        encoder: the tokenizer that came along, if one did.
        where: the files, for messages.

    Raises:
        UserError: a field that our towers do not have, named.
    """

    def same(field: str) -> Any:
        found = {tower: getattr(about, field) for tower, about in settings.items()}
        if len(set(found.values())) != 1:
            raise UserError(f"{where}: the towers differ in {field}: {found}; expected one value")
        return next(iter(found.values()))

    if same("layer_norm_eps") != 1e-5:
        raise wrong(f"{where}: layer_norm_eps", same("layer_norm_eps"), "1e-05")
    sizes: dict[str, Any] = {}
    if image := settings.get("image"):
        if image.num_channels != 3:
            raise wrong(f"{where}: num_channels", image.num_channels, "3")
        sizes = _image_sizes(image.image_size, image.patch_size, where) | {
            "vision_width": image.hidden_size,
            "vision_layers": image.num_hidden_layers,
            "vision_heads": image.num_attention_heads,
            "mlp_ratio": ratio(image.intermediate_size, image.hidden_size),
        }
        found = huggingface.read_pixels(pixels, image.image_size)
        sizes |= found or openclip_pixels(pixels, image.image_size)
    if text := settings.get("text"):
        own = ratio(text.intermediate_size, text.hidden_size)
        sizes |= _ratios(own, sizes.get("mlp_ratio", own)) | {
            "text_width": text.hidden_size,
            "text_layers": text.num_hidden_layers,
            "text_heads": text.num_attention_heads,
            "vocab_size": text.vocab_size,
            "context_length": text.max_position_embeddings,
            "end_token": _end_token(text, encoder, where),
        }
    return ClipConfig(
        **sizes,
        towers="both" if len(settings) == 2 else next(iter(settings)),
        embed_dim=same("projection_dim"),
        activation=same("hidden_act"),
    )


def _image_sizes(image_size: Any, patch: Any, where: str) -> dict[str, int]:
    """Sides of the picture and of a patch, and what is left of the picture beside its patches."""
    image_size = count(f"{where}: image_size", image_size)
    patch = count(f"{where}: patch_size", patch)
    return {"image_size": image_size, "patch": patch, "margin": image_size % patch}


def ratio(hidden: int, width: int) -> float:
    """The `mlp_ratio` whose product with the width, cut to an integer, is `hidden`."""
    found = hidden / width
    return found if int(width * found) == hidden else math.nextafter(found, math.inf)


def _ratios(text: float, vision: float) -> dict[str, float]:
    return {"mlp_ratio": text, "vision_mlp_ratio": 0.0 if vision == text else vision}


def _end_token(text: Any, encoder: FileTokenizer | None, where: str) -> int:
    """The id at which z_t is read, as a `ClipConfig` has it.

    An `eos_token_id` of 2 is an old mistake; transformers then reads where the highest id is.
    """
    end, last = text.eos_token_id, text.vocab_size - 1
    if end == 2:
        end = encoder.end_token if encoder else last
        if encoder is not None and end < encoder.vocab_size - 1:
            raise UserError(
                f"{where}: eos_token_id is 2, by which z_t is read at a caption's highest id, but"
                f" its tokenizer has ids above the {end} that ends a text; write eos_token_id {end}"
                " in the config.json to read it there"
            )
    if not isinstance(end, int) or isinstance(end, bool) or not 0 <= end <= last:
        do = "write the id that ends a caption in the config.json"
        raise wrong(f"{where}: eos_token_id", end, f"one id below vocab_size = {last + 1}", do)
    if encoder is not None and encoder.end_token != end:
        what = f"eos_token_id is {end}, but its tokenizer ends a text with {encoder.end_token}"
        raise UserError(f"{where}: {what}; take both from one place")
    if encoder is not None and encoder.vocab_size > last + 1:
        what = f"vocab_size is {last + 1}, but its tokenizer has {encoder.vocab_size} ids"
        raise UserError(f"{where}: {what}; take both from one place")
    return -1 if end == last else end


# ---------------------------------------------------------------- OpenCLIP


def of_openclip(folder: Path) -> tuple[ClipConfig, bool]:
    """Our config of an open_clip_config.json, and whether the text tower's names are apart.

    Raises:
        UserError: a tower of another kind than a plain ViT or OpenAI's text Transformer, or
            pictures prepared as we don't; the field is named.
    """
    path = folder / OPENCLIP_FILE
    model = read_json(path).get("model_cfg")
    if not isinstance(model, dict):
        raise UserError(f"{path}: no model_cfg; expected OpenCLIP's {OPENCLIP_FILE}")
    _check_plain(f"{path}: model_cfg", model, _MODEL)
    image = _tower(path, "vision_cfg", model, _VISION)
    text = _tower(path, "text_cfg", model, _TEXT)
    sizes = _image_sizes(image["image_size"], image["patch_size"], f"{path}: vision_cfg")
    config = ClipConfig(
        **sizes,
        vision_width=image["width"],
        vision_layers=image["layers"],
        vision_heads=image["width"] // image["head_width"],
        text_width=text["width"],
        text_layers=text["layers"],
        text_heads=text["heads"],
        vocab_size=text["vocab_size"],
        context_length=text["context_length"],
        embed_dim=count(f"{path}: embed_dim", model.get("embed_dim")),
        activation="quick_gelu" if model.get("quick_gelu") else "gelu",
        **_ratios(float(text["mlp_ratio"]), float(image["mlp_ratio"])),
        **openclip_pixels(folder, image["image_size"]),
    )
    return config, bool(model.get("custom_text"))


def _tower(
    path: Path, name: str, model: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """A tower's settings that we read, where all others are as in a plain tower."""
    given = model.get(name)
    if not isinstance(given, dict):
        raise wrong(f"{path}: {name}", given, "the settings of a tower")
    if isinstance(given.get("layers"), list):
        raise wrong(f"{path}: {name}.layers", given["layers"], "a ViT's number; no ResNet")
    _check_plain(f"{path}: {name}", given, set(defaults))
    found = defaults | {f: v for f, v in given.items() if f in defaults and v is not None}
    for field, value in found.items():
        if field != "mlp_ratio":
            count(f"{path}: {name}.{field}", value)
    return found


def _check_plain(where: str, given: Mapping[str, Any], known: set[str]) -> None:
    """Raise UserError for a field beside the known ones that says anything."""
    for field, value in given.items():
        if field not in known | _FREE and value and value not in _PLAIN.get(field, ()):
            do = "only a plain ViT with OpenAI's text Transformer is read"
            raise wrong(f"{where}.{field}", value, "none", do)


def openclip_pixels(folder: Path, image_size: int) -> dict[str, Any]:
    """How OpenCLIP's preprocess_cfg says that pictures are prepared: fields of a `ClipConfig`.

    Mean and deviation that it leaves out are those of Hugging Face's processor in the folder.

    Raises:
        UserError: a field asks for what we don't do.
    """
    path = folder / OPENCLIP_FILE
    given = read_json(path).get("preprocess_cfg") if path.is_file() else None
    given = {field: value for field, value in (given or {}).items() if value is not None}
    where = f"{path}: preprocess_cfg"
    found: dict[str, Any] = {}
    if not {"mean", "std"} & set(given):
        found = huggingface.read_pixels(folder, image_size)
    size = given.get("size", image_size)
    if size not in (image_size, [image_size, image_size], [3, image_size, image_size]):
        raise wrong(f"{where}.size", size, f"vision_cfg.image_size = {image_size}")
    choice(f"{where}.mode", given.get("mode", "RGB"), ("RGB",))
    if "resize_mode" in given:
        found["resize_mode"] = choice(f"{where}.resize_mode", given["resize_mode"], RESIZE_MODES)
        found["resize_to"] = 0
    if "interpolation" in given:  # a random one is for training only
        asked = choice(
            f"{where}.interpolation", given["interpolation"], (*INTERPOLATIONS, "random")
        )
        found["interpolation"] = "bicubic" if asked == "random" else asked
    if "fill_color" in given:
        found["fill"] = count(f"{where}.fill_color", given["fill_color"], least=0)
    means = {field: given[field] for field in ("mean", "std") if field in given}
    return found | huggingface.channels(where, means)


# ---------------------------------------------------------------- a file alone


def of_shapes(tensors: Tensors, arch: str) -> ClipConfig:
    """Our config from the shapes in a file, and from what its architecture's name says.

    Raises:
        UserError: not a CLIP with a ViT, or a file that needs a name and got none, or another.
    """

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
    is_openai = OPENAI_MARK in tensors.shapes
    if not arch and not is_openai:
        raise UserError(
            f"{tensors.origin}: does not say its activation and heads; give the folder with its"
            f" config.json or {OPENCLIP_FILE}, or --arch, one of {', '.join(ARCHS)}"
        )
    quick = arch in ("", "openai") or arch.endswith(_QUICK)
    head = _HEADS.get(arch.removesuffix(_QUICK), _HEAD)
    if is_openai and not (quick and head == _HEAD):
        raise wrong("--arch", arch, "none, as this file is OpenAI's, which says what it is")
    if vision_width % head:
        raise wrong("--arch", arch, f"one with heads that divide the width {vision_width}")
    if not is_openai and _WIDTHS.get(vision_width, head) != head:
        fits = [name for name in _HEADS if _HEADS[name] == _WIDTHS[vision_width]]
        expected = f"one whose heads have the {_WIDTHS[vision_width]} features of ViTs as wide"
        do = f"give {' or '.join(fits)}" if fits else "give the folder with its settings"
        raise wrong("--arch", arch, f"{expected} as {vision_width}", do)
    text, vision = (
        ratio(shape(f"{tower}.resblocks.0.mlp.c_fc.weight")[0], width)
        for tower, width in (("transformer", text_width), ("visual.transformer", vision_width))
    )
    return ClipConfig(
        image_size=patch * round((shape("visual.positional_embedding")[0] - 1) ** 0.5),
        patch=patch,
        vision_width=vision_width,
        vision_layers=layers("visual.transformer"),
        vision_heads=vision_width // head,
        text_width=text_width,
        text_layers=layers("transformer"),
        text_heads=text_width // _HEAD,
        vocab_size=shape("token_embedding.weight")[0],
        context_length=shape("positional_embedding")[0],
        embed_dim=embed_dim,
        activation="quick_gelu" if quick else "gelu",
        **_ratios(text, vision),
    )
