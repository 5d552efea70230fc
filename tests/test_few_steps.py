"""Few steps: consistency distillation, and the prior of one forward pass."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.networks import said
from unclip_jax import stages
from unclip_jax.common import config as settings
from unclip_jax.diffusion import Diffusion, Sampling, sample
from unclip_jax.diffusion.consistency import distillation_loss
from unclip_jax.diffusion.gaussian import at
from unclip_jax.errors import UserError
from unclip_jax.pipeline.unclip import UnCLIP
from unclip_jax.stages.conditioning import example_keys
from unclip_jax.training import distillation, prepare
from unclip_jax.training.distillation import Distillation
from unclip_jax.weights.trained import Part

MEAN, STD, STEPS = 0.4, 0.3, 20


def gaussian(diffusion, spread=STD):
    """The best network for data N(MEAN, spread^2)."""
    process = diffusion.process()

    def denoise(x_t, t):
        alpha, sigma = at(process.alpha, t, x_t), at(process.sigma, t, x_t)
        gain = alpha * spread**2 / (alpha**2 * spread**2 + sigma**2)
        x_0 = MEAN + gain * (x_t - alpha * MEAN)
        return said(diffusion.prediction, x_0, x_t, alpha, sigma)

    return denoise


def consistent(diffusion):
    """Where the probability flow of the same data leads to from any x_t, in closed form."""
    process = diffusion.process()

    def denoise(x_t, t):
        alpha, sigma = at(process.alpha, t, x_t), at(process.sigma, t, x_t)
        now = jnp.sqrt(alpha**2 * STD**2 + sigma**2)
        x_0 = MEAN + STD / now * (x_t - alpha * MEAN)
        return said(diffusion.prediction, x_0, x_t, alpha, sigma)

    return denoise


@pytest.mark.parametrize(
    ("method", "schedule"),
    [("ddim", "cosine"), ("ddim", "scaled_linear"), ("heun", "scaled_linear")],
)
def test_the_exact_consistency_function_has_next_to_no_loss_and_the_teacher_has_some(
    method, schedule
):
    """What is left is the solver's error, which a finer grid makes smaller."""
    diffusion = Diffusion(prediction="v", schedule=schedule)
    x_0 = MEAN + STD * jax.random.normal(jax.random.key(0), (512, 3))
    noise = jax.random.normal(jax.random.key(1), x_0.shape)
    teacher = gaussian(diffusion)

    def apart(student, steps):
        i = jnp.arange(512) % steps
        sampling = Sampling(method, steps)
        given = diffusion, student, teacher, x_0, i, noise, sampling
        return float(jnp.mean(jax.jit(lambda: distillation_loss(*given))()))

    exact = [apart(consistent(diffusion), steps) for steps in (20, 160)]
    assert exact[1] < 0.4 * exact[0] and exact[0] < 0.3 * apart(teacher, 20)


def test_the_target_is_never_moved_and_clean_steps_are_the_teachers():
    diffusion, sampling = Diffusion(prediction="x_0"), Sampling("ddim", 5)
    x_0 = jax.random.normal(jax.random.key(0), (4, 2))

    def loss(answer, i):
        student = lambda x_t, t: jnp.broadcast_to(answer, x_t.shape)  # noqa: E731
        teacher = lambda x_t, t: jnp.full_like(x_t, 2.0)  # noqa: E731
        i = jnp.full(4, i)
        given = diffusion, student, teacher, x_0, i, jnp.zeros_like(x_0), sampling, 1e-6
        return jnp.mean(distillation_loss(*given))

    assert float(loss(0.5, 0)) == pytest.approx(1.5, rel=1e-4)  # to the teacher's 2
    assert float(loss(0.5, 3)) == pytest.approx(0.0, abs=1e-6)  # the same at both steps
    assert float(jax.grad(loss)(0.5, 0)) == pytest.approx(-1.0, rel=1e-3)


def test_what_clips_the_samples_clips_the_targets_at_every_step():
    diffusion, x_0 = Diffusion(prediction="x_0"), jnp.zeros((4, 2))
    far = lambda x_t, t: jnp.full_like(x_t, 3.0)  # noqa: E731

    def loss(i, clip):
        given = diffusion, far, far, x_0, jnp.full(4, i), x_0, Sampling("ddim", 5, clip_x_0=clip)
        return float(jnp.mean(distillation_loss(*given, 1e-6)))

    for i in range(5):
        assert loss(i, 1.0) == pytest.approx(2.0, rel=1e-4)  # from 3 to 1
        assert loss(i, 0.0) == pytest.approx(0.0, abs=1e-6)


def test_a_consistency_walk_draws_the_data_in_any_number_of_steps():
    diffusion = Diffusion(prediction="v")
    keys = jax.random.split(jax.random.key(0), 20_000)
    x_T = jax.random.normal(jax.random.key(1), (20_000, 1))
    for steps in (1, 2, 4):
        walk = jax.jit(
            lambda x, keys, n=steps: sample(
                consistent(diffusion), x, keys, diffusion, Sampling("consistency", n)
            )
        )
        drawn = walk(x_T, keys)
        assert float(drawn.mean()) == pytest.approx(MEAN, abs=0.01)
        assert float(drawn.std()) == pytest.approx(STD, rel=0.03)


# ---------------------------------------------------------------------------------- as stages


def few(stage):
    guided = {"guidance_scale": 1.0} if "guidance_scale" in stage.settings else {}
    return dataclasses.replace(stage, sampling=Sampling("consistency", "2"), **guided)


@pytest.mark.parametrize("kind", ["decoder", pytest.param("upsampler", marks=pytest.mark.slow)])
def test_a_stage_learns_from_itself_and_the_teacher_stays(kind):
    stage = few({"decoder": tiny.DECODER, "upsampler": tiny.UPSAMPLER}[kind])
    config = Distillation(steps=4, guidance_scale=2.0 if kind == "decoder" else 1.0)
    distillation.check(stage, config, has_origin=True)
    params = distillation.attach(tiny.params(stage))
    loss = distillation.loss(stage, config)
    batch = tiny.batch(2, stage.image_size)
    value, gradient = jax.jit(jax.value_and_grad(lambda p: loss(p, batch, jax.random.key(0))[0]))(
        params | {"network": params["network"]}
    )
    assert np.isfinite(value) and value > 0
    moved = {n: max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient[n])) for n in params
             if n.endswith("network")}  # fmt: skip
    assert moved["network"] > 0 and moved["base_network"] == 0
    assert set(distillation.detach(params)) == set(params) - {"base_network"}


def test_targets_are_thresholded_as_the_samples_will_be(monkeypatch):
    limits = {"clip_x_0": 0.5, "dynamic_percentile": 90.0, "dynamic_most": 1.5}
    stage, seen = types.SimpleNamespace(), []
    stage.sampling, stage.diffusion = Sampling("consistency", "2", **limits), Diffusion()
    stage.denoising = lambda params, batch, key: (jnp.zeros((2, 1)), lambda params, scale: None)

    def apart(*given):
        seen.append(given[6])
        return jnp.zeros(2)

    monkeypatch.setattr(distillation.consistency, "distillation_loss", apart)
    loss = distillation.loss(stage, Distillation(steps=4))
    loss(distillation.attach({"network": {}}), {}, jax.random.key(0))
    assert seen == [Sampling("ddim", 4, **limits)]


@pytest.mark.parametrize(
    ("stage", "fields", "origin", "message"),
    [
        (few(tiny.DECODER), {}, False, "without config.init"),
        (tiny.DECODER, {}, True, "samples by consistency"),
        (few(tiny.UPSAMPLER), {"guidance_scale": 2.0}, True, "a upsampler has no guidance"),
        (tiny.CLIP, {}, True, "0 for this clip, which cannot be distilled"),
    ],
)
def test_what_cannot_be_distilled_is_named(stage, fields, origin, message):
    with pytest.raises(UserError, match=message):
        distillation.check(stage, Distillation(steps=4, **fields), has_origin=origin)


@pytest.mark.parametrize("fields", [{"steps": 1}, {"method": "dpm++"}, {"huber": -1}])
def test_settings_out_of_range_are_named(fields):
    with pytest.raises(UserError, match=f"config.distillation.{next(iter(fields))}"):
        Distillation(**fields)


def test_the_boxs_config_is_its_decoders_with_few_steps():
    from configs.box import decoder, decoder_cd

    given = settings.build(prepare.Settings, decoder_cd.get_config())
    few_steps, whole = stages.build(given.stage), stages.build(decoder.get_config().stage)
    assert few(whole).sampling.method == few_steps.sampling.method
    scale = whole.guidance_scale
    assert dataclasses.replace(few_steps, sampling=whole.sampling, guidance_scale=scale) == whole
    distillation.check(few_steps, given.distillation, has_origin=bool(given.init))


# ------------------------------------------------------------------------------------- ECLIPSE

ECLIPSE = stages.EclipsePriorStage(model=tiny.PRIOR.model)


@pytest.mark.parametrize("variant", ["", "gpu"])
def test_the_boxs_config_has_the_network_of_its_prior(variant):
    from configs.box import eclipse_prior, prior

    given, whole = (
        settings.build(prepare.Settings, c.get_config(variant)) for c in (eclipse_prior, prior)
    )
    one_call = stages.build(given.stage)
    assert isinstance(one_call, stages.EclipsePriorStage)
    assert one_call.model == stages.build(whole.stage).model
    assert given.data == whole.data
    assert given.train.batch_size == whole.train.batch_size


def test_the_loss_is_a_projection_and_a_contrast_with_equal_captions_as_one():
    params, batch = tiny.params(ECLIPSE), tiny.batch(4, 16)
    batch["z_t"] = batch["z_t"].at[3].set(batch["z_t"][1])
    key = jax.random.key(5)
    loss, told = tiny.call(ECLIPSE, "loss", params, batch, key)
    noise = jax.random.normal(key, (4, tiny.DIM))
    cond = ECLIPSE.condition_of(batch)
    found = np.asarray(tiny.call(ECLIPSE, "predict", params, noise, cond), np.float64)
    projection = np.mean((found - np.float64(batch["z_i"])) ** 2)
    unit = lambda z: z / np.linalg.norm(z, axis=1, keepdims=True)  # noqa: E731
    logits = unit(found) @ unit(np.asarray(batch["z_t"], np.float64)).T / 0.07
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    own = chances[np.arange(4), np.arange(4)] + [0, chances[1, 3], 0, chances[3, 1]]
    contrast = -np.log(own).mean()
    assert float(told["projection"]) == pytest.approx(projection, rel=1e-4)
    assert float(told["contrast"]) == pytest.approx(contrast, rel=1e-3)
    assert float(loss) == pytest.approx(projection + 0.2 * contrast, rel=1e-3)


def test_a_model_with_it_draws_saves_loads_and_reports_one_step(tmp_path):
    model = tiny.model()
    about = {"stage": stages.describe(ECLIPSE)} | {
        "clip_fingerprint": model.prior.description["clip_fingerprint"]
    }
    part = Part(ECLIPSE, tiny.params(ECLIPSE), about)
    dataclasses.replace(model, prior=part).save(tmp_path / "model")
    config = json.loads((tmp_path / "model/prior/config.json").read_text())
    assert config["description"]["stage"]["kind"] == "eclipse_prior"
    loaded, seen = UnCLIP.load(tmp_path / "model"), []
    keys = example_keys(jax.random.key(0), 2)
    told = {"progress": lambda *step: seen.append(step)}
    z_i = np.asarray(loaded.sample_prior(keys, ["a dog", "a cat"], **told))
    assert seen == [("prior", 1, 1)]
    np.testing.assert_allclose(np.linalg.norm(z_i, axis=1), 1, rtol=1e-5)
    again = loaded.sample_prior(keys[:1], ["a dog"])
    np.testing.assert_allclose(again, z_i[:1], atol=1e-5)
    with pytest.raises(UserError, match="which has none"):
        loaded.sample_prior(keys, ["a"] * 2, noise=np.zeros((2, 1, tiny.DIM)))


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"contrast": -1}, {"contrast": "a"}])
def test_eclipse_settings_out_of_range_are_named(fields):
    with pytest.raises(UserError, match=f"stage.{next(iter(fields))}: got"):
        stages.EclipsePriorStage(model=tiny.PRIOR.model, **fields)
