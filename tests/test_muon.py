"""Muon: matrices step along the polar factor of their gradient, and all else as Adam has it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.sharded_run import STAGES
from tests.tiny import params
from tests.toy_run import Batches, assert_same, run
from unclip_jax.errors import UserError
from unclip_jax.training import optimizers
from unclip_jax.training.config import TrainConfig
from unclip_jax.training.optimizers import matrix_axes, polar_factor

CONFIG = TrainConfig(optimizer="muon", learning_rate=1.0)
KERNELS = {
    "dense": {"kernel": (8, 12), "bias": (12,)},
    "conv_1": {"kernel": (3, 3, 4, 6)},
    "conv_in": {"kernel": (3, 3, 3, 6)},
    "qkv": {"kernel": (8, 3, 2, 4)},
    "out": {"kernel": (2, 4, 8)},
    "blocks": {"up": {"kernel": (2, 8, 16)}, "qkv": {"kernel": (2, 8, 3, 2, 4)}},
    "tokens": {"embedding": (20, 8)},
}


def gradients(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    is_shape = lambda node: isinstance(node, tuple)  # noqa: E731
    draw = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {"network": jax.tree.map(draw, KERNELS, is_leaf=is_shape)}


def first_step(config: TrainConfig, grads: dict) -> dict:
    """What the first step adds to params of 0."""
    optimizer, zeros = optimizers.make_optimizer(config), jax.tree.map(jnp.zeros_like, grads)
    updates, _ = optimizer.update(grads, optimizer.init(zeros), zeros)
    return updates["network"]


def assert_polar(step, grad) -> None:
    """`step` [in, out] is -0.2 sqrt(max(in, out)) U V^T of `grad`, singular values near 1.

    The iteration leaves each singular value between 0.7 and 1.2, and the vectors as they are.
    """
    u, _, vt = np.linalg.svd(np.asarray(grad, np.float64), full_matrices=False)
    found = -np.asarray(step, np.float64) / (0.2 * np.sqrt(max(grad.shape)))
    inside = u.T @ found @ vt.T
    values = np.diag(inside)
    assert values.min() > 0.6 and values.max() < 1.25
    np.testing.assert_allclose(inside, np.diag(values), atol=2e-3)
    np.testing.assert_allclose(u @ inside @ vt, found, atol=2e-3)


def test_matrices_step_along_the_polar_factor_of_their_gradient():
    """numpy's SVD is the witness. Each of q, k and v, and each layer, is a matrix of its own."""
    grads = gradients()
    g, steps = grads["network"], first_step(CONFIG, grads)
    assert_polar(steps["dense"]["kernel"], g["dense"]["kernel"])
    assert_polar(steps["conv_1"]["kernel"].reshape(36, 6), g["conv_1"]["kernel"].reshape(36, 6))
    assert_polar(steps["out"]["kernel"].reshape(8, 8), g["out"]["kernel"].reshape(8, 8))
    for part in range(3):
        one = steps["qkv"]["kernel"][:, part].reshape(8, 8)
        assert_polar(one, g["qkv"]["kernel"][:, part].reshape(8, 8))
    for layer in range(2):
        stacked, theirs = steps["blocks"], g["blocks"]
        assert_polar(stacked["up"]["kernel"][layer], theirs["up"]["kernel"][layer])
        for part in range(3):
            one = stacked["qkv"]["kernel"][layer, :, part].reshape(8, 8)
            assert_polar(one, theirs["qkv"]["kernel"][layer, :, part].reshape(8, 8))


@pytest.mark.parametrize("decades", [0, 3, 6])
@pytest.mark.parametrize("shape", [(90, 10), (12, 12), (5, 40), (1, 7)])
def test_iterating_on_gram_matrices_gives_what_iterating_on_matrices_does(shape, decades):
    """optax iterates on the matrix itself. Singular values fall by so many decades, which costs no
    digit beyond those that it loses as well."""
    u, s, vt = np.linalg.svd(np.random.default_rng(3).normal(size=shape), full_matrices=False)
    matrix = jnp.asarray((u * s * np.logspace(0, -decades, len(s))) @ vt, jnp.float32)
    witness = optax.contrib.scale_by_muon(beta=0.0, nesterov=False)
    expected, _ = witness.update(matrix, witness.init(matrix))
    np.testing.assert_allclose(polar_factor(matrix), expected, atol=3e-5)


def test_a_gradient_of_nothing_is_no_step():
    np.testing.assert_array_equal(polar_factor(jnp.zeros((2, 6, 3))), 0.0)


def test_what_is_no_matrix_steps_as_with_adamw():
    grads = gradients(1)
    steps, adam = first_step(CONFIG, grads), first_step(TrainConfig(learning_rate=1.0), grads)
    for name, leaf in (("dense", "bias"), ("conv_in", "kernel"), ("tokens", "embedding")):
        np.testing.assert_array_equal(steps[name][leaf], adam[name][leaf])


def test_steps_are_of_adams_size():
    """One learning rate serves both: the root mean square of a full matrix's step is 0.2."""
    grads = {"network": {"up": {"kernel": gradients()["network"]["out"]["kernel"].reshape(8, 8)}}}
    step = first_step(CONFIG, grads)["up"]["kernel"]
    assert 0.14 < float(jnp.sqrt(jnp.mean(step**2))) < 0.25


def test_decay_shrinks_matrices_too():
    config = TrainConfig(optimizer="muon", learning_rate=0.5, weight_decay=0.1)
    weights = {"network": {"kernel": jnp.full((4, 4), 3.0), "bias": jnp.full((4,), 3.0)}}
    optimizer = optimizers.make_optimizer(config)
    nothing = jax.tree.map(jnp.zeros_like, weights)
    updates, _ = optimizer.update(nothing, optimizer.init(weights), weights)
    np.testing.assert_allclose(updates["network"]["kernel"], -0.5 * 0.1 * 3.0, rtol=1e-6)
    np.testing.assert_array_equal(updates["network"]["bias"], 0.0)


@pytest.mark.parametrize("stage", STAGES)
def test_every_kernel_but_those_at_pixels_is_a_matrix(stage):
    """So a new layer's kernel does not fall to Adam unseen."""
    found = matrix_axes(optimizers.trained(params(STAGES[stage])))
    none = {
        "/".join(key.key for key in path[-2:])
        for path, axes in jax.tree_util.tree_leaves_with_path(found, is_leaf=lambda x: x is None)
        if axes is None
    }
    kernels = {name for name in none if name.endswith("/kernel")}
    assert kernels <= {"conv_in/kernel", "conv_out/kernel", "patches/kernel", "pixels/kernel"}


def test_it_reaches_a_minimum_that_steep_and_flat_directions_share():
    """A sum of squares whose curvatures span four decades."""
    curvature = jnp.logspace(-2, 2, 16)[:, None] * jnp.ones((16, 16))

    start = {"network": {"kernel": jax.random.normal(jax.random.key(0), (16, 16))}}
    settings = {"learning_rate": 0.2, "steps": 200, "schedule": "cosine"}
    optimizer = optimizers.make_optimizer(TrainConfig(optimizer="muon", **settings))

    def loss(weights):
        return 0.5 * jnp.sum(curvature * weights["network"]["kernel"] ** 2)

    def step(carry, _):
        weights, state = carry
        updates, state = optimizer.update(jax.grad(loss)(weights), state, weights)
        return (optax.apply_updates(weights, updates), state), None

    (weights, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), length=200)
    assert float(loss(weights)) < 1e-4 * float(loss(start))


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    """Its state, which has holes where the other optimizer's is, survives a checkpoint."""
    settings = {"optimizer": "muon", "learning_rate": 0.01, "schedule": "constant"}
    whole = run(tmp_path / "whole", **settings)
    run(tmp_path / "parts", steps=14, **settings)
    batches = Batches()
    assert_same(run(tmp_path / "parts", batches, **settings), whole)
    assert batches.log[0] == 14


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("optimizer", {"optimizer": "sgd"}),
        ("muon_momentum", {"muon_momentum": 1.0}),
        ("moment_dtype", {"optimizer": "muon", "moment_dtype": "bfloat16"}),
    ],
)
def test_settings_that_cannot_be(field, settings):
    with pytest.raises(UserError, match=rf"train\.{field}: got"):
        TrainConfig(**settings)
