"""CLIP as Hugging Face, OpenCLIP and OpenAI publish it, to our CLIP stage.

part = load("openai/clip-vit-large-patch14")          # a folder of transformers' CLIPModel
part = load("laion/CLIP-ViT-H-14")                    # a folder of OpenCLIP
part = load("ViT-L-14.pt")                            # OpenAI's own file
part = load("open_clip_model.safetensors", arch="ViT-H-14")     # OpenCLIP's file alone
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from unclip_jax import stages
from unclip_jax.common.checks import choice
from unclip_jax.common.params import fingerprint, listing
from unclip_jax.data.tokenizer import FileTokenizer
from unclip_jax.errors import UserError
from unclip_jax.models import ClipConfig
from unclip_jax.models.clip import MAX_LOG_SCALE
from unclip_jax.stages import ClipStage
from unclip_jax.weights.convert import clip_configs, clip_names, huggingface
from unclip_jax.weights.convert.clip_configs import ARCHS, OPENAI_MARK
from unclip_jax.weights.convert.folders import weights_in
from unclip_jax.weights.convert.tables import Row, to_ours
from unclip_jax.weights.convert.tensor_files import Tensors, open_tensors
from unclip_jax.weights.trained import Part

OPENCLIP_STEMS = ("open_clip_model", "open_clip_pytorch_model")

PREPARED = "how pictures are prepared (their size, mean and deviation)"

# Fields of a config that say how pictures are prepared.
_PIXELS = ("pixel_mean", "pixel_std", "resize_mode", "resize_to", "interpolation", "fill")
# What some files keep besides the weights: constants that follow from the sizes.
_CONSTANTS = (OPENAI_MARK, "context_length", "vocab_size", "position_ids", "attn_mask")


def load(
    source: str | Path, *, dtype: str = "", unit_embeddings: bool = True, arch: str = ""
) -> Part:
    """Read a CLIP.

    Args:
        source: a folder of transformers' CLIPModel, CLIPTextModelWithProjection or
            CLIPVisionModelWithProjection, a folder of OpenCLIP, OpenAI's file, or OpenCLIP's alone.
            Of a folder that is both of the first, OpenCLIP's weights count, where they are there.
        dtype: of the weights; "" stands for the narrowest that holds all of theirs.
        unit_embeddings: whether z_i and z_t have length one, see `ClipStage`.
        arch: one of `ARCHS`, of a file that does not say what it is.

    Returns:
        a CLIP stage with params of NumPy arrays.

    Raises:
        UserError: not a CLIP that our networks can be, or a damaged file.
    """
    source = Path(source).expanduser()
    if arch:
        choice("arch", arch, ARCHS)
    if source.is_dir():
        if arch:
            raise UserError(f"arch: got {arch!r}, but the folder {source} says what it holds")
        settings = huggingface.CONFIG_FILE, clip_configs.OPENCLIP_FILE
        if not any((source / name).is_file() for name in settings):
            found = listing(sorted(path.name for path in source.iterdir())) or "nothing"
            do = "give the folder of a CLIP, or the weight file itself"
            raise UserError(f"{source}: no {' or '.join(settings)}, found {found}; {do}")
        if not _is_openclip(source):
            return load_huggingface([source], dtype=dtype, unit_embeddings=unit_embeddings)
        config, apart = clip_configs.of_openclip(source)
        weights = weights_in(source, OPENCLIP_STEMS)
    else:
        config, apart, weights = None, False, source
    with open_tensors(weights) as tensors:
        tensors = tensors.of_training("module.")
        if apart:
            tensors = tensors.select(lambda name: name.removeprefix("text."))
        said = config is not None or OPENAI_MARK in tensors.shapes or arch == "openai"
        config = config or clip_configs.of_shapes(tensors, arch)
        assumed = () if said else (PREPARED,)
        return _part(config, clip_names.openai(), tensors, dtype, unit_embeddings, assumed=assumed)


def _is_openclip(folder: Path) -> bool:
    """Whether a folder is OpenCLIP's: by its settings, unless only other weights are there."""
    if not (folder / clip_configs.OPENCLIP_FILE).is_file():
        return False
    is_other = (folder / huggingface.CONFIG_FILE).is_file() and weights_in(folder, needed=False)
    return bool(weights_in(folder, OPENCLIP_STEMS, needed=False)) or not is_other


def load_huggingface(
    folders: Sequence[Path],
    *,
    tokenizer: Path | None = None,
    pixels: Path | None = None,
    dtype: str = "",
    unit_embeddings: bool = True,
) -> Part:
    """Both towers from one folder, or one tower from each of two (Karlo for image variations).

    Towers that were cut apart have lost the temperature, which only training uses; it is then 100,
    where OpenAI's training ended.

    Args:
        folders: of the towers.
        tokenizer: the folder of its tokenizer; the first of `folders` where it is not given.
            Without one there, captions are encoded with OpenAI's.
        pixels: the folder of its image processor; the first of `folders` likewise.
        dtype: as for `load`.
        unit_embeddings: as for `load`.

    Raises:
        UserError: as for `load`, or two towers of different embedding sizes.
    """
    towers: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        tensors = Tensors({}, {}.__getitem__, "CLIP")
        for folder in folders:
            towers |= clip_configs.towers(folder / huggingface.CONFIG_FILE)
            found = stack.enter_context(open_tensors(weights_in(folder)))
            tensors = tensors.join(found) if tensors.shapes else found
        encoder = None
        if text := towers.get("text"):
            length = text.max_position_embeddings
            encoder = huggingface.read_tokenizer(tokenizer or folders[0], length)
        folder = pixels or folders[0]
        config = clip_configs.of_towers(towers, folder, encoder, tensors.origin)
        if config.towers == "both" and len(folders) > 1:
            scale = Tensors.of({"logit_scale": np.float32(MAX_LOG_SCALE)}, "no temperature")
            tensors = tensors.join(scale)
        table = {
            "both": clip_names.huggingface,
            "text": clip_names.huggingface_text,
            "image": clip_names.huggingface_vision,
        }[config.towers]()
        says = any((folder / name).is_file() for name in clip_configs.PIXEL_FILES)
        assumed = [PREPARED] if "image" in towers and not says else []
        assumed += ["the tokenizer"] if "text" in towers and encoder is None else []
        return _part(config, table, tensors, dtype, unit_embeddings, encoder, assumed)


def _part(
    config: ClipConfig,
    table: list[Row],
    tensors: Tensors,
    dtype: str,
    unit_embeddings: bool,
    encoder: FileTokenizer | None = None,
    assumed: Sequence[str] = (),
) -> Part:
    """The stage, its params, and a description that names it by its fingerprint.

    `assumed` is what the files do not say, and is taken to be as OpenAI's.
    """
    stage = ClipStage(model=config, unit_embeddings=unit_embeddings)
    target = jax.eval_shape(stage.init, jax.random.key(0))["network"]
    kept = tensors.select(lambda n: None if n.rsplit(".", 1)[-1] in _CONSTANTS else n)
    params = {"network": to_ours(table, kept, target, dtype)}
    # Other pixels make other embeddings of the same weights.
    usual = all(getattr(config, field) == getattr(ClipConfig, field) for field in _PIXELS)
    pixels = {} if usual else {"pixels": {f: np.array(getattr(config, f)) for f in _PIXELS}}
    description = {
        "stage": stages.describe(stage),
        "converted_from": tensors.origin,
        "fingerprint": fingerprint(params | pixels),
    }
    if assumed:
        description["assumed"] = list(assumed)
    if encoder is not None:
        description["tokenizer"] = encoder.describe()
    return Part(stage, params, description)
