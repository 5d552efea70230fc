"""Which program computes attention, and that the kernels compute what the reference does.

The TPU's kernel runs here in Pallas's interpreter; libtpu, where it is installed, compiles it.
"""

import contextlib
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

from tests.networks import normal, prefix_mask, relative_error
from tests.xla_flags import xla_flags
from unclip_jax.errors import UserError
from unclip_jax.models import attention as module
from unclip_jax.models import fused_attention
from unclip_jax.models.attention import attention, causal_mask, implementation
from unclip_jax.parallel import axes, sharding
from unclip_jax.plan import chips

KERNEL = "tpu_custom_call"
SCALE = 0.3
LONG = (2, 2, 1024, 64)  # shapes of queries and of keys that the kernels take
KEYS = (2, 2, 1105, 64)


def shape(*sides, dtype=jnp.bfloat16, **where):
    return jax.ShapeDtypeStruct(sides, dtype, **where)


def arrays(b, n, length, keys, dim, dtype=jnp.float32):
    sizes = ((b, n, length, dim), (b, n, keys, dim), (b, n, keys, dim))
    return tuple(normal(seed, *size).astype(dtype) for seed, size in enumerate(sizes))


def by_key(seen):
    return None if seen is None else seen[:, None, None, :]


def value_and_gradients(function, arguments, mask):
    """The result, and the gradients of its products with fixed noise."""

    def loss(q, k, v):
        out = function(q, k, v, mask, scale=SCALE).astype(jnp.float32)
        return (out * normal(9, *out.shape)).sum(), out

    compiled = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
    gradients, out = compiled(*arguments)
    return out, *gradients


reference = functools.partial(module.reference_attention, bias=None)


@contextlib.contextmanager
def interpreted():
    """Pallas kernels run as plain JAX, block by block."""
    made = splash_attention_kernel.make_splash_mha
    with pytest.MonkeyPatch.context() as patch:
        interpreting = functools.partial(made, interpret=True)
        patch.setattr(splash_attention_kernel, "make_splash_mha", interpreting)
        yield


# ---------------------------------------------------------------- the TPU's kernel


@pytest.mark.parametrize(
    ("sizes", "seen", "dtype", "within"),
    [
        ((1, 1, 128, 256, 128), None, jnp.float32, 1e-5),
        ((2, 1, 70, 131, 8), None, jnp.float32, 1e-5),
        ((3, 1, 130, 81, 64), (81, 5, 0), jnp.float32, 1e-5),
        ((2, 1, 64, 300, 64), (1, 300), jnp.bfloat16, 2e-2),
    ],
    ids=["whole blocks", "odd lengths", "masked", "bf16"],
)
def test_the_tpus_kernel_equals_the_reference(sizes, seen, dtype, within):
    """Values and gradients; rows that see nothing are exactly zero, and so are their gradients."""
    arguments = arrays(*sizes, dtype=dtype)
    mask = by_key(None if seen is None else prefix_mask(seen, sizes[3]))
    expected = value_and_gradients(reference, arguments, mask)
    with interpreted():
        found = value_and_gradients(fused_attention.tpu_attention, arguments, mask)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert relative_error(ours, theirs) < within
    for i in () if seen is None else np.flatnonzero(np.array(seen) == 0):
        assert all((np.asarray(x[i]) == 0).all() for x in found)


@pytest.mark.parametrize("length", [1024, 1105, 1284, 4096, 4177])
def test_blocks_are_whole_lanes_and_pad_little(length):
    block = fused_attention.block_length(length)
    padded = -(-length // block) * block
    assert block % 128 == 0 and length <= padded <= 1.2 * length


# ---------------------------------------------------------------- the choice


@pytest.fixture
def on_tpu(monkeypatch):
    """As on a machine whose devices are TPUs."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")


def kernels(function, *arguments, platforms=("tpu",)):
    """How many kernels a function exported for these platforms has."""
    new = jax.jit(lambda *args: function(*args))  # not traced before, on another machine
    return export.export(new, platforms=platforms)(*arguments).mlir_module().count(KERNEL)


def test_only_the_tpus_program_has_the_tpus_kernel(on_tpu):
    """The choice is made when a program is lowered: one traced function serves any platform."""
    shapes = shape(*LONG), shape(*KEYS), shape(*KEYS), shape(2, 1, 1, 1105, dtype=jnp.bool_)

    def gradient(q, k, v, mask):
        return jax.grad(lambda q: attention(q, k, v, mask).astype(jnp.float32).sum())(q)

    assert kernels(attention, *shapes) == 1
    assert kernels(gradient, *shapes) == 2
    for platform in ("cpu", "cuda"):
        assert kernels(gradient, *shapes, platforms=(platform,)) == 0


def test_any_number_of_examples_can_be_exported():
    (b,) = export.symbolic_shape("b")
    shapes = [shape(b, *sides[1:]) for sides in (LONG, KEYS, KEYS)]
    with implementation("fused"):
        assert kernels(attention, *shapes) == 1
    with implementation("reference"):
        assert kernels(attention, *shapes, platforms=("cpu", "cuda", "tpu")) == 0


@pytest.mark.parametrize(
    ("q", "k", "rest"),
    [
        (LONG, (2, 2, 1000, 64), {}),
        ((2, 2, 1, 64), KEYS, {}),
        ((2, 2, 1024, 60), (2, 2, 1105, 60), {}),
        (LONG, KEYS, {"mask": shape(1, 1, 1024, 1105, dtype=jnp.bool_)}),
        (LONG, KEYS, {"mask": shape(2, 1, 1, 1, dtype=jnp.bool_)}),
        (LONG, KEYS, {"bias": shape(1, 2, 1024, 1105, dtype=jnp.float32)}),
        (LONG, KEYS, {"precision": "highest"}),
    ],
    ids=["few keys", "one query", "odd heads", "mask by query", "one mask", "bias", "precision"],
)
def test_what_does_not_fit_is_left_to_the_reference(on_tpu, q, k, rest):
    rest = dict(rest)
    precision = rest.pop("precision", None)

    def function(q, k, v, rest):
        return attention(q, k, v, **rest)

    with jax.default_matmul_precision(precision):
        assert kernels(function, shape(*q), shape(*k), shape(*k), rest) == 0


def test_the_switch(on_tpu):
    """A function that was traced before is traced again."""
    function = jax.jit(lambda *args: attention(*args))
    shapes = shape(*LONG), shape(*KEYS), shape(*KEYS)

    def count():
        return function.trace(*shapes).lower(lowering_platforms=("tpu",)).as_text().count(KERNEL)

    assert count() == 1
    with implementation("reference"):
        assert count() == 0
    assert count() == 1


def test_no_such_implementation():
    said = "got 'flash', expected one of auto, reference, fused"
    with pytest.raises(UserError, match=said), implementation("flash"):
        pass


def test_this_machine_has_no_kernel():
    """Nothing is traced for other platforms than the CPU's."""
    shapes = shape(*LONG), shape(*KEYS), shape(*KEYS)
    traced = jax.make_jaxpr(lambda *args: attention(*args))(*shapes)
    assert "platform_index" not in str(traced)


# ---------------------------------------------------------------- several devices


def on_four_devices():
    """Values, gradients and the choice on a mesh of four devices; runs in a process of its own."""
    arguments, mask = arrays(2, 2, 128, 128, 8), by_key(prefix_mask((128, 40), 128))
    expected = value_and_gradients(reference, arguments, mask)
    for config in (sharding.MeshConfig(fsdp=2, spatial=2), sharding.MeshConfig(fsdp=2, tensor=2)):
        mesh = sharding.make_mesh(config)

        def on_mesh(q, k, v, mask, *, scale, mesh=mesh):
            with axes.on(mesh):
                return fused_attention.tpu_attention(q, k, v, mask, scale=scale)

        with interpreted():
            found = value_and_gradients(on_mesh, arguments, mask)
        for ours, theirs in zip(found, expected, strict=True):
            assert relative_error(ours, theirs) < 1e-5

    with axes.on(mesh):
        assert fused_attention.fits("tpu", shape(*LONG), shape(*KEYS))
        for odd in (shape(3, 2, *LONG[2:]), shape(2, 3, *LONG[2:])):
            assert not fused_attention.fits("tpu", odd, odd)


def test_every_device_calls_the_kernel_for_its_own_part():
    environ = {
        "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(4),
    }  # fmt: skip
    code = "from tests.test_models_attention import on_four_devices; on_four_devices()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent.parent,
        env=os.environ | environ, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- compilers


@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
@pytest.mark.parametrize(("axis", "queries"), [("tensor", (1, 1024)), ("spatial", (2, 512))])
def test_libtpu_compiles_both_passes_for_four_chips(axis, queries):
    """On a machine without TPUs, as the planner does; each chip has one example of one head.

    Or half the queries of both, for which it sums the gradients of keys and values with another.
    """
    try:
        devices = chips.Topology.parse("v5e:2x2").devices()
    except UserError as error:
        pytest.skip(str(error))
    mesh = sharding.make_mesh(sharding.MeshConfig(**{axis: 2}), devices)
    where = jax.sharding.NamedSharding(mesh, axes.spec(("batch", "heads", None, None)))
    q, k = shape(*LONG, sharding=where), shape(2, 2, 1040, 64, sharding=where)

    def loss(q, k, v):
        with axes.on(mesh):
            return attention(q, k, v).astype(jnp.float32).sum()

    program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k).compile()
    text = program.as_text()
    assert text.count(f'custom_call_target="{KERNEL}"') == 2
    heads, length = queries
    assert f"bf16[1,{heads},{length},64]" in text, "queries of one example"
    assert "all-gather" not in text and ("all-reduce" in text) == (axis == "spatial")


def test_cudnn_is_handed_what_attention_means(monkeypatch):
    """The arguments of jax.nn.dot_product_attention, by its own implementation in plain JAX."""

    def plain(*args, implementation, **rest):
        assert implementation == "cudnn"
        return dot_product_attention(*args, implementation="xla", **rest)

    dot_product_attention = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", plain)
    for seen in (None, (17, 0)):
        arguments = arrays(2, 3, 10, 17, 8)
        mask = by_key(None if seen is None else prefix_mask(seen, 17))
        expected = value_and_gradients(reference, arguments, mask)
        found = value_and_gradients(fused_attention.gpu_attention, arguments, mask)
        for ours, theirs in zip(found, expected, strict=True):
            assert relative_error(ours, theirs) < 1e-5


def test_causal_mask_lets_each_query_see_what_came_before():
    np.testing.assert_array_equal(causal_mask(3)[0, 0], [[1, 0, 0], [1, 1, 0], [1, 1, 1]])
