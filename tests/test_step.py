"""One step: optimizers against NumPy, gradients of microbatches, averages, SAM in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import networks, tiny
from tests.toy_run import Batches, assert_same, fresh, init_params, loss_fn, numpy_leaves, step_fn
from unclip_jax.errors import UserError
from unclip_jax.parallel import sharding
from unclip_jax.training import (
    TrainConfig,
    init_state,
    make_optimizer,
    make_train_step,
    optimizers,
)

# The optimizer


def test_adamw_agrees_with_numpy_and_decays_kernels_only():
    config = TrainConfig(
        steps=5, learning_rate=0.03, warmup_steps=2, b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.5
    )
    rng = np.random.default_rng(0)
    shapes = {"kernel": (4, 3), "bias": (2, 3), "scale": (3,), "positions": (6, 3)}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    gradients = [{n: rng.normal(size=s) for n, s in shapes.items()} for _ in range(4)]

    optimizer = make_optimizer(config)
    tree = jax.tree.map(jnp.float32, params)
    state = optimizer.init(tree)
    for gradient in gradients:
        updates, state = optimizer.update(jax.tree.map(jnp.float32, gradient), state, tree)
        tree = optax.apply_updates(tree, updates)

    for name, value in params.items():
        m, v = 0.0, 0.0
        for n, gradient in enumerate(gradients, 1):
            g = gradient[name]
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
            update = (m / (1 - 0.8**n)) / (np.sqrt(v / (1 - 0.9**n)) + 1e-3)
            update = update + (0.5 * value if name == "kernel" else 0.0)
            value = value - 0.03 * min(1.0, n / 2) * update
        np.testing.assert_allclose(tree[name], value, rtol=1e-5, atol=1e-6)


def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero():
    config = TrainConfig(steps=100, learning_rate=2.0, warmup_steps=10, schedule="cosine")
    rate = optimizers.learning_rate(config)
    assert float(rate(0)) == pytest.approx(0.2)
    assert float(rate(9)) == pytest.approx(2.0)
    assert float(rate(55)) == pytest.approx(1.0)  # half way down
    assert float(rate(100)) == pytest.approx(0.0, abs=1e-6)
    constant = optimizers.learning_rate(TrainConfig(learning_rate=2.0))
    assert float(constant(0)) == float(constant(10**6)) == 2.0


def test_clipping_bounds_the_gradient_but_reports_its_true_norm():
    config = TrainConfig(batch_size=16, learning_rate=1.0, b1=0.0, b2=0.0, grad_clip=1e-3, eps=1.0)
    before = init_params()
    state, metrics = step_fn(config)(fresh(config), next(Batches()))
    assert float(metrics["grad_norm"]) > 0.1
    # With b1 = b2 = 0 and eps = 1, Adam's update is g / (|g| + 1), hence below the clipped norm.
    moved = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), state.params, before)
    assert 0 < float(optax.tree.norm(moved)) <= 1e-3


# One step


def test_microbatches_give_the_gradient_of_the_whole_batch():
    whole = TrainConfig(batch_size=16, learning_rate=0.1)
    parts = TrainConfig(batch_size=16, learning_rate=0.1, grad_accum=4)
    batch = next(Batches())
    one, metrics = step_fn(whole)(fresh(whole), batch)
    four, metrics_of_four = step_fn(parts)(fresh(parts), batch)
    for a, b in zip(numpy_leaves(one), numpy_leaves(four), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
    for name in metrics:
        assert float(metrics[name]) == pytest.approx(float(metrics_of_four[name]), rel=1e-5)


@pytest.mark.parametrize("sam_rho", [0.0, pytest.param(0.05, marks=pytest.mark.slow)])
def test_microbatches_of_a_clip_keep_the_whole_batch_s_negatives(sam_rho):
    """Loss, gradient and params of one step, with a picture and a caption there twice."""
    batch, found = tiny.batch(8, 16), []
    batch["tokens"] = batch["tokens"].at[6].set(batch["tokens"][1])
    batch["image"] = batch["image"].at[5].set(batch["image"][2])
    params = {
        "network": networks.random(jax.eval_shape(tiny.CLIP.init, jax.random.key(0))["network"])
    }
    for grad_accum in (1, 2, 4):
        config = TrainConfig(batch_size=8, eps=1.0, sam_rho=sam_rho, grad_accum=grad_accum)
        state = init_state(params, make_optimizer(config))
        found.append(step_fn(config, tiny.CLIP.loss)(state, batch))
    (one, metrics), *others = found
    for state, other in others:
        for a, b in zip(numpy_leaves(state), numpy_leaves(one), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
        for name in metrics:
            assert float(other[name]) == pytest.approx(float(metrics[name]), rel=1e-5), name


def test_microbatches_draw_different_noise():
    def loss(params, batch, key):
        draw = jax.random.uniform(key)
        return loss_fn(params, batch, key)[0], {"draw": draw, "square": draw**2}

    config = TrainConfig(batch_size=16, grad_accum=8)
    _, metrics = step_fn(config, loss)(fresh(config), next(Batches()))
    assert float(metrics["square"]) - float(metrics["draw"]) ** 2 > 1e-3  # their variance


def test_the_average_has_its_closed_form():
    config = TrainConfig(batch_size=16, learning_rate=0.1, ema_decay=0.8, ema_warmup=False)
    step, state, batches = step_fn(config), fresh(config), Batches()
    kernels = [np.asarray(state.params["network"]["kernel"], np.float64)]
    for _ in range(6):
        state, _ = step(state, next(batches))
        kernels.append(np.asarray(state.params["network"]["kernel"], np.float64))
    # decay^n p_0 + (1 - decay) sum_i decay^(n - i) p_i
    expected = 0.8**6 * kernels[0]
    expected += 0.2 * sum(0.8 ** (6 - i) * kernels[i] for i in range(1, 7))
    np.testing.assert_allclose(state.ema_params["network"]["kernel"], expected, rtol=1e-5)
    assert state.ema_params["network"]["kernel"].dtype == jnp.float32


def test_the_average_warms_up():
    config = TrainConfig(batch_size=16, learning_rate=0.1, ema_decay=0.999)
    state = fresh(config)
    first = np.asarray(state.params["network"]["bias"])
    state, _ = step_fn(config)(state, next(Batches()))
    expected = 0.1 * first + 0.9 * np.asarray(state.params["network"]["bias"])
    np.testing.assert_allclose(state.ema_params["network"]["bias"], expected, rtol=1e-5)


def test_constants_stay_bit_for_bit():
    config = TrainConfig(batch_size=16, learning_rate=0.1, weight_decay=0.5, ema_decay=0.9)
    step, state, batches = step_fn(config), fresh(config), Batches()
    for _ in range(3):
        state, _ = step(state, next(batches))
    assert_same(state.params["normalisation"], init_params()["normalisation"])
    assert_same(state.averaged["normalisation"], init_params()["normalisation"])
    assert set(state.ema_params) == set(optimizers.trained(state.params)) == {"network"}


def test_a_step_writes_its_state_over_the_one_before():
    config = TrainConfig(batch_size=16, ema_decay=0.9)
    step, state, batch = step_fn(config), fresh(config), next(Batches())
    memory = step.lower(state, batch).compile().memory_analysis()
    assert memory.alias_size_in_bytes == sum(x.nbytes for x in jax.tree.leaves(state))
    params = state.params["network"]
    step(state, batch)
    assert all(x.is_deleted() for x in jax.tree.leaves(params))


def test_a_step_that_is_not_finite_changes_nothing_but_the_step():
    config = TrainConfig(batch_size=16)
    step, batches = step_fn(config), Batches(poison=1)
    state, metrics = step(fresh(config), next(batches))
    assert float(metrics["finite"]) == 1.0
    before = numpy_leaves(state)[1:]
    state, metrics = step(state, next(batches))
    assert float(metrics["finite"]) == 0.0 and int(state.step) == 2
    assert_same(before, numpy_leaves(state)[1:])


def test_a_metric_must_not_take_the_loops_names():
    config = TrainConfig(batch_size=16)

    def loss(params, batch, key):
        return loss_fn(params, batch, key)[0], {"grad_norm": 0.0}

    with pytest.raises(ValueError, match="grad_norm"):
        step_fn(config, loss)(fresh(config), next(Batches()))


# Sharpness-aware minimisation


CURVATURE = np.array([[3.0, 1.0], [1.0, 0.5]])
START = np.array([0.7, -1.2])


def quadratic(params, batch, key):
    """1/2 w A w, over a constant that scales it; each example asks for the same."""
    w = params["network"]["bias"] / params["normalisation"]["std"]
    value = 0.5 * w @ jnp.asarray(CURVATURE, jnp.float32) @ w
    return value + 0.0 * jnp.mean(batch["x"]), {}


def quadratic_step(start=START, **settings):
    """The state and metrics after a step of plain gradient descent at rate 1."""
    config = TrainConfig(batch_size=16, ema_decay=0.5, ema_warmup=False, **settings)
    mesh = sharding.make_mesh()
    step = make_train_step(quadratic, optax.sgd(1.0), config, mesh)
    params = {
        "network": {"bias": jnp.asarray(start, jnp.float32)},
        "normalisation": {"std": jnp.ones(2)},
    }
    return step(init_state(params, optax.sgd(1.0)), {"x": np.ones((16, 1), np.float32)})


@pytest.mark.parametrize("grad_accum", [1, 4])
def test_sam_takes_the_gradient_uphill(grad_accum):
    """For 1/2 w A w it is A (w + rho g / |g|) with g = A w; the loss is that at w."""
    g = CURVATURE @ START
    sharp = CURVATURE @ (START + 0.3 * g / np.linalg.norm(g))
    state, metrics = quadratic_step(sam_rho=0.3, grad_accum=grad_accum)
    np.testing.assert_allclose(state.params["network"]["bias"], START - sharp, rtol=1e-5)
    np.testing.assert_allclose(state.ema_params["network"]["bias"], START - sharp / 2, rtol=1e-5)
    assert float(metrics["loss"]) == pytest.approx(0.5 * START @ g, rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(np.linalg.norm(sharp), rel=1e-5)
    # The constant is in the loss, but neither climbs nor moves.
    np.testing.assert_array_equal(state.params["normalisation"]["std"], np.ones(2))
    plain, _ = quadratic_step(grad_accum=grad_accum)
    np.testing.assert_allclose(plain.params["network"]["bias"], START - g, rtol=1e-5)


def test_sam_at_a_minimum_stays_there():
    state, metrics = quadratic_step(start=np.zeros(2), sam_rho=0.3)
    assert float(metrics["finite"]) == 1.0
    np.testing.assert_array_equal(state.params["network"]["bias"], np.zeros(2))


def test_sam_uses_the_same_noise_for_both_gradients():
    """A loss whose noise shifts the slope: other noise in the second gradient would show."""

    def loss(params, batch, key):
        slope = jax.random.normal(key, (2,))
        return quadratic(params, batch, key)[0] + params["network"]["bias"] @ slope, {"s": slope[0]}

    config = TrainConfig(batch_size=16, sam_rho=0.3)
    step = make_train_step(loss, optax.sgd(1.0), config, sharding.make_mesh())
    params = {
        "network": {"bias": jnp.asarray(START, jnp.float32)},
        "normalisation": {"std": jnp.ones(2)},
    }
    batch = {"x": np.ones((16, 1), np.float32)}
    state, _ = step(init_state(params, optax.sgd(1.0)), batch)
    slope = np.asarray(jax.random.normal(jax.random.fold_in(jax.random.key(0), 0), (2,)))
    g = CURVATURE @ START + slope
    sharp = CURVATURE @ (START + 0.3 * g / np.linalg.norm(g)) + slope
    np.testing.assert_allclose(state.params["network"]["bias"], START - sharp, rtol=1e-5)


def test_sam_that_is_not_finite_changes_nothing():
    config = TrainConfig(batch_size=16, sam_rho=0.1)
    step, batches = step_fn(config), Batches(poison=1)
    state, metrics = step(fresh(config), next(batches))
    assert float(metrics["finite"]) == 1.0
    before = numpy_leaves(state)[1:]
    state, metrics = step(state, next(batches))
    assert float(metrics["finite"]) == 0.0
    assert_same(before, numpy_leaves(state)[1:])


def test_a_radius_below_zero_is_named():
    with pytest.raises(
        UserError, match=r"train\.sam_rho: got -0\.1, expected a finite number, 0 or more"
    ):
        TrainConfig(sam_rho=-0.1)
