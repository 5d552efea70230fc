"""Solvers: their order, against k-diffusion's formulas and diffusers' schedulers, and inversion.

All in float64, on data whose network and flow are known in closed form.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from unclip_jax.diffusion import Diffusion, Sampling, Schedule, invert, sample
from unclip_jax.diffusion.solvers import METHODS, ONE_STEP
from unclip_jax.errors import UserError

MEAN, STD = 0.7, 0.3
WEIGHTS, MEANS, STDS = (0.3, 0.7), (-1.0, 0.8), (0.4, 0.5)
VP = Diffusion(schedule="linear", prediction="x_0", continuous=True)
EDM = Diffusion(schedule="edm", prediction="x_0")
FLOW = Diffusion(schedule=Schedule("flow", shift=2.0), prediction="velocity")
GRIDS = {"vp": (VP, "logsnr"), "edm": (EDM, "karras"), "flow": (FLOW, "even")}
DETERMINISTIC = [name for name, method in METHODS.items() if method.inverse]
NOISY = ["euler_ancestral", "dpm++_2m_sde", "dpm++_3m_sde"]


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def mixture(diffusion, weights=(1.0,), means=(MEAN,), stds=(STD,)):
    """The optimal network: E[x_0 | x_t], told as the diffusion's prediction."""

    def denoise(x, t):
        alpha, sigma = diffusion.levels(t, x)
        log_shares, guesses = [], []
        for weight, mean, std in zip(weights, means, stds, strict=True):
            variance, gap = alpha**2 * std**2 + sigma**2, x - alpha * mean
            log_shares.append(np.log(weight) - 0.5 * (gap**2 / variance + jnp.log(variance)))
            guesses.append(mean + alpha * std**2 / variance * gap)
        share = jax.nn.softmax(jnp.stack(log_shares), axis=0)
        x_0 = jnp.sum(share * jnp.stack(guesses), axis=0)
        return x_0 if diffusion.prediction == "x_0" else (x - alpha * x_0) / sigma - x_0

    return denoise


def keys(n=1):
    return jax.random.split(jax.random.key(0), n)


def x_T(width=5):
    return jnp.linspace(-2.0, 2.0, width, dtype=jnp.float64)[None]


def walk(diffusion, method, spacing, x=None, network=None, **options):
    network = network or mixture(diffusion)
    run = jax.jit(
        lambda x: sample(network, x, keys(), diffusion, Sampling(method, spacing), **options)
    )
    return np.asarray(run(x_T() if x is None else x))


# --------------------------------------------------------------------------------------- orders


def gaussian_truth(diffusion, spacing):
    """Where the flow takes x_T, keeping the standard score, and then the network's x_0."""
    process = diffusion.process(spacing, np.float64)

    def deviation(i):
        return np.hypot(process.alpha[i] * STD, process.sigma[i])

    x = np.asarray(x_T()) * diffusion.noise_std
    x = (x - process.alpha[-1] * MEAN) / deviation(-1) * deviation(0)  # less its mean
    return MEAN + process.alpha[0] * STD**2 / deviation(0) ** 2 * x


ORDERS = {"ddim": 1, "heun": 2, "dpm2": 2, "dpm++": 2, "unipc2": 3, "unipc3": 4}


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("method", ORDERS)
def test_the_error_falls_as_the_order_says(name, method):
    """Over 40 to 640 steps; UniPC-p corrects to order p + 1."""
    diffusion, rule = GRIDS[name]
    steps = [40, 160, 640] if ORDERS[method] < 4 else [40, 160]
    errors = []
    for n in steps:
        spacing = f"{rule}:{n}"
        gap = walk(diffusion, method, spacing) - gaussian_truth(diffusion, spacing)
        errors.append(np.sqrt(np.mean(gap**2)))
    slopes = np.log(np.divide(errors[:-1], errors[1:])) / np.log(4)
    # A flow's even t is no smooth grid in lambda, where UniPC-2 gains its third order slowly.
    room = 0.8 if name == "flow" else 0.4 if ORDERS[method] == 4 else 0.15
    assert np.all(slopes > ORDERS[method] - room), slopes


def test_lms_is_of_fourth_order_until_its_last_step_counts():
    errors = []
    for n in (10, 20, 40):
        gap = walk(EDM, "lms", f"karras:{n}") - gaussian_truth(EDM, f"karras:{n}")
        errors.append(np.sqrt(np.mean(gap**2)))
    assert errors[0] / errors[1] > 2**2 and errors[1] / errors[2] > 2**3
    assert walk(EDM, "lms", "karras:80") == pytest.approx(
        gaussian_truth(EDM, "karras:80"), abs=5e-4
    )


@pytest.mark.parametrize("method", ["heun", "dpm2", "dpm++", "lms", "unipc2", "unipc3"])
def test_a_mixture_is_solved_in_few_steps(method):
    """25 steps of a higher order come nearer than 50 of the first."""
    network = mixture(VP, WEIGHTS, MEANS, STDS)
    truth = walk(VP, "unipc3", "logsnr:400", network=network)
    coarse = np.abs(walk(VP, "ddim", "logsnr:50", network=network) - truth).max()
    assert np.abs(walk(VP, method, "logsnr:25", network=network) - truth).max() < coarse


def test_on_even_whole_timesteps_2m_is_bounded_and_elsewhere_published():
    """The bound wins with few even steps; a tuple of the same timesteps has the published w."""
    whole = Diffusion(schedule="cosine", prediction="x_0")
    network, errors = mixture(whole, WEIGHTS, MEANS, STDS), {}
    truth = walk(whole, "ddim", "", network=network)
    for n in (10, 20):
        same = tuple(whole.process(n).timesteps.tolist())
        bounded, published = (walk(whole, "dpm++", s, network=network) for s in (n, same))
        errors[n] = np.abs(bounded - truth).max(), np.abs(published - truth).max()
        assert errors[n][0] < errors[n][1] / 1.5


@pytest.mark.parametrize("method", NOISY)
@pytest.mark.parametrize("name", GRIDS)
def test_noisy_methods_reach_the_marginal(name, method):
    """On Gaussian data a walk is linear in x_T and noises: the squared weights are its variance."""
    diffusion, rule = GRIDS[name]
    if name == "flow":
        rule = "logsnr"  # even t has steps in lambda that double, which a memory overdraws
    errors = []
    for n in (20, 80):
        unit = jnp.eye(n + 1, dtype=jnp.float64)[:n]  # x_T, then each step's noise
        rows = jnp.concatenate([unit, jnp.zeros((1, n + 1))])[:, :n]
        run = jax.jit(
            lambda rows, spacing=f"{rule}:{n}": sample(
                mixture(diffusion), rows[:, :1], None, diffusion, Sampling(method, spacing),
                noise=rows[:, 1:, None],
            )[:, 0]
        )  # fmt: skip
        found = run(rows)
        weights = np.asarray(found[:-1] - found[-1])
        errors.append(abs(np.sqrt(np.sum(weights**2)) - STD) + abs(float(found[-1]) - MEAN))
    assert errors[1] < 0.06 and errors[1] < 0.5 * errors[0]


# ------------------------------------------------------------------------- k-diffusion's formulas


def k_diffusion(method, model, x, sigmas, noise):
    """Its samplers, rewritten from its formulas in NumPy: `sigmas` [n + 1] falls to 0."""
    lam, ds, olds = -np.log(np.maximum(sigmas, 1e-300)), [], []
    for i in range(len(sigmas) - 1):
        now, then = sigmas[i], sigmas[i + 1]
        denoised, h = model(x, now), lam[i + 1] - lam[i]
        d, dt, final = (x - denoised) / now, then - now, then == 0
        if method == "euler":
            x = x + d * dt
        elif method == "euler_ancestral":
            up = min(then, (then**2 * (now**2 - then**2) / now**2) ** 0.5)
            x = x + d * ((then**2 - up**2) ** 0.5 - now) + noise[i] * up
        elif method == "heun":
            if not final:
                d = (d + ((x + d * dt) - model(x + d * dt, then)) / then) / 2
            x = x + d * dt
        elif method == "dpm2":
            if not final:
                mid = np.exp((np.log(now) + np.log(then)) / 2)
                half = x + d * (mid - now)
                d = (half - model(half, mid)) / mid
            x = x + d * dt
        elif method == "lms":
            ds = [d, *ds][:4]
            known = sigmas[max(i - 3, 0) : i + 1][::-1]

            def basis(tau, j, known=known):
                return np.prod([(tau - s) / (known[j] - s) for k, s in enumerate(known) if k != j])

            x = x + sum(
                integrate.quad(basis, now, then, args=(j,), epsabs=1e-13)[0] * old
                for j, old in enumerate(ds)
            )
        elif final:
            x = denoised
        elif method == "dpm++":
            best = denoised
            if olds:
                r = (lam[i] - lam[i - 1]) / h
                best = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * olds[0]
            x = then / now * x - np.expm1(-h) * best
        elif method == "dpm++_2m_sde":
            x = then / now * np.exp(-h) * x - np.expm1(-2 * h) * denoised
            if olds:
                r = (lam[i] - lam[i - 1]) / h
                x = x - 0.5 * np.expm1(-2 * h) / r * (denoised - olds[0])
            x = x + noise[i] * then * np.sqrt(-np.expm1(-2 * h))
        elif method == "dpm++_3m_sde":
            x = np.exp(-2 * h) * x - np.expm1(-2 * h) * denoised
            phi_2 = np.expm1(-2 * h) / (2 * h) + 1
            if len(olds) > 1:
                r0, r1 = (lam[i] - lam[i - 1]) / h, (lam[i - 1] - lam[i - 2]) / h
                a, b = (denoised - olds[0]) / r0, (olds[0] - olds[1]) / r1
                d1, d2 = a + (a - b) * r0 / (r0 + r1), (a - b) / (r0 + r1)
                x = x + phi_2 * d1 - (phi_2 / (2 * h) - 0.5) * d2
            elif olds:
                x = x + phi_2 * (denoised - olds[0]) / ((lam[i] - lam[i - 1]) / h)
            x = x + noise[i] * then * np.sqrt(-np.expm1(-2 * h))
        olds = [denoised, *olds]
    return x


K_METHODS = [
    "euler", "euler_ancestral", "heun", "dpm2", "lms", "dpm++", "dpm++_2m_sde", "dpm++_3m_sde",
]  # fmt: skip


@pytest.mark.parametrize("name", ["vp", "edm", "flow"])
@pytest.mark.parametrize("method", K_METHODS)
def test_every_solver_is_k_diffusions(name, method):
    """Its x is x_t / alpha, its sigma sigma / alpha; of flows, as ComfyUI has it, x_t and t."""
    if name == "flow" and method not in ("euler", "heun", "dpm2", "lms"):
        pytest.skip("the others are defined in sigma / alpha")
    diffusion, rule = GRIDS[name]
    spacing = f"{rule}:9"
    process = diffusion.process(spacing, np.float64)
    scale = np.ones(9) if name == "flow" else process.alpha
    table, toy = np.append(process.sigma[::-1] / scale[::-1], 0.0), np.cos

    def model(x, sigma):  # x_0 of a network that sees x and sigma / alpha alone
        return toy(0.9 * x / np.hypot(1, sigma) + np.log(sigma))

    def denoise(x, t):
        alpha, sigma = diffusion.levels(t, x)
        if name == "flow":
            return (x - jnp.cos(0.9 * x / jnp.hypot(1.0, sigma) + jnp.log(sigma))) / sigma
        ratio = sigma / alpha
        return jnp.cos(0.9 * x / alpha / jnp.hypot(1.0, ratio) + jnp.log(ratio))

    x, noise = x_T(), np.random.default_rng(0).normal(size=(9, 5))
    draws = jnp.asarray(noise[None, :-1])
    ours = jax.jit(
        lambda x: sample(denoise, x, None, diffusion, Sampling(method, spacing), noise=draws)
    )(x)
    theirs = k_diffusion(
        method, model, np.asarray(x) * diffusion.noise_std / scale[-1], table, noise
    )
    # Levels between timesteps are read in the network again, from t.
    np.testing.assert_allclose(ours, theirs, rtol=1e-7 if name == "vp" else 1e-9, atol=1e-8)


# --------------------------------------------------------------------------- diffusers' schedulers

BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
SCHEDULERS = {
    "ddim": ("ddim", "DDIMScheduler", dict(clip_sample=False, set_alpha_to_one=True)),
    "dpm++": ("dpmsolver_multistep", "DPMSolverMultistepScheduler", dict(lower_order_final=True)),
    "unipc2": ("unipc_multistep", "UniPCMultistepScheduler", dict(solver_order=2)),
    "unipc3": ("unipc_multistep", "UniPCMultistepScheduler", dict(solver_order=3)),
    "euler": ("euler_discrete", "EulerDiscreteScheduler", {}),
    "heun": ("heun_discrete", "HeunDiscreteScheduler", {}),
    "lms": ("lms_discrete", "LMSDiscreteScheduler", {}),
}


@pytest.mark.parametrize("method", SCHEDULERS)
def test_every_solver_is_diffusers(method):
    """The same toy network of eps, on the same whole timesteps."""
    pytest.importorskip("diffusers")

    import torch

    module, name, settings = SCHEDULERS[method]
    found = importlib.import_module(f"diffusers.schedulers.scheduling_{module}")
    if method.startswith(("dpm", "unipc")):
        settings = settings | dict(final_sigmas_type="zero", timestep_spacing="trailing")
    else:
        settings = settings | dict(timestep_spacing="trailing")
    scheduler = getattr(found, name)(**BETAS, **settings)
    diffusion = Diffusion(schedule=Schedule("scaled_linear"), prediction="eps")
    # Its own table is a product in float32.
    scheduler.alphas_cumprod = torch.from_numpy(
        diffusion.process(dtype=np.float64).alpha_bar.copy()
    )
    scheduler.set_timesteps(10)
    toy = lambda x, t, cos: cos(1.3 * x + 0.003 * t)  # noqa: E731
    x = torch.from_numpy(np.array(x_T())) * float(scheduler.init_noise_sigma)
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t)
        x = scheduler.step(toy(given, float(t), torch.cos), t, x).prev_sample
    kept = tuple(sorted({int(t) for t in scheduler.timesteps}))
    assert kept == tuple(diffusion.process("trailing:10").timesteps.tolist())
    start = x_T() * float(scheduler.init_noise_sigma)
    if scheduler.init_noise_sigma != 1:  # in sigma / alpha; ours takes x_t itself
        start = start * float(diffusion.process(kept, np.float64).alpha[-1])
    ours = walk(
        diffusion, method, kept, start, lambda x, t: toy(x, t.astype(x.dtype)[:, None], jnp.cos)
    )
    np.testing.assert_allclose(ours, x, rtol=3e-5, atol=3e-5)  # its sigmas are float32


def test_rf_euler_is_diffusers_flow():
    theirs = pytest.importorskip("diffusers.schedulers.scheduling_flow_match_euler_discrete")
    import torch

    scheduler = theirs.FlowMatchEulerDiscreteScheduler(shift=2.0)
    scheduler.set_timesteps(10)
    x = torch.from_numpy(np.array(x_T()))
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        x = scheduler.step(torch.cos(1.3 * x + sigma.double()), t, x).prev_sample
    times = tuple(np.float64(scheduler.sigmas).tolist())
    network = lambda x, t: jnp.cos(1.3 * x + t[:, None])  # noqa: E731
    for method in ("rf_euler", "euler", "ddim"):
        np.testing.assert_allclose(walk(FLOW, method, times, network=network), x, atol=1e-6)


# ------------------------------------------------------------------------------------- inversion


@pytest.mark.parametrize("method", DETERMINISTIC)
def test_inversion_returns_the_nearer_the_more_steps(method):
    x_0, network = x_T() * 0.8, mixture(EDM, WEIGHTS, MEANS, STDS)

    def missed(n):
        sampling = Sampling(method, f"karras:{n}")
        back = jax.jit(
            lambda x: sample(network, invert(network, x, EDM, sampling), keys(), EDM, sampling)
        )(x_0)
        return float(jnp.abs(back - x_0).max())

    few, many = missed(20), missed(80)
    assert many < 0.2 and (many < 0.4 * few or many < 3e-3)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("method", ["ddim", "heun", "dpm2"])
def test_fixed_point_inversion_returns_exactly(name, method):
    diffusion, rule = GRIDS[name]
    x_0, network = x_T() * 0.8, mixture(diffusion, WEIGHTS, MEANS, STDS)
    sampling = Sampling(method, f"{rule}:15")

    @functools.partial(jax.jit, static_argnums=1)
    def back(x, iterations):
        found = invert(network, x, diffusion, sampling, iterations=iterations)
        return sample(network, found, keys(), diffusion, sampling)

    assert np.abs(back(x_0, 0) - x_0).max() > 1e-4
    np.testing.assert_allclose(back(x_0, 60), x_0, atol=1e-7)


def test_methods_with_a_memory_or_noise_have_no_exact_inverse():
    for method in DETERMINISTIC:
        if method not in ONE_STEP:
            with pytest.raises(UserError, match=r'iterations: got 3.*use "ddim" or'):
                invert(mixture(EDM), x_T(), EDM, Sampling(method, 3), iterations=3)
    for method in NOISY:
        with pytest.raises(UserError, match="cannot be inverted"):
            invert(mixture(EDM), x_T(), EDM, Sampling(method, 3))
    with pytest.raises(UserError, match="iterations: got -1"):
        invert(mixture(EDM), x_T(), EDM, Sampling("ddim", 3), iterations=-1)


def test_methods_of_second_order_ask_twice_but_in_the_last_step():
    for method, calls in (("heun", 7), ("dpm2", 7), ("unipc3", 4), ("lms", 4)):
        asked = []

        def denoise(x, t, asked=asked):
            jax.debug.callback(lambda: asked.append(1))
            return mixture(VP)(x, t)

        sample(denoise, x_T(), keys(), VP, Sampling(method, 4))
        jax.effects_barrier()
        assert len(asked) == calls
