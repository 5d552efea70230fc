"""The U-Net and the decoder: shapes, conditions, and what may depend on what."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.networks import (
    integers,
    normal,
    prefix_mask,
    random_params,
    relative_error,
    shapes,
    size,
)
from unclip_jax.errors import UserError
from unclip_jax.models import Decoder, DecoderConfig, TextConfig, UNet, UNetConfig
from unclip_jax.models.denoiser import PixelHead
from unclip_jax.models.resample import convolve_doubled, depth_to_space, double, space_to_depth

UNET = UNetConfig(
    image_size=12,
    channels=8,
    channel_mults=(1, 2),
    res_blocks=1,
    attention_sizes=(6,),
    head_channels=4,
    context_dim=10,
    groups=4,
)
ONE_LEVEL = dataclasses.replace(UNET, image_size=6, channel_mults=(1,))
CONVOLUTIONS = dataclasses.replace(UNET, attention_sizes=(), context_dim=0)
TEXT = TextConfig(vocab_size=11, context_length=5, width=10, layers=1, heads=2)
PLAIN = DecoderConfig(dataclasses.replace(ONE_LEVEL, context_dim=0))
GLIDE = DecoderConfig(ONE_LEVEL, text=TEXT)
UNCLIP = DecoderConfig(ONE_LEVEL, text=TEXT, embed_dim=7)
KARLO = DecoderConfig(ONE_LEVEL, text_width=6, embed_dim=7, use_z_t=True, learned_null=True)
Z_I_ONLY = DecoderConfig(ONE_LEVEL, embed_dim=7, clip_tokens=3)
Z_I_IN_TIME = dataclasses.replace(PLAIN, embed_dim=7, clip_tokens=0)

X = normal(0, 3, 12, 12, 3)
SMALL_X = normal(0, 3, 6, 6, 3)
T = jnp.array([0, 7, 999])


def conditions(config, seed=1, lengths=(0, 2, 5)):
    cond = {
        "z_i": normal(seed, 3, 7),
        "z_t": normal(seed + 1, 3, 7),
        "text_states": normal(seed + 2, 3, 5, 6),
        "tokens": integers(seed, 11, 3, 5),
        "text_mask": prefix_mask(lengths, 5),
    }
    return {name: cond[name] for name in config.conditions}


def applied(network, params):
    return jax.jit(lambda *args: network.apply({"params": params}, *args))


# ---------------------------------------------------------------- U-Net


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"image_size": 7, "channel_mults": (1,), "attention_sizes": (7,), "in_channels": 1},
        {"image_size": 20, "channel_mults": (1, 1, 3), "attention_sizes": (20, 5), "groups": 1},
        {"patch": 2, "attention_sizes": (3,), "out_channels": 3},
        {"patch": 3, "attention_sizes": (), "context_dim": 0, "res_blocks": 2, "emb_dim": 6},
        {"patch": 2, "attention_sizes": (3,), "pixel_channels": 3},
        {"scale_shift": False, "channels": 12, "channel_mults": (2, 1), "head_channels": 3},
    ],
)
def test_unet_shapes(changes):
    config = dataclasses.replace(UNET, **changes)
    side = config.image_size
    x = normal(0, 2, side, side, config.in_channels)
    emb = normal(1, 2, config.embedding_features)
    context = normal(2, 2, 3, config.context_dim) if config.context_dim else None
    network, t = UNet(config), jnp.array([3, 4])
    params = random_params(network, x, t, emb, context)
    out = applied(network, params)(x, t, emb, context)
    assert out.shape == (2, side, side, config.out_channels)
    assert out.dtype == jnp.float32
    assert jnp.isfinite(out).all()


def test_unet_starts_as_zero_and_its_blocks_as_the_identity():
    network, context = UNet(ONE_LEVEL), normal(1, 3, 4, 10)
    key = jax.random.key(0, impl="rbg")  # compiles many small draws faster than threefry
    params = jax.jit(network.init)(key, SMALL_X, T, None, context)["params"]
    np.testing.assert_array_equal(applied(network, params)(SMALL_X, T, None, context), 0.0)
    for name in params:
        last = {"res": "conv_2", "attention": "out"}.get(
            name.split("_")[-2 if "_0" in name else -1]
        )
        if last:
            np.testing.assert_array_equal(params[name][last]["kernel"], 0.0)


def test_convolutions_alone_run_at_any_size_that_the_levels_divide():
    network = UNet(CONVOLUTIONS)
    params = random_params(network, X, T)
    for height, width in ((2, 4), (16, 22)):
        x = normal(0, 1, height, width, 3)
        out = jax.eval_shape(network.apply, {"params": params}, x, T[:1])
        assert out.shape == (1, height, width, 6)
    for bad in (normal(0, 1, 7, 12, 3), normal(0, 1, 12, 9, 3)):
        with pytest.raises(UserError, match="multiples of 2"):
            network.apply({"params": params}, bad, T[:1])


def test_wrong_inputs_are_user_errors():
    network, context = UNet(UNET), normal(1, 3, 4, 10)
    init = jax.random.key(0)
    for message, args in {
        "expected .*12, 12, 3": (X[:, :10, :10], T, None, context),
        "expected .*12, 12, 3.": (X[..., :2], T, None, context),
        "context_dim = 10": (X, T, None, None),
        "U-Net context's shape: got": (X, T, None, context[..., :9]),
        "U-Net emb's shape: got": (X, T, normal(0, 3, 5), context),
        "U-Net context_mask's shape: got": (X, T, None, context, jnp.ones((3, 5), bool)),
    }.items():
        with pytest.raises(UserError, match=message):
            jax.eval_shape(network.init, init, *args)
    with pytest.raises(UserError, match="without a context; give both"):
        jax.eval_shape(UNet(CONVOLUTIONS).init, init, X, T, None, None, jnp.ones((3, 4), bool))


def test_masked_context_is_not_read_and_all_masked_equals_none_at_all():
    """With every context token masked, keys and values are the image's own."""
    network, context = UNet(ONE_LEVEL), normal(1, 3, 4, 10)
    mask = jnp.array([[True, False, True, False]] * 2 + [[False] * 4])
    params = random_params(network, SMALL_X, T, None, context, mask)
    apply = applied(network, params)
    out = apply(SMALL_X, T, None, context, mask)
    other = jnp.where(mask[:, :, None], context, normal(2, 3, 4, 10))
    np.testing.assert_array_equal(apply(SMALL_X, T, None, other, mask), out)
    assert relative_error(apply(SMALL_X, T, None, context, ~mask), out) > 1e-3

    without = dict(params)
    for name in [n for n in params if "attention" in n]:
        without[name] = {k: v for k, v in params[name].items() if k != "context_kv"}
    unconditional = UNet(dataclasses.replace(ONE_LEVEL, context_dim=0))
    alone = applied(unconditional, without)(SMALL_X, T)
    assert relative_error(out[2], alone[2]) < 1e-5


def test_context_is_a_set():
    """Attention reads its tokens in no order."""
    network, context = UNet(ONE_LEVEL), normal(1, 3, 4, 10)
    params = random_params(network, SMALL_X, T, None, context)
    apply = applied(network, params)
    out = apply(SMALL_X, T, None, context)
    assert relative_error(apply(SMALL_X, T, None, context[:, ::-1]), out) < 1e-5


@pytest.mark.parametrize("patch", [1, 2, 3])
def test_patches_fold_and_unfold(patch):
    x = normal(0, 2, 6, 12, 5)
    folded = space_to_depth(x, patch)
    assert folded.shape == (2, 6 // patch, 12 // patch, 5 * patch**2)
    np.testing.assert_array_equal(depth_to_space(folded, patch), x)
    # One square of pixels is one place's channels.
    np.testing.assert_array_equal(folded[0, 0, 1], x[0, :patch, patch : 2 * patch].reshape(-1))


@pytest.mark.parametrize("sides", [(5, 4), (1, 3), (1, 1)])
def test_the_doubled_image_is_convolved_without_being_made(sides):
    x, kernel, pull = normal(0, 2, *sides, 3), normal(1, 3, 3, 3, 7), normal(2, 2, *sides, 7)
    pull = double(pull) * normal(3, 2, 2 * sides[0], 2 * sides[1], 7)

    def plain(x, kernel):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            double(x), kernel, (1, 1), "SAME", dimension_numbers=dims
        )

    out, expected = convolve_doubled(x, kernel), plain(x, kernel)
    assert relative_error(out, expected) < 1e-6
    ours = jax.vjp(convolve_doubled, x, kernel)[1](pull)
    for found, wanted in zip(ours, jax.vjp(plain, x, kernel)[1](pull), strict=True):
        assert relative_error(found, wanted) < 1e-6
    half = convolve_doubled(x.astype(jnp.bfloat16), kernel)
    assert half.dtype == jnp.bfloat16
    assert relative_error(half.astype(jnp.float32), expected) < 2e-2


def test_patch_1_is_the_net_on_folded_images():
    """A patch stem is the same U-Net at a smaller side with more channels in and out."""
    patched = dataclasses.replace(CONVOLUTIONS, patch=2, out_channels=3)
    folded = dataclasses.replace(CONVOLUTIONS, image_size=6, in_channels=12, out_channels=12)
    params = random_params(UNet(patched), X, T)
    assert size(params) == size(shapes(UNet(folded), space_to_depth(X, 2), T))
    out = applied(UNet(folded), params)(space_to_depth(X, 2), T)
    ours = applied(UNet(patched), params)(X, T)
    assert relative_error(ours, depth_to_space(out, 2)) < 1e-6


def test_a_pixel_head_begins_as_nothing():
    patched = dataclasses.replace(CONVOLUTIONS, patch=2, out_channels=3)
    network = UNet(dataclasses.replace(patched, pixel_channels=5))
    params = random_params(network, X, T)
    fresh = jax.jit(network.init)(jax.random.key(0, impl="rbg"), X, T)["params"]["pixels"]
    np.testing.assert_array_equal(fresh["conv_out"]["kernel"], 0.0)
    params["pixels"] |= {"conv_out": jax.tree.map(jnp.zeros_like, fresh["conv_out"])}
    without = {name: param for name, param in params.items() if name != "pixels"}
    expected = applied(UNet(patched), without)(X, T)
    np.testing.assert_array_equal(applied(network, params)(X, T), expected)


def test_a_pixel_head_can_copy_as_much_of_its_input_as_the_embedding_says():
    """SiLU(a) - SiLU(-a) = a: six channels carry three of pixels exactly, times 1 + scale."""
    x, y, emb = normal(0, 2, 6, 8, 3), normal(1, 2, 6, 8, 3), jnp.array([[1.0], [0.0]])
    only_there = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)
    both = jnp.concatenate([jnp.eye(3), -jnp.eye(3)], axis=1)  # x, then -x
    params = {
        "conv_in": {
            "kernel": only_there * jnp.concatenate([both, -both])[None, None],
            "bias": jnp.zeros(6),
        },
        "emb": {"kernel": -jnp.ones((1, 12)) * (jnp.arange(12) < 6)[None], "bias": jnp.zeros(12)},
        "conv_out": {"kernel": only_there * both.T[None, None], "bias": jnp.zeros(3)},
    }
    result = applied(PixelHead(6, "float32"), params)(x, y, emb)
    np.testing.assert_allclose(result[0], y[0], atol=1e-6)  # scale -1: nothing of x - y is added
    np.testing.assert_allclose(result[1], x[1], atol=1e-6)  # scale 0: all of it


def test_dropout_draws_only_in_training():
    exact = dataclasses.replace(ONE_LEVEL, attention_sizes=(), context_dim=0)
    network = UNet(dataclasses.replace(exact, dropout=0.3))
    params = random_params(network, SMALL_X, T)

    @jax.jit
    def train(key):
        rngs = {"dropout": key}
        return network.apply({"params": params}, SMALL_X, T, deterministic=False, rngs=rngs)

    plain = applied(UNet(exact), params)(SMALL_X, T)
    np.testing.assert_array_equal(applied(network, params)(SMALL_X, T), plain)
    first, second = jax.random.key(1), jax.random.key(2)
    np.testing.assert_array_equal(train(first), train(first))
    assert relative_error(train(first), train(second)) > 1e-3


@pytest.mark.parametrize("remat", ["full", pytest.param("dots", marks=pytest.mark.slow)])
def test_remat_changes_no_gradient(remat):
    context, dropout = normal(1, 3, 4, 10), {"dropout": jax.random.key(5)}
    exact = dataclasses.replace(ONE_LEVEL, dropout=0.2)
    params = random_params(UNet(exact), SMALL_X, T, None, context)

    def grads(remat):
        network = UNet(dataclasses.replace(exact, remat=remat))

        def loss(params):
            variables = {"params": params}
            out = network.apply(
                variables, SMALL_X, T, None, context, deterministic=False, rngs=dropout
            )
            return jnp.sin(out).mean()

        return jax.tree.leaves(jax.jit(jax.grad(loss))(params))

    for ours, leaf in zip(grads(remat), grads("none"), strict=True):
        np.testing.assert_allclose(ours, leaf, atol=1e-6)


# ---------------------------------------------------------------- decoder


@pytest.mark.parametrize("config", [PLAIN, GLIDE, UNCLIP, KARLO, Z_I_ONLY, Z_I_IN_TIME])
def test_decoder_is_encode_then_denoise(config):
    network, cond = Decoder(config), conditions(config)
    params = random_params(network, SMALL_X, T, cond)
    out = applied(network, params)(SMALL_X, T, cond)
    assert out.shape == (3, 6, 6, 6)
    encode, denoise = (
        jax.jit(functools.partial(network.apply, method=method)) for method in ("encode", "denoise")
    )
    encoded = encode({"params": params}, cond)
    assert relative_error(denoise({"params": params}, SMALL_X, T, encoded), out) < 1e-6


def test_decoder_treats_each_example_alone():
    network, cond = Decoder(KARLO), conditions(KARLO)
    params = random_params(network, SMALL_X, T, cond)
    apply = applied(network, params)
    one = apply(SMALL_X[1:2], T[1:2], {name: array[1:2] for name, array in cond.items()})
    assert relative_error(one, apply(SMALL_X, T, cond)[1:2]) < 1e-5


@pytest.mark.parametrize("config", [GLIDE, UNCLIP, KARLO])
def test_a_dropped_caption_reaches_nothing(config):
    """Tokens, states and z_t of a fully masked caption do not matter, and those of others do."""
    network, cond, other = Decoder(config), conditions(config), conditions(config, seed=9)
    params = random_params(network, SMALL_X, T, cond)
    apply = applied(network, params)
    z_i = {"z_i": cond["z_i"]} if config.embed_dim else {}
    kept = {"text_mask": cond["text_mask"]} | z_i
    same = (apply(SMALL_X, T, other | kept) == apply(SMALL_X, T, cond)).all((1, 2, 3))
    assert same.tolist() == [True, False, False]


@pytest.mark.parametrize("config", [UNCLIP, KARLO, Z_I_ONLY, Z_I_IN_TIME])
def test_a_dropped_z_i_is_zeros_or_the_learned_null(config):
    network, cond = Decoder(config), conditions(config)
    params = random_params(network, SMALL_X, T, cond)
    apply = applied(network, params)
    mask = jnp.array([True, False, True])
    null = params["null_z_i"] if config.learned_null else jnp.zeros(7)
    expected = apply(SMALL_X, T, cond | {"z_i": cond["z_i"].at[1].set(null)})
    out = apply(SMALL_X, T, cond | {"z_i_mask": mask})
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(out[mask], apply(SMALL_X, T, cond)[mask], atol=1e-5)
    assert relative_error(out[1], apply(SMALL_X, T, cond)[1]) > 1e-3


def test_everything_dropped_has_a_finite_gradient():
    network, cond = Decoder(KARLO), conditions(KARLO, lengths=(0, 0, 0))
    cond["z_i_mask"] = jnp.zeros(3, bool)
    params = random_params(network, SMALL_X, T, cond)
    grads = jax.jit(jax.grad(lambda p: network.apply({"params": p}, SMALL_X, T, cond).std()))(
        params
    )
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_bfloat16_decoder_is_finite_and_near_float32():
    half = dataclasses.replace(
        UNCLIP,
        unet=dataclasses.replace(ONE_LEVEL, dtype="bfloat16"),
        text=dataclasses.replace(TEXT, dtype="bfloat16"),
    )
    cond = conditions(UNCLIP)
    params = random_params(Decoder(UNCLIP), SMALL_X, T, cond)
    out = applied(Decoder(half), params)(SMALL_X, T, cond)
    assert out.dtype == jnp.float32
    assert relative_error(out, applied(Decoder(UNCLIP), params)(SMALL_X, T, cond)) < 0.05


def test_conditions_that_are_missing_or_unknown_are_user_errors():
    init, cond = jax.random.key(0), conditions(KARLO)
    for message, bad in {
        r"add \['z_i'\]": {k: v for k, v in cond.items() if k != "z_i"},
        r"unknown: \['z_i_msk'\]": cond | {"z_i_msk": jnp.ones(3, bool)},
        "cond z_i's shape: got": cond | {"z_i": normal(0, 3, 6)},
        "cond z_t's shape: got": cond | {"z_t": normal(0, 3, 6)},
        "cond text_mask's shape: got": cond | {"text_mask": jnp.ones((3, 4), bool)},
        "cond text_states's shape: got": cond | {"text_states": normal(0, 3, 5, 7)},
        "cond z_i_mask's shape: got": cond | {"z_i_mask": jnp.ones((3, 1), bool)},
    }.items():
        with pytest.raises(UserError, match=message):
            jax.eval_shape(Decoder(KARLO).init, init, SMALL_X, T, bad)


# ---------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (UNET, {"image_size": 13}),
        (UNET, {"patch": 4}),
        (UNET, {"channels": 10}),
        (UNET, {"channels": 7, "groups": 7}),
        (UNET, {"groups": 0}),
        (UNET, {"channel_mults": ()}),
        (UNET, {"channel_mults": (1, 0)}),
        (UNET, {"channel_mults": 3}),
        (UNET, {"attention_sizes": (5,)}),
        (UNET, {"head_channels": 3}),
        (UNET, {"attention_sizes": ()}),
        (UNET, {"dropout": 1.0}),
        (UNET, {"dtype": "half"}),
        (UNET, {"remat": True}),
        (KARLO, {"text": TEXT}),
        (UNCLIP, {"text": dataclasses.replace(TEXT, width=12)}),
        (GLIDE, {"learned_null": True}),
        (GLIDE, {"use_z_t": True}),
        (Z_I_ONLY, {"use_z_t": True}),
        (Z_I_ONLY, {"clip_tokens": 0}),
        (PLAIN, {"embed_dim": 7}),
        (PLAIN, {"text_width": 7}),
    ],
)
def test_a_config_that_makes_no_network_is_a_user_error(config, changes):
    with pytest.raises(UserError, match=rf"{type(config).__name__}\.\w+: got .*, expected"):
        dataclasses.replace(config, **changes)


def test_configs_are_hashable_and_take_lists_from_files():
    listed = dataclasses.replace(ONE_LEVEL, channel_mults=[1], attention_sizes=[6])
    assert listed == ONE_LEVEL
    assert hash(dataclasses.replace(KARLO, unet=listed)) == hash(KARLO)
