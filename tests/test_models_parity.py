"""Our networks against public PyTorch ones, on random weights, in several odd sizes each."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.networks import normal, prefix_mask, relative_error, shapes
from unclip_jax.models import (
    Clip,
    ClipConfig,
    Decoder,
    DecoderConfig,
    Prior,
    PriorConfig,
    UNet,
    UNetConfig,
)
from unclip_jax.weights.convert import clip_names, karlo_configs, karlo_names
from unclip_jax.weights.convert.tables import Tensors, to_ours

karlo_folders = pytest.importorskip("tests.karlo_folders")
torch, diffusers = karlo_folders.torch, karlo_folders.diffusers
transformers = karlo_folders.transformers
TOLERANCE = 1e-5

CLIPS = {
    "odd heads": ClipConfig(
        image_size=21,
        patch=7,
        vision_width=24,
        vision_layers=3,
        vision_heads=3,
        text_width=20,
        text_layers=2,
        text_heads=5,
        vocab_size=31,
        context_length=9,
        embed_dim=13,
    ),
    "one layer": ClipConfig(
        image_size=12,
        patch=6,
        vision_width=10,
        vision_layers=1,
        vision_heads=1,
        text_width=14,
        text_layers=1,
        text_heads=7,
        vocab_size=40,
        context_length=9,
        embed_dim=5,
        mlp_ratio=3.0,
    ),
    # ViT-bigG's heads, an eighth as wide, and perceptrons; the image tower's are no multiple.
    "bigG": ClipConfig(
        image_size=18,
        patch=6,
        vision_width=39,
        vision_layers=2,
        vision_heads=3,
        vision_mlp_ratio=192 / 39,
        text_width=20,
        text_layers=2,
        text_heads=5,
        vocab_size=33,
        context_length=9,
        embed_dim=20,
    ),
}
PRIORS = {
    "three heads": PriorConfig(
        embed_dim=12, width=24, layers=3, heads=3, context_length=7, vocab_size=0, text_width=12
    ),
    "one head": PriorConfig(
        embed_dim=5, width=6, layers=1, heads=1, context_length=7, vocab_size=0, text_width=5
    ),
    "wide embeddings": PriorConfig(
        embed_dim=20, width=12, layers=2, heads=2, context_length=7, vocab_size=0, text_width=20
    ),
}
DECODERS = {
    "three levels": DecoderConfig(
        unet=UNetConfig(
            image_size=20,
            channels=24,
            channel_mults=(1, 2, 3),
            res_blocks=3,
            attention_sizes=(10, 5),
            head_channels=8,
            context_dim=20,
            groups=4,
        ),
        text_width=12,
        embed_dim=12,
        use_z_t=True,
        learned_null=True,
    ),
    "attention everywhere": DecoderConfig(
        unet=UNetConfig(
            image_size=8,
            channels=12,
            channel_mults=(1, 3),
            res_blocks=1,
            attention_sizes=(8, 4),
            head_channels=6,
            context_dim=9,
            groups=3,
        ),
        text_width=7,
        embed_dim=7,
        clip_tokens=2,
        use_z_t=True,
        learned_null=True,
    ),
}
SUPER_RES = {
    "three levels": UNetConfig(
        image_size=20,
        in_channels=6,
        out_channels=3,
        channels=12,
        channel_mults=(1, 2, 3),
        res_blocks=3,
        attention_sizes=(),
        scale_shift=False,
        groups=4,
    ),
    "equal levels": UNetConfig(
        image_size=12,
        in_channels=6,
        out_channels=3,
        channels=10,
        channel_mults=(1, 1, 2),
        res_blocks=1,
        attention_sizes=(),
        scale_shift=False,
        groups=5,
    ),
}


def random(kind, settings):
    """A PyTorch network in which no parameter is zero or one."""
    return karlo_folders.randomise(kind(**settings), 0)


def to_torch(x):
    return torch.from_numpy(np.array(x))


def channels_first(x):
    return to_torch(x.transpose(0, 3, 1, 2))


def tensors(module):
    arrays = {name: value.detach().numpy() for name, value in module.state_dict().items()}
    return Tensors.of(arrays, type(module).__name__)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("size", list(CLIPS))
def test_clip_agrees_with_transformers(size, activation):
    config = dataclasses.replace(CLIPS[size], activation=activation)
    text, vision = karlo_folders.clip_settings(config)
    settings = transformers.CLIPConfig(
        projection_dim=config.embed_dim, text_config=text, vision_config=vision
    )
    theirs = karlo_folders.randomise(transformers.CLIPModel(settings), 0)
    images = jnp.tanh(normal(0, 3, config.image_size, config.image_size, 3))
    start, end = config.vocab_size - 2, config.vocab_size - 1
    tokens = [[start, 5, 7, end, 0, 0, 0, 0, 0], [start, 1, 2, 3, 4, 5, 6, 7, end]] * 2
    tokens = jnp.array(tokens)[:3]
    ours = Clip(config)
    target = shapes(ours, images, tokens)
    params = to_ours(clip_names.huggingface(), tensors(theirs), target)
    z_i, z_t, scale = jax.jit(ours.apply)({"params": params}, images, tokens)
    _, states = ours.apply({"params": params}, tokens, method="encode_text")

    mean, std = (np.array(s).reshape(1, 1, 1, 3) for s in (config.pixel_mean, config.pixel_std))
    pixels = ((np.asarray(images) + 1) / 2 - mean) / std
    with torch.no_grad():
        text = theirs.text_model(to_torch(tokens))
        vision = theirs.vision_model(channels_first(pixels.astype(np.float32)))
        expected_z_i = theirs.visual_projection(vision.pooler_output)
        expected_z_t = theirs.text_projection(text.pooler_output)
    assert relative_error(z_i, expected_z_i) < TOLERANCE
    assert relative_error(z_t, expected_z_t) < TOLERANCE
    assert relative_error(states, text.last_hidden_state) < TOLERANCE
    assert relative_error(scale, theirs.logit_scale.exp().detach()) < TOLERANCE


@pytest.mark.parametrize("remat", ["none", "dots"])
@pytest.mark.parametrize("size", list(PRIORS))
def test_prior_agrees_with_diffusers(size, remat):
    config = dataclasses.replace(PRIORS[size], remat=remat)
    e = config.embed_dim
    theirs = random(diffusers.PriorTransformer, karlo_configs.prior_settings(config))
    args = (
        normal(0, 3, e),
        jnp.array([0, 31, 999]),
        normal(1, 3, e),
        normal(2, 3, 7, e),
        prefix_mask([1, 4, 7], 7),
    )
    ours = Prior(config)
    stats = {"mean": jnp.zeros(e), "std": jnp.ones(e)}
    target = {"network": shapes(ours, *args), "normalisation": stats}
    params = to_ours(karlo_names.diffusers_prior(), tensors(theirs), target)["network"]
    with torch.no_grad():
        expected = theirs(*map(to_torch, args)).predicted_image_embedding
    assert relative_error(jax.jit(ours.apply)({"params": params}, *args), expected) < TOLERANCE


@pytest.mark.parametrize("size", list(DECODERS))
def test_decoder_agrees_with_diffusers(size):
    """As Karlo guides: the first example has the learned null for z_i. With its text projection."""
    from diffusers.pipelines.unclip import UnCLIPTextProjModel

    config = DECODERS[size]
    side, e = config.unet.image_size, config.embed_dim
    settings = karlo_configs.decoder_settings(config.unet)
    unet = random(diffusers.UNet2DConditionModel, settings)
    text_proj = random(UnCLIPTextProjModel, karlo_configs.text_proj_settings(config))
    x_t, t = normal(0, 2, side, side, 3), jnp.array([3, 998])
    cond = {
        "z_i": normal(1, 2, e),
        "z_i_mask": jnp.array([False, True]),
        "text_states": normal(2, 2, 7, e),
        "text_mask": prefix_mask([2, 6], 7),
        "z_t": normal(3, 2, e),
    }
    ours = Decoder(config)
    both = tensors(unet).join(tensors(text_proj), "text_proj.")
    params = to_ours(karlo_names.diffusers_decoder(config), both, shapes(ours, x_t, t, cond))
    ours_out = jax.jit(ours.apply)({"params": params}, x_t, t, cond)

    with torch.no_grad():
        context, emb = text_proj(
            image_embeddings=to_torch(cond["z_i"][1:]),
            prompt_embeds=to_torch(cond["z_t"]),
            text_encoder_hidden_states=to_torch(cond["text_states"]),
            do_classifier_free_guidance=True,
        )
        mask = to_torch(cond["text_mask"])
        mask = torch.nn.functional.pad(mask, (config.clip_tokens, 0), value=True)
        images = channels_first(x_t)
        out = unet(images, to_torch(t), context, class_labels=emb, attention_mask=mask).sample
    assert relative_error(ours_out, out.permute(0, 2, 3, 1)) < TOLERANCE


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize(
    ("size", "side"),
    [("three levels", (20, 20)), ("three levels", (12, 28)), ("equal levels", (12, 8))],
)
def test_super_resolution_agrees_with_diffusers(size, side, place):
    """At its own size, and at oblong ones that no config names; each of Karlo's two networks."""
    config = SUPER_RES[size]
    settings = karlo_configs.super_res_settings(config)
    settings |= {"downsample_type": "resnet", "upsample_type": "resnet"}
    pair = {
        name: karlo_folders.randomise(diffusers.UNet2DModel(**settings), seed)
        for seed, name in enumerate(("first", "last"))
    }
    x, t = normal(0, 2, *side, 6), jnp.array([0, 999])
    ours = UNet(config)
    network = shapes(ours, x, t)
    table = karlo_names.diffusers_super_res(config)
    given = tensors(pair["first"]).prefixed("first.").join(tensors(pair["last"]), "last.")
    params = to_ours(table, given, {"network": network, "last_network": network})
    params = params["network" if place == "first" else "last_network"]
    with torch.no_grad():
        expected = pair[place](channels_first(x), to_torch(t)).sample
    ours_out = jax.jit(ours.apply)({"params": params}, x, t)
    assert relative_error(ours_out, expected.permute(0, 2, 3, 1)) < TOLERANCE
