"""The U-Nets' convolution, and the gradient of its kernel by strips."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.networks import normal, relative_error
from tests.test_sharding import run_on_eight
from unclip_jax.models import convolution
from unclip_jax.models.convolution import Conv, convolve, kernel_gradient, strip_size, strips_pay
from unclip_jax.parallel import axes, sharding

PADS = [((1, 1), (1, 1)), ((1, 0), (0, 1)), ((0, 1), (1, 0)), ((0, 0), (0, 0)), ((2, 1), (0, 0))]


@pytest.fixture
def mesh():
    return sharding.make_mesh(devices=jax.devices()[:1])


def by_xla(x, y, pads):
    """The kernel's gradient as XLA's automatic differentiation has it."""
    kernel = jnp.zeros((1 + sum(pads[0]), 1 + sum(pads[1]), x.shape[-1], y.shape[-1]))
    return jax.linear_transpose(lambda kernel: convolve(x, kernel, pads), kernel)(y)[0]


@pytest.mark.parametrize("strip_bytes", [1, 400, 2**19])
@pytest.mark.parametrize(
    "shape", [(1, 6, 4, 3, 5), (3, 5, 7, 4, 2), (4, 2, 3, 1, 1), (2, 1, 1, 2, 3)]
)
def test_the_kernels_gradient_is_that_of_xla(shape, strip_bytes, mesh, monkeypatch):
    """Whatever the strips: of one row, of several, of several images, or of all."""
    monkeypatch.setattr(convolution, "STRIP_BYTES", strip_bytes)
    b, h, w, c, f = shape
    x, y = normal(0, b, h, w, c), normal(1, b, h, w, f)
    for pads in PADS:
        ours = jax.jit(kernel_gradient, static_argnums=(2, 3))(x, y, pads, mesh)
        assert ours.shape == (1 + sum(pads[0]), 1 + sum(pads[1]), c, f)
        assert relative_error(ours, by_xla(x, y, pads)) < 1e-6, pads


ON_MESHES = """
import jax, numpy as np
from tests.networks import normal, relative_error
from tests.test_models_convolution import PADS, by_xla
from unclip_jax import sharding
from unclip_jax.models import convolution
convolution.STRIP_BYTES = 400
for sides, b, h in [
    ((4, 1, 1, 1), 4, 6), ((1, 1, 8, 1), 1, 8), ((2, 1, 4, 1), 2, 12), ((2, 2, 2, 1), 8, 4),
    ((4, 1, 2, 1), 1, 16), ((2, 2, 2, 1), 3, 5),
]:
    mesh = sharding.make_mesh(sharding.MeshConfig(*sides), jax.devices()[: np.prod(sides)])
    x, y = normal(0, b, h, 12, 1), normal(1, b, h, 12, 6)  # either is the smaller
    gradient = jax.jit(convolution.kernel_gradient, static_argnums=(2, 3))
    for pads in PADS[:3]:
        for a, c in ((x, y), (y, x)):
            ours = gradient(a, c, pads, mesh)
            assert ours.sharding.is_fully_replicated
            assert relative_error(ours, by_xla(a, c, pads)) < 1e-6, (sides, b, h, pads)
print("equal")
"""


def test_devices_sum_over_their_own_images_and_rows():
    """With their neighbours' rows at the edges, and where the mesh divides neither, whole."""
    assert run_on_eight("-c", ON_MESHES).split() == ["equal"]


@given(st.integers(1, 64), st.integers(1, 300), st.integers(1, 2**22))
@settings(max_examples=200, deadline=None)
def test_strips_divide_what_there_is_and_fit(b, h, row_bytes):
    n, rows = strip_size(b, h, row_bytes)
    assert b % n == 0 and h % rows == 0
    assert n * rows * row_bytes <= convolution.STRIP_BYTES or (n, rows) == (1, 1)
    assert n == 1 or rows == h  # several images only where they are whole


def test_a_convolution_is_flaxs():
    x, ours, flaxs = normal(0, 2, 5, 4, 3), Conv(7), nn.Conv(7, (3, 3))
    params, expected = (net.init(jax.random.key(1), x) for net in (ours, flaxs))
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    np.testing.assert_array_equal(ours.apply(params, x), flaxs.apply(params, x))
    half = Conv(7, dtype="bfloat16").apply(params, x)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, nn.Conv(7, (3, 3), dtype="bfloat16").apply(params, x))


def test_strips_are_for_large_images_in_float32_on_cpus_without_tensor_parallelism(mesh):
    class Other:
        """A mesh of other devices, or of more."""

        def __init__(self, platform, tensor):
            device = type("Device", (), {"platform": platform})()
            self.devices, self.size = np.array([device] * tensor), tensor
            self.shape = {axes.TENSOR: tensor}

    x, kernel = jax.ShapeDtypeStruct((1, 64, 64, 64), jnp.float32), jnp.zeros((3, 3, 64, 64))
    assert strips_pay(mesh, x, kernel) and strips_pay(Other("cpu", 1), x, kernel)
    assert not strips_pay(Other("cpu", 2), x, kernel)
    assert not strips_pay(Other("tpu", 1), x, kernel)
    assert not strips_pay(mesh, jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), kernel)
    assert not strips_pay(mesh, jax.ShapeDtypeStruct((1, 8, 8, 64), jnp.float32), kernel)


def test_a_network_on_a_mesh_takes_its_gradients_by_strips(mesh, monkeypatch):
    """They are those off the mesh, where derivatives of every kind are left to JAX."""
    monkeypatch.setattr(convolution, "LEAST_FLOPS", 0)
    x, net = normal(0, 2, 6, 6, 3), Conv(4)
    params = net.init(jax.random.key(1), x)

    def loss(params, x, mesh):
        with axes.on(mesh):
            return jnp.sum(jnp.sin(net.apply(params, x)))

    gradient = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
    for ours, expected in zip(
        jax.tree.leaves(gradient(params, x, mesh)),
        jax.tree.leaves(gradient(params, x, None)),
        strict=True,
    ):
        assert relative_error(ours, expected) < 1e-6
    assert "shard_map" in str(jax.make_jaxpr(gradient, static_argnums=2)(params, x, mesh))
    assert "shard_map" not in str(jax.make_jaxpr(gradient, static_argnums=2)(params, x, None))
    _, along = jax.jvp(lambda x: loss(params, x, None), (x,), (x,))
    np.testing.assert_allclose(along, jnp.vdot(gradient(params, x, None)[1], x), rtol=1e-4)
