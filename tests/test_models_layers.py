"""The layers: attention, convolution, norms, time, and the scanned Transformer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tests.networks import normal, prefix_mask, random_params, relative_error, shapes
from unclip_jax.errors import UserError
from unclip_jax.models import layers
from unclip_jax.models.attention import attention, causal_mask


def attention_by_loops(q, k, v, mask):
    """Softmax attention in float64, one query at a time; nothing to attend to gives zeros."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    dim = q.shape[-1]
    out = np.zeros_like(q)
    for i, j, row in np.ndindex(q.shape[:3]):
        seen = np.flatnonzero(mask[i, j, row])
        if seen.size:
            scores = k[i, j, seen] @ q[i, j, row] / np.sqrt(dim)
            weights = np.exp(scores - scores.max())
            out[i, j, row] = weights @ v[i, j, seen] / weights.sum()
    return out


def test_attention_is_softmax_over_what_the_mask_allows():
    q, k, v = normal(0, 2, 3, 5, 4), normal(1, 2, 3, 7, 4), normal(2, 2, 3, 7, 4)
    mask = (normal(3, 2, 3, 5, 7) > -0.3).at[0, 1, 2].set(False)
    assert (
        relative_error(attention(q, k, v, mask), attention_by_loops(q, k, v, np.asarray(mask)))
        < 1e-6
    )
    everything = np.ones((2, 3, 5, 7), bool)
    assert relative_error(attention(q, k, v), attention_by_loops(q, k, v, everything)) < 1e-6


def test_attention_does_not_overflow_and_has_no_nan_gradient():
    q, k, v = 1e3 * normal(0, 1, 1, 3, 4), 1e3 * normal(1, 1, 1, 5, 4), normal(2, 1, 1, 5, 4)
    mask = jnp.array([[True] * 5, [True] + [False] * 4, [False] * 5])[None, None]
    grads = jax.grad(lambda *qkv: attention(*qkv, mask).sum(), argnums=(0, 1, 2))(q, k, v)
    assert all(jnp.isfinite(g).all() for g in grads)
    # One key alone has weight 1 whatever its score; no key at all has no weight.
    np.testing.assert_array_equal(grads[0][0, 0, 1:], 0.0)


def test_attention_gradient():
    q, k, v = normal(0, 1, 2, 3, 4), normal(1, 1, 2, 5, 4), normal(2, 1, 2, 5, 4)
    mask = prefix_mask([3], 5)[:, None, None, :]
    check_grads(lambda *qkv: attention(*qkv, mask), (q, k, v), 1, ["rev"], rtol=2e-2)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_group_norm_leaves_each_group_with_mean_0_and_variance_1(groups):
    x = 1e3 + normal(0, 2, 4, 5, 6) * jnp.arange(1.0, 7.0).reshape(1, 1, 1, 6)
    norm = layers.GroupNorm(groups)
    y = norm.apply(norm.init(jax.random.key(0), x), x).reshape(2, 20, groups, -1)
    np.testing.assert_allclose(y.mean((1, 3)), 0.0, atol=1e-4)
    np.testing.assert_allclose(y.var((1, 3)), 1.0, atol=1e-3)


def test_timestep_embedding_is_cosines_then_sines():
    t = jnp.array([0, 1, 999])
    embedded = layers.timestep_embedding(t, 8)
    freqs = 10000.0 ** (-np.arange(4) / 4)
    expected = np.exp(1j * np.array([0, 1, 999])[:, None] * freqs)
    np.testing.assert_allclose(embedded[:, :4], expected.real, atol=2e-4)
    np.testing.assert_allclose(embedded[:, 4:], expected.imag, atol=2e-4)
    with pytest.raises(UserError, match="even"):
        layers.timestep_embedding(t, 7)


# ---------------------------------------------------------------- the scanned Transformer


def test_scanned_transformer_equals_its_blocks_one_after_another():
    x, mask = normal(0, 2, 5, 12), causal_mask(5)
    stack = layers.Transformer(layers=3, heads=2, mlp_ratio=2.5)
    params = random_params(stack, x, mask)
    block = layers.TransformerBlock(
        heads=2, mlp_ratio=2.5, depth=3, activation="gelu", dtype="float32"
    )
    expected = x
    for i in range(3):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
        expected, _ = block.apply({"params": layer}, expected, mask)
    assert relative_error(stack.apply({"params": params}, x, mask), expected) < 1e-6


def test_every_layer_starts_different():
    stack = layers.Transformer(layers=3, heads=2)
    kernel = stack.init(jax.random.key(0), normal(0, 1, 4, 8))["params"]["blocks"]["up"]["kernel"]
    assert kernel.shape == (3, 8, 32)
    assert not jnp.allclose(kernel[0], kernel[1])


def test_depth_does_not_grow_the_program():
    def length(depth):
        stack = layers.Transformer(layers=depth, heads=2)
        x = jnp.ones((1, 4, 8))
        variables = jax.eval_shape(stack.init, jax.random.key(0), x)
        return len(jax.jit(stack.apply).lower(variables, x).as_text().splitlines())

    assert length(2) == length(40)


def test_remat_changes_no_value_and_no_gradient():
    x = normal(0, 2, 5, 12)
    params = random_params(layers.Transformer(layers=2, heads=3), x)

    def value_and_grad(policy):
        stack = layers.Transformer(layers=2, heads=3, remat=policy)
        loss = lambda p, x: jnp.sin(stack.apply({"params": p}, x)).sum()  # noqa: E731
        return jax.tree.leaves(jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x))

    expected = value_and_grad("none")
    for policy in ("full", "dots"):
        for ours, leaf in zip(value_and_grad(policy), expected, strict=True):
            np.testing.assert_allclose(ours, leaf, rtol=1e-4, atol=1e-5)


def test_dots_keeps_products_and_full_keeps_none():
    """ "full" saves only the inputs; "dots" saves the products too, and recomputes the rest."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.sin(jnp.tanh(nn.Conv(7, (3, 3))(nn.Dense(5)(x))))

    def products(policy):
        net = layers.remat(Net, policy)()
        x = jnp.ones((1, 4, 4, 2))
        params = shapes(net, x)
        grad = jax.value_and_grad(lambda p, x: net.apply({"params": p}, x).sum(), argnums=1)
        text = jax.jit(grad).lower(params, x).as_text()
        return text.count("stablehlo.convolution"), text.count("stablehlo.dot_general")

    # One of each forward and one by x; "full" computes the forward ones again.
    assert [products(policy) for policy in ("none", "dots", "full")] == [(2, 2), (2, 2), (3, 3)]
