"""Truths about schedules, respacing, the three predictions, posteriors and learned variances."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.diffusion.gaussian import (
    PREDICTIONS,
    Diffusion,
    eps_from_x_0,
    interpret,
    normal,
    predict,
    q_posterior,
    q_sample,
    target,
)
from unclip_jax.diffusion.schedules import Schedule
from unclip_jax.diffusion.thresholding import threshold
from unclip_jax.errors import UserError


def gaussians(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


# --------------------------------------------------------------------- schedules and respacing


@pytest.mark.parametrize(
    ("schedule", "theirs"),
    [
        ("cosine", "squaredcos_cap_v2"),
        ("linear", "linear"),
        ("sigmoid", "sigmoid"),
        (Schedule("scaled_linear", 1e-4, 0.02), "scaled_linear"),
    ],
)
def test_schedules_equal_diffusers(schedule, theirs):
    pytest.importorskip("diffusers")
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    reference = DDPMScheduler(
        num_train_timesteps=1000, beta_schedule=theirs, beta_start=1e-4, beta_end=0.02
    )
    process = Diffusion(schedule=schedule).process()
    np.testing.assert_allclose(process.betas, reference.betas, rtol=1e-4)
    np.testing.assert_allclose(process.alpha_bar, reference.alphas_cumprod, rtol=2e-3)


def test_cosine_alpha_bar_is_the_squared_cosine_until_betas_are_capped():
    steps = 1000
    t = (np.arange(steps) + 1) / steps
    expected = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    process = Diffusion(steps=steps).process()
    np.testing.assert_allclose(process.alpha_bar[:-1], expected[:-1], rtol=1e-6)
    assert process.betas.max() == np.float32(0.999)


@pytest.mark.parametrize("steps", [100, 4000])
def test_linear_schedule_destroys_as_much_whatever_its_length(steps):
    log_alpha_bar = np.log(Diffusion(steps=steps, schedule="linear").process().alpha_bar[-1])
    log_expected = np.log(Diffusion(steps=1000, schedule="linear").process().alpha_bar[-1])
    assert log_alpha_bar == pytest.approx(log_expected, rel=0.1)


@pytest.mark.parametrize("n", [2, 7, 25, 50, 999, 1000])
def test_spacing_is_karlos(n):
    expected = np.round(np.arange(n) * (999 / (n - 1)))
    np.testing.assert_array_equal(Diffusion().process(str(n)).timesteps, expected)


def test_spacings_by_section_and_stride():
    diffusion = Diffusion(steps=300)
    np.testing.assert_array_equal(
        diffusion.process("2,3,1").timesteps, [0, 99, 100, 150, 199, 299]
    )  # fewer steps where they matter less; a lone step is its section's noisiest
    np.testing.assert_array_equal(Diffusion().process("ddim25").timesteps, np.arange(0, 1000, 40))
    np.testing.assert_array_equal(Diffusion().process("1").timesteps, [999])
    assert Diffusion(steps=10).process("3,3,3").steps == 9  # sections of 4, 3 and 3


@pytest.mark.parametrize("spacing", ["1", "2", "25", "10,20,30", "ddim50", ""])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_respacing_keeps_alpha_bar_and_betas_step_along_it(schedule, spacing):
    diffusion = Diffusion(schedule=schedule)
    full, process = diffusion.process(), diffusion.process(spacing)
    np.testing.assert_array_equal(process.alpha_bar, full.alpha_bar[process.timesteps])
    assert np.all(np.diff(process.timesteps) > 0)
    stepped = (1 - process.betas.astype(np.float64)) * np.append(1, process.alpha_bar[:-1])
    np.testing.assert_allclose(stepped, process.alpha_bar, rtol=1e-6, atol=1e-7)


def test_tables_are_finite_shared_and_read_only():
    for steps, spacing in [(1000, ""), (1000, "1"), (1, ""), (4000, "1000"), (2, "")]:
        process = Diffusion(steps=steps).process(spacing)
        assert all(np.isfinite(table).all() for table in process)
        assert all(table.dtype == np.float32 for table in process[1:])
        assert process.timesteps.dtype == np.int32
        assert process is dataclasses.replace(Diffusion(steps=steps), prediction="v").process(
            spacing
        )
        with pytest.raises(ValueError, match="read-only"):
            process.betas[0] = 0


# ------------------------------------------------------------------------ the three predictions


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("shape", [(6, 5), (6, 4, 4, 3), (6,)])
def test_predictions_invert_q_sample(prediction, shape):
    diffusion = Diffusion(prediction=prediction)
    process = diffusion.process()
    i = jnp.array([0, 1, 100, 500, 900, 990])
    x_0, noise = gaussians(*shape), gaussians(*shape, seed=1)
    x_t = q_sample(process, x_0, i, noise)
    output = target(diffusion, process, x_0, i, noise)
    # dividing by sqrt(alpha_bar) or sqrt(1 - alpha_bar), both above 6e-3, magnifies float32's error
    found = predict(diffusion, process, output, x_t, i)
    np.testing.assert_allclose(found[0], x_0, atol=1e-4)
    np.testing.assert_allclose(found[1], noise, atol=1e-4)


def test_q_sample_has_the_marginals_of_the_chain_of_single_steps():
    process = Diffusion(steps=50).process()
    mean, variance = 1.0, 0.0
    for i, beta in enumerate(process.betas.astype(np.float64)):
        mean, variance = np.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        i = jnp.int32(i)
        signal = q_sample(process, jnp.ones((1, 1)), i, jnp.zeros((1, 1)))
        noise = q_sample(process, jnp.zeros((1, 1)), i, jnp.ones((1, 1)))
        np.testing.assert_allclose(signal, [[mean]], rtol=1e-4)
        np.testing.assert_allclose(noise**2, [[variance]], rtol=1e-4)


@pytest.mark.parametrize("spacing", ["", "25"])
def test_posterior_is_bayes_rule(spacing):
    """Multiply N(x_t; sqrt(a) x, b) and N(x; m, v) in x by adding precisions, in float64."""
    diffusion = Diffusion()
    process = diffusion.process(spacing)
    alpha_bar = exact_alpha_bar()[process.timesteps]
    i = np.array([1, 2, process.steps // 2, process.steps - 1])
    x_0, x_t = np.array(gaussians(4, 3), np.float64), np.array(gaussians(4, 3, seed=1), np.float64)
    before, now = alpha_bar[i - 1][:, None], alpha_bar[i][:, None]
    a = now / before
    precision = a / (1 - a) + 1 / (1 - before)
    mean = (np.sqrt(a) * x_t / (1 - a) + np.sqrt(before) * x_0 / (1 - before)) / precision
    ours = q_posterior(process, jnp.float32(x_0), jnp.float32(x_t), jnp.int32(i))
    np.testing.assert_allclose(ours[0], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours[1], 1 / precision, rtol=1e-5)
    np.testing.assert_allclose(ours[2], np.log(1 / precision), rtol=1e-5)


def exact_alpha_bar():
    """The capped cosine schedule, in float64, one step at a time."""
    alpha_bar, product = [], 1.0
    for t in range(1000):
        now, then = (np.cos((u / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2 for u in (t + 1, t))
        product *= max(now / then, 1e-3)
        alpha_bar.append(product)
    return np.array(alpha_bar)


def test_posterior_at_the_last_step_is_x_0_itself():
    process = Diffusion().process("10")
    x_0, x_t = gaussians(2, 3), gaussians(2, 3, seed=1)
    mean, variance, _ = q_posterior(process, x_0, x_t, jnp.int32(0))
    np.testing.assert_array_equal(mean, x_0)
    assert variance == 0


# --------------------------------------------------------------------------------- interpret


@pytest.mark.parametrize("spacing", ["", "25"])
def test_learned_variance_runs_from_beta_tilde_to_beta_of_the_respaced_process(spacing):
    diffusion = Diffusion(variance="learned_range")
    process = diffusion.process(spacing)
    i = jnp.arange(1, process.steps)
    x_t = gaussians(len(i), 2)
    for fraction, expected in [
        (-1.0, process.posterior_variance[1:]),
        (1.0, process.betas[1:]),
        (0.0, np.sqrt(process.posterior_variance[1:] * process.betas[1:])),
    ]:
        output = jnp.concatenate([x_t, jnp.full_like(x_t, fraction)], axis=-1)
        variance = jnp.exp(interpret(diffusion, process, output, x_t, i).log_variance)
        np.testing.assert_allclose(variance, np.stack([expected] * 2, axis=1), rtol=1e-5)


def test_fixed_variances():
    process = Diffusion().process("25")
    x_t = gaussians(2, 3)
    for variance, expected in [
        ("fixed_small", process.posterior_variance[7]),
        ("fixed_small_log", process.posterior_variance[7]),
        ("fixed_large", process.betas[7]),
    ]:
        log_variance = interpret(
            Diffusion(variance=variance), process, x_t, x_t, jnp.int32(7)
        ).log_variance
        np.testing.assert_allclose(jnp.exp(log_variance), np.full((2, 3), expected), rtol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_clipping_bounds_x_0_and_eps_follows_it(prediction):
    diffusion = Diffusion(prediction=prediction)
    process = diffusion.process("25")
    x_t, i = gaussians(3, 4, 4, 2), jnp.array([0, 12, 24])
    result = interpret(diffusion, process, 5 * gaussians(3, 4, 4, 2, seed=1), x_t, i, 1.0)
    assert jnp.abs(result.x_0).max() == 1
    np.testing.assert_allclose(q_sample(process, result.x_0, i, result.eps), x_t, atol=1e-5)


def test_without_clipping_the_output_is_taken_literally():
    output, x_t = gaussians(3, 4), gaussians(3, 4, seed=1)
    for prediction in ("eps", "x_0"):
        diffusion = Diffusion(prediction=prediction)
        result = interpret(diffusion, diffusion.process(), output, x_t, jnp.int32(3))
        np.testing.assert_array_equal(getattr(result, prediction), output)


def test_dynamic_thresholding_scales_each_example_by_its_own_percentile():
    x_0 = jnp.stack([jnp.linspace(-4, 4, 201), jnp.linspace(-0.5, 0.5, 201)])
    result = threshold(x_0, 0.0, 90.0)
    np.testing.assert_allclose(result[0], np.clip(np.linspace(-4, 4, 201) / 3.6, -1, 1), atol=1e-6)
    np.testing.assert_array_equal(result[1], x_0[1])  # already within [-1, 1]
    np.testing.assert_allclose(jnp.abs(threshold(x_0, 2.0, 90.0)).max(axis=1), [2, 0.5], rtol=1e-6)


def test_interpret_computes_in_float32():
    diffusion = Diffusion(variance="learned_range", loss="hybrid")
    output = gaussians(2, 8).astype(jnp.bfloat16)
    result = interpret(diffusion, diffusion.process(), output, gaussians(2, 4), jnp.int32(9))
    assert {x.dtype for x in result} == {jnp.dtype("float32")}


def test_eps_from_x_0_is_exact_at_both_ends():
    process = Diffusion().process()
    i = jnp.array([0, 999])
    x_0, noise = gaussians(2, 64), gaussians(2, 64, seed=1)
    eps = eps_from_x_0(process, q_sample(process, x_0, i, noise), i, x_0)
    np.testing.assert_allclose(eps, noise, atol=1e-4)


def test_noise_of_an_example_depends_on_its_key_alone():
    keys = jax.random.split(jax.random.key(3), 4)
    batch = normal(keys, (5, 2))
    assert batch.shape == (4, 5, 2)
    np.testing.assert_array_equal(batch[2:3], normal(keys[2:3], (5, 2)))


# --------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"steps": 0}, "steps: got 0"),
        ({"steps": 10.0}, "steps: got 10.0"),
        ({"steps": True}, "steps: got True"),
        ({"schedule": "squaredcos"}, "squaredcos.*cosine, linear"),
        ({"prediction": "epsilon"}, "epsilon.*eps, x_0, v"),
        ({"variance": "learned"}, "learned_range"),
        ({"loss": "mse"}, "simple, hybrid"),
        ({"likelihood": "uniform"}, "8bit, gaussian"),
        ({"min_snr_gamma": -1.0}, "min_snr_gamma: got -1.0"),
        ({"min_snr_gamma": float("nan")}, "min_snr_gamma: got nan"),
        ({"timestep_shift": 0.0}, "timestep_shift: got 0"),
        ({"timestep_shift": float("inf")}, "timestep_shift: got inf"),
        ({"schedule": "linear", "steps": 20}, "got 20, expected more than 20"),
        ({"loss": "hybrid"}, 'variance="learned_range"'),
    ],
)
def test_bad_fields_are_named(fields, words):
    with pytest.raises(UserError, match=words) as error:
        Diffusion(**fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "spacing",
    ["0", "1001", "25,", "-3", "ddim", "ddim0", "ddim1", "ddim7000", "600,600", "a", " 25", 0],
)
def test_bad_spacings_are_named(spacing):
    with pytest.raises(UserError, match="spacing: got"):
        Diffusion().process(spacing)


def test_network_of_the_wrong_width_is_named():
    diffusion = Diffusion(variance="learned_range")
    x_t = gaussians(2, 4)
    with pytest.raises(UserError, match=r"\(2, 4\), expected \(2, 8\)"):
        interpret(diffusion, diffusion.process(), x_t, x_t, jnp.int32(0))


@pytest.mark.parametrize("keys", [jax.random.PRNGKey(0), jax.random.key(0), jnp.zeros((2, 2))])
def test_lone_keys_and_what_is_none_are_named(keys):
    with pytest.raises(UserError, match="one typed key per example"):
        normal(keys, (2,))


def test_legacy_keys_draw_what_typed_ones_do():
    keys = jax.random.split(jax.random.key(0), 2)
    np.testing.assert_array_equal(normal(jax.random.key_data(keys), (3,)), normal(keys, (3,)))
