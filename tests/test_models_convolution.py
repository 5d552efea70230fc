"""The U-Nets' convolution."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests.networks import normal
from unclip_jax.models.convolution import Conv
from unclip_jax.parallel import axes, sharding


def test_a_convolution_is_flaxs():
    x, ours, flaxs = normal(0, 2, 5, 4, 3), Conv(7), nn.Conv(7, (3, 3))
    params, expected = (net.init(jax.random.key(1), x) for net in (ours, flaxs))
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    np.testing.assert_array_equal(ours.apply(params, x), flaxs.apply(params, x))
    half = Conv(7, dtype="bfloat16").apply(params, x)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, nn.Conv(7, (3, 3), dtype="bfloat16").apply(params, x))


def test_on_a_mesh_it_has_derivatives_of_every_kind():
    mesh, x, net = sharding.make_mesh(devices=jax.devices()[:1]), normal(0, 2, 64, 64, 32), Conv(32)
    params = net.init(jax.random.key(1), x)

    def loss(x):
        with axes.on(mesh):
            return jnp.mean(jnp.sin(net.apply(params, x)))

    _, along = jax.jvp(loss, (x,), (x,))
    np.testing.assert_allclose(along, jnp.vdot(jax.grad(loss)(x), x), rtol=1e-4)
