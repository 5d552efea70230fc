"""The analytic variance end to end: measured over data, kept with the weights, sampled with."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests import tiny
from unclip_jax import stages
from unclip_jax.common.params import fingerprint
from unclip_jax.diffusion.gaussian import Diffusion
from unclip_jax.diffusion.samplers import Sampling
from unclip_jax.errors import UserError
from unclip_jax.models.decoder import DecoderConfig
from unclip_jax.models.unet import UNetConfig
from unclip_jax.stages.conditioning import example_keys
from unclip_jax.stages.normalisation import identity
from unclip_jax.training import analytic, prepare
from unclip_jax.weights import folder as model_folder
from unclip_jax.weights.trained import load_part

STEPS = 40
DIFFUSION = Diffusion(steps=STEPS, prediction="x_0", variance="fixed_small_log")
PRIOR = dataclasses.replace(tiny.PRIOR, diffusion=DIFFUSION)
SIDE = 8
DECODER = stages.DecoderStage(
    model=DecoderConfig(
        unet=UNetConfig(
            image_size=SIDE, out_channels=3, channels=8, channel_mults=(1,), res_blocks=1,
            attention_sizes=(), groups=4,
        )
    ),
    diffusion=DIFFUSION,
    sampling=Sampling(method="ddpm", spacing="4"),
)  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Twelve pictures, every pixel black or white, with captions."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(12):
        pixels = 255 * rng.integers(0, 2, (SIDE, SIDE, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return folder


@pytest.fixture(scope="module")
def params():
    """Random params of each stage, drawn by NumPy: nothing to compile."""
    rng = np.random.default_rng(0)

    def draw(stage):
        shapes = jax.eval_shape(stage.init, jax.random.key(0))
        noise = lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), jnp.float32)  # noqa: E731
        network = {"network": jax.tree.map(noise, shapes["network"])}
        return network | ({"normalisation": identity(tiny.DIM)} if stage is PRIOR else {})

    return {stage: draw(stage) for stage in (tiny.CLIP, PRIOR, DECODER)}


def constant(stage, params):
    """Params of a network that always predicts zero: its last layer is zeros."""
    network = params[stage]["network"]
    if stage is PRIOR:
        zeros = jax.tree.map(jnp.zeros_like, network["out"])
        return params[stage] | {"network": network | {"out": zeros}}
    zeros = jax.tree.map(jnp.zeros_like, network["unet"]["conv_out"])
    return {"network": {"unet": network["unet"] | {"conv_out": zeros}}}


@pytest.fixture(scope="module")
def trained(pictures, params, tmp_path_factory):
    """Folders "clip", "prior" and "decoder" as training leaves them, all trained on `pictures`."""
    folder = tmp_path_factory.mktemp("trained")
    clip = params[tiny.CLIP]
    about = {
        "data": {"name": str(pictures), "split": "all"},
        "clip_fingerprint": fingerprint(clip),
    }
    for stage in (tiny.CLIP, PRIOR, DECODER):
        model_folder.save_stage(
            folder / stage.kind / "model",
            params=clip if stage is tiny.CLIP else constant(stage, params),
            description=about | {"stage": stages.describe(stage)},
            dtype="bfloat16" if stage is PRIOR else None,
        )
    return folder


@pytest.fixture
def workdirs(trained, tmp_path, monkeypatch):
    """A copy of `trained`, to be changed."""
    monkeypatch.setenv("UNCLIP_JAX_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(trained, tmp_path / "runs")


def test_a_prior_that_knows_nothing_is_as_uncertain_as_its_data(workdirs, capsys):
    """CLIP's embeddings have length one: predicting zero errs by 1/e, whatever the noise."""
    before = load_part(workdirs / "prior")
    analytic.main(["--stage", str(workdirs / "prior"), "--num", "2", "--batch_size", "8"])
    assert "sampling is now analytic" in capsys.readouterr().out
    stage, params, description = load_part(workdirs / "prior")
    np.testing.assert_allclose(params["analytic"], np.full(STEPS, 1 / tiny.DIM), rtol=1e-5)
    assert stage.analytic and stage.sampling == dataclasses.replace(
        PRIOR.sampling, method="analytic"
    )
    assert description["analytic"]["num"] == 2
    changed = {"stage", "analytic"}
    assert {k: v for k, v in description.items() if k not in changed} == {
        k: v for k, v in before.description.items() if k not in changed
    }
    jax.tree.map(np.testing.assert_array_equal, params["network"], before.params["network"])
    stored = json.loads((workdirs / "prior" / "model" / "config.json").read_text())
    assert stored["storage_dtype"] == "bfloat16", "the weights stay as narrow as they were"


def test_a_decoder_of_black_and_white_is_measured_on_pixels_and_may_keep_its_method(workdirs):
    arguments = ["--stage", str(workdirs / "decoder"), "--num", "1", "--method", "ddpm"]
    analytic.main([*arguments, "--batch_size", "8"])
    stage, params, _ = load_part(workdirs / "decoder" / "model")
    np.testing.assert_allclose(params["analytic"], np.ones(STEPS), rtol=1e-5)
    assert stage.analytic and stage.sampling == DECODER.sampling
    analytic.main([*arguments, "--batch_size", "8"])  # measuring again replaces the first
    np.testing.assert_array_equal(
        load_part(workdirs / "decoder").params["analytic"], params["analytic"]
    )


def draw(stage, params, statistic=None):
    if statistic is not None:
        sampling = dataclasses.replace(stage.sampling, method="analytic")
        stage = dataclasses.replace(stage, sampling=sampling, analytic=True)
        params = params | {"analytic": jnp.float32(statistic)}
    batch = tiny.batch(3, SIDE)
    if stage.kind == "prior":
        cond = stage.condition(batch["tokens"], batch["z_t"])
    else:
        cond = stage.condition_of(batch)
    return tiny.call(stage, "sample", params, example_keys(jax.random.key(0), 3), cond)


@pytest.mark.parametrize("stage", [PRIOR, DECODER], ids=["prior", "decoder"])
def test_a_network_that_knows_x_0_needs_no_more_than_the_posteriors_variance(stage, params):
    """Var(x_0 | x_t) = 0 leaves beta_tilde, DDPM's fixed variance; anything more is drawn with."""
    params = params[stage]
    fixed = draw(stage, params)
    np.testing.assert_allclose(draw(stage, params, np.zeros(STEPS)), fixed, atol=1e-5)
    assert np.abs(draw(stage, params, np.full(STEPS, 0.5)) - fixed).max() > 1e-3


@pytest.mark.parametrize("stage", [PRIOR, DECODER], ids=["prior", "decoder"])
def test_without_the_statistic_the_command_is_named(stage):
    sampling = dataclasses.replace(stage.sampling, method="analytic")
    with pytest.raises(UserError, match="unclip analytic --stage DIR"):
        dataclasses.replace(stage, sampling=sampling)


def test_training_from_the_beginning_cannot_have_it():
    stage = dataclasses.replace(DECODER, analytic=True)
    assert jax.eval_shape(stage.init, jax.random.key(0))["analytic"].shape == (STEPS,)
    config = {"stage": stages.describe(stage), "data": {}, "train": {}}
    with pytest.raises(UserError, match=r"config\.stage\.analytic: got True.*unclip analytic"):
        prepare.prepare(config)


@pytest.mark.parametrize(
    ("stage", "more", "message"),
    [
        ("clip", [], "holds a clip, expected a prior or a decoder"),
        ("prior", ["--num", "0"], "--num: got 0, expected an integer, 1 or more"),
        ("prior", ["--data", "no/such"], "no such folder"),
        ("prior", ["--clip", "gone"], "gone.*no such folder"),
        ("decoder", ["--t5", "t5"], "reads no text states"),
    ],
)
def test_mistakes_are_named(workdirs, stage, more, message):
    with pytest.raises(UserError, match=message):
        analytic.main(["--stage", str(workdirs / stage), *more])


def test_what_cannot_be_guessed_is_asked_for(workdirs, params):
    (workdirs / "clip").rename(workdirs.parent / "elsewhere")
    with pytest.raises(UserError, match=r"--clip: 0 CLIPs beside .*prior"):
        analytic.main(["--stage", str(workdirs / "prior")])
    description = model_folder.read_description(workdirs / "decoder" / "model")
    del description["data"]
    model_folder.save_stage(workdirs / "converted", params=params[DECODER], description=description)
    with pytest.raises(UserError, match=r"--data: .*does not say what it was trained on"):
        analytic.main(["--stage", str(workdirs / "converted")])
