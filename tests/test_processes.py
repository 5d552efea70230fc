"""Noise processes and grids: against diffusers, closed forms, and what people write down."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from tests.networks import said
from unclip_jax.common import config
from unclip_jax.diffusion import (
    Diffusion,
    Sampling,
    Schedule,
    edm,
    q_sample,
    sample,
    training_losses,
)
from unclip_jax.diffusion.gaussian import PREDICTIONS, predict, target
from unclip_jax.errors import UserError

SD = Schedule("scaled_linear")  # Stable Diffusion's betas, 0.00085 to 0.012
PROCESSES = {
    "betas": Diffusion(schedule=SD),
    "own betas": Diffusion(schedule=Schedule.own("betas", np.linspace(0.01, 0.3, 40))),
    "zero snr": Diffusion(schedule=Schedule("linear", zero_terminal_snr=True), prediction="v"),
    "edm": Diffusion(schedule="edm", prediction="F"),
    "sigmas": Diffusion(schedule=Schedule.own("sigmas", [14.6, 5.0, 1.0, 0.1, 0.0])),
    "flow": Diffusion(schedule=Schedule("flow", shift=3.0), prediction="velocity"),
    "floats": Diffusion(continuous=True),
}


def test_rescaling_to_zero_snr_is_diffusers():
    theirs = pytest.importorskip("diffusers.schedulers.scheduling_ddim")
    import torch

    betas = theirs.rescale_zero_terminal_snr(torch.from_numpy(SD.betas(1000)))
    process = Diffusion(schedule=Schedule("scaled_linear", zero_terminal_snr=True), prediction="v")
    np.testing.assert_allclose(process.process().betas, betas, rtol=1e-4)
    assert process.process().alpha[-1] == 0


def test_edms_levels_and_reading_are_the_papers():
    """arXiv 2206.00364: the levels of eq. 5, and table 1's c_skip, c_out, c_in and c_noise."""
    diffusion = PROCESSES["edm"]
    i, rho = np.arange(18), 7.0
    levels = (80 ** (1 / rho) + i / 17 * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
    np.testing.assert_allclose(diffusion.process(18).timesteps[::-1], levels, rtol=1e-6)
    x, sigma = np.float32([[1.5, -0.3], [4.0, 2.0]]), np.float32([0.7, 3.0])
    seen = {}

    def network(x, c_noise):
        seen.update(x=x, c_noise=c_noise)
        return jnp.cos(x)

    found = edm(network)(jnp.asarray(x), jnp.asarray(sigma))
    s = sigma[:, None]
    c_in, c_skip = 1 / np.sqrt(s**2 + 0.25), 0.25 / (s**2 + 0.25)
    np.testing.assert_allclose(seen["x"], c_in * x, rtol=1e-6)
    np.testing.assert_allclose(seen["c_noise"], np.log(sigma) / 4, rtol=1e-6)
    expected = c_skip * x + s * 0.5 / np.sqrt(s**2 + 0.25) * np.cos(c_in * x)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", ["betas", "edm", "flow"])
def test_every_prediction_is_read_and_written_on_every_process(name, prediction):
    diffusion = Diffusion(schedule=PROCESSES[name].schedule, prediction=prediction)
    process, i = diffusion.process(), jnp.array([20, 300, 700, 990])
    x_0, eps = (jax.random.normal(jax.random.key(s), (4, 8)) for s in (0, 1))
    x_t = q_sample(process, x_0, i, eps)
    output = target(diffusion, process, x_0, i, eps)
    alpha, sigma = (np.float64(t)[i][:, None] for t in (process.alpha, process.sigma))
    of_x_0, of_eps = (np.float64(x) for x in (x_0, eps))
    exact = said(prediction, of_x_0, alpha * of_x_0 + sigma * of_eps, alpha, sigma)
    np.testing.assert_allclose(output, exact, rtol=1e-4, atol=1e-5)
    found = predict(diffusion, process, output, x_t, i)
    # In float32 x_t keeps of x_0, where sigma is 80, and of eps, where it is 0.004, only so much.
    np.testing.assert_allclose(found[0], x_0, atol=1e-6 * float((1 + sigma / alpha).max()))
    np.testing.assert_allclose(found[1], eps, atol=1e-6 * float((1 + alpha / sigma).max()))


@pytest.mark.parametrize("name", PROCESSES)
def test_the_steps_of_a_process_compose_to_its_levels(name):
    """q(x_t | x_prev) with mean alpha/alpha_prev x_prev and variance betas, and Bayes' rule."""
    process = PROCESSES[name].process(4, np.float64)
    kept = process.alpha / process.alpha_prev
    np.testing.assert_allclose(kept**2 * process.sigma_prev**2 + process.betas, process.sigma**2)
    precision = kept[1:] ** 2 / process.betas[1:] + 1 / process.sigma_prev[1:] ** 2
    np.testing.assert_allclose(process.posterior_variance[1:], 1 / precision)
    mean = process.posterior_mean_x_0 + process.posterior_mean_x_t * process.alpha
    np.testing.assert_allclose(mean, process.alpha_prev, atol=1e-12)
    assert np.all(np.diff(process.timesteps) > 0) and process.alpha_prev[0] == 1


@pytest.mark.parametrize("name", PROCESSES)
def test_levels_at_the_times_the_network_sees_are_those_of_the_walk(name):
    diffusion, x = PROCESSES[name], jnp.zeros((3, 2))
    process = diffusion.process("logsnr:3")
    alpha, sigma = diffusion.levels(jnp.asarray(process.timesteps), x)
    np.testing.assert_allclose(alpha[:, 0], process.alpha, atol=1e-6)
    np.testing.assert_allclose(sigma[:, 0], process.sigma, rtol=2e-5)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("spacing", [3, "trailing:3", "karras:3"])
def test_any_process_and_grid_leads_a_network_that_knows_the_answer_to_it(name, spacing):
    diffusion = PROCESSES[name]
    answer, times = jnp.linspace(-1, 1, 5)[None], []

    def denoise(x_t, t):
        jax.debug.callback(lambda t: times.append(float(t[0])), t)
        alpha, sigma = diffusion.levels(t, x_t)
        eps = (x_t - alpha * answer) / sigma
        kinds = {"eps": eps, "v": alpha * eps - sigma * answer, "velocity": eps - answer}
        ratio = sigma / alpha
        f = (answer - 0.25 / (ratio**2 + 0.25) * x_t) * jnp.sqrt(ratio**2 + 0.25) / (0.5 * ratio)
        return kinds.get(diffusion.prediction, f)

    keys = jax.random.split(jax.random.key(0), 1)
    x_T = jax.random.normal(jax.random.key(1), answer.shape)
    found = sample(denoise, x_T, keys, diffusion, Sampling("ddim", spacing))
    np.testing.assert_allclose(found, answer, atol=2e-3)
    jax.effects_barrier()
    np.testing.assert_allclose(times, diffusion.process(spacing).timesteps[::-1], rtol=1e-6)


def test_training_gives_the_network_the_times_of_its_process():
    for name in ("edm", "flow", "betas"):
        diffusion, seen = PROCESSES[name], []

        def denoise(x_t, t, seen=seen):
            seen.append(np.asarray(t))
            return jnp.zeros_like(x_t)

        t, x_0 = jnp.array([3, 999]), jnp.ones((2, 4))
        training_losses(diffusion, denoise, x_0, t, jnp.zeros((2, 4)))
        np.testing.assert_array_equal(seen[0], diffusion.process().timesteps[np.asarray(t)])


# --------------------------------------------------------------------------------------- grids


def test_grids_are_diffusers():
    """Leading, trailing and even ("linspace"), and Karras's sigmas, of Stable Diffusion's betas."""
    scheduling = pytest.importorskip("diffusers.schedulers.scheduling_ddim")
    heun = pytest.importorskip("diffusers.schedulers.scheduling_euler_discrete")
    settings = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    diffusion = Diffusion(schedule=SD)
    for rule, theirs in (("leading", "leading"), ("trailing", "trailing"), ("even", "linspace")):
        for n in (7, 16, 30):
            scheduler = scheduling.DDIMScheduler(timestep_spacing=theirs, **settings)
            scheduler.set_timesteps(n)
            found = diffusion.process(f"{rule}:{n}").timesteps[::-1]
            np.testing.assert_array_equal(found, scheduler.timesteps)
    for rule, kind in (("karras", "use_karras_sigmas"), ("exponential", "use_exponential_sigmas")):
        scheduler = heun.EulerDiscreteScheduler(**settings, **{kind: True})
        scheduler.set_timesteps(12)
        process = Diffusion(schedule=SD, continuous=True).process(f"{rule}:12")
        ratio = (process.sigma / process.alpha)[::-1]
        np.testing.assert_allclose(ratio, scheduler.sigmas[:-1], rtol=2e-4)
        np.testing.assert_allclose(process.timesteps[::-1], scheduler.timesteps, atol=0.02)


def test_a_flows_grid_is_diffusers():
    theirs = pytest.importorskip("diffusers.schedulers.scheduling_flow_match_euler_discrete")
    scheduler = theirs.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    times = tuple(np.float64(scheduler.sigmas).tolist())  # ends in 0, which is the data
    process = PROCESSES["flow"].process(times)
    np.testing.assert_allclose(process.sigma[::-1], scheduler.sigmas[:-1], rtol=1e-6)
    even = np.arange(1, 11) / 10
    np.testing.assert_allclose(
        PROCESSES["flow"].process("trailing:10").timesteps, 3 * even / (1 + 2 * even), rtol=1e-6
    )


def test_align_your_steps_is_the_papers_table():
    published = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]
    found = Diffusion(schedule=SD).process("ays-sd15:10").timesteps[::-1]
    np.testing.assert_allclose(found, published, atol=1)


def test_log_snr_and_beta_rules():
    floats = Diffusion(schedule=SD, continuous=True)
    np.testing.assert_allclose(np.ptp(np.diff(floats.process("logsnr:9").log_snr)), 0, atol=1e-5)
    t = stats.beta.ppf(1 - np.linspace(0, 1, 8, endpoint=False), 0.6, 0.6)  # as ComfyUI's
    np.testing.assert_array_equal(
        Diffusion(schedule=SD).process("beta:8").timesteps[::-1], np.rint(t * 999)
    )


@pytest.mark.parametrize("name", PROCESSES)
def test_zero_snr_and_every_rule_give_times_that_rise(name):
    diffusion = PROCESSES[name]
    most = 4 if name == "sigmas" else 9
    for rule in ("even", "leading", "trailing", "logsnr", "karras", "beta", "ays-sd15"):
        for n in (1, 2, most):
            times = diffusion.process(f"{rule}:{n}").timesteps
            assert len(times) == n and np.all(np.diff(times) > 0) and times[0] >= 0
            whole = np.issubdtype(times.dtype, np.integer)
            assert whole == (name in ("betas", "own betas", "zero snr"))


def test_times_of_ones_own():
    diffusion = Diffusion()
    given = (999, 800, 500, 100, 0)
    for spacing in (given, list(given), np.array(given), jnp.array(given[::-1]), np.float32(given)):
        sampling = Sampling(spacing=spacing)
        assert sampling.spacing in (given, given[::-1]) and hash(sampling)
        np.testing.assert_array_equal(diffusion.process(spacing).timesteps, given[::-1])
    for number in (25, np.int64(25)):
        assert Sampling(spacing=number).spacing == 25
        same = diffusion.process(number).timesteps, diffusion.process("25").timesteps
        np.testing.assert_array_equal(*same)


def test_schedules_and_spacings_live_in_configs():
    for settings in (*PROCESSES.values(), Sampling(spacing=(9, 4, 1)), Sampling(spacing=12)):
        plain = json.loads(json.dumps(config.to_dict(settings)))
        assert config.build(type(settings), plain) == settings


@pytest.mark.parametrize(
    ("spacing", "words"),
    [
        ("karras20", 'rules: even, leading.*write "karras:20"'),
        ("karras:20:0", "rules: even"),
        ("karras:20:7:1", "rules: even"),
        ("cubic:4", "rules: even"),
        ("even:", "rules: even"),
        ((1, 1), "all rise or all fall"),
        ((1, 3, 2), "all rise or all fall"),
        ((-1, 2), "0 or more"),
        ((), "a tuple of timesteps"),
        ([[1, 2]], "a tuple of timesteps"),
        ((float("nan"), 1.0), "0 or more"),
        (True, "a tuple of timesteps"),
        (2.5, "a tuple of timesteps"),
        (None, "a tuple of timesteps"),
        (0, "1 or more"),
    ],
)
def test_a_bad_spacing_is_refused_when_it_is_given(spacing, words):
    for give in (lambda: Sampling(spacing=spacing), lambda: Diffusion().process(spacing)):
        with pytest.raises(UserError, match=f"spacing: got.*{words}") as error:
            give()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Diffusion().process((1000, 0)), "whole timesteps from 0 to 999"),
        (lambda: Diffusion().process((0.5, 1)), "whole timesteps"),
        (lambda: Diffusion(continuous=True).process((0.5, 999.5)), "times from 0 to 999"),
        (lambda: Diffusion().process("karras:1001"), "1 to 1000"),
        (lambda: PROCESSES["flow"].process((1.5, 0.5)), "times above 0, to 1"),
        (lambda: PROCESSES["edm"].process((0.0,)), "sigmas above 0"),
        (lambda: Diffusion(schedule=SD, continuous=True).process("ays-svd:10"), "apart within"),
        (lambda: Diffusion(schedule="betas"), "one of cosine"),
        (lambda: Schedule("betas"), "table of betas"),
        (lambda: Schedule.own("betas", [0.1, 2.0]), "above 0, below 1"),
        (lambda: Schedule.own("alpha_bar", [0.1, 0.2]), "fall from below 1"),
        (lambda: Schedule.own("sigmas", [1, 3, 2]), "rise, or fall"),
        (lambda: Schedule("cosine", beta_end=0.1), "none for 'cosine'"),
        (lambda: Schedule("flow", zero_terminal_snr=True), "none for 'flow'"),
        (lambda: Schedule("flow", shift=-1.0), "above 0"),
        (lambda: Schedule("edm", sigma_max=0.001), "above sigma_min"),
        (lambda: Diffusion(steps=7, schedule=Schedule.own("sigmas", [2, 1])), "leave it out"),
        (lambda: Diffusion(schedule=Schedule("linear", beta_end=1.5)), "below 1"),
        (
            lambda: Diffusion(schedule=Schedule("linear", zero_terminal_snr=True)),
            'holds no signal; use "v"',
        ),
    ],
)
def test_bad_processes_and_times_are_named(make, words):
    with pytest.raises(UserError, match=words) as error:
        make()
    assert "\n" not in str(error.value)
