"""A Karlo of ours back to diffusers' layout, so that what is fine-tuned here can go home.

The key maps are those of the way in, read the other way; the weights keep their values exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unclip_jax import stages
from unclip_jax.errors import UserError
from unclip_jax.weights.convert import clip_names, huggingface, karlo_configs, karlo_names
from unclip_jax.weights.convert.karlo import INDEX
from unclip_jax.weights.convert.tables import Tensors, to_theirs
from unclip_jax.weights.export.folders import (
    check_out,
    new_folder,
    text_settings,
    vision_settings,
    write_json,
    write_tensors,
)
from unclip_jax.weights.trained import Part, find_parts, load_part, read_stage, tokenizer

NETWORK_FILE = "diffusion_pytorch_model.safetensors"
CLIP_FILE = "model.safetensors"


def write(model: str | Path, out: str | Path) -> Iterator[str]:
    """Write a model folder as diffusers' UnCLIPPipeline, or as the one for image variations.

    Args:
        model: a model folder of Karlo's form: a prior and a decoder that read CLIP's states, and
            one upsampler with a second network for its last step. Without a prior, the pipeline
            for image variations is written.
        out: the folder to write, which must not exist.

    Yields:
        the name of each component after it is written; `out` is there when all are.

    Raises:
        UserError: `out` exists, or the model is not of Karlo's form.
    """
    check_out(Path(out))
    found = find_parts(Path(model))
    for kind in ("clip", "decoder", "upsampler"):
        if len(found.get(kind, [])) != 1:
            number = f"{len(found.get(kind, []))} of kind {kind}, expected one"
            raise UserError(
                f"model {str(model)!r}: {number}, for diffusers' layout holds a whole Karlo"
            )
    for kind in ("prior", "decoder", "upsampler"):
        for path in found.get(kind, []):
            _check_form(read_stage(path)[0], path)
    kinds = {
        "clip": _write_clip,
        "prior": _write_prior,
        "decoder": _write_decoder,
        "upsampler": _write_upsampler,
    }
    components: dict[str, list[str]] = {}
    with new_folder(out) as folder:
        for kind, write_kind in kinds.items():
            for path in found.get(kind, []):
                for name, library, class_name in write_kind(load_part(path), folder):
                    components[name] = [library, class_name]
                    yield name
        has_prior = "prior" in components
        kind = "UnCLIPPipeline" if has_prior else "UnCLIPImageVariationPipeline"
        if not has_prior and "image_encoder" not in components:
            what = "neither a prior nor an image tower in its CLIP"
            raise UserError(f"model {str(model)!r}: {what}; expected one")
        if has_prior:  # that pipeline takes no image tower
            components = {k: v for k, v in components.items() if k not in _VARIATION_ONLY}
        write_json(folder / INDEX, {"_class_name": kind} | components)


_VARIATION_ONLY = ("image_encoder", "feature_extractor")

_Component = tuple[str, str, str]


def _check_form(stage: stages.Stage, path: Path) -> None:
    fits = getattr(stage, "empty_null", stage.last_steps == 1)
    if stage.unet:
        fits = fits and stage.unet.patch == 1 and not (stage.unet.pixel_channels or stage.canvas)
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
    text_proj = tensors.within("text_proj.")
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
        one = tensors.within(f"{place}.")
        yield _network(out, f"super_res_{place}", "UNet2DModel", settings, one)
    yield _scheduler(out, "super_res_scheduler", part)


def _write_clip(part: Part, out: Path) -> Iterator[_Component]:
    config, network = part.stage.model, part.params["network"]
    towers = (
        ("text", "text_encoder", clip_names.huggingface_text, text_settings),
        ("vision", "image_encoder", clip_names.huggingface_vision, vision_settings),
    )
    for tower, name, table, settings in towers:
        if tower not in network:
            continue
        tree = {key: network[key] for key in (tower, f"{tower}_projection")}
        write_tensors(out / name / CLIP_FILE, to_theirs(table(), tree))
        class_name = f"CLIP{tower.capitalize()}ModelWithProjection"
        about = {"architectures": [class_name]} | settings(config)
        write_json(out / name / huggingface.CONFIG_FILE, about)
        yield name, "transformers", class_name
    if "vision" in network:
        pixels = out / "feature_extractor" / huggingface.PIXELS_FILE
        write_json(pixels, huggingface.pixel_settings(config))
        yield "feature_extractor", "transformers", "CLIPImageProcessor"
    tokenizer(part).save(out / "tokenizer")
    yield "tokenizer", "transformers", "CLIPTokenizer"


def _network(
    out: Path, name: str, kind: str, settings: dict[str, Any], tensors: Tensors
) -> _Component:
    write_tensors(out / name / NETWORK_FILE, tensors)
    write_json(out / name / "config.json", {"_class_name": kind} | settings)
    return name, "diffusers", kind


def _scheduler(out: Path, name: str, part: Part) -> _Component:
    settings = karlo_configs.scheduler_settings(part.stage.diffusion, part.stage.sampling)
    about = {"_class_name": "UnCLIPScheduler"}
    write_json(out / name / "scheduler_config.json", about | settings)
    return name, "diffusers", "UnCLIPScheduler"
