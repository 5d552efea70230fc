"""Narrow dtypes for averages and moments: unbiased, so that small changes are not lost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.training import optimizers
from unclip_jax.training.config import TrainConfig


def test_rounding_is_to_a_neighbour_and_right_on_average():
    """bfloat16 has 8 bits: between 1 and 2 its steps are 1/128."""
    x = jnp.full((200_000,), 1.0 + 0.3 / 128, jnp.float32)
    rounded = np.asarray(optimizers.round_stochastically(jax.random.key(0), x), np.float64)
    assert set(np.unique(rounded)) == {1.0, 1.0 + 1 / 128}
    assert abs(np.mean(rounded > 1.0) - 0.3) < 4 * np.sqrt(0.3 * 0.7 / x.size)
    down = np.asarray(optimizers.round_stochastically(jax.random.key(0), -x), np.float64)
    np.testing.assert_array_equal(down, -rounded)


def test_what_bfloat16_holds_is_not_changed_and_infinities_stay():
    bits = np.arange(2**16, dtype=np.uint16)
    every = jax.lax.bitcast_convert_type(jnp.asarray(bits), jnp.bfloat16)
    exact = every[~jnp.isnan(every)]
    back = optimizers.round_stochastically(jax.random.key(1), exact.astype(jnp.float32))
    np.testing.assert_array_equal(
        np.asarray(jax.lax.bitcast_convert_type(back, jnp.uint16)),
        np.asarray(jax.lax.bitcast_convert_type(exact, jnp.uint16)),
    )
    for value in (jnp.nan, -jnp.nan):
        rounded = optimizers.round_stochastically(jax.random.key(2), jnp.full((1000,), value))
        assert bool(jnp.all(jnp.isnan(rounded)))


def average_after(steps: int, dtype: str) -> float:
    """An average with decay 0.999 of a constant 1, begun at 0, over many leaves."""

    def step(average, key):
        moved = average.astype(jnp.float32) + 0.001 * (1.0 - average.astype(jnp.float32))
        return optimizers.stored(key, {"a": moved}, dtype)["a"], None

    keys = jax.random.split(jax.random.key(0), steps)
    average, _ = jax.lax.scan(step, jnp.zeros(512, dtype), keys)
    return float(jnp.mean(average.astype(jnp.float32)))


def test_an_average_in_bfloat16_follows():
    """Rounded to the nearest it would stop where a step is less than half its last bit."""
    truth = 1.0 - 0.999**3000
    assert average_after(3000, "float32") == pytest.approx(truth, rel=1e-4)
    assert average_after(3000, "bfloat16") == pytest.approx(truth, rel=0.005)


def minimise(config: TrainConfig, steps: int = 400):
    """Adam on a sum of squares in 64 dimensions of very different curvature."""
    curvature = jnp.logspace(-2, 2, 64)
    optimizer = optimizers.make_optimizer(config)
    params = {"network": {"kernel": jnp.ones((1, 64))}}

    def step(carry, _):
        params, state = carry
        loss = lambda p: 0.5 * jnp.sum(curvature[None] * p["network"]["kernel"] ** 2)  # noqa: E731
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return (jax.tree.map(jnp.add, params, updates), state), value

    (params, state), losses = jax.lax.scan(step, (params, optimizer.init(params)), length=steps)
    return losses, state


def test_moments_in_bfloat16_train_as_well():
    config = {"learning_rate": 0.02, "steps": 400, "schedule": "cosine", "b2": 0.999}
    wide, _ = minimise(TrainConfig(**config))
    narrow, state = minimise(TrainConfig(**config, moment_dtype="bfloat16"))
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert {leaf.dtype.name for leaf in moments} == {"bfloat16"}
    assert float(wide[-1]) < 1e-3 * float(wide[0])
    assert float(narrow[-1]) < 2e-3 * float(narrow[0])
    np.testing.assert_allclose(narrow[:20], wide[:20], rtol=0.02)
