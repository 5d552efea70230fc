"""A CLIP trained here as a folder of transformers: CLIPModel and CLIPProcessor read it.

    model = transformers.CLIPModel.from_pretrained("clip-out")
    processor = transformers.CLIPProcessor.from_pretrained("clip-out")

Embeddings are ours to float precision, before they are given length one. So are token ids, but
where our `clean` changes a caption: CLIPTokenizer does not repair mis-decoded text, straighten
curly quotes, open ligatures and wide letters (all of them ftfy's) or undo HTML entities, and it
lowers letters one by one. Captions that went through `clean` first have our ids, with the three
exceptions that `unclip_jax.data.tokenizer` names. A CLIP that was converted keeps the tokenizer it
came with, and all ids.
"""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp

from unclip_jax.errors import UserError
from unclip_jax.models.clip import MAX_LOG_SCALE
from unclip_jax.weights.convert import clip_names, huggingface
from unclip_jax.weights.convert.tables import to_theirs
from unclip_jax.weights.export.folders import (
    new_folder,
    text_settings,
    vision_settings,
    write_json,
    write_tensors,
)
from unclip_jax.weights.trained import Part, tokenizer


def write(out: str | Path, part: Part) -> None:
    """Write a CLIP: config.json, model.safetensors, preprocessor_config.json, tokenizer files.

    Args:
        out: the folder to write, which must not exist.
        part: a CLIP with both towers.

    Raises:
        UserError: `out` exists or cannot be written, or a tower is missing.
    """
    config, network = part.stage.model, part.params["network"]
    if config.towers != "both":
        raise UserError(f"--model: its CLIP has the {config.towers} tower alone, expected both")
    # Theirs does not limit the temperature.
    network = network | {"log_scale": jnp.minimum(network["log_scale"], MAX_LOG_SCALE)}
    settings = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "text_config": text_settings(config),
        "vision_config": vision_settings(config),
    }
    pixels = huggingface.pixel_settings(config) | {"processor_class": "CLIPProcessor"}
    with new_folder(out) as folder:
        write_json(folder / huggingface.CONFIG_FILE, settings)
        write_json(folder / huggingface.PIXELS_FILE, pixels)
        tokenizer(part).save(folder)
        write_tensors(folder / "model.safetensors", to_theirs(clip_names.huggingface(), network))
