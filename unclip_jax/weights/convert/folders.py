"""Folders as Hugging Face's libraries write them: settings in JSON beside one network's weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unclip_jax.errors import UserError

INDEX = "model_index.json"  # of a whole pipeline: the class of each network in it

# transformers' and diffusers' names for a network's weights, the best to read first.
STEMS = ("model", "diffusion_pytorch_model", "pytorch_model")
_ENDINGS = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".fp16.safetensors",
    ".fp16.bin",
)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: no such file, a damaged one, or one that holds no object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing; copy or download the whole folder again") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); download it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds a {type(found).__name__}, expected a network's settings")
    return found


def weights_in(folder: Path, stems: Sequence[str] = STEMS, needed: bool = True) -> Path | None:
    """The weight file, or the index of its shards, in a network's folder.

    Raises:
        UserError: there is none; where none is `needed`, None is returned instead.
    """
    names = [stem + ending for ending in _ENDINGS for stem in stems]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    if not needed:
        return None
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; copy or download the whole model again")
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
    expected = f"{names[0]}, {stems[-1]}.bin or the like"
    raise UserError(f"{folder}: no weights, found {found}; expected {expected}; download them")
