"""What every export needs: the stage that is asked for, and a new folder, whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from unclip_jax.common.files import making_folder
from unclip_jax.data.shards import storage
from unclip_jax.errors import UserError, wrong
from unclip_jax.models import ClipConfig
from unclip_jax.weights import folder as model_folder
from unclip_jax.weights.convert.tables import Tensors
from unclip_jax.weights.trained import (
    Part,
    find_parts,
    in_dtype,
    load_part,
    read_stage,
    stage_folder,
)


def check_out(out: Path) -> None:
    """Raise UserError where something stands in the way of the new folder."""
    if out.exists():
        raise UserError(f"--out {str(out)!r}: exists; choose a folder that does not")
    above = next(path for path in out.absolute().parents if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"--out {str(out)!r}: {above} is no folder that you may write to")


@contextlib.contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """Yield a temporary folder, which becomes `out` if the block succeeds.

    Raises:
        UserError: `out` exists, or cannot be written.
    """
    out = Path(os.path.abspath(out))
    check_out(out)
    try:
        with making_folder(out) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(f"--out {str(out)!r}: cannot be written ({error})") from error


def find(model: str | Path, kind: str, size: int | None = None, dtype: str = "") -> Part:
    """The one stage of a kind.

    Args:
        model: a model folder with a sub-folder for each stage, or the folder of one stage.
        kind: of the stage.
        size: of the images that an upsampler makes, where there are several.
        dtype: of weights and compute, as for `UnCLIP.load`.

    Raises:
        UserError: there is none, or there are several; or a size for what is no upsampler.
    """
    if size is not None and kind != "upsampler":
        raise UserError(f"--upsampler: got {size}, but a {kind} is asked for; leave it out")
    folder = stage_folder(model)
    single = (folder / model_folder.CONFIG_FILE).is_file()
    paths = [folder] if single else find_parts(storage.place(model, "model")).get(kind, [])
    sizes = {path: read_stage(path)[0].image_size for path in paths} if kind == "upsampler" else {}
    chosen = [path for path in paths if size in (None, sizes.get(path))]
    if len(chosen) != 1 and sizes:
        raise wrong("--upsampler", size, f"one of {', '.join(map(str, sorted(sizes.values())))}")
    if len(chosen) != 1:
        raise UserError(
            f"model {str(model)!r}: {len(paths)} of kind {kind}, expected one; give the"
            " folder of the stage itself, or of a model that has it"
        )
    part = load_part(chosen[0], kind, dtype)
    mark = {"fingerprint": model_folder.read_fingerprint(chosen[0])}
    stage = in_dtype(part.stage, dtype) if dtype else part.stage
    return Part(stage, part.params, mark | part.description)


def write_json(path: Path, settings: dict[str, Any]) -> None:
    """Write settings as the libraries of Hugging Face do; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: Tensors) -> None:
    """Write weights as PyTorch's libraries read them; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, np.ndarray] = {name: tensors.read(name) for name in tensors.shapes}
    model_folder.save_tensors(arrays, path, metadata={"format": "pt"})


# ---------------------------------------------------------------- transformers' settings of a CLIP


def text_settings(config: ClipConfig) -> dict[str, Any]:
    """config.json of transformers' text tower."""
    sizes = config.text_width, config.text_layers, config.text_heads, config.mlp_ratio
    return _tower("text", config, *sizes) | {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "bos_token_id": config.vocab_size - 2,
        "eos_token_id": config.end,
        "pad_token_id": 0,
    }


def vision_settings(config: ClipConfig) -> dict[str, Any]:
    """config.json of transformers' image tower."""
    sizes = config.vision_width, config.vision_layers, config.vision_heads
    return _tower("vision", config, *sizes, config.vision_mlp_ratio or config.mlp_ratio) | {
        "image_size": config.image_size,
        "patch_size": config.patch,
        "num_channels": 3,
    }


def _tower(
    name: str, config: ClipConfig, width: int, layers: int, heads: int, mlp_ratio: float
) -> dict[str, Any]:
    return {
        "model_type": f"clip_{name}_model",
        "hidden_size": width,
        "intermediate_size": int(width * mlp_ratio),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "projection_dim": config.embed_dim,
        "hidden_act": config.activation,
        "layer_norm_eps": 1e-5,
    }
