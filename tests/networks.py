"""What the tests of networks share: params in which nothing is zero, and comparing arrays."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def shapes(network: nn.Module, *args, **kwargs):
    """The tree of `ShapeDtypeStruct`s of a network's params."""
    init = lambda key: network.init(key, *args, **kwargs)  # noqa: E731
    return jax.eval_shape(init, jax.random.key(0))["params"]


def random(shapes, seed: int = 0):
    """Params of these shapes with every leaf random, so that no zero start hides a mistake."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        fan_in = math.prod(leaf.shape[:-1]) or 1
        noise = rng.standard_normal(leaf.shape) / math.sqrt(max(fan_in, 4))
        return jnp.asarray(noise + (path[-1].key == "scale"), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_params(network: nn.Module, *args, seed: int = 0, **kwargs):
    """Random params of a network that is called with these arguments."""
    return random(shapes(network, *args, **kwargs), seed)


def size(tree) -> int:
    """Number of parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def relative_error(ours, reference) -> float:
    """Greatest absolute difference over the reference's greatest absolute value."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape
    return np.abs(ours - reference).max() / np.abs(reference).max()


def normal(seed: int, *shape: int) -> jax.Array:
    """Standard normal noise, drawn by NumPy: nothing to compile for each shape."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def integers(seed: int, below: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, below, shape), jnp.int32)


def prefix_mask(lengths, length: int) -> jax.Array:
    """`[b, length]` booleans, True on the first `lengths[i]` places."""
    return jnp.arange(length)[None, :] < jnp.array(lengths)[:, None]


def said(prediction, x_0, x_t, alpha, sigma, std=0.5):
    """What a network that knows x_0 says of x_t = alpha x_0 + sigma eps, by each definition."""
    eps = (x_t - alpha * x_0) / sigma
    ratio = sigma / alpha  # EDM's sigma, where x_t / alpha is its x
    c_skip, c_out = std**2 / (ratio**2 + std**2), ratio * std / (ratio**2 + std**2) ** 0.5
    return {
        "x_0": x_0,
        "eps": eps,
        "v": alpha * eps - sigma * x_0,
        "velocity": eps - x_0,
        "F": (x_0 - c_skip * (x_t / alpha)) / c_out,
    }[prediction]
