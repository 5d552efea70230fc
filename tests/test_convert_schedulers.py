"""diffusers' DDPMScheduler read and written: every field, its timesteps, tables and steps."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.diffusion import samplers
from unclip_jax.errors import UserError
from unclip_jax.weights.convert import schedulers

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

# As it is published beside Kandinsky 2.2's decoder.
KANDINSKY = {
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.18.0",
    "beta_schedule": "linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "variance_type": "fixed_small",
}
BETAS = np.linspace(1e-3, 0.3, 20).tolist()
OTHERS = {
    "kandinsky": {},
    "clipped": {"clip_sample": True, "clip_sample_range": 1.5},
    "thresholded": {"thresholding": True, "sample_max_value": 2.0, "clip_sample": True},
    "learned": {"variance_type": "learned_range", "steps_offset": 0},
    "large": {"variance_type": "fixed_large", "timestep_spacing": "linspace", "steps_offset": 0},
    "log": {"variance_type": "fixed_small_log", "timestep_spacing": "trailing"},
    "v": {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear", "steps_offset": 0},
    "zero": {"prediction_type": "sample", "rescale_betas_zero_snr": True, "steps_offset": 0},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 700},
    "sigmoid": {"beta_schedule": "sigmoid", "num_train_timesteps": 400},
    "short": {"num_train_timesteps": 250},
    "own": {"trained_betas": BETAS, "num_train_timesteps": 20, "steps_offset": 0},
}


def test_a_field_that_is_left_out_is_as_diffusers_takes_it():
    signature = inspect.signature(diffusers.DDPMScheduler.__init__)
    known = {name: p.default for name, p in signature.parameters.items() if name != "self"}
    assert known == schedulers.DDPM


def in_float64(scheduler):
    """The same scheduler with exact tables, as ours are."""
    config = scheduler.config
    if config.trained_betas is not None:
        betas = np.asarray(config.trained_betas)
    elif config.beta_schedule == "linear":
        betas = np.linspace(config.beta_start, config.beta_end, config.num_train_timesteps)
    else:
        return scheduler
    if not config.rescale_betas_zero_snr:
        scheduler.alphas_cumprod = torch.from_numpy(np.cumprod(1 - betas))
    return scheduler


def their_walk(settings, steps, network, x_T, noise, monkeypatch):
    """Their loop over a made-up network: x after all steps, channels last."""
    scheduler = in_float64(diffusers.DDPMScheduler.from_config(settings))
    scheduler.set_timesteps(steps)
    given = iter(np.moveaxis(noise, 1, 0))
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor",
        lambda *_, **__: torch.from_numpy(next(given, 0 * noise[:, 0]).transpose(0, 3, 1, 2)),
    )
    x = torch.from_numpy(x_T.transpose(0, 3, 1, 2).copy())
    for t in scheduler.timesteps:
        output = np.asarray(network(jnp.asarray(x.numpy().transpose(0, 2, 3, 1)), float(t)))
        x = scheduler.step(torch.from_numpy(output.transpose(0, 3, 1, 2).copy()), t, x)[0]
    return x.numpy().transpose(0, 2, 3, 1), scheduler


@pytest.mark.parametrize("name", OTHERS)
def test_the_walk_is_diffusers(name, monkeypatch):
    """Timesteps, tables, limits and variances at once: the same x_0 after all steps."""
    settings = KANDINSKY | OTHERS[name]
    steps = 5 if name == "own" else 7
    diffusion, sampling = schedulers.read_ddpm(settings, steps, "scheduler_config.json")
    rng = np.random.default_rng(0)
    x_T = rng.standard_normal((2, 4, 6, 3)).astype(np.float32)
    noise = rng.standard_normal((2, steps - 1, 4, 6, 3)).astype(np.float32)

    def network(x, t):
        t = jnp.asarray(t, jnp.float32).reshape(-1, 1, 1, 1)
        prediction = 0.9 * jnp.sin(2 * x + 0.01 * t)
        fraction = [jnp.cos(3 * x)] if diffusion.learned_variance else []
        return jnp.concatenate([prediction, *fraction], axis=-1)

    theirs, scheduler = their_walk(settings, steps, network, x_T, noise, monkeypatch)
    times = diffusion.process(sampling.spacing).timesteps[::-1]
    np.testing.assert_array_equal(times, scheduler.timesteps)
    walk = jax.jit(lambda x: samplers.sample(network, x, None, diffusion, sampling, noise=noise))
    ours = walk(x_T)
    # Theirs keeps float32 tables where they are not linear betas, and its zero SNR is not quite 0.
    bound = {"zero": 2e-3, "cosine": 1e-3, "sigmoid": 1e-3, "v": 1e-3}.get(name, 2e-5)
    assert np.abs(ours - theirs).max() < bound * np.abs(theirs).max()


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_written_is_read_again_and_theirs(name):
    diffusion, sampling = schedulers.read_ddpm(KANDINSKY | OTHERS[name], 5, "x")
    written = schedulers.ddpm_settings(diffusion, sampling)
    assert schedulers.read_ddpm(written, 5, "x") == (diffusion, sampling)
    ours, theirs = (
        diffusers.DDPMScheduler.from_config(each) for each in (written, KANDINSKY | OTHERS[name])
    )
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "DDIMScheduler"}, "_class_name: got 'DDIMScheduler', expected one of"),
        ({"new_field": 3}, "field 'new_field' is 3, which unclip_jax does not know"),
        ({"variance_type": "learned"}, "variance_type: got 'learned'"),
        ({"variance_type": "fixed_large_log"}, "variance_type: got 'fixed_large_log'"),
        ({"beta_schedule": "laplace"}, "beta_schedule: got 'laplace'"),
        ({"beta_start": "low"}, "beta_start: got 'low'"),
        ({"beta_end": 2.0}, "betas up to 2, which have to stay below 1"),
        ({"timestep_spacing": "even"}, "timestep_spacing: got 'even'"),
        ({"steps_offset": -1}, "steps_offset: got -1"),
        ({"steps_offset": 900}, "expected timesteps from 0 to 999"),
        ({"num_train_timesteps": 10.5}, "num_train_timesteps: got 10.5"),
        ({"num_train_timesteps": 4}, "expected 1 to 4 steps"),
        ({"rescale_betas_zero_snr": True}, "prediction: got 'eps'"),
        ({"clip_sample": True, "clip_sample_range": 0}, "clip_sample_range: got 0"),
        ({"thresholding": True, "sample_max_value": 0.5}, "sample_max_value: got 0.5"),
        ({"trained_betas": [0.1]}, "trained_betas: got '1 of them', expected a list of"),
        ({"trained_betas": "x"}, "trained_betas: got 'x'"),
    ],
)
def test_what_it_does_not_do_is_one_line(change, message):
    with pytest.raises(UserError, match=message) as caught:
        schedulers.read_ddpm(KANDINSKY | change, 5, "a/scheduler_config.json")
    assert str(caught.value).startswith("a/scheduler_config.json: ")
    assert "\n" not in str(caught.value)
