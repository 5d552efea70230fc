"""Networks of any size: what the config says comes out, or the field that makes none is named.

Only shapes are computed, so that many sizes can be tried.
"""

import dataclasses

import jax
import jax.numpy as jnp
from hypothesis import event, given
from hypothesis import strategies as st

from tests.test_properties import examples  # also loads the profile
from unclip_jax.errors import UserError
from unclip_jax.models.clip import Clip, ClipConfig
from unclip_jax.models.prior import Prior, PriorConfig
from unclip_jax.models.unet import UNet, UNetConfig

DTYPES = st.sampled_from(["float32", "bfloat16"])
REMAT = st.sampled_from(["none", "full", "dots"])


def few(*values):
    return st.sampled_from(values)


def made(config_class, fields):
    """The config, or None where a field makes none, which the message must name."""
    try:
        config = config_class(**fields)
    except UserError as error:
        names = {field.name for field in dataclasses.fields(config_class)}
        assert str(error).split(".")[1].split(": got")[0] in names, error
        event("refused")
        return None
    event("made")
    return config


def outcome(network, *args, **kwargs):
    """Shapes of the output and the params, and that every param is float32."""
    outputs, variables = jax.eval_shape(
        lambda key: network.init_with_output(key, *args, **kwargs), jax.random.key(0)
    )
    assert all(leaf.dtype == "float32" for leaf in jax.tree.leaves(variables))
    return outputs


UNET_FIELDS = st.fixed_dictionaries(
    {
        "image_size": few(8, 12, 16, 24, 31),
        "in_channels": st.integers(0, 7),
        "out_channels": st.integers(1, 7),
        "channels": few(6, 8, 16, 24),
        "channel_mults": st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
        "res_blocks": st.integers(1, 2),
        "attention_sizes": st.lists(few(2, 3, 4, 6, 8, 12), max_size=2, unique=True).map(tuple),
        "head_channels": few(2, 4, 8, 16),
        "emb_dim": few(0, 10),
        "context_dim": few(0, 5),
        "scale_shift": st.booleans(),
        "patch": few(1, 2, 3),
        "pixel_channels": few(0, 4),
        "groups": few(1, 2, 4),
        "dtype": DTYPES,
        "remat": REMAT,
    }
)


@st.composite
def unets(draw):
    """Fields at random, or with sides and channels that fit each other."""
    fields = draw(UNET_FIELDS)
    if draw(st.integers(0, 3)):
        multiple = fields["patch"] * 2 ** (len(fields["channel_mults"]) - 1)
        fields["image_size"] = multiple * draw(st.integers(1, 3))
        sides = [fields["image_size"] // fields["patch"] // 2**i for i in range(3)]
        chosen = draw(st.lists(few(*sides[: len(fields["channel_mults"])]), unique=True))
        fields["attention_sizes"] = tuple(chosen)
        fields["channels"], fields["head_channels"] = draw(few((8, 4), (16, 8), (12, 6), (8, 8)))
        fields["context_dim"] *= bool(chosen)
        fields["in_channels"] += 1
    return fields


@examples(30)
@given(unets(), st.integers(1, 3), st.booleans())
def test_a_unet_of_any_size_gives_images_of_the_side_it_takes(fields, b, masked):
    config = made(UNetConfig, fields)
    if config is None:
        return
    wider = 0 if config.attention_sizes else config.size_multiple  # then it takes any such side
    x = jnp.zeros((b, config.image_size, config.image_size + wider, config.in_channels))
    context = jnp.zeros((b, 3, config.context_dim)) if config.context_dim else None
    mask = jnp.ones((b, 3), bool) if config.context_dim and masked else None
    y = outcome(UNet(config), x, jnp.zeros(b), None, context, mask)
    assert y.shape == (*x.shape[:-1], config.out_channels) and y.dtype == "float32"


PRIORS = st.fixed_dictionaries(
    {
        "embed_dim": st.integers(1, 9),
        "width": few(6, 8, 12, 15),
        "layers": st.integers(0, 5),
        "heads": few(1, 2, 2, 3),
        "context_length": st.integers(1, 5),
        "vocab_size": few(0, 0, 0, 11),
        "text_width": few(0, 7, 7, 7),
        "dtype": DTYPES,
        "remat": REMAT,
    }
)


@examples(40)
@given(PRIORS, st.integers(1, 3))
def test_a_prior_of_any_size_gives_an_embedding_for_each(fields, b):
    config = made(PriorConfig, fields)
    if config is None:
        return
    length, e = config.context_length, config.embed_dim
    ids, states = jnp.zeros((b, length), jnp.int32), jnp.zeros((b, length, config.text_width))
    text, mask = ids if config.vocab_size else states, jnp.ones((b, length), bool)
    z = jnp.zeros((b, e))
    z = outcome(Prior(config), z, jnp.zeros(b), z, text, mask)
    assert z.shape == (b, e) and z.dtype == "float32"


CLIPS = st.fixed_dictionaries(
    {
        "image_size": few(8, 12, 16, 15),
        "patch": few(4, 4, 4, 5),
        "vision_width": few(6, 8, 12),
        "vision_layers": st.integers(1, 2),
        "vision_heads": few(1, 2, 2),
        "text_width": few(6, 8, 9, 12),
        "text_layers": st.integers(1, 2),
        "text_heads": few(1, 1, 3),
        "vocab_size": st.integers(2, 9),
        "context_length": st.integers(1, 6),
        "embed_dim": st.integers(0, 30),
        "dtype": DTYPES,
        "remat": REMAT,
    }
)


@examples(40)
@given(CLIPS, st.integers(1, 3), st.integers(1, 3))
def test_a_clip_of_any_size_embeds_both_in_one_space(fields, pictures, captions):
    config = made(ClipConfig, fields)
    if config is None:
        return
    images = jnp.zeros((pictures, config.image_size, config.image_size, 3))
    tokens = jnp.zeros((captions, config.context_length), jnp.int32)
    z_i, z_t, *_ = outcome(Clip(config), images, tokens)
    assert z_i.shape == (pictures, config.embed_dim) and z_i.dtype == "float32"
    assert z_t.shape == (captions, config.embed_dim) and z_t.dtype == "float32"
