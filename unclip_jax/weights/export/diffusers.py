"""A Karlo or Kandinsky of ours back to diffusers' layout, so that what is fine-tuned can go home.

The key maps are those of the way in, read the other way; the weights keep their values exactly,
and the dtype that they are stored in.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from unclip_jax import stages
from unclip_jax.errors import UserError
from unclip_jax.weights.convert import karlo_configs, karlo_names
from unclip_jax.weights.convert.folders import INDEX
from unclip_jax.weights.convert.tables import to_theirs
from unclip_jax.weights.export import components, kandinsky
from unclip_jax.weights.export.components import Component
from unclip_jax.weights.export.folders import check_out, new_folder, write_json
from unclip_jax.weights.trained import Part, find_parts, read_stage


def write(model: str | Path, out: str | Path) -> Iterator[str]:
    """Write a model folder as diffusers' UnCLIPPipeline, or as the one for image variations.

    One whose decoder draws latents becomes the two folders of a Kandinsky, see `kandinsky.write`.

    Args:
        model: a model folder of Karlo's form: a prior and a decoder that read CLIP's states, and
            one upsampler with a second network for its last step. Without a prior, the pipeline
            for image variations is written. Or one of Kandinsky 2.2's form.
        out: the folder to write, which must not exist.

    Yields:
        the name of each component after it is written; `out` is there when all are.

    Raises:
        UserError: `out` exists, or the model is of neither form.
    """
    check_out(Path(out))
    found = find_parts(Path(model))
    decoders = [read_stage(path)[0] for path in found.get("decoder", [])]
    if any(stage.autoencoder for stage in decoders):
        with new_folder(out) as folder:
            yield from kandinsky.write(found, folder)
        return
    for kind in ("clip", "decoder", "upsampler"):
        if len(found.get(kind, [])) != 1:
            number = f"{len(found.get(kind, []))} of kind {kind}, expected one"
            what = "diffusers' layout holds a whole Karlo or Kandinsky"
            raise UserError(f"model {str(model)!r}: {number}, for {what}")
    for kind in ("prior", "decoder", "upsampler"):
        for path in found.get(kind, []):
            _check_form(read_stage(path)[0], path)
    kinds = {
        "clip": lambda part, out: components.clip(out, part, "feature_extractor"),
        "prior": _write_prior,
        "decoder": _write_decoder,
        "upsampler": _write_upsampler,
    }
    written: dict[str, list[str]] = {}
    with new_folder(out) as folder:
        for kind, write_kind in kinds.items():
            for path in found.get(kind, []):
                for name, library, class_name in write_kind(components.stored(path), folder):
                    written[name] = [library, class_name]
                    yield name
        has_prior = "prior" in written
        kind = "UnCLIPPipeline" if has_prior else "UnCLIPImageVariationPipeline"
        if not has_prior and "image_encoder" not in written:
            what = "neither a prior nor an image tower in its CLIP"
            raise UserError(f"model {str(model)!r}: {what}; expected one")
        if has_prior:  # that pipeline takes no image tower
            written = {k: v for k, v in written.items() if k not in _VARIATION_ONLY}
        write_json(folder / INDEX, {"_class_name": kind} | written)


_VARIATION_ONLY = ("image_encoder", "feature_extractor")


def _check_form(stage: stages.Stage, path: Path) -> None:
    fits = getattr(stage, "empty_null", stage.last_steps == 1)
    if stage.unet:
        fits = fits and stage.unet.patch == 1 and not (stage.unet.pixel_channels or stage.canvas)
    if not fits:
        raise UserError(
            f"{path}: a {stage.kind} of another form than Karlo's, which diffusers' layout cannot"
            " hold; expected one that was converted from Karlo"
        )


def _write_prior(part: Part, out: Path) -> Iterator[Component]:
    yield components.prior(out, part)
    yield components.unclip_scheduler(out, "prior_scheduler", part)


def _write_decoder(part: Part, out: Path) -> Iterator[Component]:
    model = part.stage.model
    tensors = to_theirs(karlo_names.diffusers_decoder(model), part.params["network"])
    unet = tensors.select(lambda n: None if n.startswith("text_proj.") else n)
    text_proj = tensors.within("text_proj.")
    settings = karlo_configs.decoder_settings(model.unet)
    yield components.network(out, "decoder", "UNet2DConditionModel", settings, unet)
    settings = karlo_configs.text_proj_settings(model)
    components.network(out, "text_proj", "UnCLIPTextProjModel", settings, text_proj)
    yield "text_proj", "unclip", "UnCLIPTextProjModel"
    yield components.unclip_scheduler(out, "decoder_scheduler", part)


def _write_upsampler(part: Part, out: Path) -> Iterator[Component]:
    model = part.stage.model
    tree = {name: part.params[name] for name in ("network", "last_network")}
    tensors = to_theirs(karlo_names.diffusers_super_res(model), tree)
    settings = karlo_configs.super_res_settings(model)
    for place in ("first", "last"):
        one = tensors.within(f"{place}.")
        yield components.network(out, f"super_res_{place}", "UNet2DModel", settings, one)
    yield components.unclip_scheduler(out, "super_res_scheduler", part)
