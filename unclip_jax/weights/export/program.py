"""A trained stage as a program that plain JAX runs, without this package.

The folder holds `program.bin`, the stage's sampler as StableHLO serialised by jax.export, for any
batch size on CPU, CUDA and TPU; `params.safetensors`, its weights, which are arguments of the
program and not constants in it; and `call.json`, which names, describes and shapes every input and
output. Whoever has jax and safetensors calls it:

    program = jax.export.deserialize(Path("decoder-program/program.bin").read_bytes())
    params = safetensors.numpy.load_file("decoder-program/params.safetensors")
    images = jax.jit(program.call)(params, inputs)["images"]

See docs/export.md.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from unclip_jax import stages
from unclip_jax.common.params import Params, flatten, unflatten
from unclip_jax.errors import UserError, wrong
from unclip_jax.models import attention
from unclip_jax.stages.conditioning import Field, tokens_field
from unclip_jax.stages.pixels import to_float
from unclip_jax.weights import folder as model_folder
from unclip_jax.weights.export import folders
from unclip_jax.weights.trained import Part

Arrays = dict[str, jax.Array]

SCHEMA_VERSION = 1
PROGRAM_FILE = "program.bin"
PARAMS_FILE = "params.safetensors"
CALL_FILE = "call.json"

PLATFORMS = ("cpu", "cuda", "tpu")
BATCH = "b"  # the symbolic size in every shape

# What --stage may be, and the kind of stage that it is found in.
KINDS = {
    "decoder": "decoder",
    "prior": "prior",
    "ar_prior": "ar_prior",
    "eclipse_prior": "eclipse_prior",
    "upsampler": "upsampler",
    "clip_text": "clip",
    "clip_image": "clip",
}


class Input(NamedTuple):
    """One named input: sizes are numbers or `BATCH`; `default` is what the stage itself uses."""

    shape: tuple[int | str, ...]
    dtype: str
    meaning: str
    default: float | None = None


class Sampler(NamedTuple):
    """What is exported: the inputs by name, `run(params, inputs)`, and what its outputs mean."""

    inputs: dict[str, Input]
    run: Callable[[Params, Arrays], Arrays]
    outputs: dict[str, str]


# ---------------------------------------------------------------------------------- samplers

_KEYS = Input(
    (BATCH, 2),
    "uint32",
    "one threefry key per example, as jax.random.key_data gives it: an example depends on its own"
    " key and inputs alone",
)


def _typed(key_data: jax.Array) -> jax.Array:
    """Typed keys [b] from uint32 [b, 2], whatever generator JAX is configured to use."""
    return jax.random.wrap_key_data(key_data, impl="threefry2x32")


def _inputs(fields: Mapping[str, Field]) -> dict[str, Input]:
    return {name: Input((BATCH, *f.shape), f.dtype, f.meaning) for name, f in fields.items()}


def of_sample(stage: stages.Stage) -> Sampler:
    """`stage.sample`: whatever the stage draws from to what it draws."""
    settings, (made, meaning) = stage.settings, stage.makes
    scalars = {n: Input((), "float32", s.meaning, s.default) for n, s in settings.items()}

    def run(params: Params, inputs: Arrays) -> Arrays:
        cond = stage.condition_of(inputs, inputs.get("text_mask"))
        chosen = {name: inputs[name] for name in settings}
        scale = chosen.pop("guidance_scale", None)

        def drawn(**guided: jax.Array) -> jax.Array:
            return stage.sample(params, _typed(inputs["keys"]), cond, **chosen, **guided)

        if scale is None:
            return {made: drawn()}
        # Of the two samplers in the program one runs: without guidance the network runs once.
        return {made: jax.lax.cond(scale == 1, drawn, lambda: drawn(guidance_scale=scale))}

    return Sampler({"keys": _KEYS} | _inputs(stage.conditions) | scalars, run, {made: meaning})


def of_clip_text(stage: stages.ClipStage) -> Sampler:
    """`stage.encode_text`."""

    def run(params: Params, inputs: Arrays) -> Arrays:
        z_t, states = stage.encode_text(params, inputs["tokens"])
        return {"z_t": z_t, "text_states": states}

    outputs = {"z_t": "the caption's embedding", "text_states": "the states of its tokens"}
    return Sampler(_inputs(tokens_field(*stage.context)), run, outputs)


def of_clip_image(stage: stages.ClipStage) -> Sampler:
    """`stage.encode_image` of 8-bit images."""
    size = stage.image_size
    fit = stage.model.fit
    side = {"shortest": "the shorter side", "squash": "both sides", "longest": "the longer side"}
    meaning = f"RGB, {side[fit.resize_mode]} resized to {fit.resize_to or size} px"
    meaning += f" ({fit.interpolation}), the centre square of it"
    images = Input((BATCH, size, size, 3), "uint8", meaning)

    def run(params: Params, inputs: Arrays) -> Arrays:
        return {"z_i": stage.encode_image(params, to_float(inputs["images"]))}

    return Sampler({"images": images}, run, {"z_i": "the image's embedding"})


_TOWERS = {"clip_text": of_clip_text, "clip_image": of_clip_image}


def sampler(stage: stages.Stage, name: str) -> Sampler:
    """What is exported of a stage under one of the names of `KINDS`."""
    return _TOWERS.get(name, of_sample)(stage)


# ------------------------------------------------------------------------------------ export


def program(
    sampler: Sampler, params: Arrays, platforms: Sequence[str] = PLATFORMS
) -> jax_export.Exported:
    """The sampler compiled to StableHLO for any batch size.

    Args:
        sampler: what to export.
        params: arrays, or `jax.ShapeDtypeStruct`s, by names joined with "/".
        platforms: some of `PLATFORMS`.

    Returns:
        `jax.export`'s program, whose `call(params, inputs)` takes params as here and inputs by
        name. It reports no progress and calls nothing on the host. For TPUs alone it has their
        kernels (`models.fused_attention`); for several platforms it can have none.
    """
    scope = jax_export.SymbolicScope()

    def abstract(one: Input) -> jax.ShapeDtypeStruct:
        shape = jax_export.symbolic_shape(", ".join(map(str, one.shape)), scope=scope)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(one.dtype))

    def call(params: Arrays, inputs: Arrays) -> Arrays:
        return sampler.run(unflatten(params), inputs)

    weights = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in params.items()}
    inputs = {name: abstract(one) for name, one in sampler.inputs.items()}
    with attention.implementation("fused" if tuple(platforms) == ("tpu",) else "reference"):
        return jax_export.export(jax.jit(call), platforms=platforms)(weights, inputs)


def convention(
    sampler: Sampler, exported: jax_export.Exported, name: str, part: Part
) -> dict[str, Any]:
    """What call.json says: plain data that names every input and output of the program."""
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    return {
        "schema_version": SCHEMA_VERSION,
        "stage": name,
        "call": "jax.export.deserialize(program).call(params, inputs) -> outputs, dicts by name",
        "program": PROGRAM_FILE,
        "params": PARAMS_FILE,
        "platforms": list(exported.platforms),
        "jax_version": jax.__version__,
        "calling_convention_version": exported.calling_convention_version,
        "inputs": {
            key: {"shape": list(one.shape), "dtype": one.dtype, "meaning": one.meaning}
            | ({} if one.default is None else {"default": one.default})
            for key, one in sampler.inputs.items()
        },
        "outputs": {
            key: {
                "shape": [size if isinstance(size, int) else str(size) for size in aval.shape],
                "dtype": aval.dtype.name,
                "meaning": sampler.outputs[key],
            }
            for key, aval in outputs.items()
        },
        "description": part.description | {"stage": stages.describe(part.stage)},
    }


def write(
    out: str | Path, part: Part, name: str, platforms: Sequence[str] = PLATFORMS
) -> jax_export.Exported:
    """Write a stage's program, its params and how to call it, all of them or none.

    Args:
        out: the folder to write, which must not exist.
        part: the stage and its params.
        name: one of `KINDS`.
        platforms: some of `PLATFORMS`.

    Returns:
        the program that was written.

    Raises:
        UserError: `out` exists, or the stage is a CLIP without the tower that is asked for.
    """
    folders.check_out(Path(out))
    part = _one_tower(part, name)
    exporting = sampler(part.stage, name)
    params = flatten(part.params)
    exported = program(exporting, params, platforms)
    about = convention(exporting, exported, name, part)
    with folders.new_folder(out) as folder:
        (folder / PROGRAM_FILE).write_bytes(exported.serialize())
        flat = {key: np.asarray(value, order="C") for key, value in params.items()}
        model_folder.save_tensors(flat, folder / PARAMS_FILE)
        text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
        (folder / CALL_FILE).write_text(text, encoding="utf-8")
    return exported


def _one_tower(part: Part, name: str) -> Part:
    """A CLIP's one tower alone, so that only its weights travel; other stages as they are."""
    if name not in _TOWERS:
        return part
    tower = name.removeprefix("clip_")
    towers = part.stage.model.towers
    if towers not in ("both", tower):
        raise UserError(f"--stage: got {name}, but this CLIP has its {towers} tower alone")
    model = dataclasses.replace(part.stage.model, towers=tower)
    stage = dataclasses.replace(part.stage, model=model)
    kept = jax.eval_shape(stage.init, jax.random.key(0))["network"]
    network = {key: part.params["network"][key] for key in kept}
    return part._replace(stage=stage, params={"network": network})


def check_platforms(text: str) -> tuple[str, ...]:
    """The platforms in a comma-separated list.

    Raises:
        UserError: none, one twice, or one that is not among `PLATFORMS`.
    """
    found = tuple(text.split(","))
    if not set(found) <= set(PLATFORMS) or len(set(found)) != len(found):
        raise wrong("--platforms", text, f"some of {','.join(PLATFORMS)}, joined by commas")
    return found
