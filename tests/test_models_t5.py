"""T5's encoder against transformers' on random weights, and what its parts promise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.networks import (
    integers,
    prefix_mask,
    random_params,
    relative_error,
    shapes,
    size,
)
from unclip_jax.errors import UserError
from unclip_jax.models import presets
from unclip_jax.models.t5 import T5Config, T5Encoder, distance_buckets
from unclip_jax.weights.convert.t5 import t5_table
from unclip_jax.weights.convert.tables import Tensors, to_ours, to_theirs

TINY = T5Config(
    vocab_size=50, width=24, layers=3, heads=3, head_dim=5, mlp_width=20, buckets=8, max_distance=12
)
V1_0 = dataclasses.replace(TINY, perceptron="relu", layers=2, heads=4, head_dim=6)


def t5_kwargs(config):
    """Arguments of transformers' T5Config."""
    kind = {"gated_gelu": "gated-gelu", "relu": "relu"}[config.perceptron]
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.width,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_width,
        "num_layers": config.layers,
        "num_heads": config.heads,
        "relative_attention_num_buckets": config.buckets,
        "relative_attention_max_distance": config.max_distance,
        "feed_forward_proj": kind,
    }


def reference(config):
    """transformers' encoder with every parameter random, and its tensors by name."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.T5EncoderModel(transformers.T5Config(**t5_kwargs(config))).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            around_one = "layer_norm" in name
            p.copy_(
                torch.randn(p.shape) * (0.2 if around_one else p.shape[-1] ** -0.5) + around_one
            )
    state = {name: value.numpy() for name, value in theirs.state_dict().items()}
    del state["encoder.embed_tokens.weight"]  # the same tensor as shared.weight
    return theirs, state


def inputs(length, lengths, config=TINY):
    return integers(0, config.vocab_size, len(lengths), length), prefix_mask(lengths, length)


def encode(config, params, tokens, mask):
    return jax.jit(T5Encoder(config).apply)({"params": params}, tokens, mask)


# ---------------------------------------------------------------- against transformers


@pytest.mark.parametrize(
    ("config", "length", "lengths"),
    [
        (TINY, 37, [37, 1, 20]),  # far beyond max_distance, odd, one token alone
        (V1_0, 13, [13, 5]),
        (dataclasses.replace(TINY, buckets=32, max_distance=128, layers=1), 150, [150, 149]),
        (dataclasses.replace(V1_0, heads=1, head_dim=40, layers=1), 1, [1]),
    ],
    ids=["gated", "relu", "long", "one_token"],
)
def test_encoder_agrees_with_transformers(config, length, lengths):
    torch = pytest.importorskip("torch")
    theirs, state = reference(config)
    tokens, mask = inputs(length, lengths)
    target = shapes(T5Encoder(config), tokens, mask)
    params = to_ours(t5_table(config), Tensors.of(state, "reference"), target)
    with torch.no_grad():
        expected = theirs(torch.tensor(np.array(tokens)), torch.tensor(np.array(mask)))[0].numpy()
    assert relative_error(encode(config, params, tokens, mask), expected) < 1e-5


@pytest.mark.parametrize("config", [TINY, V1_0], ids=["gated", "relu"])
def test_the_table_gives_their_tensors_back_bit_for_bit(config):
    _, state = reference(config)
    target = shapes(T5Encoder(config), *inputs(2, [2]))
    params = to_ours(t5_table(config), Tensors.of(state, "reference"), target)
    back = to_theirs(t5_table(config), params)
    assert set(back.shapes) == set(state)
    for name, array in state.items():
        np.testing.assert_array_equal(back.read(name), array, err_msg=name)


def test_published_sizes_are_those_that_transformers_builds():
    """Counted on PyTorch's meta device; XXL is the 4.6 B of Imagen's paper, embeddings apart."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes = {}
    for name in ("SMALL", "BASE", "LARGE", "XL", "XXL"):
        config = getattr(presets, f"T5_V1_1_{name}")
        with torch.device("meta"):
            theirs = transformers.T5EncoderModel(transformers.T5Config(**t5_kwargs(config)))
        ours = shapes(T5Encoder(config), *inputs(2, [2]))
        sizes[name] = size(ours)
        assert sizes[name] == sum(p.numel() for p in theirs.parameters())
    xxl = presets.T5_V1_1_XXL
    assert 4.6e9 < sizes["XXL"] - xxl.vocab_size * xxl.width < 4.7e9
    assert sizes["SMALL"] < sizes["BASE"] < sizes["LARGE"] < sizes["XL"] < sizes["XXL"]


@pytest.mark.parametrize("buckets", [4, 8, 12, 32, 64])
def test_distance_buckets_are_those_of_transformers(buckets):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.models.t5.modeling_t5 import T5Attention

    place = torch.arange(400)
    distance = place[None, :] - place[:, None]
    for max_distance in (buckets, 100, 128, 1000):
        expected = T5Attention._relative_position_bucket(distance, True, buckets, max_distance)
        found = distance_buckets(400, buckets, max_distance)
        np.testing.assert_array_equal(found, expected.numpy())


# ---------------------------------------------------------------- what its parts promise


def test_distance_buckets_keep_near_places_apart_and_sides_apart():
    found = distance_buckets(300, 32, 128)
    after, before = found[0], found[:, 0]  # keys 0, 1, 2, ... after and before the query
    np.testing.assert_array_equal(before[:8], np.arange(8))
    np.testing.assert_array_equal(after[1:], before[1:] + 16)
    assert (np.diff(before) >= 0).all() and before[127] == before[299] == 15
    assert set(found.flat) == set(range(32)) - {16}  # 16 would be distance zero to the right


def test_states_depend_on_no_padding():
    """Neither on the ids there nor on how much of it there is."""
    params = random_params(T5Encoder(TINY), *inputs(2, [2]))
    tokens, mask = inputs(9, [6, 3])
    states = encode(TINY, params, tokens, mask)
    other = jnp.where(mask, tokens, (tokens + 7) % TINY.vocab_size)
    longer = jnp.pad(other, ((0, 0), (0, 5))), jnp.pad(mask, ((0, 0), (0, 5)))
    again = encode(TINY, params, *longer)[:, :9]
    np.testing.assert_allclose(
        jnp.where(mask[..., None], states, 0), jnp.where(mask[..., None], again, 0), atol=2e-6
    )


def test_states_depend_on_order_and_on_every_token():
    params = random_params(T5Encoder(TINY), *inputs(2, [2]))
    tokens = jnp.array([[3, 4, 5, 6], [3, 5, 4, 6], [3, 4, 5, 7]], jnp.int32)
    states = encode(TINY, params, tokens, jnp.ones((3, 4), bool))
    assert jnp.abs(states[0, 0] - states[1, 0]).max() > 1e-3
    assert jnp.abs(states[0, 0] - states[2, 0]).max() > 1e-3


def test_a_caption_with_no_token_has_finite_states():
    params = random_params(T5Encoder(TINY), *inputs(2, [2]))
    tokens, _ = inputs(5, [5, 5])
    assert jnp.isfinite(encode(TINY, params, tokens, jnp.zeros((2, 5), bool))).all()


def test_bfloat16_stays_near_float32_and_returns_it():
    params = random_params(T5Encoder(TINY), *inputs(2, [2]))
    tokens, mask = inputs(11, [11, 4])
    half = dataclasses.replace(TINY, dtype="bfloat16")
    stored = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    exact = encode(TINY, params, tokens, mask)
    for given in (params, stored):
        rounded = encode(half, given, tokens, mask)
        assert rounded.dtype == jnp.float32
        assert relative_error(rounded, exact) < 0.05


def test_a_large_residual_stream_is_normalised_without_overflow():
    """T5's stream reaches values that half precision cannot hold."""
    params = random_params(T5Encoder(TINY), *inputs(2, [2]))
    params["blocks"]["down"]["kernel"] *= 1e6
    half = dataclasses.replace(TINY, dtype="bfloat16")
    states = encode(half, params, *inputs(6, [6]))
    assert jnp.isfinite(states).all()
    root_mean_square = jnp.sqrt(((states / params["norm_out"]["scale"][None, None]) ** 2).mean(-1))
    np.testing.assert_allclose(root_mean_square, 1.0, rtol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"perceptron": "gelu"},
            "T5Config.perceptron: got 'gelu', expected one of gated_gelu, relu",
        ),
        ({"buckets": 10}, "buckets: got 10, expected a multiple of 4"),
        (
            {"buckets": 8, "max_distance": 2},
            "max_distance: got 2, expected more than buckets / 4 = 2",
        ),
        ({"heads": 0}, "heads: got 0, expected an integer, 1 or more"),
        ({"dtype": "float16"}, "dtype: got 'float16', expected one of float32, bfloat16"),
    ],
)
def test_a_config_that_makes_no_network_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TINY, **change)


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(UserError, match=r"T5 mask's shape: got \(2, 5\), expected \[2, 4\]"):
        T5Encoder(TINY).init(jax.random.key(0), jnp.zeros((2, 4), jnp.int32), jnp.ones((2, 5)))
