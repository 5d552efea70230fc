"""CLIP as Hugging Face, OpenCLIP and OpenAI publish it, to our CLIP stage.

part = load("openai/clip-vit-large-patch14")          # a folder of transformers' CLIPModel
part = load("laion/CLIP-ViT-H-14")                    # a folder of OpenCLIP
part = load("ViT-L-14.pt")                            # OpenAI's own file
part = load("open_clip_model.safetensors", arch="ViT-H-14")     # OpenCLIP's file alone
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from unclip_jax import stages
from unclip_jax.common.checks import choice, count
from unclip_jax.common.params import fingerprint
from unclip_jax.data.tokenizer import FileTokenizer
from unclip_jax.errors import UserError, wrong
from unclip_jax.models import ClipConfig
from unclip_jax.models.clip import MAX_LOG_SCALE
from unclip_jax.stages import ClipStage
from unclip_jax.weights.convert import clip_names, huggingface
from unclip_jax.weights.convert.folders import read_json, weights_in
from unclip_jax.weights.convert.tables import Row, Tensors, to_ours
from unclip_jax.weights.convert.tensor_files import open_tensors
from unclip_jax.weights.trained import Part

OPENCLIP_CONFIG = "open_clip_config.json"
OPENCLIP_STEMS = ("open_clip_model", "open_clip_pytorch_model")
_OPENAI_HEAD = 64  # features of a head in every ViT that OpenAI published

# What a file cannot say of itself: features of a head of its image tower. OpenCLIP's have GELU,
# OpenAI's and those named so QuickGELU; all have heads of 64 in the text tower.
_HEADS = {"ViT-B-32": 64, "ViT-B-16": 64, "ViT-L-14": 64, "ViT-L-14-336": 64, "ViT-H-14": 80}
_HEADS |= {"ViT-g-14": 88, "ViT-bigG-14": 104}
_QUICK = "-quickgelu"
ARCHS = ("openai", *_HEADS, *(name + _QUICK for name in _HEADS))

# What some files keep besides the weights: constants that follow from the sizes. OpenAI's have the
# first of them, OpenCLIP's none.
_OPENAI_MARK = "input_resolution"
_CONSTANTS = (_OPENAI_MARK, "context_length", "vocab_size", "position_ids", "attn_mask")


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
        if not _is_openclip(source):
            return load_huggingface([source], dtype=dtype, unit_embeddings=unit_embeddings)
        config = _openclip_config(source / OPENCLIP_CONFIG)
        weights = weights_in(source, OPENCLIP_STEMS)
    else:
        config, weights = None, source
    with open_tensors(weights) as opened:
        tensors = Tensors(opened.shapes, opened.read, str(weights))
        config = config or _openai_config(tensors, arch)
        return _part(config, clip_names.openai(), tensors, dtype, unit_embeddings)


def _is_openclip(folder: Path) -> bool:
    """Whether a folder is OpenCLIP's: by its settings, unless only other weights are there."""
    if not (folder / OPENCLIP_CONFIG).is_file():
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
            towers |= _towers(folder / huggingface.CONFIG_FILE)
            path = weights_in(folder)
            opened = stack.enter_context(open_tensors(path))
            found = Tensors(opened.shapes, opened.read, str(path))
            tensors = tensors.join(found, "") if tensors.shapes else found
        encoder = None
        if text := towers.get("text"):
            length = text.max_position_embeddings
            encoder = huggingface.read_tokenizer(tokenizer or folders[0], length)
        config = _huggingface_config(towers, pixels or folders[0], encoder, tensors.origin)
        if config.towers == "both" and len(folders) > 1:
            scale = Tensors.of({"logit_scale": np.float32(MAX_LOG_SCALE)}, "no temperature")
            tensors = tensors.join(scale, "")
        table = {
            "both": clip_names.huggingface,
            "text": clip_names.huggingface_text,
            "image": clip_names.huggingface_vision,
        }[config.towers]()
        return _part(config, table, tensors, dtype, unit_embeddings, encoder)


def _part(
    config: ClipConfig,
    table: list[Row],
    tensors: Tensors,
    dtype: str,
    unit_embeddings: bool,
    encoder: FileTokenizer | None = None,
) -> Part:
    """The stage, its params, and a description that names it by its fingerprint."""
    stage = ClipStage(model=config, unit_embeddings=unit_embeddings)
    target = jax.eval_shape(stage.init, jax.random.key(0))["network"]
    kept = tensors.select(lambda n: None if n.rsplit(".", 1)[-1] in _CONSTANTS else n)
    params = {"network": to_ours(table, kept, target, dtype)}
    description = {
        "stage": stages.describe(stage),
        "converted_from": tensors.origin,
        "fingerprint": fingerprint(params),
    }
    if encoder is not None:
        description["tokenizer"] = encoder.describe()
    return Part(stage, params, description)


# ---------------------------------------------------------------- their settings


def _towers(path: Path) -> dict[str, Any]:
    """The settings of each tower in one config.json of transformers, by our names of the towers."""
    kinds = {"clip": "both", "clip_text_model": "text", "clip_vision_model": "image"}
    found = huggingface.read_config(path, tuple(kinds))
    if kinds[found.model_type] != "both":
        return {kinds[found.model_type]: found}
    towers = {"text": found.text_config, "image": found.vision_config}
    for settings in towers.values():  # the towers' own are those of the towers cut apart
        settings.projection_dim = found.projection_dim
    return towers


def _huggingface_config(
    towers: Mapping[str, Any], pixels: Path, encoder: FileTokenizer | None, where: str
) -> ClipConfig:
    """Our config of what the towers' settings have in common and of what each has."""

    def same(field: str) -> Any:
        found = {tower: getattr(settings, field) for tower, settings in towers.items()}
        if len(set(found.values())) != 1:
            raise UserError(f"{where}: the towers differ in {field}: {found}; expected one value")
        return next(iter(found.values()))

    if same("layer_norm_eps") != 1e-5:
        raise wrong(f"{where}: layer_norm_eps", same("layer_norm_eps"), "1e-05")
    sizes: dict[str, Any] = {}
    if image := towers.get("image"):
        if image.num_channels != 3:
            raise wrong(f"{where}: num_channels", image.num_channels, "3")
        sizes |= {
            "image_size": count(f"{where}: image_size", image.image_size),
            "patch": count(f"{where}: patch_size", image.patch_size),
            "vision_width": image.hidden_size,
            "vision_layers": image.num_hidden_layers,
            "vision_heads": image.num_attention_heads,
            "mlp_ratio": _ratio(image.intermediate_size, image.hidden_size),
        } | huggingface.read_pixels(pixels, image.image_size)
    if text := towers.get("text"):
        sizes["vision_mlp_ratio"] = sizes.get("mlp_ratio", 0.0)
        sizes |= {
            "text_width": text.hidden_size,
            "text_layers": text.num_hidden_layers,
            "text_heads": text.num_attention_heads,
            "mlp_ratio": _ratio(text.intermediate_size, text.hidden_size),
            "vocab_size": text.vocab_size,
            "context_length": text.max_position_embeddings,
            "end_token": _end_token(text, encoder, where),
        }
        if sizes["vision_mlp_ratio"] == sizes["mlp_ratio"]:
            sizes["vision_mlp_ratio"] = 0.0
    return ClipConfig(
        **sizes,
        towers="both" if len(towers) == 2 else next(iter(towers)),
        embed_dim=same("projection_dim"),
        activation=same("hidden_act"),
    )


def _ratio(hidden: int, width: int) -> float:
    """The `mlp_ratio` whose product with the width, cut to an integer, is `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _end_token(text: Any, encoder: FileTokenizer | None, where: str) -> int:
    """The id at which z_t is read, as a `ClipConfig` has it.

    An `eos_token_id` of 2 is an old mistake; transformers then reads where the highest id is.
    """
    end, last = text.eos_token_id, text.vocab_size - 1
    if end == 2:
        end = encoder.end_token if encoder else last
    if not isinstance(end, int) or not 0 <= end <= last:
        raise wrong(f"{where}: eos_token_id", end, f"one id below vocab_size = {last + 1}")
    if encoder is not None and encoder.end_token != end:
        raise UserError(
            f"{where}: eos_token_id is {end}, but its tokenizer ends a text with"
            f" {encoder.end_token}; take both from one place"
        )
    if encoder is not None and encoder.vocab_size > last + 1:
        raise UserError(
            f"{where}: vocab_size is {last + 1}, but its tokenizer has {encoder.vocab_size} ids;"
            " take both from one place"
        )
    return -1 if end == last else end


def _openclip_config(path: Path) -> ClipConfig:
    """Our config of an open_clip_config.json.

    Raises:
        UserError: a field is missing, a tower is of another kind than a plain ViT or text
            Transformer, or pictures are prepared in another way than here.
    """
    settings = read_json(path)
    model = settings.get("model_cfg")
    if not isinstance(model, dict):
        raise UserError(f"{path}: no model_cfg; expected OpenCLIP's {OPENCLIP_CONFIG}")
    image, text = dict(model.get("vision_cfg") or {}), dict(model.get("text_cfg") or {})
    needed = {
        "vision_cfg": (image, {"image_size", "layers", "width", "patch_size"}),
        "text_cfg": (text, {"context_length", "vocab_size", "width", "heads", "layers"}),
    }
    for name, (given, fields) in needed.items():
        missing = sorted(fields - set(given))
        known = fields | {"head_width", "mlp_ratio"}
        unknown = sorted(field for field in set(given) - known if given[field])
        if missing or unknown:
            raise UserError(
                f"{path}: {name} lacks {missing} and has {unknown}, which unclip_jax does not"
                " know; expected a plain ViT with OpenAI's text Transformer"
            )
    ratio, vision_ratio = (float(given.get("mlp_ratio", 4.0)) for given in (text, image))
    return ClipConfig(
        image_size=image["image_size"],
        patch=image["patch_size"],
        vision_width=image["width"],
        vision_layers=image["layers"],
        vision_heads=image["width"] // image.get("head_width", _OPENAI_HEAD),
        text_width=text["width"],
        text_layers=text["layers"],
        text_heads=text["heads"],
        vocab_size=text["vocab_size"],
        context_length=text["context_length"],
        embed_dim=model["embed_dim"],
        activation="quick_gelu" if model.get("quick_gelu") else "gelu",
        mlp_ratio=ratio,
        vision_mlp_ratio=0.0 if vision_ratio == ratio else vision_ratio,
        **_openclip_pixels(settings.get("preprocess_cfg") or {}, image["image_size"], path),
    )


def _openclip_pixels(given: Mapping[str, Any], image_size: int, path: Path) -> dict[str, Any]:
    """Mean and deviation of the pixels, of OpenCLIP's preprocess_cfg; OpenAI's where it is bare."""
    where = f"{path}: preprocess_cfg"
    ours = {"resize_mode": "shortest", "interpolation": "bicubic", "mode": "RGB"}
    for field, expected in ours.items():
        if (value := given.get(field, expected)) != expected:
            raise wrong(f"{where}.{field}", value, repr(expected), huggingface.ONLY)
    size = given.get("size", image_size)
    if size not in (image_size, [image_size, image_size], [3, image_size, image_size]):
        raise wrong(f"{where}.size", size, f"vision_cfg.image_size = {image_size}")
    defaults = ClipConfig()
    mean, std = given.get("mean", defaults.pixel_mean), given.get("std", defaults.pixel_std)
    return huggingface.channels(f"{where}", mean, std)


def _openai_config(tensors: Tensors, arch: str) -> ClipConfig:
    """Our config from the shapes in a file, and from what its architecture's name says.

    Raises:
        UserError: not a CLIP with a ViT, or a file that needs a name and got none.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors.shapes:
            raise UserError(
                f"{tensors.origin}: no tensor {name!r}; expected OpenAI's CLIP with a ViT, or give"
                " the folder of a Hugging Face or OpenCLIP model, with its settings"
            )
        return tensors.shapes[name].shape

    def layers(prefix: str) -> int:
        end = ".ln_1.weight"
        return sum(n.startswith(f"{prefix}.resblocks.") and n.endswith(end) for n in tensors.shapes)

    vision_width, _, patch, _ = shape("visual.conv1.weight")
    text_width, embed_dim = shape("text_projection")
    arch = arch or ("openai" if _OPENAI_MARK in tensors.shapes else "")
    if not arch:
        raise UserError(
            f"{tensors.origin}: does not say its activation and heads; give the folder with its"
            f" config.json or {OPENCLIP_CONFIG}, or --arch, one of {', '.join(ARCHS)}"
        )
    head = _HEADS.get(arch.removesuffix(_QUICK), _OPENAI_HEAD)
    if vision_width % head:
        raise wrong("--arch", arch, f"one with heads that divide the width {vision_width}")
    text, vision = (
        _ratio(shape(f"{tower}.resblocks.0.mlp.c_fc.weight")[0], width)
        for tower, width in (("transformer", text_width), ("visual.transformer", vision_width))
    )
    return ClipConfig(
        image_size=patch * round((shape("visual.positional_embedding")[0] - 1) ** 0.5),
        patch=patch,
        vision_width=vision_width,
        vision_layers=layers("visual.transformer"),
        vision_heads=vision_width // head,
        text_width=text_width,
        text_layers=layers("transformer"),
        text_heads=text_width // _OPENAI_HEAD,
        vocab_size=shape("token_embedding.weight")[0],
        context_length=shape("positional_embedding")[0],
        embed_dim=embed_dim,
        activation="quick_gelu" if arch == "openai" or arch.endswith(_QUICK) else "gelu",
        mlp_ratio=text,
        vision_mlp_ratio=0.0 if vision == text else vision,
    )
