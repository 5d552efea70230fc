"""What a public folder says besides its weights, as `transformers` reads it.

Settings with their legacy names and defaults, the tokenizer, how pictures are prepared. The library
is imported here alone, when such a folder is read or written; PyTorch need not be installed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unclip_jax.common.checks import choice
from unclip_jax.data.tokenizer import FileTokenizer
from unclip_jax.errors import UserError, one_line, wrong
from unclip_jax.models import ClipConfig
from unclip_jax.weights.convert.folders import read_json

CONFIG_FILE = "config.json"
PIXELS_FILE, PROCESSOR_FILE = "preprocessor_config.json", "processor_config.json"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer_config.json")

# Their class for each model_type that we can be.
_CONFIGS = {
    "clip": "CLIPConfig",
    "clip_text_model": "CLIPTextConfig",
    "clip_vision_model": "CLIPVisionConfig",
    "t5": "T5Config",
    "mt5": "MT5Config",
}
# Image processors that resize, crop at the centre and normalise, each with its own defaults.
_PROCESSORS = ("CLIPImageProcessor", "ViTImageProcessor", "SiglipImageProcessor")
_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def library() -> Any:
    """The module `transformers`."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is not there
    import transformers

    return transformers


def read_config(path: Path, kinds: tuple[str, ...]) -> Any:
    """A config.json as a config of `transformers`, of one of these kinds.

    Raises:
        UserError: no such file, a damaged one, or the settings of another network.
    """
    settings = read_json(path)
    kind = settings.get("model_type")
    if kind not in kinds:
        raise wrong(f"{path}: model_type", kind, " or ".join(kinds), "give the folder of such one")
    for field in ("auto_map", "quantization_config"):  # code of its own; weights in another form
        if settings.get(field):
            raise wrong(f"{path}: {field}", settings[field], "none", "get the plain model")
    try:
        return getattr(library(), _CONFIGS[kind]).from_dict(settings)
    except Exception as error:  # whatever its checks raise
        raise UserError(f"{path}: transformers refuses it ({one_line(error)})") from error


def read_tokenizer(folder: Path, context_length: int) -> FileTokenizer | None:
    """The tokenizer in a folder, as `AutoTokenizer` gives it; None where there is none.

    Raises:
        UserError: it cannot be read, or lacks a token that ends a text.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        found = library().AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        model = found.backend_tokenizer
    except Exception as error:  # whatever its readers raise
        raise UserError(
            f"{folder}: its tokenizer cannot be read ({one_line(error)}); copy its files again"
        ) from error
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    special = {name: str(token) for name in names if (token := getattr(found, name)) is not None}
    for name in ("eos_token", "pad_token"):
        if model.token_to_id(special.get(name, "")) is None:
            raise UserError(f"{folder}: its tokenizer has no {name}; give the folder of a CLIP")
    return FileTokenizer(model, context_length, special)


def read_pixels(folder: Path, image_size: int) -> dict[str, Any]:
    """How pictures are prepared, as the image processor in a folder does it.

    Args:
        folder: of preprocessor_config.json, or of the processor_config.json that newer releases
            write, which counts before it.
        image_size: of the network.

    Returns:
        fields of a `ClipConfig`; none where the folder says nothing.

    Raises:
        UserError: the file cannot be read, is of a processor that we don't know, or asks for what
            we don't do.
    """
    path, settings = folder / PROCESSOR_FILE, None
    if path.is_file():
        settings = read_json(path).get("image_processor")
    if settings is None:
        path = folder / PIXELS_FILE
        if not path.is_file():
            return {}
        settings = read_json(path)
    kind = settings.get("image_processor_type") or settings.get("feature_extractor_type")
    kind = str(kind or _PROCESSORS[0]).replace("FeatureExtractor", "ImageProcessor")
    kind = choice(f"{path}: image_processor_type", re.sub("(Fast|Pil)$", "", kind), _PROCESSORS)
    module = library()
    # Newer releases call those of Pillow so; their others are for torchvision.
    reader = getattr(module, f"{kind}Pil", None) or getattr(module, kind)
    try:
        found = reader.from_dict(settings).to_dict()
    except Exception as error:
        raise UserError(f"{path}: transformers refuses it ({one_line(error)})") from error
    crops = bool(found.get("do_center_crop"))
    expected = {"do_resize": True, "do_rescale": True}
    if crops:
        expected["crop_size"] = {"height": image_size, "width": image_size}
    for field, value in expected.items():
        if found.get(field) != value:
            raise wrong(f"{path}: {field}", found.get(field), repr(value))
    if found.get("do_pad"):
        raise wrong(f"{path}: do_pad", True, "none")
    if abs((found.get("rescale_factor") or 0) - 1 / 255) > 1e-6:
        raise wrong(f"{path}: rescale_factor", found.get("rescale_factor"), "1/255")
    choice(f"{path}: resample", found.get("resample"), _RESAMPLE)
    size = {name: side for name, side in dict(found.get("size") or {}).items() if side}
    mode, side = "squash" if "height" in size else "shortest", max(size.values(), default=0)
    fits = side == image_size or (crops and side > image_size)
    forms = {"shortest_edge": side}, {"height": side, "width": side}
    if size not in forms or not fits or not (crops or mode == "squash"):
        raise wrong(
            f"{path}: size",
            size,
            f"one from which a square of image_size = {image_size} follows: a shorter side of that"
            " or more with do_center_crop, or both sides",
        )
    fields = {"resize_mode": mode, "interpolation": _RESAMPLE[found["resample"]]}
    fields["resize_to"] = 0 if side == image_size else side
    if not found.get("do_normalize"):
        return fields | {"pixel_mean": (0.0,) * 3, "pixel_std": (1.0,) * 3}
    given = {"mean": found.get("image_mean"), "std": found.get("image_std")}
    return fields | channels(str(path), given)


def channels(where: str, given: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """The `mean` and `std` that are given for three channels, as fields of a `ClipConfig`.

    Raises:
        UserError: they are something else.
    """
    for field, values in given.items():
        three = isinstance(values, list | tuple) and len(values) == 3
        if not three or not all(isinstance(value, int | float) for value in values):
            raise wrong(f"{where}: {field} of the pixels", values, "three numbers, one per channel")
    return {f"pixel_{field}": tuple(map(float, values)) for field, values in given.items()}


def pixel_settings(config: ClipConfig) -> dict[str, Any]:
    """The preprocessor_config.json that `read_pixels` reads.

    Raises:
        UserError: pictures are prepared as no processor of a CLIP does it.
    """
    side = config.resize_to or config.image_size
    sizes = {"shortest": {"shortest_edge": side}, "squash": {"height": side, "width": side}}
    choice("ClipConfig.resize_mode", config.resize_mode, sizes)
    return {
        "image_processor_type": _PROCESSORS[0],
        "crop_size": {"height": config.image_size, "width": config.image_size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(config.pixel_mean),
        "image_std": list(config.pixel_std),
        "resample": next(n for n, name in _RESAMPLE.items() if name == config.interpolation),
        "rescale_factor": 1 / 255,
        "size": sizes[config.resize_mode],
    }
