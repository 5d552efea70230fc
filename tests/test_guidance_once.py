"""Guidance of scale 1 is the conditional model: its network is asked once for each example."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tests import tiny
from tests.test_ar_prior import STAGE as AR_STAGE
from unclip_jax import stages
from unclip_jax.common import checks
from unclip_jax.diffusion import guidance
from unclip_jax.diffusion.samplers import Sampling, sample
from unclip_jax.errors import UserError
from unclip_jax.pipeline import class_conditional, manipulate
from unclip_jax.pipeline.manipulate import Walk
from unclip_jax.weights.export import program
from unclip_jax.weights.trained import Part

KEY = jax.random.key(5)
HOLE = np.eye(16, dtype=bool)
PICTURE = np.zeros((16, 16, 3), np.uint8)
ONES = [1, 1.0, np.float32(1), np.int64(1), np.array(1.0), jnp.float32(1), ml_dtypes.bfloat16(1)]


@pytest.fixture
def rows(monkeypatch):
    """How many rows each network is traced with, by the kind of its stage."""
    seen = {}
    for kind in (stages.PriorStage, stages.DecoderStage, stages.UpsamplerStage):
        whole = kind.denoise

        def denoise(self, params, x_t, *rest, whole=whole, **named):
            seen.setdefault(self.kind, set()).add(x_t.shape[0])
            return whole(self, params, x_t, *rest, **named)

        monkeypatch.setattr(kind, "denoise", denoise)
    jax.clear_caches()
    yield seen
    jax.clear_caches()


def with_scale(model, scale):
    """The model with this scale as its own."""
    return dataclasses.replace(
        model,
        prior=model.prior._replace(
            stage=dataclasses.replace(model.prior.stage, guidance_scale=scale)
        ),
        decoder=model.decoder._replace(
            stage=dataclasses.replace(model.decoder.stage, guidance_scale=scale)
        ),
    )


def drawn(model, scale):
    scales = {"guidance_scale": scale, "prior_guidance_scale": scale}
    return model.generate(KEY, ["a dog"], num=3, **scales)


def drawn_by_its_own(model, scale):
    return with_scale(model, float(scale)).generate(KEY, ["a dog"], num=3)


def painted(model, scale):
    walk = Walk(steps=4, eta=1.0, guidance_scale=scale, caption="a dog")
    return manipulate.inpaint(with_scale(model, float(scale)), KEY, PICTURE, HOLE, walk, num=3)


def varied(model, scale):
    return model.variations(KEY, PICTURE[None], num=3, guidance_scale=scale)


ROUTES = {drawn: "prior decoder", drawn_by_its_own: "prior decoder", painted: "prior decoder",
          varied: "decoder"}  # fmt: skip


HEAVY = [pytest.param(route, marks=pytest.mark.slow) for route in (drawn_by_its_own, painted)]


@pytest.mark.parametrize("route", [drawn, varied, *HEAVY])
def test_a_scale_of_1_runs_every_network_once(route, rows):
    model, draws = tiny.model(), {"prior": 3 * tiny.PRIOR.draws, "decoder": 3, "upsampler": 3}
    route(model, 1.0)
    once = {kind: {draws[kind]} for kind in (*ROUTES[route].split(), "upsampler")}
    assert rows == once
    rows.clear()
    route(model, 2.0)
    once.pop("upsampler")
    assert {k: rows[k] for k in once} == {kind: {2 * n for n in once[kind]} for kind in once}


def test_inversion_runs_the_network_once(rows):
    manipulate.encode(tiny.model(), [PICTURE] * 3, Walk(steps=4, guidance_scale=3.0))
    assert rows == {"decoder": {3}}


def test_class_conditional_pictures_run_the_network_once(rows):
    unet = dataclasses.replace(tiny.DECODER.model.unet, context_dim=0)
    model = dataclasses.replace(
        tiny.DECODER.model, unet=unet, text=None, embed_dim=0, num_classes=3
    )
    stage = dataclasses.replace(tiny.DECODER, model=model)
    part = Part(stage, tiny.params(stage), {"classes": ["a", "b", "c"]})
    for scale, times in ((1, 1), (np.float32(1), 1), (2.0, 2)):
        class_conditional.generate(KEY, part, ["a", "c"], guidance_scale=scale)
        assert rows.pop("decoder") == {2 * times}
        jax.clear_caches()


@pytest.mark.parametrize("scale", ONES)
def test_a_1_of_any_type_is_1(scale):
    assert guidance.changes_nothing(scale)
    assert tiny.DECODER.guided_by(scale) == {}
    asked = []

    def network(x_t, t, cond):
        asked.append(x_t.shape)
        return x_t + cond

    denoise = guidance.classifier_free(network, jnp.ones((2, 4)), jnp.zeros((2, 4)), scale)
    np.testing.assert_array_equal(denoise(jnp.ones((2, 4)), jnp.zeros(2, jnp.int32)), 2)
    assert asked == [(2, 4)]


def test_the_autoregressive_prior_runs_its_network_once_and_draws_the_same(monkeypatch):
    params, keys = tiny.params(AR_STAGE), jax.random.split(KEY, 3)
    cond = AR_STAGE.condition(jnp.ones((3, AR_STAGE.context[0]), jnp.int32),
                              jnp.ones((3, AR_STAGE.model.embed_dim)))  # fmt: skip
    seen, whole = set(), type(AR_STAGE).apply

    def apply(self, params, *inputs, **named):
        seen.add((named["method"], inputs[0].shape[0]))
        return whole(self, params, *inputs, **named)

    monkeypatch.setattr(type(AR_STAGE), "apply", apply)
    codes = AR_STAGE.draw_codes(params, keys, cond, guidance_scale=np.float32(1))
    assert seen == {("prefill", 3), ("step", 3)}
    traced = jax.jit(functools.partial(AR_STAGE.draw_codes, params, keys, cond))
    np.testing.assert_array_equal(codes, traced(guidance_scale=1.0))
    assert ("step", 6) in seen


def test_an_exported_program_runs_the_network_once_at_scale_1():
    sampler = program.sampler(tiny.DECODER, "decoder")
    inputs = {
        name: jnp.ones([2 if size == "b" else size for size in one.shape], one.dtype)
        for name, one in sampler.inputs.items()
    }
    params = tiny.params(tiny.DECODER)
    text = str(jax.make_jaxpr(sampler.run)(params, inputs))
    assert "cond[" in text
    run = jax.jit(sampler.run)
    drawn = {}
    for scale in (1.0, 2.0):
        made = run(params, inputs | {"guidance_scale": jnp.float32(scale)})["images"]
        cond = tiny.DECODER.condition_of(inputs, inputs["text_mask"])
        keys = jax.random.wrap_key_data(inputs["keys"], impl="threefry2x32")
        sample = functools.partial(tiny.DECODER.sample, guidance_scale=scale)
        own = jax.jit(sample)(params, keys, cond)
        np.testing.assert_allclose(made, own, atol=2e-4)
        drawn[scale] = made
    assert np.abs(drawn[1.0] - drawn[2.0]).max() > 1e-2


# ------------------------------------------------------------------------- numbers of any type


@pytest.mark.parametrize("make", [float, np.float32, np.float64, np.array, jnp.float32, jnp.array])
def test_numbers_of_any_type_are_checked_as_plain_ones(make):
    x_T, keys, diffusion = jnp.ones((2, 4)), jax.random.split(KEY, 2), tiny.DECODER.diffusion

    def walk(method, eta):
        learned = lambda x_t, t: jnp.concatenate([x_t, x_t], axis=-1)  # noqa: E731
        return sample(learned, x_T, keys, diffusion, Sampling(method, "4"), eta=make(eta))

    for eta in (2.0, -0.5, np.nan):
        with pytest.raises(UserError, match=f"eta: got {eta}, expected a finite number"):
            walk("ddim", eta)
    for method in ("ddpm", "dpm++"):
        with pytest.raises(UserError, match=r'eta: got 0\.5.*use method="ddim"'):
            walk(method, 0.5)
        assert np.isfinite(walk(method, 0.0)).all()
    with pytest.raises(UserError, match="guidance scale: got nan"):
        guidance.classifier_free(lambda x, t, c: x, x_T, x_T, make(np.nan))
    with pytest.raises(UserError, match="guidance_scale: got inf"):
        tiny.model().generate(KEY, ["a dog"], guidance_scale=make(np.inf))
    for fields in ({"eta": make(1.5)}, {"guidance_scale": make(np.nan)}, {"steps": make(4.0)}):
        with pytest.raises(UserError, match=f"{next(iter(fields))}: got"):
            Walk(**fields)
    noisy = dataclasses.replace(tiny.UPSAMPLER, noise_max=0.2)
    with pytest.raises(UserError, match=r"noise_level: got .*0\.5"):
        noisy.sample({}, keys, jnp.zeros((2, 16, 16, 3)), noise_level=make(0.5))
    with pytest.raises(UserError, match=r"clip_x_0: got -1\.0"):
        Sampling(clip_x_0=make(-1.0))
    assert hash(Sampling(clip_x_0=make(1.0))) == hash(Sampling(clip_x_0=1.0))
    assert Walk(steps=np.int64(4), eta=make(1.0), guidance_scale=make(2.0)) == Walk(4, 1.0, 2.0)


def test_an_eta_of_nothing_draws_nothing_whatever_its_type():
    def walk(eta):
        return sample(
            lambda x_t, t: jnp.concatenate([x_t, x_t], axis=-1), jnp.ones((2, 4)),
            jax.random.split(KEY, 2), tiny.DECODER.diffusion, Sampling("ddim", "4"), eta=eta,
        )  # fmt: skip

    for zero in (0, np.float32(0), jnp.zeros(())):
        np.testing.assert_array_equal(walk(zero), walk(0.0))


def test_numbers_that_are_none_are_refused():
    for value in (True, np.bool_(True), jnp.array(True), "1", None, 1j, np.ones(1)):
        with pytest.raises(UserError, match="x: got"):
            checks.number("x", value)
        with pytest.raises(UserError, match="x: got"):
            checks.count("x", value)
    assert checks.count("x", jnp.int32(3)) == 3 and type(checks.count("x", np.array(3))) is int
    with pytest.raises(UserError, match=r"x: got 3\.0"):
        checks.count("x", jnp.float32(3))


def test_a_classifier_of_scale_0_is_not_asked():
    def log_prob(x_t, t):
        raise AssertionError("asked")

    for zero in (0, 0.0, np.float32(0), jnp.zeros(())):
        denoise = guidance.classifier_guided(
            lambda x_t, t: 2 * x_t, log_prob, zero, tiny.DECODER.diffusion
        )
        np.testing.assert_array_equal(denoise(jnp.ones((2, 4)), jnp.zeros(2, jnp.int32)), 2)
