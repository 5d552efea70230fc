"""Karlo-v1-alpha as it is published, to the stages of our pipeline.

Its files come in two layouts: diffusers' (one folder per network, in a text-to-image and in an
image-variation repository) and the original one (three checkpoints, a statistics file, OpenAI's
CLIP). Several folders may be given together, for one repository has what the other lacks.

How Karlo samples is part of what is read: the schedules, variances and clipping from diffusers'
scheduler_config.json, or as in the original program, and the steps and guidance of the published
pipelines.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from unclip_jax.common.checks import choice
from unclip_jax.diffusion.gaussian import Diffusion
from unclip_jax.diffusion.samplers import Sampling
from unclip_jax.errors import UserError
from unclip_jax.models import presets
from unclip_jax.stages import DecoderStage, PriorStage, UpsamplerStage
from unclip_jax.weights.clip_text import ClipText
from unclip_jax.weights.convert import clip, karlo_configs, karlo_names, parts
from unclip_jax.weights.convert.folders import INDEX, read_json, weights_in
from unclip_jax.weights.convert.tables import under
from unclip_jax.weights.convert.tensor_files import open_tensors
from unclip_jax.weights.trained import Part

PRIOR_STEPS, DECODER_STEPS, SUPER_RES_STEPS = "25", "25", "7"
_PRIOR = {"draws": 1, "unit_embeddings": False, "guidance_scale": 4.0, "empty_null": True}
_DECODER = {"guidance_scale": 8.0, "empty_null": True}

# What each of the original files is called, and a tensor that no other of them has.
ORIGINAL = {
    "prior": ("prior-ckpt-step=*.ckpt", "state_dict.model.prd_emb"),
    "decoder": ("decoder-ckpt-step=*.ckpt", "state_dict.model.cf_param"),
    "super-resolution": (
        "improved-sr-ckpt-step=*.ckpt",
        "state_dict.model_last_step.time_embed.0.weight",
    ),
    "statistics": ("ViT-L-14_stats.th", "1"),
    "clip": ("ViT-L-14.pt", "text_projection"),
}


def is_karlo(folder: Path) -> bool:
    """Whether a folder looks like Karlo's, in either layout."""
    return (folder / INDEX).is_file() or _is_original(folder)


def _is_original(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern, _ in ORIGINAL.values())


def _is_diffusers(folder: Path) -> bool:
    """Whether a folder is in diffusers' layout: it has an index, and not the other's weights."""
    has_weights = weights_in(folder / "decoder", needed=False) or not _is_original(folder)
    return (folder / INDEX).is_file() and bool(has_weights)


def _named(folders: Sequence[Path]) -> str:
    return ", ".join(map(str, folders))


def load(
    folders: Sequence[str | Path], dtype: str = "", mesh: Mesh | None = None
) -> dict[str, Any]:
    """Karlo in memory, as the fields of `UnCLIP`.

    Args:
        folders: as for `read`.
        dtype: as for `read`.
        mesh: devices that the weights go to, see `sharding.tree_shardings`; else the default one.

    Raises:
        UserError: as for `read`; or the mesh does not divide the weights.
    """
    return parts.of_unclip(read(folders, dtype), mesh)


def read(folders: Sequence[str | Path], dtype: str = "") -> Iterator[tuple[str, Part]]:
    """Read Karlo, one part after the other, so that no two need be in memory.

    Args:
        folders: one or more, whose files are taken together; of two that hold the same network,
            the first counts.
        dtype: of the weights; "" stands for the narrowest that holds all of a network's own.

    Yields:
        "clip", "prior" (where there is one), "decoder" and "upsampler_256", with params of NumPy
        arrays.

    Raises:
        UserError: a folder is not Karlo's, a network is missing, or its tensors are missing,
            unexpected or misshapen, or its settings are none that our networks have.
    """
    paths = [Path(folder).expanduser() for folder in folders]
    for path in paths:
        if not path.is_dir():
            raise UserError(f"Karlo {str(path)!r}: no such folder; give the folder of its files")
        if not is_karlo(path):
            raise UserError(
                f"Karlo {str(path)!r}: neither {INDEX} of diffusers nor the original files"
                f" ({', '.join(pattern for pattern, _ in ORIGINAL.values())}) in it"
            )
    in_diffusers = [_is_diffusers(path) for path in paths]
    if any(in_diffusers) and not all(in_diffusers):
        found = "some are in diffusers' layout and some in the original one"
        raise UserError(f"Karlo {_named(paths)}: {found}; give folders of one layout")
    networks = (_read_diffusers if all(in_diffusers) else _read_original)(paths, dtype)
    whole = next(networks)
    yield "clip", whole
    text, mark = ClipText.of(whole), whole.description["fingerprint"]
    del whole
    # CLIP's encoding of the empty caption, which Karlo's guidance leads away from.
    empty = {"null_caption": jax.tree.map(np.asarray, text.empty_caption())}
    of_clip = empty, {"clip_fingerprint": mark}
    for stage, table, files in networks:
        if stage.kind == "upsampler":
            yield f"upsampler_{stage.image_size}", parts.part(stage, table, files, dtype)
            continue
        if stage.kind == "decoder":
            stage = dataclasses.replace(stage, states_length=text.stage.context[0])
        yield stage.kind, parts.part(stage, table, files, dtype, *of_clip)


# ---------------------------------------------------------------- diffusers' layout

# The class of each component that a config of its own does not name.
_COMPONENTS = {
    "text_encoder": "CLIPTextModelWithProjection",
    "image_encoder": "CLIPVisionModelWithProjection",
    "prior": "PriorTransformer",
    "decoder": "UNet2DConditionModel",
    "text_proj": "UnCLIPTextProjModel",
    "super_res_first": "UNet2DModel",
    "super_res_last": "UNet2DModel",
    "prior_scheduler": "UnCLIPScheduler",
    "decoder_scheduler": "UnCLIPScheduler",
    "super_res_scheduler": "UnCLIPScheduler",
}


def _read_diffusers(folders: list[Path], dtype: str) -> Iterator[Any]:
    """CLIP; then the stage, the table and the files of each network, by the prefixes of names."""
    for folder in folders:
        index = read_json(folder / INDEX)
        kinds = "UnCLIPPipeline", "UnCLIPImageVariationPipeline"
        choice(f"{folder / INDEX}: _class_name", index.get("_class_name"), kinds)
        for name, kind in _COMPONENTS.items():
            found = index.get(name) or (None, kind)
            choice(f"{folder / INDEX}: {name}", found[-1] or kind, (kind,))

    def find(name: str, needed: bool = True) -> Path | None:
        for folder in folders:
            if (folder / name).is_dir():
                return folder / name
        if needed:
            do = "download the whole repository again"
            raise UserError(f"Karlo {_named(folders)}: no folder {name!r}; {do}")
        return None

    def scheduler(name: str, steps: str) -> tuple[Diffusion, Sampling]:
        path = find(name) / "scheduler_config.json"
        diffusion, sampling = karlo_configs.read_scheduler(read_json(path), steps, str(path))
        if name == "prior_scheduler":  # as that network has no second output
            choice(f"{path}: variance_type", diffusion.variance, ("fixed_small_log",))
        return diffusion, sampling

    towers = [find("text_encoder"), find("image_encoder", needed=False)]
    yield clip.load_huggingface(
        [t for t in towers if t],
        tokenizer=find("tokenizer"),
        pixels=find("feature_extractor", needed=towers[1] is not None),
        dtype=dtype,
        unit_embeddings=False,
    )

    def config(folder: Path) -> tuple[dict[str, Any], str]:
        return read_json(folder / "config.json"), str(folder / "config.json")

    folder = find("prior", needed=False)
    if folder is not None:
        model = karlo_configs.read_prior(*config(folder))
        stage = PriorStage(model, *scheduler("prior_scheduler", PRIOR_STEPS), **_PRIOR)
        yield stage, karlo_names.diffusers_prior(), {"": weights_in(folder)}
    unet, text_proj = find("decoder"), find("text_proj")
    given, where = config(unet)
    model = karlo_configs.read_decoder(given, config(text_proj)[0], where)
    stage = DecoderStage(model, *scheduler("decoder_scheduler", DECODER_STEPS), **_DECODER)
    files = {"": weights_in(unet), "text_proj.": weights_in(text_proj)}
    yield stage, under("network", karlo_names.diffusers_decoder(model)), files
    first, last = find("super_res_first"), find("super_res_last")
    models = [karlo_configs.read_super_res(*config(folder)) for folder in (first, last)]
    if models[0] != models[1]:
        raise UserError(f"{first} and {last}: their config.json differ; expected equal networks")
    sampled = scheduler("super_res_scheduler", SUPER_RES_STEPS)
    stage = UpsamplerStage(models[0], stage.image_size, *sampled, last_steps=1)
    files = {"first.": weights_in(first), "last.": weights_in(last)}
    yield stage, karlo_names.diffusers_super_res(models[0]), files


# ---------------------------------------------------------------- the original layout


def _read_original(folders: list[Path], dtype: str) -> Iterator[Any]:
    """As the original program: networks of one size, x_0 of the prior clipped at 10."""
    files = {kind: _original_file(folders, kind) for kind in ORIGINAL}
    yield clip.load(files["clip"], dtype=dtype, unit_embeddings=False, arch="openai")
    cosine = Diffusion(schedule="cosine", variance="fixed_small_log")
    sampling = Sampling(method="ddpm", spacing=PRIOR_STEPS, clip_x_0=10.0)
    x_0 = dataclasses.replace(cosine, prediction="x_0")
    stage = PriorStage(presets.KARLO_PRIOR, x_0, sampling, **_PRIOR)
    both = {"": files["prior"], "stats.": files["statistics"]}
    yield stage, karlo_names.original_prior(), both
    model = presets.KARLO_DECODER
    learned = dataclasses.replace(cosine, variance="learned_range", loss="hybrid")
    sampling = Sampling(method="ddpm", spacing=DECODER_STEPS, clip_x_0=1.0)
    stage = DecoderStage(model, learned, sampling, **_DECODER)
    table = under("network", karlo_names.original_decoder(model))
    yield stage, table, {"": files["decoder"]}
    model = presets.KARLO_SUPER_RES
    sampling = dataclasses.replace(sampling, spacing=SUPER_RES_STEPS)
    stage = UpsamplerStage(model, stage.image_size, cosine, sampling, last_steps=1)
    yield stage, karlo_names.original_super_res(model), {"": files["super-resolution"]}


def _original_file(folders: list[Path], kind: str) -> Path:
    """The one file of a kind, known by its name, and by a tensor that only it has."""
    pattern, mark = ORIGINAL[kind]
    found = [path for folder in folders for path in sorted(folder.glob(pattern))]
    if not found:
        raise UserError(f"Karlo {_named(folders)}: no {pattern}, the {kind}; download it")
    with open_tensors(found[0]) as source:
        if mark in source.shapes:
            return found[0]
        held = [other for other, (_, tensor) in ORIGINAL.items() if tensor in source.shapes]
    raise UserError(
        f"{found[0]}: holds {held[0] if held else 'something else'}, expected Karlo's {kind};"
        " give each file the name it was published under"
    )
