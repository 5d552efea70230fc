"""Truths about the samplers: exact models whose marginals and flows are known in closed form."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, stats

from tests.networks import said
from unclip_jax.diffusion import analytic
from unclip_jax.diffusion.gaussian import PREDICTIONS, Diffusion, at, normal
from unclip_jax.diffusion.guidance import classifier_free, classifier_guided
from unclip_jax.diffusion.samplers import METHODS, Sampling, invert, sample
from unclip_jax.errors import UserError

KEY = jax.random.key(0)
# A mixture of two Gaussians on the line.
WEIGHTS, MEANS, STDS = np.array([0.3, 0.7]), np.array([-1.0, 0.8]), np.array([0.4, 0.5])


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def noise_like(*shape, seed=7):
    return jax.random.normal(jax.random.key(seed), shape)


def as_output(diffusion, x_0, x_t, t):
    """What a network that knows x_0 says, in the words of its prediction."""
    process = diffusion.process()
    alpha, sigma = at(process.sqrt_alpha_bar, t, x_t), at(process.sqrt_one_minus_alpha_bar, t, x_t)
    return said(diffusion.prediction, x_0, x_t, alpha, sigma)


def gaussian_denoiser(diffusion, mean, std):
    """The optimal network for data N(mean, std^2)."""

    def denoise(x_t, t):
        alpha_bar = at(diffusion.process().alpha_bar, t, x_t)
        gain = jnp.sqrt(alpha_bar) * std**2 / (alpha_bar * std**2 + 1 - alpha_bar)
        x_0 = mean + gain * (x_t - jnp.sqrt(alpha_bar) * mean)
        return as_output(diffusion, x_0, x_t, t)

    return denoise


def mixture_denoiser(diffusion):
    """The optimal network for the mixture: responsibilities times each component's posterior."""

    def denoise(x_t, t):
        alpha_bar = at(diffusion.process().alpha_bar, t, x_t)
        alpha = jnp.sqrt(alpha_bar)
        log_weights, guesses = [], []
        for weight, mean, std in zip(WEIGHTS, MEANS, STDS, strict=True):
            variance = alpha_bar * std**2 + 1 - alpha_bar
            gap = x_t - alpha * mean
            log_weights.append(np.log(weight) - 0.5 * (gap**2 / variance + jnp.log(variance)))
            guesses.append(mean + alpha * std**2 / variance * gap)
        share = jax.nn.softmax(jnp.stack(log_weights), axis=0)
        return as_output(diffusion, jnp.sum(share * jnp.stack(guesses), axis=0), x_t, t)

    return denoise


def mixture_cdf(x, alpha_bar):
    stds = np.sqrt(alpha_bar * STDS**2 + 1 - alpha_bar)
    return np.sum(WEIGHTS * stats.norm.cdf((x - np.sqrt(alpha_bar) * MEANS) / stds))


def mixture_flow(x_T, alpha_bar_T):
    """Where the probability flow takes x_T: on the line it keeps the cumulative probability."""

    def follow(x_t):
        below = mixture_cdf(x_t, alpha_bar_T)
        return optimize.brentq(lambda x: mixture_cdf(x, 1.0) - below, -9, 9)

    return np.vectorize(follow)(np.asarray(x_T, np.float64))


# ------------------------------------------------------------------- known marginals and flows


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("method", ["ddim", "dpm++"])
def test_the_flow_of_gaussian_data_is_affine(method, prediction):
    diffusion = Diffusion(prediction=prediction)
    denoise = gaussian_denoiser(diffusion, 0.7, 0.3)
    x_T = noise_like(3, 16)
    walk = jax.jit(lambda x: sample(denoise, x, keys(3), diffusion, Sampling(method)))
    # Error of first order in 1000 steps for DDIM.
    np.testing.assert_allclose(walk(x_T), 0.7 + 0.3 * x_T, atol=5e-3)


@pytest.mark.parametrize("shape", [(2, 30_000), (2, 100, 100, 3)])
def test_ddpm_reaches_the_marginal(shape):
    diffusion = Diffusion(variance="fixed_small")
    denoise = gaussian_denoiser(diffusion, 0.7, 0.3)
    x_0 = jax.jit(lambda x: sample(denoise, x, keys(2), diffusion, Sampling(spacing="250")))(
        noise_like(*shape)
    )
    assert x_0.shape == shape
    assert float(x_0.mean()) == pytest.approx(0.7, abs=0.01)
    assert float(x_0.std()) == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("spacing", ["3", "8", "2,4"])
def test_analytic_variance_is_exact_for_gaussian_data_at_any_number_of_steps(spacing):
    """The reverse steps of Gaussian data are Gaussian: with the optimal variance few steps lose
    nothing, while beta_tilde, which takes x_0 for known, ends too narrow."""
    mean, std = 0.7, 0.8
    diffusion = Diffusion()
    alpha_bar = diffusion.process().alpha_bar.astype(np.float64)
    statistic = 1 / (1 / std**2 + alpha_bar / (1 - alpha_bar))  # posterior precision adds up
    denoise = gaussian_denoiser(diffusion, mean, std)
    x_T = noise_like(1, 60_000)

    def spread(method):
        sampling = Sampling(method, spacing)
        return jax.jit(lambda x, s: sample(denoise, x, keys(1), diffusion, sampling, analytic=s))(
            x_T, jnp.float32(statistic)
        ).std()

    # The last step adds no noise, which loses Var(x_0 | x_1): next to nothing at timestep 0.
    assert float(spread("analytic")) == pytest.approx(std, rel=0.01)
    assert float(spread("ddpm")) < 0.97 * std


def test_analytic_variance_is_the_papers_theorem_1():
    """sigma^2 = lambda^2 + (sqrt(bb/a) - sqrt(bb_prev - lambda^2))^2 (1 - Gamma), in float64."""
    std = 0.6
    process = Diffusion().process("64")
    alpha_bar = process.alpha_bar.astype(np.float64)
    before = np.append(1.0, alpha_bar[:-1])
    alpha, b_bar, b_bar_prev = alpha_bar / before, 1 - alpha_bar, 1 - before
    square = b_bar_prev / b_bar * (1 - alpha)
    gamma = b_bar / (
        alpha_bar * std**2 + b_bar
    )  # E |eps(x_t)|^2, eps(x) = sqrt(bb) x / V, E x^2 = V
    gap = np.sqrt(b_bar / alpha) - np.sqrt(np.maximum(b_bar_prev - square, 0))
    expected = square + gap**2 * (1 - gamma)
    statistic = (1 - gamma) * b_bar / alpha_bar
    ours = analytic.variance(process, jnp.float32(statistic))
    np.testing.assert_allclose(ours[1:], expected[1:], rtol=2e-3)


def test_analytic_variance_of_unit_gaussian_data_is_beta():
    process = Diffusion().process("10")
    variance = analytic.variance(process, process.sqrt_one_minus_alpha_bar**2)  # 1 / (1 + SNR)
    np.testing.assert_allclose(variance, process.betas, rtol=1e-4)


def test_analytic_variance_keeps_its_bounds():
    process = Diffusion().process("10")
    huge = jnp.full(10, 1e6)
    bounded = analytic.variance(process, huge, clip_x_0=1.0)
    np.testing.assert_allclose(
        bounded, process.posterior_variance + process.posterior_mean_x_0**2, rtol=1e-6
    )
    quiet = analytic.variance(process, huge, last_noise=2 / 255)
    mean_noise = stats.halfnorm(scale=np.sqrt(float(quiet[1]))).mean()
    assert mean_noise == pytest.approx(2 / 255, rel=1e-5)
    np.testing.assert_array_equal(quiet[2:], analytic.variance(process, huge)[2:])


def test_second_order_converges_faster_than_first():
    """Against the exact flow of the mixture, found from cumulative probabilities in float64."""
    diffusion = Diffusion(prediction="eps")
    denoise = mixture_denoiser(diffusion)
    x_T = jnp.linspace(-2, 2, 41)[None]
    truth = mixture_flow(x_T, float(diffusion.process().alpha_bar[-1]))

    def error(method, spacing):
        walk = jax.jit(lambda x: sample(denoise, x, keys(1), diffusion, Sampling(method, spacing)))
        return float(np.sqrt(np.mean((walk(x_T) - truth) ** 2)))

    first = [error("ddim", n) for n in ("10", "20", "40")]
    second = [error("dpm++", n) for n in ("10", "20", "40")]
    assert all(b < 0.25 * a for a, b in zip(first, second, strict=True))
    assert second[1] / second[2] > 3.5 > 2.5 > first[1] / first[2] > 1.5  # halving h: 4 against 2
    assert error("ddim", "") < 0.01


# ------------------------------------------------------------------------------------- inversion


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_inversion_then_decoding_returns_the_input(prediction):
    diffusion = Diffusion(prediction=prediction)
    denoise = mixture_denoiser(diffusion)
    x_0 = jnp.linspace(-1.8, 1.8, 31)[None]

    @functools.partial(jax.jit, static_argnums=1)
    def there_and_back(x_0, sampling):
        x_T = invert(denoise, x_0, diffusion, sampling)
        return x_T, sample(denoise, x_T, keys(1), diffusion, sampling)

    x_T, back = there_and_back(x_0, Sampling("ddim"))
    np.testing.assert_allclose(back, x_0, atol=6e-3)
    np.testing.assert_allclose(
        mixture_flow(x_T, float(diffusion.process().alpha_bar[-1])), x_0, atol=1e-2
    )
    few = there_and_back(x_0, Sampling("ddim", "50"))[1]
    assert np.abs(back - x_0).max() < 0.2 * np.abs(few - x_0).max()


def test_a_point_is_inverted_exactly_in_one_step():
    diffusion = Diffusion(prediction="x_0")
    point = noise_like(2, 3)
    denoise = lambda x_t, t: point  # noqa: E731
    sampling = Sampling("ddim", "4")
    x_T = invert(denoise, point, diffusion, sampling)
    np.testing.assert_allclose(sample(denoise, x_T, keys(2), diffusion, sampling), point, atol=1e-6)


# -------------------------------------------------------------- identities between the methods


def test_ddim_with_eta_1_is_ddpm():
    diffusion = Diffusion(variance="fixed_small")
    denoise, x_T = mixture_denoiser(diffusion), noise_like(2, 9)
    by_ddim, by_ddpm = (
        sample(denoise, x_T, keys(2), diffusion, Sampling(method, "12"), eta=eta)
        for method, eta in [("ddim", 1.0), ("ddpm", 0.0)]
    )
    np.testing.assert_allclose(by_ddim, by_ddpm, atol=2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_one_step_returns_the_networks_x_0(method):
    diffusion = Diffusion(prediction="x_0")
    guess = noise_like(2, 4, seed=1)
    asked = []

    def denoise(x_t, t):
        jax.debug.callback(lambda t: asked.append(np.asarray(t)), t)
        return guess

    x_0 = sample(
        denoise,
        noise_like(2, 4),
        keys(2),
        diffusion,
        Sampling(method, "1"),
        analytic=jnp.ones(1000),
    )
    jax.effects_barrier()
    np.testing.assert_array_equal(asked, [[999, 999]])
    np.testing.assert_allclose(x_0, guess, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_the_last_step_adds_no_noise(method):
    """A network that is sure of its x_0 gets exactly it, whatever the noise before."""
    diffusion = Diffusion(prediction="x_0", variance="fixed_large")
    guess = noise_like(2, 4, seed=1)
    x_0 = sample(
        lambda x_t, t: guess,
        noise_like(2, 4),
        keys(2),
        diffusion,
        Sampling(method, "6"),
        eta=1.0 if method == "ddim" else 0.0,
        analytic=jnp.ones(1000),
    )
    np.testing.assert_allclose(x_0, guess, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_noise_that_is_given_is_the_noise_that_is_added(method):
    diffusion, sampling = Diffusion(), Sampling(method, "6")
    options = {"eta": 0.5 if method == "ddim" else 0.0, "analytic": jnp.full(1000, 0.1)}
    denoise, x_T = mixture_denoiser(diffusion), noise_like(2, 4)
    drawn = [normal(jax.vmap(jax.random.fold_in, (0, None))(keys(2), i), (4,)) for i in range(6)]
    noise = jnp.stack(drawn[:0:-1], axis=1)  # the noisiest step's first, none for the last
    by_keys = sample(denoise, x_T, keys(2), diffusion, sampling, **options)
    given = sample(denoise, x_T, None, diffusion, sampling, noise=noise, **options)
    np.testing.assert_allclose(given, by_keys, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_does_not_depend_on_its_batch(method):
    diffusion = Diffusion()
    denoise, x_T = mixture_denoiser(diffusion), noise_like(4, 3, 3, 2)

    def walk(x_T, keys):
        sampling = Sampling(method, "6", clip_x_0=2.0)
        eta = 0.5 if method == "ddim" else 0.0
        statistic = jnp.full(1000, 0.1)
        return sample(denoise, x_T, keys, diffusion, sampling, eta=eta, analytic=statistic)

    batch, walk = jax.jit(walk)(x_T, keys(4)), jax.jit(walk)
    single = np.concatenate([walk(x_T[j : j + 1], keys(4)[j : j + 1]) for j in range(4)])
    np.testing.assert_allclose(batch, single, atol=1e-6)
    other = walk(x_T, keys(4, seed=1))
    found = METHODS[method]
    deterministic = found.inverse is not None and "eta" not in found.uses
    assert np.allclose(other, batch) == deterministic  # else it does depend on its key


def test_a_network_in_bfloat16_has_a_float32_walk():
    diffusion = Diffusion()

    def denoise(x_t, t):
        assert x_t.dtype == jnp.float32
        return jnp.zeros_like(x_t, jnp.bfloat16)

    x_T = noise_like(2, 3).astype(jnp.bfloat16)
    assert sample(denoise, x_T, keys(2), diffusion, Sampling(spacing="3")).dtype == jnp.float32


def test_clipping_keeps_samples_in_range():
    diffusion = Diffusion()
    wild = lambda x_t, t: 3 * jnp.sin(40 * x_t)  # noqa: E731
    for sampling in [
        Sampling("ddim", "9", clip_x_0=1.0),
        Sampling("ddim", "9", dynamic_percentile=95.0),
        Sampling("dpm++", "9", clip_x_0=1.0),
    ]:
        x_0 = sample(wild, noise_like(2, 50), keys(2), diffusion, sampling)
        assert np.abs(x_0).max() <= 1 + 1e-6


# --------------------------------------------------------------------------- an outside witness


@pytest.mark.parametrize(
    ("prediction", "variance", "clip"),
    [
        ("x_0", "fixed_small_log", 5.0),
        ("eps", "learned_range", 1.0),
        ("eps", "fixed_small_log", 1.0),
    ],
)
def test_every_step_equals_karlos_scheduler(prediction, variance, clip, monkeypatch):
    pytest.importorskip("diffusers")
    import torch
    from diffusers.schedulers import scheduling_unclip

    diffusion = Diffusion(prediction=prediction, variance=variance)
    n, shape = 7, (2, 4, 4, 3)
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(3, 6 if diffusion.learned_variance else 3)).astype(np.float32)
    visited = {}

    def record(x_t, t):
        visited[int(t[0])] = np.asarray(x_t)

    def denoise(x_t, t):
        jax.debug.callback(record, x_t, t)
        return jnp.tanh(x_t @ mix + 0.001 * t[:, None, None, None])

    x_T = noise_like(*shape)
    ours = sample(denoise, x_T, keys(2), diffusion, Sampling(spacing=str(n), clip_x_0=clip))
    jax.effects_barrier()

    scheduler = scheduling_unclip.UnCLIPScheduler(
        variance_type=variance,
        prediction_type={"x_0": "sample", "eps": "epsilon"}[prediction],
        clip_sample_range=clip,
    )
    # Its own tables, multiplied up in float32, are off by as much as 2e-3.
    scheduler.betas = scheduler.betas.double()
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = torch.cumprod(scheduler.alphas, dim=0)
    scheduler.set_timesteps(n)
    timesteps = [int(t) for t in scheduler.timesteps]
    x = torch.from_numpy(np.array(x_T)).permute(0, 3, 1, 2)
    for step, t in enumerate(timesteps):
        np.testing.assert_allclose(visited[t], x.permute(0, 2, 3, 1), atol=2e-5)
        noise = normal(jax.vmap(jax.random.fold_in, (0, None))(keys(2), n - 1 - step), shape[1:])
        noise = torch.from_numpy(np.array(noise)).permute(0, 3, 1, 2)
        monkeypatch.setattr(scheduling_unclip, "randn_tensor", lambda *_, z=noise, **__: z)
        output = torch.tanh(x.permute(0, 2, 3, 1) @ torch.from_numpy(mix) + 0.001 * t)
        before = timesteps[step + 1] if step + 1 < n else None
        x = scheduler.step(output.permute(0, 3, 1, 2), t, x, prev_timestep=before).prev_sample
    np.testing.assert_allclose(ours, x.permute(0, 2, 3, 1), atol=2e-5)


# -------------------------------------------------------------------------------------- guidance


def linear_network(x_t, t, cond):
    """Rows never meet; eight output channels of four data channels."""
    mix = jnp.linspace(-1, 1, 32).reshape(4, 8)
    return jnp.tanh(x_t @ mix + cond["y"] + 0.001 * t[:, None])


COND = {"y": noise_like(3, 8, seed=2)}
NULL = {"y": jnp.zeros((3, 8))}


@pytest.mark.parametrize("learned_variance", [False, True])
def test_guidance_of_scale_1_is_the_conditional_model_bit_for_bit(learned_variance):
    x_t, t = noise_like(3, 4), jnp.array([1, 50, 900])
    conditional = linear_network(x_t, t, COND)
    for scale in (1.0, jnp.float32(1.0), jnp.ones(3)):
        guided = classifier_free(linear_network, COND, NULL, scale, learned_variance)
        np.testing.assert_array_equal(guided(x_t, t), conditional)


def test_guidance_extrapolates_the_prediction_and_leaves_the_variance():
    x_t, t = noise_like(3, 4), jnp.array([1, 50, 900])
    c, u = (np.float64(linear_network(x_t, t, y)) for y in (COND, NULL))
    scale = jnp.array([0.0, 3.0, 8.0])
    guided = classifier_free(linear_network, COND, NULL, scale, True)(x_t, t)
    expected = u + np.asarray(scale)[:, None] * (c - u)
    np.testing.assert_allclose(guided[:, :4], expected[:, :4], atol=1e-5)
    np.testing.assert_array_equal(guided[:, 4:], linear_network(x_t, t, COND)[:, 4:])


def test_guidance_asks_the_network_once_per_step_for_both():
    shapes, calls = [], []

    def network(x_t, t, cond):
        shapes.append((x_t.shape, t.shape, cond["y"].shape))
        jax.debug.callback(lambda: calls.append(1))
        return linear_network(x_t, t, cond)[:, :4]

    denoise = classifier_free(network, COND, NULL, jnp.float32(2.0))
    sample(denoise, noise_like(3, 4), keys(3), Diffusion(), Sampling(spacing="5"))
    jax.effects_barrier()
    assert set(shapes) == {((6, 4), (6,), (6, 8))}
    assert len(calls) == 5


def test_guidance_encodes_both_conditions_once_and_in_any_layout():
    encoded = []

    def encode(cond):
        encoded.append(cond["y"].shape)
        return cond["y"].T

    def network(x_t, t, transposed):
        return linear_network(x_t, t, {"y": transposed.T})

    x_t, t = noise_like(3, 4), jnp.array([1, 50, 900])
    for scale, rows in ((1, 3), (jnp.float32(2.5), 6)):
        expected = classifier_free(linear_network, COND, NULL, scale)(x_t, t)
        denoise = classifier_free(network, COND, NULL, scale, encode=encode)
        np.testing.assert_array_equal(denoise(x_t, t), expected)
        denoise(x_t, t)
        assert encoded.pop() == (rows, 8) and not encoded


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_guidance_means_the_same_for_every_prediction(prediction):
    """Of experts N(m, s^2) with one s, guidance makes N(m_null + scale (m_cond - m_null), s^2)."""
    diffusion = Diffusion(prediction=prediction)

    def network(x_t, t, cond):
        return gaussian_denoiser(diffusion, cond, 0.3)(x_t, t)

    cond, null = jnp.full((2, 1), 0.5), jnp.full((2, 1), 0.2)
    denoise = classifier_free(network, cond, null, jnp.float32(3.0))
    x_T = noise_like(2, 50)
    x_0 = jax.jit(lambda x: sample(denoise, x, keys(2), diffusion, Sampling("dpm++", "200")))(x_T)
    np.testing.assert_allclose(x_0, 0.2 + 3 * 0.3 + 0.3 * x_T, atol=5e-3)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_classifier_guidance_of_scale_1_is_bayes_rule(prediction, variance):
    """Data N(0, 1) seen through noise of std r as y = 1: posterior N(1, r^2) / (1 + r^2)."""
    diffusion, r = Diffusion(prediction=prediction, variance=variance), 0.5
    table = diffusion.process().alpha_bar

    def denoise(x_t, t):
        output = gaussian_denoiser(diffusion, 0.0, 1.0)(x_t, t)
        channels = [output, jnp.ones_like(output)] if diffusion.learned_variance else [output]
        return jnp.concatenate(channels, axis=-1)

    def log_prob(x_t, t):  # y | x_t is N(sqrt(alpha_bar) x_t, 1 - alpha_bar + r^2)
        alpha_bar = at(table, t, x_t)
        gap = 1.0 - jnp.sqrt(alpha_bar) * x_t
        return jnp.sum(-0.5 * gap**2 / (1 - alpha_bar + r**2), axis=1)

    guided = classifier_guided(denoise, log_prob, jnp.float32(1.0), diffusion)
    x_T = noise_like(2, 40)
    x_0 = jax.jit(lambda x: sample(guided, x, keys(2), diffusion, Sampling("ddim")))(x_T)
    mean, std = 1 / (1 + r**2), r / np.sqrt(1 + r**2)
    np.testing.assert_allclose(x_0, mean + std * x_T, atol=1e-2)
    if diffusion.learned_variance:
        t = jnp.array([3, 4])
        np.testing.assert_array_equal(guided(x_T, t)[:, 40:], denoise(x_T, t)[:, 40:])


# ---------------------------------------------------------------------- compilation


def test_new_scales_etas_and_statistics_compile_nothing():
    diffusion = Diffusion()

    @functools.partial(jax.jit, static_argnums=0)
    def generate(method, x_T, scale, eta, statistic):
        denoise = classifier_free(lambda x, t, c: linear_network(x, t, c)[:, :4], COND, NULL, scale)
        sampling = Sampling(method, "4")
        return sample(denoise, x_T, keys(3), diffusion, sampling, eta=eta, analytic=statistic)

    found = []
    for scale, eta, level in [(1.0, 0.0, 0.1), (3.0, 0.5, 0.2), (8.0, 1.0, 0.3)]:
        for method in ("ddim", "analytic"):
            found.append(generate(method, noise_like(3, 4), scale, eta, jnp.full(1000, level)))
    assert generate._cache_size() == 2
    assert len({np.asarray(x).tobytes() for x in found}) == 6


def test_every_method_is_one_scan():
    for method in METHODS:
        walk = functools.partial(
            sample,
            lambda x_t, t: x_t,
            diffusion=Diffusion(),
            sampling=Sampling(method, "50"),
            analytic=jnp.ones(1000),
        )
        text = str(jax.make_jaxpr(walk)(noise_like(2, 3), keys(2)))
        assert len(re.findall(r"\bscan\[", text)) == 1
        assert "callback" not in text


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"method": "rk4"}, "rk4.*ddpm, ddim"),
        ({"clip_x_0": -1.0}, "clip_x_0: got -1.0"),
        ({"clip_x_0": float("inf")}, "clip_x_0: got inf"),
        ({"dynamic_percentile": 0.995}, "percent from 50 to 100"),
        ({"dynamic_percentile": 101.0}, "101"),
        ({"last_noise": 0.01}, 'last_noise: got 0.01.*use method="analytic"'),
    ],
)
def test_bad_fields_are_named(fields, words):
    with pytest.raises(UserError, match=words) as error:
        Sampling(**fields)
    assert "\n" not in str(error.value)


def test_bad_arguments_are_named():
    x_T, diffusion = noise_like(2, 4), Diffusion()

    def walk(x_T=x_T, keys=keys(2), sampling=Sampling("ddim", "3"), **options):  # noqa: B008
        return sample(lambda x_t, t: x_t, x_T, keys, diffusion, sampling, **options)

    optimal = Sampling("analytic", "3")
    for call, words in [
        (lambda: walk(keys=keys(3)), "one per example"),
        (lambda: walk(keys=jnp.zeros(2)), "typed key"),
        (lambda: walk(keys=None, eta=1.0), "keys and noise: got neither"),
        (lambda: walk(noise=jnp.zeros((2, 2, 4))), "keys and noise: got both"),
        (lambda: walk(keys=None, noise=jnp.zeros((2, 3, 4))), r"noise's shape.*\[2, 2, 4\]"),
        (lambda: walk(eta=1.5), "eta: got 1.5"),
        (lambda: walk(eta=0.5, sampling=Sampling(spacing="3")), 'use method="ddim"'),
        (lambda: walk(sampling=Sampling(spacing="ddim7000")), "ddim7000"),
        (lambda: walk(sampling=optimal), "got None"),
        (lambda: walk(sampling=optimal, analytic=jnp.ones(3)), r"\(1000,\)"),
        (lambda: invert(lambda x, t: x, x_T, diffusion, Sampling()), "cannot be inverted"),
        (lambda: classifier_free(linear_network, COND, {"z": NULL["y"]}, 2.0), "structure"),
        (lambda: classifier_free(linear_network, COND, {"y": NULL["y"][:1]}, 2.0), r"\['y'\]"),
        (
            lambda: classifier_free(linear_network, COND, NULL, jnp.ones(2))(
                noise_like(3, 4), jnp.zeros(3, jnp.int32)
            ),
            "guidance scale's shape: got",
        ),
    ]:
        with pytest.raises(UserError, match=words) as error:
            call()
        assert "\n" not in str(error.value)


def test_the_guides_example_runs():
    guide = (Path(__file__).parent.parent / "docs" / "samplers.md").read_text()
    [example] = re.findall(r"```python\n(# A whole program.*?)```", guide, re.DOTALL)
    scope = {}
    exec(example, scope)
    radius = np.linalg.norm(scope["samples"], axis=1)
    assert np.mean(np.abs(radius - 1) < 0.25) > 0.8  # it has learnt the circle


def test_the_guides_processes_and_inversion_run():
    guide = (Path(__file__).parent.parent / "docs" / "samplers.md").read_text()
    section = guide[guide.index("## Which noise process") : guide.index("## A solver of your own")]
    scope = {}
    for example in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        exec(example, scope)
    np.testing.assert_allclose(scope["again"], scope["x_0"], atol=1e-3)
