"""Walks that begin on the way, and walks over grids that are traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.test_samplers import keys, noise_like
from unclip_jax.diffusion.gaussian import Diffusion
from unclip_jax.diffusion.samplers import METHODS, Sampling, grid_of, invert, noised, sample
from unclip_jax.errors import UserError

ON_THE_WAY = [
    (Diffusion(prediction="v"), "heun"),
    (Diffusion(prediction="v"), "ddpm"),
    (Diffusion(schedule="edm", prediction="F"), "euler"),
    (Diffusion(schedule="flow", prediction="velocity"), "euler_ancestral"),
]


@pytest.mark.parametrize(("diffusion", "method"), ON_THE_WAY)
def test_steps_that_are_left_out_are_those_of_a_shorter_grid(diffusion, method):
    """One program for any number; what is left is the walk over the times that are left."""
    denoise = lambda x, t: jnp.tanh(x) * 0.3  # noqa: E731
    times = diffusion.process(6).timesteps.tolist()
    x, own = noise_like(2, 5), keys(2)
    compiled = []

    @jax.jit
    def some(x, first):
        compiled.append(first)
        return sample(denoise, x, own, diffusion, Sampling(method, 6), first=first)

    for first in (0, 4):
        left = Sampling(method, tuple(times[: 6 - first]))
        scaled = x / diffusion.noise_std  # which x_T of a whole walk is multiplied with
        expected = jax.jit(lambda x, left=left: sample(denoise, x, own, diffusion, left))(scaled)
        np.testing.assert_allclose(some(x, first), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(some(x, 6), x)
    assert len(compiled) == 1


@pytest.mark.parametrize(
    "diffusion", [Diffusion(prediction="v"), Diffusion(schedule="flow", prediction="velocity")]
)
def test_inversion_stops_where_sampling_begins_and_noise_has_that_level(diffusion):
    denoise = lambda x, t: 0.1 * x  # noqa: E731
    x_0 = 0.5 * noise_like(2, 4000)
    way = Sampling("ddim", 40)
    there = jax.jit(lambda x, n: invert(denoise, x, diffusion, way, first=n, iterations=9))
    back = jax.jit(lambda x, n: sample(denoise, x, None, diffusion, way, first=n))
    for first in (0, 15, 40):
        np.testing.assert_allclose(back(there(x_0, first), first), x_0, atol=1e-4)
        drawn = noised(x_0, noise_like(2, 4000, seed=3), diffusion, way, first=first)
        level = diffusion.process(40)
        alpha, sigma = (
            (1.0, 0.0) if first == 40 else (level.alpha[39 - first], level.sigma[39 - first])
        )
        assert float(jnp.std(drawn)) == pytest.approx(np.hypot(0.5 * alpha, sigma), rel=0.03)


@pytest.mark.parametrize(
    ("method", "first", "message"),
    [
        (
            "dpm++",
            2,
            "first, for Sampling.method='dpm\\+\\+': got 2, expected none: its steps remember",
        ),
        ("ddim", 7, "first: got 7, expected 0 to 6"),
        ("ddim", -1, "first: got -1"),
        ("ddim", 1.5, "first: got 1.5"),
    ],
)
def test_a_start_that_is_not_there_is_named(method, first, message):
    with pytest.raises(UserError, match=message):
        sample(
            lambda x, t: x, noise_like(2, 3), None, Diffusion(), Sampling(method, 6), first=first
        )


# ------------------------------------------------------------------------------- traced grids


@pytest.mark.parametrize("method", METHODS)
def test_a_grid_that_is_traced_walks_as_its_spacing_does(method):
    diffusion = Diffusion(prediction="v", schedule="scaled_linear", continuous=True)
    x_T, own, compiled = noise_like(2, 5), keys(2), []
    told = {"analytic": jnp.full(1000, 0.1), "eta": 0.5 if method == "ddim" else 0.0}

    def walk(x, spacing, grid=None):
        compiled.append(spacing)
        denoise = lambda x, t: jnp.tanh(x) * 0.3 + 1e-4 * t[:, None]  # noqa: E731
        return sample(denoise, x, own, diffusion, Sampling(method, spacing), grid=grid, **told)

    traced = jax.jit(walk, static_argnums=1)
    for spacing in ("karras:5", "even:5"):
        grid = grid_of(diffusion, Sampling(method, spacing))
        found = traced(x_T, "logsnr:5", grid)
        np.testing.assert_allclose(found, walk(x_T, spacing), rtol=1e-4, atol=1e-5)
    assert compiled.count("logsnr:5") == 1


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda d: grid_of(d, Sampling("ddim", 5)), "grid: of ddim in 5 steps, expected one"),
        (lambda d: grid_of(d, Sampling("dpm++", 6)), "grid: of dpm\\+\\+ in 6 steps"),
        (lambda d: grid_of(Diffusion(), Sampling("dpm++", 5)), "of the same diffusion"),
        (lambda d: grid_of(d, Sampling("dpm++", 5), dtype=np.float64), "grid's dtype: got"),
    ],
)
def test_a_grid_of_another_walk_is_named(made, message):
    diffusion = Diffusion(prediction="v")
    with pytest.raises(UserError, match=message):
        sampling, grid = Sampling("dpm++", 5), made(diffusion)
        sample(lambda x, t: x, noise_like(2, 3), None, diffusion, sampling, grid=grid)
