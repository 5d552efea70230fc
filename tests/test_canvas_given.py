"""A trained decoder that is given a canvas, whole or by adapters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.canvas_runs import config_of, fill, run
from unclip_jax import stages
from unclip_jax.common.params import TRAINED, flatten, is_weights
from unclip_jax.errors import UserError
from unclip_jax.models.dit import DiTConfig
from unclip_jax.training import prepare, save
from unclip_jax.training.fine_tuning import Origin
from unclip_jax.weights import folder as model_folder
from unclip_jax.weights.adapters import read_adapters
from unclip_jax.weights.trained import load_part

STAGE, DECODER = tiny.CANVAS, tiny.ON_CANVAS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("canvas")
    fill(folder)
    return folder


@pytest.fixture(scope="module")
def two_canvases(folder):
    """Beside the others "one" and "two", canvases, and "on_one", a decoder that has the first."""
    about = tiny.model().decoder.description
    kept = {name: tiny.params(STAGE, seed) for seed, name in enumerate(("one", "two"), 1)}
    for name, params in kept.items():
        told = about | {"stage": stages.describe(STAGE)}
        model_folder.save_stage(folder / name, params=params, description=told)
    params = tiny.params(DECODER) | {"canvas": kept["one"]}
    told = about | {"stage": stages.describe(DECODER)}
    model_folder.save_stage(folder / "on_one", params=params, description=told)
    return kept


@pytest.mark.parametrize(
    ("init", "canvas"), [("plain", "two"), ("on_one", "two"), ("on_one", "")], ids=str
)
def test_adapters_are_saved_with_the_canvas_that_they_were_trained_on(
    folder, two_canvases, init, canvas
):
    stage, where = DECODER if init == "on_one" else tiny.DECODER, str(folder / init)
    flags = {"canvas": str(folder / canvas) if canvas else "", "init": where}
    lora = {"rank": 2, "convolutions": True}
    run = prepare.prepare(config_of(folder, stage, lora=lora, **flags))
    begun = run.init_params()
    assert run.stage == DECODER
    kept = {n: x for n, x in begun.items() if n == TRAINED or not is_weights(n)}
    origin = save.origin_of(run.description, where, run.stage)
    exported = run.export(begun)
    saved = save.whole(kept, run.description, origin)  # of a checkpoint, which has no more
    expected = tiny.params(DECODER) if init == "on_one" else origin.params()
    expected = expected | {"canvas": two_canvases[canvas or "one"]}
    for found in (exported, saved):
        found, wanted = flatten(found), flatten(expected)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_how_a_decoder_samples_with_its_canvas_is_free(folder, two_canvases):
    assert Origin.read(str(folder / "on_one"), {"from_canvas": True}).stage.from_canvas


@pytest.mark.slow
def test_a_run_of_adapters_that_is_given_a_canvas_is_saved_as_it_was_exported(folder, two_canvases):
    flags = {"init": str(folder / "plain"), "canvas": str(folder / "two")}
    lora = {"rank": 2, "convolutions": True}
    made = run(folder, tiny.DECODER, "adapted", lora=lora, train={"preview_every": 0}, **flags)
    out, alone = folder / "adapted_saved", folder / "adapted.safetensors"
    for path in (out, alone):
        told = ["--workdir", str(folder / "adapted"), "--init", flags["init"]]
        save.main([*told, "--out", str(path)])
    saved = load_part(out)
    first, again = map(read_adapters, (folder / "adapted" / "lora.safetensors", alone))
    assert first.about == again.about and first.about["canvas"] == made.description["canvas"]
    assert first.kernels.keys() == again.kernels.keys()
    for name, kernel in first.kernels.items():
        for one, other in zip(kernel, again.kernels[name], strict=True):
            np.testing.assert_array_equal(one, other)
    assert saved.stage == made.stage == DECODER
    assert jax.tree.all(jax.tree.map(np.array_equal, saved.params, made.params))
    assert jax.tree.all(jax.tree.map(np.array_equal, made.params["canvas"], two_canvases["two"]))
    assert np.any(made.params["network"]["unet"]["conv_in"]["kernel"][:, :, 3:])  # it is looked at


UNET = tiny.DECODER.model.unet
PATCHED = dataclasses.replace(UNET, patch=2, pixel_channels=4, attention_sizes=(8,))
DIT = DiTConfig(
    image_size=16, out_channels=6, patch=4, width=16, layers=1, heads=2, context_dim=16
)  # fmt: skip
NARROW = dataclasses.replace(DIT, bottleneck=8, pixel_channels=4)


@pytest.mark.parametrize(
    ("unet", "first"),
    [
        pytest.param(UNET, "conv_in", id="unet"),
        pytest.param(PATCHED, "conv_in", id="patched", marks=pytest.mark.slow),
        pytest.param(DIT, "from_pixels", id="dit"),
        pytest.param(NARROW, "narrow", id="narrow", marks=pytest.mark.slow),
    ],
)
def test_a_decoder_that_is_given_a_canvas_draws_the_same_at_first(unet, first, tmp_path):
    model = dataclasses.replace(tiny.DECODER.model, unet=unet)
    stage = dataclasses.replace(tiny.DECODER, model=model)
    before, about = tiny.params(stage), {"stage": stages.describe(stage)}
    model_folder.save_stage(tmp_path / "plain", params=before, description=about)
    asked = stages.describe(stage.with_canvas(STAGE.model))
    origin = Origin.read(str(tmp_path / "plain"), asked)
    params = origin.params()
    shapes = jax.eval_shape(origin.stage.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    batch = tiny.batch(2, 16)
    x_t, t = jax.random.normal(jax.random.key(0), (2, 16, 16, 3)), jnp.array([3, 900])
    found, expected = (
        tiny.call(s, "denoise", p, x_t, t, tiny.call(s, "encode", p, s.condition_of(batch)))
        for s, p in ((origin.stage, params), (stage, before))
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)  # the sums have other partial sums
    moved = jax.tree.map(lambda x: x + 0.1, params["network"]["unet"][first])
    network = params["network"] | {"unet": params["network"]["unet"] | {first: moved}}
    other = params | {"network": network}
    one, two = (
        tiny.call(
            origin.stage, "denoise", p, x_t, t,
            tiny.call(origin.stage, "encode", p, origin.stage.condition_of(batch | {"z_t": z_t})),
        )
        for p, z_t in ((other, batch["z_t"]), (other, -batch["z_t"]))
    )  # fmt: skip
    assert np.any(np.asarray(one) != two)


def test_no_other_change_of_the_input_is_taken(folder):
    for overrides, message in (
        ({"model": {"unet": {"in_channels": 6}}}, "in_channels"),
        ({"canvas": {"embed_dim": 8}}, "in_channels: got 3, expected 6"),
        ({"model": {"embed_dim": 9}}, "model.embed_dim is 9, but there 8"),
    ):
        with pytest.raises(UserError, match=message):
            Origin.read(str(folder / "plain"), overrides)
