"""The components of diffusers' folders: networks with their settings, and CLIP's towers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from unclip_jax.weights import folder as model_folder
from unclip_jax.weights.convert import clip_names, huggingface, karlo_configs, karlo_names
from unclip_jax.weights.convert.tables import Tensors, to_theirs
from unclip_jax.weights.export.folders import (
    text_settings,
    vision_settings,
    write_json,
    write_tensors,
)
from unclip_jax.weights.trained import Part, load_part, tokenizer

NETWORK_FILE = "diffusion_pytorch_model.safetensors"
CLIP_FILE = "model.safetensors"
SCHEDULER_FILE = "scheduler_config.json"

Component = tuple[str, str, str]  # its name, the library and the class that read it


def stored(path: Path) -> Part:
    """The stage in a folder, its weights in the dtype that they are stored in."""
    return load_part(path, dtype=model_folder.read_dtype(path))


def network(
    out: Path, name: str, kind: str, settings: dict[str, Any], tensors: Tensors
) -> Component:
    """Write a network."""
    write_tensors(out / name / NETWORK_FILE, tensors)
    write_json(out / name / "config.json", {"_class_name": kind} | settings)
    return name, "diffusers", kind


def scheduler(out: Path, name: str, kind: str, settings: dict[str, Any]) -> Component:
    """Write a scheduler."""
    write_json(out / name / SCHEDULER_FILE, {"_class_name": kind} | settings)
    return name, "diffusers", kind


def unclip_scheduler(out: Path, name: str, part: Part) -> Component:
    """Write how a stage samples as an UnCLIPScheduler."""
    settings = karlo_configs.scheduler_settings(part.stage.diffusion, part.stage.sampling)
    return scheduler(out, name, "UnCLIPScheduler", settings)


def prior(out: Path, part: Part) -> Component:
    """Write a prior that reads CLIP's states, without its scheduler."""
    tree = {name: part.params[name] for name in ("network", "normalisation")}
    dtype = tree["network"]["query"].dtype
    narrow = {name: x.astype(dtype) for name, x in tree["normalisation"].items()}
    if all(map(jnp.array_equal, narrow.values(), tree["normalisation"].values())):
        tree["normalisation"] = narrow  # as it came; else it stays in float32
    settings = karlo_configs.prior_settings(part.stage.model)
    tensors = to_theirs(karlo_names.diffusers_prior(), tree)
    return network(out, "prior", "PriorTransformer", settings, tensors)


def clip(out: Path, part: Part, pixels: str) -> Iterator[Component]:
    """Write CLIP's towers, those that are there, its tokenizer, and how pictures are prepared.

    The last is a component named by `pixels`.
    """
    config, found = part.stage.model, part.params["network"]
    towers = (
        ("text", "text_encoder", clip_names.huggingface_text, text_settings),
        ("vision", "image_encoder", clip_names.huggingface_vision, vision_settings),
    )
    for tower, name, table, settings in towers:
        if tower not in found:
            continue
        tree = {key: found[key] for key in (tower, f"{tower}_projection")}
        write_tensors(out / name / CLIP_FILE, to_theirs(table(), tree))
        class_name = f"CLIP{tower.capitalize()}ModelWithProjection"
        about = {"architectures": [class_name]} | settings(config)
        write_json(out / name / huggingface.CONFIG_FILE, about)
        yield name, "transformers", class_name
    if "vision" in found:
        write_json(out / pixels / huggingface.PIXELS_FILE, huggingface.pixel_settings(config))
        yield pixels, "transformers", "CLIPImageProcessor"
    tokenizer(part).save(out / "tokenizer")
    yield "tokenizer", "transformers", "CLIPTokenizer"
