"""What a public folder says besides its weights, as `transformers` reads it.

Settings with their legacy names and defaults, the tokenizer, how pictures are prepared. The library
is imported here alone, when such a folder is read or written; PyTorch need not be installed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from unclip_jax.data.tokenizer import FileTokenizer
from unclip_jax.errors import UserError, one_line, wrong
from unclip_jax.models import ClipConfig
from unclip_jax.weights.convert.folders import read_json

CONFIG_FILE = "config.json"
PIXELS_FILE = "preprocessor_config.json"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer_config.json")

# Their class for each model_type that we can be.
_CONFIGS = {
    "clip": "CLIPConfig",
    "clip_text_model": "CLIPTextConfig",
    "clip_vision_model": "CLIPVisionConfig",
    "t5": "T5Config",
    "mt5": "MT5Config",
}
_BICUBIC = 3


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


def read_pixels(folder: Path, image_size: int) -> dict[str, tuple[float, ...]]:
    """Mean and deviation of the pixels, as `CLIPImageProcessor` takes them from a folder.

    Without a preprocessor_config.json they are OpenAI's.

    Raises:
        UserError: the file cannot be read, or asks for another resize and crop than ours: the
            shorter side to `image_size`, bicubic, and the centre.
    """
    path = folder / PIXELS_FILE
    if not path.is_file():
        return {}
    module = library()
    # Newer releases call it so; their other one is for torchvision.
    kind = getattr(module, "CLIPImageProcessorPil", None) or module.CLIPImageProcessor
    settings = read_json(path)
    try:
        found = kind.from_dict(settings).to_dict()
    except Exception as error:
        raise UserError(f"{path}: transformers refuses it ({one_line(error)})") from error
    ours = {
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
    }
    for field, expected in ours.items():
        if (value := found.get(field)) != expected:
            raise wrong(f"{path}: {field}", value, repr(expected), ONLY)
    if abs((found.get("rescale_factor") or 0) - 1 / 255) > 1e-6:
        raise wrong(f"{path}: rescale_factor", found.get("rescale_factor"), "1/255")
    if not found.get("do_normalize"):
        return {"pixel_mean": (0.0,) * 3, "pixel_std": (1.0,) * 3}
    return channels(path, found.get("image_mean"), found.get("image_std"))


ONLY = (
    "pictures are resized here to the shorter side, bicubic, and cropped at the centre (set the"
    " field so if all of yours are square and of that size)"
)


def channels(path: Path, mean: Any, std: Any) -> dict[str, tuple[float, ...]]:
    """Mean and deviation of three channels, as fields of a `ClipConfig`.

    Raises:
        UserError: they are something else.
    """
    for field, values in (("mean", mean), ("std", std)):
        given = isinstance(values, list | tuple) and len(values) == 3
        if not given or not all(isinstance(value, int | float) for value in values):
            raise wrong(f"{path}: {field} of the pixels", values, "three numbers, one per channel")
    return {"pixel_mean": tuple(map(float, mean)), "pixel_std": tuple(map(float, std))}


def pixel_settings(config: ClipConfig) -> dict[str, Any]:
    """The preprocessor_config.json that `read_pixels` reads."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": config.image_size, "width": config.image_size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(config.pixel_mean),
        "image_std": list(config.pixel_std),
        "resample": _BICUBIC,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": config.image_size},
    }
