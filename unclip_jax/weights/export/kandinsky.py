"""A Kandinsky of ours back to diffusers' two folders, as `weights.convert.kandinsky` reads them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from unclip_jax.errors import UserError
from unclip_jax.weights.convert import kandinsky_configs, schedulers
from unclip_jax.weights.convert.folders import INDEX
from unclip_jax.weights.convert.kandinsky import DECODERS, PRIORS, decoder_table
from unclip_jax.weights.convert.tables import to_theirs
from unclip_jax.weights.export import components
from unclip_jax.weights.export.components import Component
from unclip_jax.weights.export.folders import write_json
from unclip_jax.weights.trained import Part


def write(found: dict[str, list[Path]], out: Path) -> Iterator[str]:
    """Write "prior", a KandinskyV22PriorPipeline, and "decoder", the pipeline of its decoder.

    Args:
        found: the folders of the stages by their kind.
        out: an empty folder.

    Yields:
        the name of each component after it is written.

    Raises:
        UserError: a stage is missing, or of another form than Kandinsky 2.2's.
    """
    for kind in ("clip", "prior", "decoder"):
        if len(found.get(kind, [])) != 1:
            number = f"{len(found.get(kind, []))} of kind {kind}, expected one"
            raise UserError(f"model: {number}, for diffusers' folders hold a whole Kandinsky")
    if found.get("upsampler"):
        raise UserError("model: it has an upsampler, which Kandinsky in diffusers' layout has not")
    parts = (components.stored(found[kind][0]) for kind in ("clip", "prior", "decoder"))
    clip = next(parts)
    if clip.stage.model.towers != "both":
        has = clip.stage.model.towers
        raise UserError(f"{found['clip'][0]}: has the {has} tower alone; expected both")
    written = []
    for component in components.clip(out / "prior", clip, "image_processor"):
        written.append(component)
        yield f"prior/{component[0]}"
    del clip
    prior = next(parts)
    if not getattr(prior.stage, "empty_null", False):
        form = "a prior of another form than Kandinsky's"
        raise UserError(f"{found['prior'][0]}: {form}; expected one that was converted from it")
    written.append(components.prior(out / "prior", prior))
    written.append(components.unclip_scheduler(out / "prior", "scheduler", prior))
    yield "prior/prior"
    _index(out / "prior", PRIORS[0], written)
    del prior
    decoder = next(parts)
    kind = "hint" if decoder.stage.model.hint else "inpaint" * decoder.stage.model.inpaint
    written = list(_decoder(out / "decoder", decoder))
    _index(out / "decoder", DECODERS[kind], written)
    yield from (f"decoder/{name}" for name, *_ in written)


def _decoder(out: Path, part: Part) -> Iterator[Component]:
    stage = part.stage
    tensors = to_theirs(
        decoder_table(stage), {n: part.params[n] for n in ("network", "autoencoder")}
    )
    settings = kandinsky_configs.unet_settings(stage.model)
    unet = tensors.select(lambda name: None if name.startswith("movq.") else name)
    yield components.network(out, "unet", "UNet2DConditionModel", settings, unet)
    settings = kandinsky_configs.movq_settings(stage.autoencoder)
    yield components.network(out, "movq", "VQModel", settings, tensors.within("movq."))
    settings = schedulers.ddpm_settings(stage.diffusion, stage.sampling)
    yield components.scheduler(out, "scheduler", "DDPMScheduler", settings)


def _index(folder: Path, kind: str, written: list[Component]) -> None:
    found = {name: [library, class_name] for name, library, class_name in written}
    write_json(folder / INDEX, {"_class_name": kind} | found)
