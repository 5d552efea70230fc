"""Karlo-v1-alpha as it is published, to the stages of our pipeline.

Its files come in two layouts: diffusers' (one folder per network, in a text-to-image and in an
image-variation repository) and the original one (three checkpoints, a statistics file, OpenAI's
CLIP). Several folders may be given together, for one repository has what the other lacks.

How Karlo samples is part of what is read: the schedules, variances and clipping from diffusers'
scheduler_config.json, or as in the original program, and the steps and guidance of the published
pipelines.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from unclip_jax import stages
from unclip_jax.common.checks import choice
from unclip_jax.diffusion.gaussian import Diffusion
from unclip_jax.diffusion.samplers import Sampling
from unclip_jax.errors import UserError
from unclip_jax.models import presets
from unclip_jax.parallel import sharding
from unclip_jax.parallel.cpu import memory as host_memory
from unclip_jax.stages import DecoderStage, PriorStage, UpsamplerStage, normalisation
from unclip_jax.weights.clip_text import ClipText
from unclip_jax.weights.convert import clip, karlo_configs, karlo_names
from unclip_jax.weights.convert.folders import read_json, weights_in
from unclip_jax.weights.convert.tables import Row, Tensors, to_ours
from unclip_jax.weights.convert.tensor_files import open_tensors
from unclip_jax.weights.trained import Part

PRIOR_STEPS, DECODER_STEPS, SUPER_RES_STEPS = "25", "25", "7"
PRIOR_GUIDANCE, DECODER_GUIDANCE = 4.0, 8.0

INDEX = "model_index.json"

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
    return (folder / INDEX).is_file() or any(
        any(folder.glob(pattern)) for pattern, _ in ORIGINAL.values()
    )


def _is_diffusers(folder: Path) -> bool:
    """Whether a folder is in diffusers' layout: it has an index, and not the other's weights."""
    if not (folder / INDEX).is_file():
        return False
    is_other = any(any(folder.glob(pattern)) for pattern, _ in ORIGINAL.values())
    decoder = folder / "decoder"
    return not is_other or bool(weights_in(decoder, needed=False))


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
    found = {name: _on_devices(part, mesh) for name, part in read(folders, dtype)}
    upsamplers = tuple(part for name, part in found.items() if name.startswith("upsampler"))
    return {
        "clip": found["clip"],
        "prior": found.get("prior"),
        "decoder": found["decoder"],
        "upsamplers": upsamplers,
    }


def _on_devices(part: Part, mesh: Mesh | None) -> Part:
    """The same part; its arrays are replaced one by one, so that no two copies of all exist."""

    def place(tree: dict[str, Any], where: dict[str, Any] | None) -> None:
        for name, value in tree.items():
            there = where and where[name]
            if isinstance(value, dict):
                place(value, there)
            else:
                tree[name] = host_memory.place(value, there) if there else jnp.asarray(value)

    place(part.params, mesh and sharding.tree_shardings(part.params, mesh))
    return part


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
        raise UserError(
            f"Karlo {', '.join(map(str, paths))}: some are in diffusers' layout and some in the"
            " original one; give folders of one layout"
        )
    yield from (
        _read_diffusers(paths, dtype) if all(in_diffusers) else _read_original(paths, dtype)
    )


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


def _read_diffusers(folders: list[Path], dtype: str) -> Iterator[tuple[str, Part]]:
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
            raise UserError(
                f"Karlo {', '.join(map(str, folders))}: no folder {name!r}; download the whole"
                " repository again"
            )
        return None

    def scheduler(name: str, steps: str) -> tuple[Diffusion, Sampling]:
        path = find(name) / "scheduler_config.json"
        diffusion, sampling = karlo_configs.read_scheduler(read_json(path), steps, str(path))
        if name == "prior_scheduler":  # as that network has no second output
            choice(f"{path}: variance_type", diffusion.variance, ("fixed_small_log",))
        return diffusion, sampling

    towers = [find("text_encoder"), find("image_encoder", needed=False)]
    part = clip.load_huggingface(
        [t for t in towers if t],
        tokenizer=find("tokenizer"),
        pixels=find("feature_extractor", needed=towers[1] is not None),
        dtype=dtype,
        unit_embeddings=False,
    )
    yield "clip", part
    mark, empty = part.description["fingerprint"], _empty_caption(part)
    folder = find("prior", needed=False)
    if folder is not None:
        path = folder / "config.json"
        stage = _prior_stage(
            karlo_configs.read_prior(read_json(path), str(path)),
            *scheduler("prior_scheduler", PRIOR_STEPS),
        )
        with _tensors(weights_in(folder)) as tensors:
            yield "prior", _prior(stage, karlo_names.diffusers_prior(), tensors, dtype, mark, empty)
    unet, text_proj = find("decoder"), find("text_proj")
    model = karlo_configs.read_decoder(
        read_json(unet / "config.json"),
        read_json(text_proj / "config.json"),
        str(unet / "config.json"),
    )
    length = part.stage.model.context_length
    stage = _decoder_stage(model, length, *scheduler("decoder_scheduler", DECODER_STEPS))
    with _tensors(weights_in(unet)) as tensors, _tensors(weights_in(text_proj)) as others:
        tensors = tensors.join(others, "text_proj.")
        yield (
            "decoder",
            _decoder(stage, karlo_names.diffusers_decoder(model), tensors, dtype, mark, empty),
        )
    first, last = find("super_res_first"), find("super_res_last")
    configs = [
        karlo_configs.read_super_res(read_json(f / "config.json"), str(f / "config.json"))
        for f in (first, last)
    ]
    if configs[0] != configs[1]:
        raise UserError(f"{first} and {last}: their config.json differ; expected equal networks")
    stage = _upsampler_stage(
        configs[0], stage.image_size, *scheduler("super_res_scheduler", SUPER_RES_STEPS)
    )
    with _tensors(weights_in(first)) as tensors, _tensors(weights_in(last)) as others:
        both = tensors.prefixed("first.").join(others, "last.")
        yield _upsampler(stage, karlo_names.diffusers_super_res(configs[0]), both, dtype)


# ---------------------------------------------------------------- the original layout


def _read_original(folders: list[Path], dtype: str) -> Iterator[tuple[str, Part]]:
    """As the original program: networks of one size, x_0 of the prior clipped at 10."""
    files = {kind: _original_file(folders, kind) for kind in ORIGINAL}
    part = clip.load(files["clip"], dtype=dtype, unit_embeddings=False, arch="openai")
    yield "clip", part
    mark, empty = part.description["fingerprint"], _empty_caption(part)
    cosine = Diffusion(schedule="cosine", variance="fixed_small_log")
    stage = _prior_stage(
        presets.KARLO_PRIOR,
        dataclasses.replace(cosine, prediction="x_0"),
        Sampling(method="ddpm", spacing=PRIOR_STEPS, clip_x_0=10.0),
    )
    with _tensors(files["prior"]) as tensors, _tensors(files["statistics"]) as stats:
        tensors = _state_dict(tensors, "model.").join(stats, "stats.")
        yield "prior", _prior(stage, karlo_names.original_prior(), tensors, dtype, mark, empty)
    model = presets.KARLO_DECODER
    learned = dataclasses.replace(cosine, variance="learned_range", loss="hybrid")
    clipped = Sampling(method="ddpm", spacing=DECODER_STEPS, clip_x_0=1.0)
    stage = _decoder_stage(model, part.stage.model.context_length, learned, clipped)
    with _tensors(files["decoder"]) as tensors:
        tensors = _state_dict(tensors, "model.")
        yield (
            "decoder",
            _decoder(stage, karlo_names.original_decoder(model), tensors, dtype, mark, empty),
        )
    model = presets.KARLO_SUPER_RES
    clipped = dataclasses.replace(clipped, spacing=SUPER_RES_STEPS)
    stage = _upsampler_stage(model, stage.image_size, cosine, clipped)
    with _tensors(files["super-resolution"]) as tensors:
        tensors = _state_dict(tensors, "")
        yield _upsampler(stage, karlo_names.original_super_res(model), tensors, dtype)


def _state_dict(tensors: Tensors, prefix: str) -> Tensors:
    """What a checkpoint holds under "state_dict", without `prefix`; the rest is training's."""
    return tensors.within("state_dict.").select(lambda name: name.removeprefix(prefix))


def _original_file(folders: list[Path], kind: str) -> Path:
    """The one file of a kind, known by its name, and by a tensor that only it has."""
    pattern, mark = ORIGINAL[kind]
    found = [path for folder in folders for path in sorted(folder.glob(pattern))]
    if not found:
        raise UserError(
            f"Karlo {', '.join(map(str, folders))}: no {pattern}, the {kind}; download it"
        )
    with open_tensors(found[0]) as source:
        if mark in source.shapes:
            return found[0]
        held = [other for other, (_, tensor) in ORIGINAL.items() if tensor in source.shapes]
    raise UserError(
        f"{found[0]}: holds {held[0] if held else 'something else'}, expected Karlo's {kind};"
        " give each file the name it was published under"
    )


# ---------------------------------------------------------------- stages and parts


@contextlib.contextmanager
def _tensors(path: Path) -> Iterator[Tensors]:
    with open_tensors(path) as source:
        yield Tensors(source.shapes, source.read, str(path))


def _empty_caption(part: Part) -> dict[str, np.ndarray]:
    """CLIP's encoding of the empty caption, which Karlo's guidance leads away from."""
    return jax.tree.map(np.asarray, ClipText.of(part).empty_caption())


def _prior_stage(model, diffusion: Diffusion, sampling: Sampling) -> PriorStage:
    return PriorStage(
        model=model,
        diffusion=diffusion,
        sampling=sampling,
        draws=1,
        unit_embeddings=False,
        guidance_scale=PRIOR_GUIDANCE,
        empty_null=True,
    )


def _decoder_stage(model, length: int, diffusion: Diffusion, sampling: Sampling) -> DecoderStage:
    return DecoderStage(
        model=model,
        diffusion=diffusion,
        sampling=sampling,
        guidance_scale=DECODER_GUIDANCE,
        empty_null=True,
        states_length=length,
    )


def _upsampler_stage(
    model, low_size: int, diffusion: Diffusion, sampling: Sampling
) -> UpsamplerStage:
    return UpsamplerStage(
        model=model, low_size=low_size, diffusion=diffusion, sampling=sampling, last_steps=1
    )


def _prior(
    stage: PriorStage, table: list[Row], tensors: Tensors, dtype: str, mark: str, empty: Any
) -> Part:
    target = _target(stage)
    params = to_ours(table, tensors, {k: target[k] for k in ("network", "normalisation")}, dtype)
    stats = {name: value.astype(np.float32) for name, value in params["normalisation"].items()}
    params |= {"normalisation": stats, "null_caption": empty}
    return Part(stage, params, _description(stage, tensors) | {"clip_fingerprint": mark})


def _decoder(
    stage: DecoderStage, table: list[Row], tensors: Tensors, dtype: str, mark: str, empty: Any
) -> Part:
    params = {
        "network": to_ours(table, tensors, _target(stage)["network"], dtype),
        "normalisation": jax.tree.map(np.asarray, normalisation.identity(stage.model.embed_dim)),
        "null_caption": empty,
    }
    return Part(stage, params, _description(stage, tensors) | {"clip_fingerprint": mark})


def _upsampler(
    stage: UpsamplerStage, table: list[Row], tensors: Tensors, dtype: str
) -> tuple[str, Part]:
    params = to_ours(table, tensors, _target(stage), dtype)
    return f"upsampler_{stage.image_size}", Part(stage, params, _description(stage, tensors))


def _target(stage: stages.Stage) -> dict[str, Any]:
    return jax.eval_shape(stage.init, jax.random.key(0))


def _description(stage: stages.Stage, tensors: Tensors) -> dict[str, Any]:
    return {"stage": stages.describe(stage), "converted_from": tensors.origin}
