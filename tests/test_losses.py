"""Truths about the training losses, the bound on the likelihood and the analytic statistic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from tests.networks import said
from unclip_jax.diffusion import analytic
from unclip_jax.diffusion.gaussian import PREDICTIONS, Diffusion, q_posterior, q_sample, target
from unclip_jax.diffusion.losses import (
    VLB_WEIGHT,
    discretized_log_likelihood,
    gaussian_log_likelihood,
    normal_kl,
    training_losses,
    vlb_bits_per_dim,
    vlb_terms,
)
from unclip_jax.errors import UserError


def gaussians(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def unit_gaussian_eps(x_t, t, steps=1000):
    """The optimal eps for data N(0, 1): x_t is N(0, 1) at every t, and E[eps | x_t] is linear."""
    table = jnp.asarray(Diffusion(steps=steps).process().sqrt_one_minus_alpha_bar)
    return table[t].reshape((-1,) + (1,) * (x_t.ndim - 1)) * x_t


# ---------------------------------------------------------------------------- simple and min-SNR


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_network_has_no_loss_and_a_null_one_the_power_of_its_target(prediction):
    diffusion = Diffusion(prediction=prediction)
    x_0, noise, t = (
        gaussians(4, 6, 6, 3),
        gaussians(4, 6, 6, 3, seed=1),
        jnp.array([0, 9, 500, 999]),
    )
    truth = target(diffusion, diffusion.process(), x_0, t, noise)
    perfect = training_losses(diffusion, lambda x_t, t: truth, x_0, t, noise)
    null = training_losses(diffusion, lambda x_t, t: jnp.zeros_like(x_t), x_0, t, noise)
    assert set(perfect) == {"loss", "mse"}
    np.testing.assert_array_equal(perfect["loss"], np.zeros(4))
    np.testing.assert_allclose(null["loss"], np.mean(np.square(truth), axis=(1, 2, 3)), rtol=1e-5)


def test_min_snr_weighs_one_network_alike_whatever_it_calls_its_prediction():
    """The same guess of x_0, told in any form, costs min(SNR, gamma) |x_0 error|^2."""
    x_0, noise = gaussians(6, 8), gaussians(6, 8, seed=1)
    guess = x_0 + 0.3 * gaussians(6, 8, seed=2)
    t = jnp.array([5, 100, 300, 500, 700, 900])
    found = []
    for prediction in PREDICTIONS:
        diffusion = Diffusion(prediction=prediction, min_snr_gamma=5.0)
        process = diffusion.process()
        x_t = q_sample(process, x_0, t, noise)
        signal, sigma = (
            process.sqrt_alpha_bar[t][:, None],
            process.sqrt_one_minus_alpha_bar[t][:, None],
        )
        output = said(prediction, guess, x_t, signal, sigma)
        found.append(training_losses(diffusion, lambda *_, o=output: o, x_0, t, noise)["loss"])
    alpha_bar = process.alpha_bar[t].astype(np.float64)
    snr = alpha_bar / (1 - alpha_bar)
    expected = np.minimum(snr, 5) * np.mean((guess - x_0) ** 2, axis=1)
    for loss in found:
        np.testing.assert_allclose(loss, expected, rtol=2e-3)


def test_losses_of_an_example_do_not_depend_on_its_neighbours():
    diffusion = Diffusion(min_snr_gamma=5.0)
    x_0, noise, t = gaussians(3, 5), gaussians(3, 5, seed=1), jnp.array([3, 30, 300])
    batch = training_losses(diffusion, unit_gaussian_eps, x_0, t, noise)["loss"]
    single = training_losses(diffusion, unit_gaussian_eps, x_0[1:2], t[1:2], noise[1:2])["loss"]
    np.testing.assert_allclose(batch[1:2], single, rtol=1e-6)


# ------------------------------------------------------------------------------------- the bound


def test_normal_kl_is_the_integral():
    x = np.linspace(-20, 20, 400_001)
    p, q = stats.norm(0.3, 1.7), stats.norm(-0.5, 0.6)
    integral = np.trapezoid(q.pdf(x) * (q.logpdf(x) - p.logpdf(x)), x)
    ours = normal_kl(jnp.float32(-0.5), 2 * np.log(0.6), jnp.float32(0.3), 2 * np.log(1.7))
    np.testing.assert_allclose(ours, integral, rtol=1e-5)


@pytest.mark.parametrize("mean", [-1.3, -0.2, 0.0, 0.999, 4.0])
@pytest.mark.parametrize("std", [0.005, 0.05, 1.0])
def test_levels_are_a_distribution_with_the_probabilities_of_their_intervals(mean, std):
    levels = np.arange(256) * 2 / 255 - 1
    edges = np.concatenate([[-np.inf], levels[:-1] + 1 / 255, [np.inf]])
    normal = stats.norm(mean, std)
    upper = np.diff(-normal.sf(edges))  # of the two tails, scipy too must take the thinner
    expected = np.where(levels > mean, upper, np.diff(normal.cdf(edges)))
    ours = discretized_log_likelihood(
        jnp.float32(levels), jnp.full(256, mean), jnp.full(256, 2 * np.log(std))
    )
    assert np.isfinite(ours).all()
    np.testing.assert_allclose(np.exp(np.float64(ours)).sum(), 1, rtol=2e-4)
    np.testing.assert_allclose(np.exp(ours), expected, rtol=2e-3, atol=1e-8)


def test_level_likelihood_has_finite_gradients_everywhere():
    def total(mean, log_variance):
        x = jnp.array([-1.0, -0.5, 0.0, 0.7, 1.0])
        return discretized_log_likelihood(x, mean, log_variance).sum()

    for mean in (0.0, 50.0):
        for log_variance in (-12.0, 0.0, 12.0):
            args = jnp.full(5, mean), jnp.full(5, log_variance)
            assert all(jnp.isfinite(g).all() for g in jax.grad(total, argnums=(0, 1))(*args))


def test_gaussian_log_likelihood_is_scipys():
    x = np.linspace(-3, 3, 7)
    ours = gaussian_log_likelihood(jnp.float32(x), jnp.full(7, 0.4), jnp.full(7, 2 * np.log(0.7)))
    np.testing.assert_allclose(ours, stats.norm(0.4, 0.7).logpdf(x), rtol=1e-5)


def test_vlb_term_of_a_learned_variance_is_the_integral():
    """KL(q(x_{t-1}|x_t,x_0) || p) over a grid, p's moments formed here from the raw output."""
    diffusion = Diffusion(variance="learned_range", loss="hybrid")
    process, i = diffusion.process("25"), 12
    x_0, x_t, eps, fraction = (jnp.array([[v]]) for v in (0.4, -0.3, 0.8, 0.2))
    guess = (x_t - process.sqrt_one_minus_alpha_bar[i] * eps) / process.sqrt_alpha_bar[i]
    p_mean = float(q_posterior(process, guess, x_t, i)[0][0, 0])
    p_std = process.betas[i] ** 0.3 * process.posterior_variance[i] ** 0.2  # halves of 0.6, 0.4
    q_mean, q_variance, _ = (np.float64(np.squeeze(m)) for m in q_posterior(process, x_0, x_t, i))
    q, p = stats.norm(q_mean, np.sqrt(q_variance)), stats.norm(p_mean, p_std)
    x = np.linspace(q_mean - 12 * q.std(), q_mean + 12 * q.std(), 200_001)
    integral = np.trapezoid(q.pdf(x) * (q.logpdf(x) - p.logpdf(x)), x) / np.log(2)
    output = jnp.concatenate([eps, fraction], axis=-1)
    ours = vlb_terms(diffusion, process, output, x_0, x_t, jnp.array([i]))
    np.testing.assert_allclose(ours, [integral], rtol=1e-4)


def learned(fraction, steps=1000):
    """The optimal mean for data N(0, 1) beside constant variance channels."""

    def denoise(x_t, t):
        return jnp.concatenate(
            [unit_gaussian_eps(x_t, t, steps), jnp.full_like(x_t, fraction)], axis=-1
        )

    return denoise


@pytest.mark.parametrize("spacing", ["", "20"])
def test_the_bound_is_tight_for_the_exact_reverse_process(spacing):
    """For data N(0, 1) the true reverse step is Gaussian with variance beta (fraction 1), so the
    bound equals the entropy of the data, log2 sqrt(2 pi e), and any other variance is worse."""
    diffusion = Diffusion(variance="learned_range", loss="hybrid", likelihood="gaussian")
    x_0, keys = gaussians(2, 5_000), jax.random.split(jax.random.key(1), 2)
    bound = jax.jit(lambda f: vlb_bits_per_dim(diffusion, learned(f), x_0, keys, spacing))
    entropy = 0.5 * np.log2(2 * np.pi * np.e)
    best = bound(1.0)
    np.testing.assert_allclose(best["total"], [entropy] * 2, atol=0.05)
    assert (bound(0.0)["total"] > best["total"] + 0.005).all()
    assert best["terms"].shape == (2, int(spacing or 1000))
    np.testing.assert_allclose(best["total"], best["prior"] + best["terms"].sum(axis=1), rtol=1e-5)


def test_eight_bit_bound_agrees_with_the_density_of_fine_levels():
    """Where the density is flat over a level, bits(8 bit) = bits(density) + log2(255 / 2)."""
    fields = dict(variance="learned_range", loss="hybrid")
    x_0 = jnp.round((0.3 * gaussians(2, 4000) + 1) * 127.5) / 127.5 - 1
    keys = jax.random.split(jax.random.key(1), 2)
    totals = [
        vlb_bits_per_dim(
            Diffusion(likelihood=likelihood, **fields), learned(0.5), x_0, keys, "ddim20"
        )["total"]
        for likelihood in ("8bit", "gaussian")
    ]
    np.testing.assert_allclose(totals[0], totals[1] + np.log2(255 / 2), atol=0.05)


def test_hybrid_adds_the_bound_and_trains_only_the_variance_with_it():
    hybrid = Diffusion(variance="learned_range", loss="hybrid")
    simple = Diffusion()
    x_0, noise, t = 0.3 * gaussians(4, 5), gaussians(4, 5, seed=1), jnp.array([0, 1, 400, 999])
    mean, fraction = gaussians(4, 5, seed=2), 0.1 * gaussians(4, 5, seed=3)

    def total(mean, fraction):
        output = jnp.concatenate([mean, fraction], axis=-1)
        return training_losses(hybrid, lambda *_: output, x_0, t, noise)["loss"].sum()

    def without(mean):
        return training_losses(simple, lambda *_: mean, x_0, t, noise)["loss"].sum()

    by_mean, by_fraction = jax.grad(total, argnums=(0, 1))(mean, fraction)
    np.testing.assert_allclose(by_mean, jax.grad(without)(mean), rtol=1e-5, atol=1e-7)
    assert (jnp.abs(by_fraction) > 0).all()
    output = jnp.concatenate([mean, fraction], axis=-1)
    terms = training_losses(hybrid, lambda *_: output.astype(jnp.bfloat16), x_0, t, noise)
    np.testing.assert_allclose(terms["loss"], terms["mse"] + VLB_WEIGHT * terms["vlb"], rtol=1e-6)
    assert {v.dtype for v in terms.values()} == {jnp.dtype("float32")}


def test_hybrid_vlb_estimates_the_bound_of_the_whole_trajectory():
    diffusion = Diffusion(steps=20, variance="learned_range", loss="hybrid", likelihood="gaussian")
    x_0, noise = gaussians(1, 20_000), gaussians(20, 20_000, seed=5)
    denoise = learned(0.5, steps=20)
    whole = vlb_bits_per_dim(diffusion, denoise, x_0, jax.random.split(jax.random.key(1), 1))
    one_each = training_losses(
        diffusion, denoise, jnp.repeat(x_0, 20, axis=0), jnp.arange(20), noise
    )
    expected = whole["total"][0] - whole["prior"][0]
    np.testing.assert_allclose(one_each["vlb"].mean(), expected, atol=0.05)


# --------------------------------------------------------------------------- analytic statistic


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_statistic_of_gaussian_data_is_its_posterior_variance(prediction):
    """Data N(1, 0.5^2): Var(x_0 | x_t) = 1 / (1/0.25 + SNR), by adding precisions."""
    diffusion = Diffusion(steps=40, prediction=prediction)
    process = diffusion.process()
    signal, sigma = process.sqrt_alpha_bar, process.sqrt_one_minus_alpha_bar

    def denoise(x_t, t):
        a, s = jnp.asarray(signal)[t][:, None], jnp.asarray(sigma)[t][:, None]
        x_0 = 1.0 + a * 0.25 * (x_t - a) / (a**2 * 0.25 + s**2)
        return said(prediction, x_0, x_t, a, s)

    residuals = analytic.init(diffusion)
    update = jax.jit(lambda r, *batch: analytic.update(r, diffusion, denoise, *batch))
    seen = np.arange(1, 40, 2)
    for seed in range(3):
        x_0 = 1.0 + 0.5 * gaussians(len(seen), 4000, seed=seed)
        residuals = update(
            residuals, x_0, jnp.array(seen), gaussians(len(seen), 4000, seed=100 + seed)
        )
    snr = signal.astype(np.float64) ** 2 / sigma.astype(np.float64) ** 2
    expected = 1 / (1 / 0.25 + snr)
    statistic = analytic.statistic(residuals)
    assert statistic.shape == (40,)
    np.testing.assert_allclose(statistic[seen], expected[seen], rtol=0.06)
    np.testing.assert_allclose(statistic[1:], expected[1:], rtol=0.15)  # and between those seen


def test_a_useless_network_is_bounded_by_the_variance_of_the_data():
    diffusion = Diffusion(steps=10)
    residuals = analytic.update(
        analytic.init(diffusion),
        diffusion,
        lambda x_t, t: 100 * jnp.ones_like(x_t),
        0.5 * gaussians(10, 3000),
        jnp.arange(10),
        gaussians(10, 3000, seed=1),
    )
    assert (analytic.statistic(residuals) <= 0.26).all()


# ------------------------------------------------------------------------------------ bad input


def test_bad_input_is_named():
    noise, t = gaussians(2, 3), jnp.array([0, 1])
    with pytest.raises(UserError, match="uint8"):
        training_losses(Diffusion(), lambda x, t: x, jnp.zeros((2, 3), jnp.uint8), t, noise)
    with pytest.raises(UserError, match='loss="hybrid"'):
        training_losses(Diffusion(variance="learned_range"), lambda x, t: x, noise, t, noise)
    with pytest.raises(UserError, match="network output"):
        training_losses(Diffusion(), lambda x, t: x[:, :1], noise, t, noise)
    with pytest.raises(UserError, match="no observations"):
        analytic.statistic(analytic.init(Diffusion()))
    with pytest.raises(UserError, match="typed key"):
        vlb_bits_per_dim(Diffusion(), unit_gaussian_eps, noise, jnp.zeros(2))
