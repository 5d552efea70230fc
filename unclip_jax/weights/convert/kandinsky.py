"""Kandinsky 2.2 as it is published, to the stages of our pipeline.

Two repositories in diffusers' layout make one model: the prior's, with CLIP ViT-bigG/14, and one of
the decoders', with MoVQ: plain, for inpainting, or with a hint (controlnet-depth). A folder that
diffusers' combined pipelines wrote holds both. How it samples is read from its schedulers.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from unclip_jax.common.checks import choice
from unclip_jax.errors import UserError, wrong
from unclip_jax.models import DecoderConfig, MoVQConfig, PriorConfig
from unclip_jax.stages import DecoderStage, PriorStage
from unclip_jax.weights.clip_text import ClipText
from unclip_jax.weights.convert import (
    clip,
    kandinsky_configs,
    kandinsky_names,
    karlo_configs,
    karlo_names,
    parts,
    schedulers,
)
from unclip_jax.weights.convert.folders import INDEX, read_json, weights_in
from unclip_jax.weights.convert.tables import Row, named, under
from unclip_jax.weights.trained import Part

PRIOR_STEPS, DECODER_STEPS = "25", 100
_PRIOR = {"draws": 1, "unit_embeddings": False, "guidance_scale": 4.0, "empty_null": True}
_DECODER = {"guidance_scale": 4.0, "null_picture": True}

# What a repository is, by the `_class_name` in its index.
PRIORS = tuple(f"KandinskyV22Prior{kind}Pipeline" for kind in ("", "Emb2Emb"))
DECODERS = {
    "": "KandinskyV22Pipeline",
    "inpaint": "KandinskyV22InpaintPipeline",
    "hint": "KandinskyV22ControlnetPipeline",
}
_DECODERS = (
    *DECODERS.values(),
    "KandinskyV22Img2ImgPipeline",
    "KandinskyV22ControlnetImg2ImgPipeline",
)
_COMBINED = tuple(f"KandinskyV22{kind}CombinedPipeline" for kind in ("", "Img2Img", "Inpaint"))

# The class of each component. A combined repository puts "prior_" before the names of the first.
OF_PRIOR = {
    "prior": "PriorTransformer",
    "image_encoder": "CLIPVisionModelWithProjection",
    "text_encoder": "CLIPTextModelWithProjection",
    "tokenizer": "CLIPTokenizer",
    "scheduler": "UnCLIPScheduler",
    "image_processor": "CLIPImageProcessor",
}
OF_DECODER = {"unet": "UNet2DConditionModel", "movq": "VQModel", "scheduler": "DDPMScheduler"}

_PREFIXES = {"": "unet", "movq.": "movq"}  # of the names in each file of a decoder

# Names in MoVQ's attention that older versions of diffusers wrote.
_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def is_kandinsky(folder: Path) -> bool:
    """Whether a folder is a repository of Kandinsky's, of any version."""
    path = folder / INDEX
    return path.is_file() and str(read_json(path).get("_class_name")).startswith("Kandinsky")


def load(
    folders: Sequence[str | Path], dtype: str = "", mesh: Mesh | None = None
) -> dict[str, Any]:
    """Kandinsky in memory, as the fields of `UnCLIP`.

    Args:
        folders: as for `read`.
        dtype: as for `read`.
        mesh: devices that the weights go to, see `sharding.tree_shardings`; else the default one.

    Raises:
        UserError: as for `read`; or the mesh does not divide the weights.
    """
    return parts.of_unclip(read(folders, dtype), mesh)


def read(folders: Sequence[str | Path], dtype: str = "") -> Iterator[tuple[str, Part]]:
    """Read Kandinsky 2.2, one part after the other, so that no two need be in memory.

    Args:
        folders: the prior's repository and one decoder's, in any order; or a combined one.
        dtype: of the weights; "" stands for the narrowest that holds all of a network's own.

    Yields:
        "clip", "prior" and "decoder", with params of NumPy arrays.

    Raises:
        UserError: a folder is not Kandinsky 2.2's, a repository or network is missing, two do not
            fit each other, tensors are missing, unexpected or misshapen, or its settings are none
            that our networks have.
    """
    found = _repositories([Path(folder).expanduser() for folder in folders])
    configs = _configs(found)
    prior, decoder = _prior_stage(found, configs), _decoder_stage(found, configs)
    of_prior = {"": weights_in(found.prior("prior"))}
    of_decoder = {prefix: weights_in(found.decoder(n)) for prefix, n in _PREFIXES.items()}
    whole = clip.load_huggingface(
        [found.prior("text_encoder"), found.prior("image_encoder")],
        tokenizer=found.prior("tokenizer"),
        pixels=found.prior("image_processor"),
        dtype=dtype,
        unit_embeddings=False,
    )
    _check_clip(whole, configs.prior, found)
    yield "clip", whole
    mark = {"clip_fingerprint": whole.description["fingerprint"]}
    empty = {"null_caption": jax.tree.map(np.asarray, ClipText.of(whole).empty_caption())}
    nothing = {"null_z_i": zero_picture(whole)}
    del whole
    yield "prior", parts.part(prior, karlo_names.diffusers_prior(), of_prior, dtype, empty, mark)
    table = decoder_table(decoder)
    yield "decoder", parts.part(decoder, table, of_decoder, dtype, nothing, mark, _renamed)


def _renamed(name: str) -> str:
    """Today's name of a tensor."""
    for old, new in _OLD.items() if name.startswith("movq.") else ():
        name = name.replace(f".{old}.", f".{new}.")
    return name


def decoder_table(stage: DecoderStage) -> list[Row]:
    """The key map of a decoder's stage, where MoVQ's names begin with "movq."."""
    movq = named("movq.", kandinsky_names.movq(stage.autoencoder))
    return [
        *under("network", kandinsky_names.decoder(stage.model)),
        *under("autoencoder/network", movq),
    ]


def zero_picture(whole: Part) -> np.ndarray:
    """CLIP's embedding [e] of an array of zeros in the place of normalised pixels.

    Kandinsky's guidance leads away from it. It is no black picture: its pixels are the means.
    """
    model = dataclasses.replace(whole.stage.model, towers="image")
    stage = dataclasses.replace(whole.stage, model=model)
    network = whole.params["network"]
    tower = {"network": {name: network[name] for name in ("vision", "vision_projection")}}
    pixel = 2 * np.float32(model.pixel_mean) - 1
    images = jnp.broadcast_to(pixel.reshape(1, 1, 1, 3), (1, *[model.image_size] * 2, 3))
    return np.asarray(jax.jit(stage.encode_image)(tower, images)[0], np.float32)


# ---------------------------------------------------------------- repositories


class _Repositories(NamedTuple):
    """Where the components are: a folder, and what the names of its components begin with."""

    of_prior: tuple[Path, str]
    of_decoder: tuple[Path, str]

    def prior(self, name: str) -> Path:
        """The folder of a component of the prior's repository."""
        return self._find(*self.of_prior, name)

    def decoder(self, name: str) -> Path:
        """Likewise of the decoder's."""
        return self._find(*self.of_decoder, name)

    @staticmethod
    def _find(folder: Path, prefix: str, name: str) -> Path:
        path = folder / (prefix + name)
        if not path.is_dir():
            do = "download the whole repository again"
            raise UserError(f"Kandinsky {str(folder)!r}: no folder {prefix + name!r}; {do}")
        return path

    def __str__(self) -> str:
        return f"Kandinsky {self.of_prior[0]} and {self.of_decoder[0]}"


def _repositories(paths: list[Path]) -> _Repositories:
    """Which of the folders is what."""
    priors, decoders = [], []
    for path in paths:
        if not path.is_dir():
            raise UserError(
                f"Kandinsky {str(path)!r}: no such folder; give the folder of its files"
            )
        index = read_json(path / INDEX)
        kind = choice(f"{path / INDEX}: _class_name", index.get("_class_name"), _kinds(index, path))
        combined = kind in _COMBINED
        if kind in PRIORS or combined:
            priors.append((path, "prior_" * combined))
            _check_classes(index, path, {"prior_" * combined + n: k for n, k in OF_PRIOR.items()})
        if kind not in PRIORS:
            decoders.append((path, ""))
            _check_classes(index, path, OF_DECODER)
    listing = ", ".join(map(str, paths)) or "nothing"
    for name, found, which in (
        ("prior", priors, "kandinsky-2-2-prior"),
        ("decoder", decoders, "kandinsky-2-2-decoder, -decoder-inpaint or -controlnet-depth"),
    ):
        if len(found) != 1:
            number = f"{len(found)} repositories with a {name} among them"
            do = f"leave out all but one of {', '.join(str(path) for path, _ in found)}"
            do = do if found else f"give {which} with it"
            raise UserError(f"Kandinsky {listing}: {number}, expected one; {do}")
    return _Repositories(priors[0], decoders[0])


def _kinds(index: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """The pipelines of version 2.2; UserError for one of another version, by its name."""
    kinds = *PRIORS, *_DECODERS, *_COMBINED
    kind = str(index.get("_class_name"))
    if kind.startswith("Kandinsky") and not kind.startswith("KandinskyV22"):
        field, do = f"{path / INDEX}: _class_name", "no other version is read"
        raise wrong(field, kind, "one of Kandinsky 2.2, KandinskyV22...", do)
    return kinds


def _check_classes(index: Mapping[str, Any], path: Path, components: Mapping[str, str]) -> None:
    for name, kind in components.items():
        found = index.get(name) or (None, None)
        given = str((found[-1] if isinstance(found, list) else found) or kind)
        choice(f"{path / INDEX}: {name}", re.sub("(Fast|Pil)$", "", given), (kind,))


# ---------------------------------------------------------------- settings


class _Configs(NamedTuple):
    prior: PriorConfig
    decoder: DecoderConfig
    movq: MoVQConfig


def _configs(found: _Repositories) -> _Configs:
    """The networks' configs, which fit each other."""

    def config(folder: Path, kind: str) -> tuple[dict[str, Any], str]:
        path = folder / "config.json"
        given = read_json(path)
        choice(f"{path}: _class_name", given.get("_class_name"), (kind,))
        return given, str(path)

    prior = karlo_configs.read_prior(*config(found.prior("prior"), OF_PRIOR["prior"]))
    given, where = config(found.decoder("unet"), OF_DECODER["unet"])
    decoder = kandinsky_configs.read_decoder(given, where)
    if decoder.has_text:
        field = f"{where}: addition_embed_type"
        raise wrong(field, given["addition_embed_type"], "that of Kandinsky 2.2; this is 2.1's")
    movq = kandinsky_configs.read_movq(*config(found.decoder("movq"), OF_DECODER["movq"]))
    if prior.embed_dim != decoder.embed_dim:
        dims = f"z_i of {prior.embed_dim} dimensions, the decoder reads {decoder.embed_dim}"
        raise UserError(f"{found}: the prior draws {dims}; give two of one version")
    if movq.latent_channels != decoder.x_channels:
        what = f"latents of {movq.latent_channels} channels, the U-Net draws {decoder.x_channels}"
        raise UserError(f"{found}: MoVQ decodes {what}; take both from one repository")
    return _Configs(prior, decoder, movq)


def _prior_stage(found: _Repositories, configs: _Configs) -> PriorStage:
    path = found.prior("scheduler") / "scheduler_config.json"
    given = read_json(path)
    choice(f"{path}: _class_name", given.get("_class_name"), (OF_PRIOR["scheduler"],))
    sampled = karlo_configs.read_scheduler(given, PRIOR_STEPS, str(path))
    # That network has no second output.
    choice(f"{path}: variance_type", sampled[0].variance, ("fixed_small_log",))
    return PriorStage(configs.prior, *sampled, **_PRIOR)


def _decoder_stage(found: _Repositories, configs: _Configs) -> DecoderStage:
    path = found.decoder("scheduler") / "scheduler_config.json"
    given = read_json(path)
    choice(f"{path}: _class_name", given.get("_class_name"), (OF_DECODER["scheduler"],))
    diffusion, sampling = schedulers.read_ddpm(given, DECODER_STEPS, str(path))
    diffusion = dataclasses.replace(diffusion, likelihood="gaussian")  # latents have no 256 levels
    stage = {"autoencoder": configs.movq} | _DECODER
    return DecoderStage(configs.decoder, diffusion, sampling, **stage)


def _check_clip(whole: Part, prior: PriorConfig, found: _Repositories) -> None:
    model = whole.stage.model
    for what, has, needs in (
        ("embeddings", model.embed_dim, prior.embed_dim),
        ("text states", model.text_width, prior.text_width),
        ("tokens of a caption", model.context_length, prior.context_length),
    ):
        if has != needs:
            do = "take both from one repository"
            raise UserError(f"{found}: CLIP has {what} of {has}, the prior reads {needs}; {do}")
