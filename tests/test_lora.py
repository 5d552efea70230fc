"""Low-rank adapters: closed forms, what they are put on, and that nothing else ever moves."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny, toy_run
from unclip_jax.common.params import flatten, unflatten
from unclip_jax.errors import UserError
from unclip_jax.models import low_rank
from unclip_jax.parallel import flops, sharding
from unclip_jax.training import init_state, loop, lora, make_optimizer, make_train_step, writers
from unclip_jax.training.lora import Lora

CONFIG = Lora(rank=3, alpha=6.0, dtype="float32")
STAGES = {"prior": tiny.PRIOR, "decoder": tiny.DECODER, "upsampler": tiny.UPSAMPLER}


@pytest.fixture(scope="module")
def networks():
    """A network of each kind, every weight of it random."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)

    return {
        name: jax.tree.map(draw, jax.eval_shape(stage.init, jax.random.key(0))["network"])
        for name, stage in STAGES.items()
    }


def noisy(adapters, seed=0):
    """Adapters whose B is not zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), adapters)


def assert_bits_equal(first, second):
    first, second = flatten(first), flatten(second)
    assert first.keys() == second.keys()
    for name in first:
        a, b = np.asarray(first[name]), np.asarray(second[name])
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), name


# ---------------------------------------------------------------- what is adapted


@pytest.mark.parametrize(
    ("name", "shape", "matrix"),
    [
        ("unet/time/linear_1/kernel", (5, 7), (5, 7)),
        ("unet/down_0_attention_0/qkv/kernel", (6, 3, 2, 4), (6, 24)),
        ("unet/down_0_attention_0/context_kv/kernel", (5, 2, 2, 4), (5, 16)),
        ("unet/down_0_attention_0/out/kernel", (2, 4, 6), (8, 6)),
        ("pool/key_value/kernel", (6, 2, 3, 4), (6, 24)),
        ("pool/query/kernel", (6, 3, 4), (6, 12)),
        ("transformer/blocks/qkv/kernel", (9, 6, 3, 2, 4), (9, 6, 24)),
        ("transformer/blocks/out/kernel", (9, 2, 4, 6), (9, 8, 6)),
        ("transformer/blocks/up/kernel", (9, 6, 24), (9, 6, 24)),
        ("out/kernel", (6, 4), (6, 4)),
        ("unet/down_0_res_0/conv_1/kernel", (3, 3, 6, 8), None),
        ("unet/conv_in/kernel", (3, 3, 6, 8), None),
        ("out/bias", (4,), None),
        ("transformer/blocks/qkv/bias", (9, 3, 2, 4), None),
        ("tokens/embedding", (50, 6), None),
        ("positions", (12, 6), None),
        ("unet/norm_out/scale", (6,), None),
    ],
)
def test_kernels_are_seen_as_matrices(name, shape, matrix):
    assert lora.matrix_shape(name, shape) == matrix


def test_a_convolution_is_a_matrix_of_its_whole_window():
    name = "unet/down_0_res_0/conv_1/kernel"
    assert lora.matrix_shape(name, (3, 3, 6, 8), convolutions=True) == (54, 8)


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("convolutions", [False, True])
def test_every_kernel_has_adapters_but_the_convolutions(networks, name, convolutions):
    """A convolution is told by its window here: no other kernel begins with [3, 3]."""
    config = dataclasses.replace(CONFIG, convolutions=convolutions)
    flat = flatten(networks[name])
    kernels = {
        n.removesuffix("/kernel"): x for n, x in flat.items() if n.rsplit("/", 1)[-1] == "kernel"
    }
    expected = {n for n, x in kernels.items() if convolutions or x.shape[:2] != (3, 3)}
    init = functools.partial(lora.init, config, jax.random.key(0))
    adapters = flatten(jax.eval_shape(init, networks[name]))
    assert {n.rsplit("/", 1)[0] for n in adapters} == expected
    for n in expected:
        a, b = adapters[f"{n}/lora_a"], adapters[f"{n}/lora_b"]
        *layers, inputs, rank = a.shape
        assert rank == config.rank and b.shape[:-1] == (*layers, rank)
        assert math.prod(layers) * inputs * b.shape[-1] == kernels[n].size
        assert a.dtype == b.dtype == jnp.float32


def test_a_is_normal_with_variance_one_over_its_inputs():
    kernel = {"up": {"kernel": jnp.zeros((400, 10))}}
    a = np.asarray(lora.init(Lora(rank=100), jax.random.key(0), kernel)["up"]["lora_a"])
    assert abs(a.mean()) < 4 * 0.05 / a.size**0.5 and a.std() == pytest.approx(0.05, rel=0.02)


def test_two_kernels_start_from_different_adapters(networks):
    adapters = lora.init(CONFIG, jax.random.key(0), networks["decoder"])
    drawn = [x.ravel()[:3] for n, x in flatten(adapters).items() if n.endswith("lora_a")]
    assert len({x.tobytes() for x in map(np.asarray, drawn)}) == len(drawn)


# ---------------------------------------------------------------- the sum


@pytest.mark.parametrize(("name", "dtype"), [("prior", "bfloat16"), ("upsampler", "float32")])
def test_new_adapters_change_nothing(networks, name, dtype):
    base = jax.tree.map(lambda x: x.astype(dtype), networks[name])
    config = dataclasses.replace(CONFIG, convolutions=True)
    params = {"network": base, "normalisation": {"mean": jnp.ones(3)}}
    attached = jax.jit(functools.partial(lora.attach, config))(jax.random.key(0), params)
    assert set(attached) == {"network", "base_network", "normalisation"}
    merged = jax.jit(functools.partial(lora.merged, config))(attached)
    as_it_was = jax.tree.map(lambda x, like: x.astype(like.dtype), merged, params)
    assert_bits_equal(as_it_was, params)
    moved = flatten(attached["network"])
    changed = {n for n, x in flatten(merged).items() if x.dtype != flatten(params)[n].dtype}
    assert len(changed) == (len(moved) // 2 if dtype == "bfloat16" else 0)


def test_the_sum_has_its_closed_form():
    rng = np.random.default_rng(0)
    shapes = {
        "transformer/blocks/qkv": (2, 6, 3, 2, 4),
        "transformer/blocks/out": (2, 2, 4, 6),
        "attention/out": (2, 4, 5),
        "attention/context_kv": (7, 2, 2, 4),
        "conv_1": (3, 3, 4, 5),
        "skip": (4, 5),
    }
    network = unflatten(
        {f"{n}/kernel": jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()}
    )
    config = dataclasses.replace(CONFIG, convolutions=True)
    adapters = noisy(lora.init(config, jax.random.key(0), network))
    flat = {n: np.asarray(x, np.float64) for n, x in flatten(adapters).items()}

    def factors(name, inputs, outputs):
        """A [.., *inputs, r] and B [.., r, *outputs]."""
        a, b = flat[f"{name}/lora_a"], flat[f"{name}/lora_b"]
        return a.reshape(*a.shape[:-2], *inputs, 3), b.reshape(*b.shape[:-1], *outputs)

    change = {
        "transformer/blocks/qkv": ("Lir,Lrcnk->Licnk", (6,), (3, 2, 4)),
        "transformer/blocks/out": ("Lnkr,Lro->Lnko", (2, 4), (6,)),
        "attention/out": ("nkr,ro->nko", (2, 4), (5,)),
        "attention/context_kv": ("ir,rcnk->icnk", (7,), (2, 2, 4)),
        "conv_1": ("hwir,ro->hwio", (3, 3, 4), (5,)),
        "skip": ("ir,ro->io", (4,), (5,)),
    }
    merged = flatten(lora.merge(config, network, adapters))
    base = flatten(network)
    for name, (product, inputs, outputs) in change.items():
        expected = base[f"{name}/kernel"] + 2.0 * np.einsum(
            product, *factors(name, inputs, outputs)
        )
        np.testing.assert_allclose(merged[f"{name}/kernel"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "layer", "shape"),
    [
        ("up", nn.Dense(5), (2, 6)),
        ("qkv", nn.DenseGeneral((3, 2, 4)), (2, 6)),
        ("out", nn.DenseGeneral(5, axis=(-2, -1)), (2, 7, 3, 4)),
        ("conv_1", nn.Conv(5, (3, 3)), (2, 6, 6, 4)),
    ],
)
def test_a_layer_adds_what_goes_through_the_low_rank(name, layer, shape):
    """Equation (3) of the paper: h = W x + scale * B A x, the right side with layers of rank r."""
    x = jax.random.normal(jax.random.key(1), shape)
    network = {name: layer.init(jax.random.key(2), x)["params"]}
    config = dataclasses.replace(CONFIG, convolutions=True)
    adapters = noisy(lora.init(config, jax.random.key(3), network))
    whole = layer.apply({"params": lora.merge(config, network, adapters)[name]}, x)
    a, b = (adapters[name][part] for part in ("lora_a", "lora_b"))
    kernel = network[name]["kernel"]
    if isinstance(layer, nn.Conv):
        down = nn.Conv(3, (3, 3), use_bias=False).apply(
            {"params": {"kernel": a.reshape(3, 3, 4, 3)}}, x
        )
    else:
        down = x.reshape(*x.shape[: x.ndim - (kernel.ndim - 1 if name == "out" else 1)], -1) @ a
    up = (down @ b).reshape(whole.shape)
    base = layer.apply({"params": network[name]}, x)
    np.testing.assert_allclose(whole, base + 2.0 * up, rtol=1e-4, atol=1e-4)


def test_the_sum_is_not_rounded():
    """A change far below a weight's last bit in bfloat16 is in the sum as it was."""
    network = {"up": {"kernel": jnp.ones((4, 4), jnp.bfloat16)}}
    config = Lora(rank=1, alpha=1.0)
    for size in (1e-4, 2.0**-7):
        adapters = {"up": {"lora_a": jnp.full((4, 1), size), "lora_b": jnp.ones((1, 4))}}
        kernel = lora.merge(config, network, adapters)["up"]["kernel"]
        assert kernel.dtype == jnp.float32
        np.testing.assert_array_equal(kernel, np.float32(1.0) + np.float32(size))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("prior", "bfloat16"),
        pytest.param("decoder", "bfloat16", marks=pytest.mark.slow),
        ("upsampler", "float32"),
        ("clip", "float32"),
    ],
)
def test_beside_is_what_the_sum_would_give(name, dtype):
    """In float32 the loss and its gradient are those of the sum, whatever W is kept in."""
    stage = (STAGES | {"clip": tiny.CLIP})[name]
    params, batch = tiny.params(stage), tiny.batch(4, stage.image_size or 16)
    kept = jax.tree.map(lambda x: x.astype(dtype), params["network"])
    config = dataclasses.replace(CONFIG, convolutions=True)
    attached = lora.attach(config, jax.random.key(0), params | {"network": kept})
    attached["network"] = noisy(attached["network"])

    def loss(whole, adapters):
        return stage.loss(
            whole(config, attached | {"network": adapters}), batch, jax.random.key(1)
        )[0]

    found, expected = (
        jax.jit(jax.value_and_grad(functools.partial(loss, whole)))(attached["network"])
        for whole in (lora.beside, lora.merged)
    )
    assert found[0] == pytest.approx(float(expected[0]), rel=1e-3)
    norm = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected[1]))
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3 * norm)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_a_small_change_of_bfloat16_weights_is_not_rounded_away(compute):
    """B of 1e-4, as after a few steps: what the change does to a layer's output is all there."""
    layer = nn.Dense(64, use_bias=False, dtype=compute)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4096, 128)), jnp.float32)
    network = {"up": {"kernel": jnp.asarray(rng.normal(0, 0.1, (128, 64)), jnp.bfloat16)}}
    config = Lora(rank=8, alpha=8.0)
    adapters = lora.init(config, jax.random.key(0), network)
    adapters["up"]["lora_b"] = jnp.asarray(rng.normal(0, 1e-4, (8, 64)), jnp.float32)
    params = lora.beside(config, {"network": adapters, "base_network": network})["network"]["up"]
    without = low_rank.apply(layer, network["up"], x)
    change = np.asarray(low_rank.apply(layer, params, x) - without, np.float64)
    true = np.asarray(x @ adapters["up"]["lora_a"] @ adapters["up"]["lora_b"], np.float64)
    kept = np.sum(change * true) / np.sum(true**2)  # 1: all of it; rounded in W it was 0.16
    assert kept == pytest.approx(1.0, abs=1e-3 if compute == "float32" else 0.1)


# ---------------------------------------------------------------- training


def adapted_loss(params, batch, key):
    return toy_run.noisy_loss_fn(lora.merged(CONFIG, params), batch, key)


def first_params():
    return lora.attach(CONFIG, jax.random.key(5), toy_run.init_params())


def train(workdir, **settings):
    config = loop.TrainConfig(
        **{"batch_size": 16, "steps": 12, "learning_rate": 0.02, "ema_decay": 0.5} | settings
    )
    return loop.train(
        loss_fn=adapted_loss,
        init_params=first_params,
        batches=toy_run.Batches(),
        config=config,
        workdir=workdir,
        description={"stage": {"kind": "toy"}},
    )


@pytest.fixture
def no_curves(monkeypatch):
    monkeypatch.setattr(writers, "plot_metrics", lambda workdir: None)


def test_a_step_moves_the_adapters_alone():
    config = loop.TrainConfig(batch_size=16, learning_rate=0.1, weight_decay=0.5, grad_accum=2)
    optimizer = make_optimizer(config)
    state = init_state(first_params(), optimizer)
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    adapters = sum(x.size for x in jax.tree.leaves(state.params["network"]))
    assert moments == 2 * adapters
    assert set(state.ema_params) == {"network"}
    step = make_train_step(adapted_loss, optimizer, config, sharding.make_mesh())
    batches, before = toy_run.Batches(), first_params()
    for _ in range(3):
        state, metrics = step(state, next(batches))
    assert float(metrics["finite"]) == 1.0
    for name in ("base_network", "normalisation"):
        assert_bits_equal(state.params[name], before[name])
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.params, before)
    assert all(x > 0 for x in jax.tree.leaves(moved["network"]))


def test_mfu_counts_two_forward_passes(tmp_path, monkeypatch, no_curves):
    """Kernels beside adapters have no gradient: W + A B of [5, 3], and x of [16, 5] through it."""
    monkeypatch.setitem(flops.PEAKS, jax.devices()[0].device_kind, 1e9)
    train(tmp_path, log_every=12)
    last = writers.read_metrics(tmp_path / "metrics.jsonl")[-1]
    model = 2 * (2 * 5 * 3 * 3 + 2 * 16 * 5 * 3)
    expected = model * last["train/steps_per_second"] / jax.device_count() / 1e9
    assert last["run/mfu"] == pytest.approx(expected)


def test_at_first_only_b_has_a_gradient():
    """dL/dA is proportional to B, which is zero."""
    batch = {name: jnp.asarray(x) for name, x in next(toy_run.Batches()).items()}
    grads = jax.grad(lambda p: adapted_loss(p, batch, jax.random.key(0))[0])(first_params())
    assert not np.any(grads["network"]["lora_a"]) and np.all(grads["network"]["lora_b"] != 0)


def test_adapters_learn_and_a_stopped_run_goes_on_without_the_base_in_its_checkpoints(
    tmp_path, no_curves
):
    whole = train(tmp_path / "whole")
    train(tmp_path / "parts", steps=5)
    again = train(tmp_path / "parts")
    assert_bits_equal(whole.params, again.params)
    assert_bits_equal(whole.ema_params, again.ema_params)
    metadata = next((tmp_path / "parts" / "checkpoints").glob("12/state/_METADATA")).read_text()
    assert "lora_a" in metadata and "normalisation" in metadata and "base_network" not in metadata

    batch = {name: jnp.asarray(x) for name, x in next(toy_run.Batches()).items()}
    losses = [
        float(adapted_loss(params, batch, jax.random.key(0))[0])
        for params in (first_params(), whole.averaged)
    ]
    assert losses[1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": -1}, r"config\.lora\.rank: got -1, expected an integer, 0 or more"),
        ({"alpha": 0.0}, r"config\.lora\.alpha: got 0\.0, expected a positive number"),
        ({"dtype": "float16"}, r"config\.lora\.dtype: got 'float16', expected one of float32"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        Lora(**settings)
