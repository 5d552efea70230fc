"""Kandinsky's networks against diffusers' and transformers', on random weights, in odd sizes."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.networks import normal, random_params, relative_error, shapes
from unclip_jax.errors import UserError
from unclip_jax.models import (
    Decoder,
    DecoderConfig,
    MoVQ,
    MoVQConfig,
    Prior,
    UNetConfig,
    movq,
    presets,
)
from unclip_jax.models.dit import DiTConfig
from unclip_jax.parallel.axes import checked
from unclip_jax.weights.convert import (
    kandinsky_configs,
    kandinsky_names,
    karlo_names,
)
from unclip_jax.weights.convert.tables import Tensors, their_shapes, to_ours, to_theirs

MANIFESTS = Path(__file__).parent / "kandinsky_manifests"
TOLERANCE = 1e-5


def condition(config, b, h, w):
    """Whatever a decoder reads, for latents of h x w."""
    e, x = config.embed_dim, config.x_channels
    given = {"z_i": normal(1, b, e), "known": normal(2, b, h, w, x + 1)}
    given |= {"hint": normal(3, b, 8 * h, 8 * w, 3), "z_t": normal(4, b, e)}
    given |= {"text_states": normal(5, b, 7, config.text_width or 1)}
    given |= {"text_mask": jnp.ones((b, 7), bool)}
    return {name: given[name] for name in config.conditions}


# ---------------------------------------------------------------- full size

FULL = {
    "unet": presets.KANDINSKY_DECODER,
    "unet_inpaint": presets.KANDINSKY_INPAINTER,
    "unet_hint": presets.KANDINSKY_HINTED,
    "unet_2_1": presets.KANDINSKY_2_1_DECODER,
    "movq": presets.KANDINSKY_MOVQ,
    "prior": presets.KANDINSKY_PRIOR,
    "prior_2_1": presets.KARLO_PRIOR,
}
COUNTS = {
    "unet": 1_253_057_288,
    "unet_inpaint": 1_253_074_568,
    "unet_hint": 1_253_429_212,
    "unet_2_1": 1_228_661_768,
    "movq": 67_832_495,
    "prior": 1_026_225_920,
}


def full(name):
    """The shapes of our network of a manifest, and its key map."""
    config = FULL[name]
    if isinstance(config, MoVQConfig):
        return shapes(MoVQ(config), jnp.zeros((1, 8, 8, 3))), kandinsky_names.movq(config)
    if isinstance(config, DecoderConfig):
        x_t, t = jnp.zeros((1, 8, 8, 4)), jnp.zeros(1)
        cond = condition(config, 1, 8, 8)
        return shapes(Decoder(config), x_t, t, cond), kandinsky_names.decoder(config)
    e, length = config.embed_dim, config.context_length
    z, text, mask = jnp.zeros((1, e)), jnp.zeros((1, length, e)), jnp.ones((1, length), bool)
    tree = {"network": shapes(Prior(config), z, jnp.zeros(1), z, text, mask)}
    tree["normalisation"] = dict.fromkeys(("mean", "std"), jax.ShapeDtypeStruct((e,), jnp.float32))
    return tree, karlo_names.diffusers_prior()


@pytest.mark.parametrize("name", FULL)
def test_manifests_map_one_to_one(name):
    """Every published tensor has one place in our tree, of its shape, and every leaf is filled."""
    found = json.loads((MANIFESTS / f"{name}.json").read_text())
    published = {tensor: tuple(shape) for tensor, shape in found.items()}
    tree, table = full(name)
    assert {tensor: s.shape for tensor, s in their_shapes(table, tree).items()} == published
    count = sum(int(np.prod(shape)) for shape in published.values())
    assert count == COUNTS.get(name, count)
    checked(tree.get("network", tree))


# ---------------------------------------------------------------- parity

karlo_folders = pytest.importorskip("tests.karlo_folders")
torch, diffusers = karlo_folders.torch, karlo_folders.diffusers
transformers = karlo_folders.transformers


def random(kind, settings):
    """A PyTorch network in which no parameter is zero or one."""
    return karlo_folders.randomise(kind(**settings), 0)


def to_torch(x):
    return torch.from_numpy(np.array(x))


def channels_first(x):
    return to_torch(x.transpose(0, 3, 1, 2))


def channels_last(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


def tensors(module):
    arrays = {name: value.detach().numpy() for name, value in module.state_dict().items()}
    return Tensors.of(arrays, type(module).__name__)


def there_and_back(table, theirs, target):
    """Our params of a PyTorch module, after the way back gave every tensor bit for bit."""
    given = tensors(theirs)
    params = to_ours(table, given, target)
    back = to_theirs(table, params)
    assert set(back.shapes) == set(given.shapes)
    for name in given.shapes:
        np.testing.assert_array_equal(back.read(name), given.read(name), err_msg=name)
    return params


def unet(in_channels, mults=(1, 2), attention=(6,), blocks=1, **sizes):
    settings = {"channels": 16, "head_channels": 8, "context_dim": 12, "groups": 4} | sizes
    return UNetConfig(
        image_size=12, in_channels=in_channels, out_channels=8, channel_mults=mults,
        res_blocks=blocks, attention_sizes=attention, any_size=True, **settings,
    )  # fmt: skip


NEW = {"embed_dim": 10, "clip_tokens": 32, "norms": ("z_i",), "tokens_first": True}
OLD = {"embed_dim": 12, "clip_tokens": 10, "norms": ("z_t",), "tokens_first": True}
OLD |= {"text_width": 9, "use_z_t": True}
DECODERS = {
    "plain": DecoderConfig(unet=unet(4), x_channels=4, **NEW),
    "inpainting": DecoderConfig(
        unet=unet(9, (1, 2, 3), (6, 3), 2, channels=8, groups=2), x_channels=4, inpaint=True, **NEW
    ),
    "hint": DecoderConfig(unet=unet(8, attention=(12, 6)), x_channels=4, hint=True, **NEW),
    "2.1": DecoderConfig(unet=unet(4), x_channels=4, **OLD),
}


def their_condition(config, cond):
    """What diffusers' U-Net is given of our condition: latents beside x_t, and the rest."""
    added = {"image_embeds": to_torch(cond["z_i"])}
    if "hint" in cond:
        added["hint"] = channels_first(cond["hint"])
    if "z_t" in cond:
        added["text_embeds"] = to_torch(cond["z_t"])
    states = to_torch(cond["text_states"]) if "text_states" in cond else None
    return {"encoder_hidden_states": states, "added_cond_kwargs": added}


@pytest.mark.parametrize("kind", DECODERS)
def test_decoder_agrees_with_diffusers(kind):
    """At oblong sizes that no config names; the plain one at the nominal size, too."""
    config = DECODERS[kind]
    settings = kandinsky_configs.unet_settings(config)
    theirs = random(diffusers.UNet2DConditionModel, settings)
    found = {"_class_name": "UNet2DConditionModel"} | json.loads(json.dumps(settings))
    assert kandinsky_configs.read_decoder(found, "config.json") == config
    ours, t, params = Decoder(config), jnp.array([3, 998]), None
    for side in ((28, 8), (12, 12), (4, 20))[: 3 if kind == "plain" else 1]:
        x_t, cond = normal(0, 2, *side, 4), condition(config, 2, *side)
        if params is None:
            target = shapes(ours, x_t, t, cond)
            params = there_and_back(kandinsky_names.decoder(config), theirs, target)
        seen = jnp.concatenate([x_t, cond["known"]], -1) if config.inpaint else x_t
        with torch.no_grad():
            given = their_condition(config, cond)
            expected = theirs(channels_first(seen), to_torch(t), **given).sample
        found = jax.jit(ours.apply)({"params": params}, x_t, t, cond)
        assert relative_error(found, channels_last(expected)) < TOLERANCE, side


MOVQS = {
    "two levels": MoVQConfig(32, (1, 2), 1, (1,), latent_channels=4, codes=11),
    "three levels": MoVQConfig(32, (1, 1, 2), 2, (1, 2), latent_channels=3, codes=7),
    "no attention": MoVQConfig(64, (1, 1), 1, (), latent_channels=4, codes=5),
}


@pytest.mark.parametrize(
    ("size", "side"),
    [
        ("two levels", (5, 3)),
        pytest.param("three levels", (2, 7), marks=pytest.mark.slow),
        pytest.param("no attention", (3, 4), marks=pytest.mark.slow),
    ],
)
def test_movq_agrees_with_diffusers(size, side):
    """Encoder, decoder, codebook, and all of them; the decoder in bands of rows, too."""
    config = MOVQS[size]
    settings = kandinsky_configs.movq_settings(config)
    theirs = random(diffusers.VQModel, settings)
    found = {"_class_name": "VQModel", "scaling_factor": 0.2} | json.loads(json.dumps(settings))
    assert kandinsky_configs.read_movq(found, "config.json") == config
    h, w = (config.factor * s for s in side)
    images, z = normal(0, 2, h, w, 3), normal(1, 2, *side, config.latent_channels)
    ours = MoVQ(config)
    params = there_and_back(kandinsky_names.movq(config), theirs, shapes(ours, images))

    def everything(network, through):
        """Latents, a picture, codes with their vectors, and perhaps a picture by their way."""

        @jax.jit
        def run(params, images, z):
            of = lambda x, method: network.apply({"params": params}, x, method=method)  # noqa: E731
            found = of(images, "encode"), of(z, "decode"), *of(z, "quantise")
            return (*found, of(images, "__call__")) if through else found

        return run(params, images, z)

    with torch.no_grad():
        latents = theirs.encode(channels_first(images)).latents
        picture = theirs.decode(channels_first(z), force_not_quantize=True).sample
        vectors, _, (_, _, codes) = theirs.quantize(channels_first(z))
        through = theirs(channels_first(images)).sample
    found = everything(ours, through=True)
    for one, expected in zip(found[:2], (latents, picture), strict=True):
        assert relative_error(one, channels_last(expected)) < TOLERANCE
    np.testing.assert_array_equal(found[2].ravel(), codes.numpy())
    assert relative_error(found[3], channels_last(vectors)) < TOLERANCE
    assert relative_error(found[4], channels_last(through)) < TOLERANCE
    in_bands = everything(MoVQ(config, bands=side[0]), through=False)
    for one, expected in zip(in_bands[:2], found[:2], strict=True):
        assert relative_error(one, expected) < 3e-6


def test_attention_in_parts_is_attention(monkeypatch):
    """Over many places queries are taken a few rows at a time; and rows must be whole bands."""
    config = MOVQS["two levels"]
    z = normal(0, 1, 6, 5, 4)
    params = random_params(MoVQ(config), jnp.zeros((1, 4, 4, 3)))
    decode = lambda n: MoVQ(config, n).apply({"params": params}, z, method="decode")  # noqa: E731
    expected = decode(1)
    monkeypatch.setattr(movq, "QUERIES", 10)
    assert relative_error(decode(1), expected) < 3e-6
    with pytest.raises(UserError, match="bands: got 4, expected a divisor of the 6 rows"):
        decode(4)
    with pytest.raises(UserError, match="height and width that are multiples of 2"):
        MoVQ(config).apply({"params": params}, jnp.zeros((1, 4, 5, 3)), method="encode")


def test_a_decoder_says_what_does_not_fit():
    """Conditions beside x_t of another size than it, or of no form that Kandinsky has."""
    config, x_t, t = DECODERS["hint"], jnp.zeros((1, 4, 4, 4)), jnp.zeros(1)
    cond = condition(config, 1, 4, 4)
    for changes, message in (
        ({"hint": jnp.zeros((1, 32, 36, 3))}, "hint's shape: got .*, expected .*multiples of 8"),
        ({"hint": jnp.zeros((1, 32, 40, 3))}, "hint, as large as x_t"),
        ({"known": jnp.zeros((1, 4, 4, 5))}, ""),  # not read
    ):
        given = cond | changes
        init = lambda given: jax.eval_shape(Decoder(config).init, jax.random.key(0), x_t, t, given)  # noqa: E731
        if not message:
            init(given)
            continue
        with pytest.raises(UserError, match=message):
            init(given)
    with pytest.raises(UserError, match="in_channels of 9, x_t's and what stands beside it"):
        DecoderConfig(unet=unet(8), x_channels=4, inpaint=True, **NEW)
    for other in (
        DecoderConfig(unet=unet(4), x_channels=4, embed_dim=10),
        DecoderConfig(unet=dataclasses.replace(unet(4), patch=2), x_channels=4, **NEW),
        DecoderConfig(
            unet=DiTConfig(**{"in_channels": 4, "width": 8, "heads": 2, "context_dim": 12}),
            x_channels=4,
            **NEW,
        ),
    ):
        with pytest.raises(UserError, match="diffusers holds no other form"):
            kandinsky_configs.unet_settings(other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"addition_embed_type": "text"}, "addition_embed_type and encoder_hid_dim_type: got"),
        ({"in_channels": 5}, "in_channels and out_channels: got '5 and 8', expected 4 or 9"),
        ({"out_channels": 7}, "in_channels and out_channels"),
        ({"block_out_channels": []}, "block_out_channels"),
        ({"down_block_types": "Down"}, "down_block_types: got 'Down'"),
        ({"class_embed_type": "identity"}, "class_embed_type is 'identity'"),
        ({"attention_head_dim": "8"}, "attention_head_dim: got '8'"),
        ({"_class_name": "UNet2DModel"}, "_class_name: got 'UNet2DModel'"),
        ({"sample_size": None}, ""),  # says nothing of the network
        ({"sample_size": 13}, ""),
    ],
)
def test_settings_of_a_unet_are_read_strictly(changes, message):
    settings = kandinsky_configs.unet_settings(DECODERS["plain"]) | {
        "_class_name": "UNet2DConditionModel"
    }
    if not message:
        found = kandinsky_configs.read_decoder(settings | changes, "config.json")
        assert found.unet.any_size and len(found.unet.attention_sizes) == 1
        return
    with pytest.raises(UserError, match=message) as error:
        kandinsky_configs.read_decoder(settings | changes, "config.json")
    assert "\n" not in str(error.value)
