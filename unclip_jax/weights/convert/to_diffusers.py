"""A Karlo of ours back to diffusers' layout, so that what is fine-tuned here can go home.

The key maps are those of the way in, read the other way; the weights keep their values exactly.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from unclip_jax import stages
from unclip_jax.errors import UserError
from unclip_jax.models import ClipConfig
from unclip_jax.weights import folder as model_folder
from unclip_jax.weights.convert import clip_names, huggingface, karlo_configs, karlo_names
from unclip_jax.weights.convert.karlo import INDEX
from unclip_jax.weights.convert.tables import Tensors, to_theirs
from unclip_jax.weights.trained import Part, find_parts, load_part, read_stage, tokenizer

Settings = dict[str, Any]

NETWORK_FILE = "diffusion_pytorch_model.safetensors"
CLIP_FILE = "model.safetensors"


def diffusers(folder: str | Path, out: str | Path) -> Iterator[str]:
    """Write a model folder as diffusers' UnCLIPPipeline, or as the one for image variations.

    Args:
        folder: a model folder of Karlo's form: a prior and a decoder that read CLIP's states, and
            one upsampler with a second network for its last step. Without a prior, the pipeline
            for image variations is written.
        out: the folder to write, which must not exist.

    Yields:
        the name of each component after it is written.

    Raises:
        UserError: `out` exists, or the model is not of Karlo's form.
    """
    folder, out = Path(folder), Path(out)
    if out.exists():
        raise UserError(f"--out {str(out)!r}: exists; choose a folder that does not")
    found = find_parts(folder)
    for kind in ("clip", "decoder", "upsampler"):
        if len(found.get(kind, [])) != 1:
            raise UserError(
                f"model {str(folder)!r}: {len(found.get(kind, []))} of kind {kind}, expected one,"
                " for diffusers' layout holds a whole Karlo"
            )
    for kind in ("prior", "decoder", "upsampler"):
        for path in found.get(kind, []):
            _check_form(read_stage(path)[0], path)
    components: dict[str, list[str]] = {}

    def wrote(name: str, library: str, kind: str) -> str:
        components[name] = [library, kind]
        return name

    clip = load_part(found["clip"][0])
    yield from (wrote(*component) for component in _write_clip(clip, out))
    for kind in ("prior", "decoder", "upsampler"):
        for path in found.get(kind, []):
            part = load_part(path)
            write = {
                "prior": _write_prior,
                "decoder": _write_decoder,
                "upsampler": _write_upsampler,
            }
            yield from (wrote(*component) for component in write[kind](part, out))
    has_prior = "prior" in components
    kind = "UnCLIPPipeline" if has_prior else "UnCLIPImageVariationPipeline"
    if not has_prior and "image_encoder" not in components:
        raise UserError(
            f"model {str(folder)!r}: neither a prior nor an image tower in its CLIP; expected one"
        )
    if has_prior:  # that pipeline takes no image tower
        components = {k: v for k, v in components.items() if k not in _VARIATION_ONLY}
    _write_json(out / INDEX, {"_class_name": kind} | components)


_VARIATION_ONLY = ("image_encoder", "feature_extractor")

_Component = tuple[str, str, str]


def _check_form(stage: stages.Stage, path: Path) -> None:
    fits = getattr(stage, "empty_null", stage.last_steps == 1)
    if stage.unet:
        fits = fits and stage.unet.patch == 1 and not stage.unet.pixel_channels
    if not fits:
        raise UserError(
            f"{path}: a {stage.kind} of another form than Karlo's, which diffusers' layout cannot"
            " hold; expected one that was converted from Karlo"
        )


def _write_prior(part: Part, out: Path) -> Iterator[_Component]:
    tree = {name: part.params[name] for name in ("network", "normalisation")}
    settings = karlo_configs.prior_settings(part.stage.model)
    tensors = to_theirs(karlo_names.diffusers_prior(), tree)
    yield _network(out, "prior", "PriorTransformer", settings, tensors)
    yield _scheduler(out, "prior_scheduler", part)


def _write_decoder(part: Part, out: Path) -> Iterator[_Component]:
    model = part.stage.model
    tensors = to_theirs(karlo_names.diffusers_decoder(model), part.params["network"])
    unet = tensors.select(lambda n: None if n.startswith("text_proj.") else n)
    text_proj = _within(tensors, "text_proj.")
    settings = karlo_configs.decoder_settings(model.unet)
    yield _network(out, "decoder", "UNet2DConditionModel", settings, unet)
    settings = karlo_configs.text_proj_settings(model)
    _network(out, "text_proj", "UnCLIPTextProjModel", settings, text_proj)
    yield "text_proj", "unclip", "UnCLIPTextProjModel"
    yield _scheduler(out, "decoder_scheduler", part)


def _write_upsampler(part: Part, out: Path) -> Iterator[_Component]:
    model = part.stage.model
    tree = {name: part.params[name] for name in ("network", "last_network")}
    tensors = to_theirs(karlo_names.diffusers_super_res(model), tree)
    settings = karlo_configs.super_res_settings(model)
    for place in ("first", "last"):
        one = _within(tensors, f"{place}.")
        yield _network(out, f"super_res_{place}", "UNet2DModel", settings, one)
    yield _scheduler(out, "super_res_scheduler", part)


def _write_clip(part: Part, out: Path) -> Iterator[_Component]:
    config, network = part.stage.model, part.params["network"]
    for name, kind, table, settings in (
        ("text_encoder", "Text", clip_names.huggingface_text, text_settings),
        ("image_encoder", "Vision", clip_names.huggingface_vision, _vision_settings),
    ):
        ours = {"Text": "text", "Vision": "vision"}[kind]
        if ours not in network:
            continue
        tree = {key: network[key] for key in (ours, f"{ours}_projection")}
        _write(out / name, CLIP_FILE, to_theirs(table(), tree))
        class_name = f"CLIP{kind}ModelWithProjection"
        about = {"architectures": [class_name], "model_type": f"clip_{kind.lower()}_model"}
        _write_json(out / name / "config.json", about | settings(config))
        yield name, "transformers", class_name
    if "vision" in network:
        _write_json(
            out / "feature_extractor" / "preprocessor_config.json",
            huggingface.pixel_settings(config),
        )
        yield "feature_extractor", "transformers", "CLIPImageProcessor"
    tokenizer(part).save(out / "tokenizer")
    yield "tokenizer", "transformers", "CLIPTokenizer"


def _shared(config: ClipConfig, width: int, layers: int, heads: int, ratio: float) -> Settings:
    return {
        "hidden_size": width,
        "intermediate_size": int(width * ratio),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "projection_dim": config.embed_dim,
        "hidden_act": config.activation,
        "layer_norm_eps": 1e-5,
    }


def text_settings(config: ClipConfig) -> Settings:
    """config.json of transformers' text tower."""
    sizes = config.text_width, config.text_layers, config.text_heads, config.mlp_ratio
    shared = _shared(config, *sizes)
    return shared | {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "bos_token_id": config.vocab_size - 2,
        "eos_token_id": config.end,
        "pad_token_id": 0,
    }


def _vision_settings(config: ClipConfig) -> Settings:
    ratio = config.vision_mlp_ratio or config.mlp_ratio
    shared = _shared(config, config.vision_width, config.vision_layers, config.vision_heads, ratio)
    return shared | {
        "image_size": config.image_size,
        "patch_size": config.patch,
        "num_channels": 3,
    }


def _network(out: Path, name: str, kind: str, settings: Settings, tensors: Tensors) -> _Component:
    _write(out / name, NETWORK_FILE, tensors)
    _write_json(out / name / "config.json", {"_class_name": kind} | settings)
    return name, "diffusers", kind


def _scheduler(out: Path, name: str, part: Part) -> _Component:
    settings = karlo_configs.scheduler_settings(part.stage.diffusion, part.stage.sampling)
    about = {"_class_name": "UnCLIPScheduler"}
    _write_json(out / name / "scheduler_config.json", about | settings)
    return name, "diffusers", "UnCLIPScheduler"


def _within(tensors: Tensors, prefix: str) -> Tensors:
    return tensors.select(lambda n: n[len(prefix) :] if n.startswith(prefix) else None)


def _write(folder: Path, name: str, tensors: Tensors) -> None:
    folder.mkdir(parents=True)
    arrays: dict[str, np.ndarray] = {key: tensors.read(key) for key in tensors.shapes}
    model_folder.save_tensors(arrays, folder / name, metadata={"format": "pt"})


def _write_json(path: Path, settings: Settings) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
