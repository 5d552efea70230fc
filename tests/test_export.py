"""Exported samplers: plain JAX, without this package, computes what the stages compute."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from tests import tiny
from unclip_jax import stages
from unclip_jax.common.params import flatten, is_weights
from unclip_jax.errors import UserError
from unclip_jax.models.ar_prior import ARPriorConfig
from unclip_jax.models.decoder import DecoderConfig
from unclip_jax.stages.clip import encode_image, encode_text
from unclip_jax.stages.conditioning import text_mask
from unclip_jax.stages.pixels import to_float
from unclip_jax.weights import folder as model_folder
from unclip_jax.weights.export import command, folders
from unclip_jax.weights.export import program as export
from unclip_jax.weights.trained import Part

AR_PRIOR = stages.ARPriorStage(
    model=ARPriorConfig(
        embed_dim=tiny.DIM, width=16, layers=1, heads=2, context_length=tiny.CONTEXT,
        vocab_size=tiny.VOCAB, code_dims=4, buckets=16, dot_buckets=4,
    )
)  # fmt: skip

UNET = dataclasses.replace(tiny.DECODER.model.unet, image_size=8, attention_sizes=(8,))
DECODER = dataclasses.replace(
    tiny.DECODER, model=dataclasses.replace(tiny.DECODER.model, unet=UNET)
)
UPSAMPLER = dataclasses.replace(
    tiny.UPSAMPLER,
    model=dataclasses.replace(tiny.UPSAMPLER.model, image_size=16, channel_mults=(1,)),
    low_size=8,
)

STAGES = {
    "clip_text": tiny.CLIP,
    "clip_image": tiny.CLIP,
    "prior": tiny.PRIOR,
    "ar_prior": AR_PRIOR,
    "decoder": DECODER,
    "upsampler": UPSAMPLER,
}
BATCHES = (3, 1)
SCALE = 2.5

# Runs in a process of its own: jax and safetensors, and neither this package nor flax.
PLAIN = """
import sys
from pathlib import Path

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("unclip_jax", "flax"):
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
import jax, jax.export
import numpy as np
import safetensors.numpy

programs, inputs, outputs = map(Path, sys.argv[1:])
for place in sorted(programs.iterdir()):
    program = jax.export.deserialize((place / "program.bin").read_bytes())
    params = safetensors.numpy.load_file(place / "params.safetensors")
    for path in sorted(inputs.glob(f"{place.name}-*.npz")):
        quick = {"xla_backend_optimization_level": 0} if path.stem.endswith("-1") else {}
        call = jax.jit(program.call, compiler_options=quick)  # at 3 to compare bits, quick at 1
        made = call(params, dict(np.load(path)))
        np.savez(outputs / path.name, **made)
try:
    import unclip_jax
except ImportError:
    print("plain")
"""


@functools.cache
def params_of(stage: stages.Stage, seed: int = 0) -> dict:
    """Params drawn by NumPy, nothing zero; constants, such as standard deviations, above zero."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = 0.2 * rng.standard_normal(leaf.shape).astype(np.float32)
        if path[-1].key == "scale":
            return 1 + noise
        return noise if is_weights(path[0].key) else 0.1 + abs(noise)

    shapes = jax.eval_shape(stage.init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def part_of(name: str) -> Part:
    stage = STAGES[name]
    return Part(stage, params_of(stage), {"stage": stages.describe(stage)})


KEYS = jax.random.split(jax.random.key(7), BATCHES[0])
BATCH = tiny.batch(BATCHES[0], 16, seed=5)
SMALL = to_float(BATCH["image"][:, :8, :8])


def inputs_of(name: str, size: int) -> dict[str, np.ndarray]:
    """The first `size` rows of every input that the stage's program has."""
    every = BATCH | {
        "keys": jax.random.key_data(KEYS),
        "text_mask": text_mask(BATCH["tokens"], tiny.VOCAB),
        "images": BATCH["image"] if name == "clip_image" else SMALL,
        "guidance_scale": jnp.float32(SCALE),
    }
    wanted = export.sampler(STAGES[name], name).inputs
    return {key: np.asarray(every[key][:size] if every[key].ndim else every[key]) for key in wanted}


def ours(name: str) -> dict[str, jax.Array]:
    """What the stage itself makes of all rows."""
    stage, params, _ = part_of(name)
    if name == "clip_text":
        z_t, states = tiny.call(stage, "encode_text", params, BATCH["tokens"])
        return {"z_t": z_t, "text_states": states}
    if name == "clip_image":
        return {"z_i": encode_image(stage, params, BATCH["image"])}
    if name == "upsampler":
        return {"images": tiny.call(stage, "sample", params, KEYS, SMALL)}
    named = ("z_i", "z_t") if name == "decoder" else ("z_t",)
    cond = stage.condition(BATCH["tokens"], **{key: BATCH[key] for key in named})
    scale = jnp.float32(SCALE)
    made = tiny.call(stage, "sample", params, KEYS, cond, guidance_scale=scale)
    return {"images" if name == "decoder" else "z_i": made}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Every stage of the tiny model, exported."""
    folder = tmp_path_factory.mktemp("programs")
    for name in STAGES:
        export.write(folder / name, part_of(name), name)
    return folder


@pytest.fixture(scope="module")
def plain(exported, tmp_path_factory):
    """The outputs, by stage and batch size, of a process that cannot import this package."""
    inputs, outputs = tmp_path_factory.mktemp("inputs"), tmp_path_factory.mktemp("outputs")
    for name in STAGES:
        for size in BATCHES:
            np.savez(inputs / f"{name}-{size}.npz", **inputs_of(name, size))
    done = subprocess.run(
        [sys.executable, "-I", "-c", PLAIN, exported, inputs, outputs],
        capture_output=True, text=True, timeout=600, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.stdout == "plain\n", done.stderr
    return {path.stem: dict(np.load(path)) for path in outputs.iterdir()}


@pytest.mark.parametrize("name", STAGES)
def test_plain_jax_computes_what_the_stage_computes_bit_for_bit(name, plain):
    expected, found = ours(name), plain[f"{name}-3"]
    assert set(found) == set(expected)
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value)


@pytest.mark.parametrize("name", STAGES)
def test_one_program_serves_every_batch_size(name, plain):
    """An example alone is what it is among others, but for the order of float32 sums."""
    many, one = (plain[f"{name}-{size}"] for size in BATCHES)
    for key, value in one.items():
        assert value.shape == (1, *many[key].shape[1:])
        np.testing.assert_allclose(value, many[key][:1], atol=1e-4)


@pytest.mark.parametrize("name", STAGES)
def test_call_json_says_what_the_program_takes_and_gives(name, exported, plain):
    about = json.loads((exported / name / "call.json").read_text())
    program = jax.export.deserialize((exported / name / "program.bin").read_bytes())
    assert about["stage"] == name and about["platforms"] == ["cpu", "cuda", "tpu"]
    params = safetensors.numpy.load_file(exported / name / "params.safetensors")
    _, inputs = jax.tree.unflatten(program.in_tree, program.in_avals)[0]
    assert len(jax.tree.leaves(program.in_avals)) == len(params) + len(about["inputs"])
    for key, one in about["inputs"].items():
        assert [str(n) for n in one["shape"]] == [str(n) for n in inputs[key].shape]
        assert one["dtype"] == inputs[key].dtype.name and one["meaning"]
    for key, one in about["outputs"].items():
        made = plain[f"{name}-3"][key]
        assert made.shape == tuple(3 if n == "b" else n for n in one["shape"])
        assert made.dtype.name == one["dtype"] and one["meaning"]
    assert stages.build(about["description"]["stage"]).kind == export.KINDS[name]
    assert (about["inputs"].get("guidance_scale", {}).get("default")
            == getattr(STAGES[name], "guidance_scale", None))  # fmt: skip


@pytest.mark.parametrize("name", STAGES)
def test_a_program_calls_nothing_outside_itself(name, exported):
    program = jax.export.deserialize((exported / name / "program.bin").read_bytes())
    targets = {
        line.split("custom_call @")[1].split("(")[0]
        for line in program.mlir_module().splitlines()
        if "custom_call @" in line
    }
    assert targets <= {"shape_assertion"}


def test_weights_are_arguments_not_constants(exported):
    """The same program with other params is the other model."""
    program = jax.export.deserialize((exported / "clip_text" / "program.bin").read_bytes())
    other = params_of(tiny.CLIP, 11)
    tower = {n: x for n, x in flatten(other).items() if n.startswith("network/text")}
    batch = tiny.batch(2, 16)
    found = program.call(tower, {"tokens": batch["tokens"]})["z_t"]
    np.testing.assert_allclose(found, encode_text(tiny.CLIP, other, batch["tokens"]), atol=1e-6)


def test_a_tower_travels_without_the_other(exported):
    names = set(safetensors.numpy.load_file(exported / "clip_image" / "params.safetensors"))
    whole = set(flatten(params_of(tiny.CLIP)))
    assert names < whole and not any("text" in name for name in names)


STATES = dataclasses.replace(
    DECODER,
    model=DecoderConfig(unet=UNET, embed_dim=tiny.DIM, text_width=16, use_z_t=True),
    empty_null=True,
    states_length=tiny.CONTEXT,
)
CLASSES = dataclasses.replace(
    DECODER,
    model=DecoderConfig(unet=dataclasses.replace(UNET, context_dim=0), num_classes=5),
    sampling=dataclasses.replace(DECODER.sampling, dynamic_percentile=99.5),
)
NOISED = dataclasses.replace(UPSAMPLER, noise_max=0.5, noise_level=0.1, last_steps=1)


@pytest.mark.parametrize(
    ("name", "stage", "expected"),
    [
        ("decoder", STATES, {"text_states", "text_mask", "z_i", "z_t", "guidance_scale"}),
        ("decoder", CLASSES, {"label", "guidance_scale"}),
        ("upsampler", NOISED, {"images", "noise_level"}),
    ],
    ids=["text states", "classes", "noise level"],
)
def test_what_a_stage_reads_are_its_programs_inputs(name, stage, expected):
    shapes = jax.eval_shape(stage.init, jax.random.key(0))
    sampler = export.sampler(stage, name)
    program = export.program(sampler, flatten(shapes), ("cpu",))
    assert set(sampler.inputs) == {"keys"} | expected
    size = stage.image_size
    assert [str(n) for n in program.out_avals[0].shape] == ["b", str(size), str(size), "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder with two upsamplers."""
    folder = tmp_path_factory.mktemp("model")
    larger = dataclasses.replace(UPSAMPLER.model, image_size=32)
    parts = {
        "clip": tiny.CLIP,
        "prior": tiny.PRIOR,
        "upsampler_16": UPSAMPLER,
        "upsampler_32": dataclasses.replace(UPSAMPLER, low_size=16, model=larger),
    }
    for name, stage in parts.items():
        description = {"stage": stages.describe(stage)}
        model_folder.save_stage(folder / name, params=params_of(stage), description=description)
    return folder


def test_the_command_finds_the_stage_and_writes_it(folder, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    command.main([
        "program", "--model", str(folder), "--out", str(out),
        "--stage", "upsampler", "--upsampler", "32", "--platforms", "cpu",
        "--steps", "2", "--dtype", "bfloat16",
    ])  # fmt: skip
    assert str(out) in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [
        "call.json", "params.safetensors", "program.bin",
    ]  # fmt: skip
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    about = json.loads((out / "call.json").read_text())
    assert about["outputs"]["images"]["shape"] == ["b", 32, 32, 3]
    assert about["platforms"] == ["cpu"]
    stage = about["description"]["stage"]
    assert stage["sampling"]["spacing"] == "2" and stage["model"]["dtype"] == "bfloat16"
    expected = model_folder.read_fingerprint(folder / "upsampler_32")
    assert about["description"]["fingerprint"] == expected
    params = safetensors.numpy.load_file(out / "params.safetensors")
    assert {value.dtype.name for value in params.values()} == {"bfloat16"}
    program = jax.export.deserialize((out / "program.bin").read_bytes())
    wanted, _ = jax.tree.unflatten(program.in_tree, program.in_avals)[0]
    assert {k: v.dtype for k, v in wanted.items()} == {k: v.dtype for k, v in params.items()}


@pytest.mark.parametrize(
    ("stage", "place", "size", "message"),
    [
        ("upsampler", ".", None, "--upsampler: got None, expected one of 16, 32"),
        ("upsampler", ".", 48, "--upsampler: got 48, expected one of 16, 32"),
        ("decoder", ".", 64, "--upsampler: got 64, but a decoder is asked for"),
        ("ar_prior", ".", None, "0 of kind ar_prior, expected one"),
        ("prior", "clip", None, "holds a clip, expected a prior"),
        ("prior", "nowhere", None, "is no folder"),
    ],
)
def test_a_stage_that_is_not_there_is_named(folder, stage, place, size, message):
    with pytest.raises(UserError, match=message):
        folders.find(folder / place, stage, size)


def test_one_stages_folder_will_do(folder):
    assert folders.find(folder / "prior", "prior").stage == tiny.PRIOR


def test_workdirs_beside_a_whole_model_are_those_that_are_drawn_with(folder, tmp_path):
    """`FOLDER/prior` and `FOLDER/model/prior`, as train.sh leaves them: FOLDER is the first."""
    shutil.copytree(folder / "prior", tmp_path / "prior")
    other = dataclasses.replace(tiny.PRIOR, guidance_scale=7.0)
    told = {"stage": stages.describe(other)}
    params = tiny.params(tiny.PRIOR)
    model_folder.save_stage(tmp_path / "model" / "prior", params=params, description=told)
    assert folders.find(tmp_path, "prior").stage == tiny.PRIOR
    assert folders.find(tmp_path / "model", "prior").stage == other


def test_a_tower_that_is_not_there_is_refused(folder):
    part = export._one_tower(folders.find(folder, "clip"), "clip_text")
    with pytest.raises(UserError, match="--stage: got clip_image, but this CLIP has its text"):
        export._one_tower(part, "clip_image")


@pytest.mark.parametrize("text", ["", "gpu", "cpu,cpu", "cpu, tpu", "cpu,"])
def test_platforms_are_checked(text):
    with pytest.raises(UserError, match="--platforms: got"):
        export.check_platforms(text)


def test_nothing_is_left_where_writing_fails(folder, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_folder, "save_file", full)
    with pytest.raises(UserError, match=r"cannot be written .*No space left"):
        export.write(tmp_path / "out", folders.find(folder, "clip"), "clip_text", ("cpu",))
    assert not list(tmp_path.iterdir())
