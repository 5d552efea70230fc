"""CLIP, the caption encoder and the prior: shapes, and what may depend on what."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.networks import integers, normal, prefix_mask, random_params, relative_error
from unclip_jax.errors import UserError
from unclip_jax.models import Clip, ClipConfig, Prior, PriorConfig, TextConfig, TextEncoder

CLIP = ClipConfig(
    image_size=12,
    patch=4,
    vision_width=24,
    vision_layers=2,
    vision_heads=3,
    text_width=20,
    text_layers=2,
    text_heads=2,
    vocab_size=11,
    context_length=7,
    embed_dim=9,
)
TEXT = TextConfig(vocab_size=11, context_length=6, width=12, layers=2, heads=3)
PRIOR = PriorConfig(embed_dim=9, width=12, layers=2, heads=3, context_length=6, text_width=5)
TOKENS = jnp.array([[9, 3, 10, 4, 5, 6, 10], [9, 1, 2, 3, 4, 5, 10], [10, 1, 2, 3, 4, 5, 6]])


@pytest.fixture(scope="module")
def clip():
    images = jnp.tanh(normal(0, 3, 12, 12, 3))
    params = random_params(Clip(CLIP), images, TOKENS)
    return jax.jit(lambda *args: Clip(CLIP).apply({"params": params}, *args)), params, images


# ---------------------------------------------------------------- CLIP


def test_clip_shapes(clip):
    apply, params, images = clip
    z_i, z_t, scale = apply(images, TOKENS)
    assert (z_i.shape, z_t.shape, scale.shape) == ((3, 9), (3, 9), ())
    short, states = Clip(CLIP).apply({"params": params}, TOKENS[:, :3], method="encode_text")
    assert states.shape == (3, 3, 20)
    # The first caption ends within three tokens: truncating what follows changes nothing.
    assert relative_error(short[0], z_t[0]) < 1e-6


def test_clip_text_does_not_depend_on_what_follows_the_first_end_of_text(clip):
    apply, _, images = clip
    _, z_t, _ = apply(images, TOKENS)
    after = TOKENS.at[0, 3:].set(jnp.array([10, 0, 0, 1])).at[2, 1:].set(0)
    np.testing.assert_allclose(apply(images, after)[1], z_t, atol=1e-6)
    before = TOKENS.at[0, 1].set(4)
    assert relative_error(apply(images, before)[1][0], z_t[0]) > 1e-3


def test_clip_normalises_pixels(clip):
    """A network told another mean and std sees the same thing in images moved accordingly."""
    apply, params, images = clip
    standard = dataclasses.replace(CLIP, pixel_mean=(0.5, 0.5, 0.5), pixel_std=(0.5, 0.5, 0.5))
    mean, std = (np.array(s, np.float32) for s in (CLIP.pixel_mean, CLIP.pixel_std))
    moved = jnp.asarray(((np.asarray(images) + 1) / 2 - mean) / std)
    z_i = Clip(standard).apply({"params": params}, moved, method="encode_image")
    assert relative_error(z_i, apply(images, TOKENS)[0]) < 1e-5


@pytest.mark.parametrize("log_scale", [0.0, math.log(1 / 0.07), math.log(100), 9.0])
def test_logit_scale_is_at_most_100_and_can_come_back(log_scale):
    scale = lambda s: Clip(CLIP).apply({"params": {"log_scale": s}}, method="logit_scale")  # noqa: E731
    value, grad = jax.value_and_grad(scale)(jnp.float32(log_scale))
    assert math.isclose(value, min(math.exp(log_scale), 100.0), rel_tol=1e-5)
    # Beyond the limit a loss that wants a smaller scale is heard, and one that wants more is not.
    back = jax.grad(lambda s: -scale(s))(jnp.float32(log_scale))
    beyond = log_scale >= math.log(100)
    assert grad > 0
    assert (back == 0) == beyond


def test_images_and_tokens_that_do_not_fit_are_user_errors(clip):
    _, params, images = clip
    network = Clip(CLIP)
    with pytest.raises(UserError, match=r"images's shape: got \(3, 8, 8, 3\), expected.*12"):
        network.apply({"params": params}, images[:, :8, :8], method="encode_image")
    with pytest.raises(UserError, match="truncate"):
        network.apply({"params": params}, jnp.zeros((1, 8), int), method="encode_text")


# ---------------------------------------------------------------- caption encoder


def test_text_encoder_reads_no_token_under_a_false_mask():
    tokens, mask = TOKENS[:, :6], prefix_mask([0, 3, 6], 6)
    network = TextEncoder(TEXT)
    params = random_params(network, tokens, mask)
    states = network.apply({"params": params}, tokens, mask)
    assert states.shape == (3, 6, 12)
    scrambled = jnp.where(mask, tokens, (tokens + 3) % 11)
    np.testing.assert_array_equal(network.apply({"params": params}, scrambled, mask), states)
    # Bidirectional: the first state sees the last token.
    other = network.apply({"params": params}, tokens.at[2, 5].set(0), mask)
    assert relative_error(other[2, 0], states[2, 0]) > 1e-3


# ---------------------------------------------------------------- prior


def prior_args(config, seed=0):
    b, length = 3, config.context_length
    if config.vocab_size:
        text = integers(seed, config.vocab_size, b, length)
    else:
        text = normal(seed, b, length, config.text_width)
    e = config.embed_dim
    t = jnp.array([0, 500, 999])
    return (
        normal(seed + 1, b, e),
        t,
        normal(seed + 2, b, e),
        text,
        prefix_mask([0, 2, length], length),
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"vocab_size": 11, "text_width": 0},
        {"embed_dim": 12},
        {"embed_dim": 12, "text_width": 12},
        {"context_length": 1, "layers": 1, "heads": 1, "width": 2, "embed_dim": 1},
    ],
)
def test_prior_shapes_and_dependence(changes):
    """embed_dim == width is an ordinary size; a masked caption token is never read."""
    config = dataclasses.replace(PRIOR, **changes)
    network, args = Prior(config), prior_args(config)
    params = random_params(network, *args)
    apply = jax.jit(lambda *args: network.apply({"params": params}, *args))
    out = apply(*args)
    assert out.shape == (3, config.embed_dim)
    z_noised, t, z_t, text, mask = args
    other = prior_args(config, seed=7)
    keep = mask if config.vocab_size else mask[:, :, None]
    np.testing.assert_array_equal(
        apply(z_noised, t, z_t, jnp.where(keep, text, other[3]), mask), out
    )
    # The first caption is dropped: its z_t is too. The others' is read, and so is every z_noised.
    assert (apply(z_noised, t, other[2], text, mask) == out).all(-1).tolist() == [1, 0, 0]
    if config.width > 2:  # a LayerNorm of two features gives signs only
        assert not (apply(other[0], t, z_t, text, mask) == out).all(-1).any()
        assert not (apply(z_noised, t[::-1] + 7, z_t, text, mask) == out).all(-1).any()


@pytest.mark.parametrize(
    "changes", [{}, {"vocab_size": 11, "text_width": 0}, {"context_length": 1}, {"layers": 1}]
)
def test_a_prior_that_encoded_its_caption_predicts_the_same_at_every_step(changes):
    """The caption and z_t see nothing of what comes after them."""
    config = dataclasses.replace(PRIOR, **changes)
    network, args = Prior(config), prior_args(config)
    params = random_params(network, *args)
    encode = jax.jit(functools.partial(network.apply, method=network.encode))
    denoise = jax.jit(functools.partial(network.apply, method=network.denoise))
    encoded = encode({"params": params}, *args[2:])
    assert encoded["past"][0].shape[3] == config.context_length + 1
    for seed in (0, 7):
        z_noised, t = prior_args(config, seed)[:2]
        whole = jax.jit(network.apply)({"params": params}, z_noised, t + seed, *args[2:])
        found = denoise({"params": params}, z_noised, t + seed, encoded)
        assert found.dtype == jnp.float32 and relative_error(found, whole) < 1e-6


def test_prior_treats_each_example_alone():
    network, args = Prior(PRIOR), prior_args(PRIOR)
    params = random_params(network, *args)
    apply = jax.jit(lambda *args: network.apply({"params": params}, *args))
    whole, one = apply(*args), apply(*(a[1:2] for a in args))
    assert relative_error(one, whole[1:2]) < 1e-6


# ---------------------------------------------------------------- bfloat16 and configs


def test_bfloat16_is_finite_and_near_float32(clip):
    apply, params, images = clip
    half = Clip(dataclasses.replace(CLIP, dtype="bfloat16"))
    for ours, exact in zip(
        jax.jit(half.apply)({"params": params}, images, TOKENS),
        apply(images, TOKENS),
        strict=True,
    ):
        assert ours.dtype == jnp.float32
        assert relative_error(ours, exact) < 0.05
    network, args = Prior(dataclasses.replace(PRIOR, dtype="bfloat16")), prior_args(PRIOR)
    params = random_params(network, *args)
    exact = jax.jit(Prior(PRIOR).apply)({"params": params}, *args)
    out = jax.jit(network.apply)({"params": params}, *args)
    assert out.dtype == jnp.float32
    assert relative_error(out, exact) < 0.05
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (CLIP, "image_size", 13),
        (CLIP, "vision_width", 25),
        (CLIP, "text_heads", 3),
        (CLIP, "activation", "relu"),
        (CLIP, "pixel_std", (0.2, 0.2)),
        (CLIP, "pixel_std", (0.2, 0.0, 0.2)),
        (CLIP, "remat", "some"),
        (CLIP, "mlp_ratio", 0.01),
        (CLIP, "mlp_ratio", float("inf")),
        (CLIP, "vision_mlp_ratio", 0.01),
        (TEXT, "heads", 5),
        (TEXT, "layers", 0),
        (TEXT, "width", 12.0),
        (PRIOR, "dtype", "float16"),
        (PRIOR, "heads", 0),
        (PRIOR, "width", 15),
        (PRIOR, "vocab_size", 3),
        (PRIOR, "text_width", 0),
    ],
)
def test_a_config_that_makes_no_network_is_a_user_error(config, field, value):
    with pytest.raises(UserError, match=rf"{type(config).__name__}\.\w+: got .*, expected"):
        dataclasses.replace(config, **{field: value})


def test_configs_are_hashable_and_take_lists_from_files():
    assert ClipConfig(pixel_mean=[0.5, 0.5, 0.5]) == ClipConfig(pixel_mean=(0.5, 0.5, 0.5))
    assert len({ClipConfig(), ClipConfig(), PriorConfig(), TextConfig()}) == 3
