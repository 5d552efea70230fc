"""Our networks against public PyTorch ones, on random weights."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tests import karlo_reference as reference
from tests.networks import normal, prefix_mask, quick_jit, relative_error, shapes
from unclip_jax import presets
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

torch = pytest.importorskip("torch")
TOLERANCE = 1e-5

PRIOR = PriorConfig(
    embed_dim=12, width=24, layers=3, heads=3, context_length=7, vocab_size=0, text_width=12
)
SUPER_RES = UNetConfig(
    image_size=20,
    in_channels=6,
    out_channels=3,
    channels=12,
    channel_mults=(1, 2, 3),
    res_blocks=3,
    attention_sizes=(),
    scale_shift=False,
    groups=4,
)
DECODER = DecoderConfig(
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
)


def randomise(module):
    """Give every parameter of a PyTorch module noise, so that none is zero or one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(
                0.5 * noise / max(parameter[0].numel() if parameter.ndim else 1, 4) ** 0.5
            )
    return module.eval()


def to_torch(x):
    return torch.from_numpy(np.array(x))


def decoder_state(unet, text_proj):
    return unet.state_dict() | {f"text_proj.{k}": v for k, v in text_proj.state_dict().items()}


def prior_state(prior):
    state = prior.state_dict()
    return {name: v for name, v in state.items() if name not in ("clip_mean", "clip_std")}


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip_agrees_with_transformers(activation):
    transformers = pytest.importorskip("transformers")
    config = ClipConfig(
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
        activation=activation,
    )
    theirs = transformers.CLIPModel(transformers.CLIPConfig(**reference.clip_kwargs(config)))
    theirs = randomise(theirs)
    images = jnp.tanh(normal(0, 3, 21, 21, 3))
    tokens = jnp.array([[29, 5, 7, 30, 0, 0, 0, 0, 0], [29, 1, 2, 3, 4, 5, 6, 7, 30]] * 2)[:3]
    ours = Clip(config)
    target = shapes(ours, images, tokens)
    params = reference.convert(reference.clip_table(), theirs.state_dict(), target)
    z_i, z_t, scale = quick_jit(ours.apply)({"params": params}, images, tokens)
    _, states = ours.apply({"params": params}, tokens, method="encode_text")

    mean, std = (np.array(s).reshape(1, 1, 1, 3) for s in (config.pixel_mean, config.pixel_std))
    pixels = ((np.asarray(images) + 1) / 2 - mean) / std
    with torch.no_grad():
        pixels = to_torch(pixels.transpose(0, 3, 1, 2).astype(np.float32))
        text = theirs.text_model(to_torch(tokens))
        vision = theirs.vision_model(pixels)
        expected_z_i = theirs.visual_projection(vision.pooler_output)
        expected_z_t = theirs.text_projection(text.pooler_output)
    assert relative_error(z_i, expected_z_i) < TOLERANCE
    assert relative_error(z_t, expected_z_t) < TOLERANCE
    assert relative_error(states, text.last_hidden_state) < TOLERANCE
    assert relative_error(scale, theirs.logit_scale.exp().detach()) < TOLERANCE


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_prior_agrees_with_diffusers(remat):
    diffusers = pytest.importorskip("diffusers")
    theirs = randomise(diffusers.PriorTransformer(**reference.prior_kwargs(PRIOR)))
    z_noised, z_t, text = normal(0, 3, 12), normal(1, 3, 12), normal(2, 3, 7, 12)
    t, mask = jnp.array([0, 31, 999]), prefix_mask([1, 4, 7], 7)
    ours = Prior(dataclasses.replace(PRIOR, remat=remat))
    args = (z_noised, t, z_t, text, mask)
    target = shapes(ours, *args)
    params = reference.convert(reference.prior_table(), prior_state(theirs), target)
    with torch.no_grad():
        z_noised, t, z_t, text, mask = map(to_torch, args)
        expected = theirs(z_noised, t, z_t, text, mask).predicted_image_embedding
    assert relative_error(quick_jit(ours.apply)({"params": params}, *args), expected) < TOLERANCE


def test_decoder_agrees_with_diffusers():
    """As Karlo guides: the first example has the learned null for z_i."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.unclip import UnCLIPTextProjModel

    unet = randomise(diffusers.UNet2DConditionModel(**reference.unet_kwargs(DECODER.unet)))
    text_proj = randomise(UnCLIPTextProjModel(**reference.text_proj_kwargs(DECODER)))
    x_t, t = normal(0, 2, 20, 20, 3), jnp.array([3, 998])
    cond = {
        "z_i": normal(1, 2, 12),
        "z_i_mask": jnp.array([False, True]),
        "text_states": normal(2, 2, 7, 12),
        "text_mask": prefix_mask([2, 6], 7),
        "z_t": normal(3, 2, 12),
    }
    ours = Decoder(DECODER)
    target = shapes(ours, x_t, t, cond)
    state = decoder_state(unet, text_proj)
    params = reference.convert(reference.decoder_table(DECODER), state, target)
    ours_out = quick_jit(ours.apply)({"params": params}, x_t, t, cond)

    with torch.no_grad():
        context, emb = text_proj(
            image_embeddings=to_torch(cond["z_i"][1:]),
            prompt_embeds=to_torch(cond["z_t"]),
            text_encoder_hidden_states=to_torch(cond["text_states"]),
            do_classifier_free_guidance=True,
        )
        mask = torch.nn.functional.pad(to_torch(cond["text_mask"]), (4, 0), value=True)
        images = to_torch(x_t.transpose(0, 3, 1, 2))
        out = unet(images, to_torch(t), context, class_labels=emb, attention_mask=mask).sample
    assert relative_error(ours_out, out.permute(0, 2, 3, 1)) < TOLERANCE


@pytest.mark.parametrize("size", [(20, 20), (12, 28)])
def test_super_resolution_agrees_with_diffusers(size):
    """At its own size, and at an oblong one that no config names."""
    diffusers = pytest.importorskip("diffusers")
    theirs = randomise(diffusers.UNet2DModel(**reference.unet_kwargs(SUPER_RES)))
    x, t = normal(0, 2, *size, 6), jnp.array([0, 999])
    ours = UNet(SUPER_RES)
    target = shapes(ours, x, t)
    params = reference.convert(reference.unet_table(SUPER_RES), theirs.state_dict(), target)
    with torch.no_grad():
        expected = theirs(to_torch(x.transpose(0, 3, 1, 2)), to_torch(t)).sample
    ours_out = quick_jit(ours.apply)({"params": params}, x, t)
    assert relative_error(ours_out, expected.permute(0, 2, 3, 1)) < TOLERANCE


# ---------------------------------------------------------------- Karlo at full size


def check_one_to_one(table, state, target):
    """Every tensor has its place: converting zeros of one byte each checks names and sizes."""
    convertible = {name: np.broadcast_to(np.int8(0), tuple(v.shape)) for name, v in state.items()}
    reference.convert(table, convertible, target)


def test_karlo_has_a_place_for_every_tensor():
    """Names and shapes at full size, with no weights: PyTorch's meta device and `eval_shape`."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.unclip import UnCLIPTextProjModel

    prior, decoder = presets.KARLO_PRIOR, presets.KARLO_DECODER
    super_res = presets.KARLO_SUPER_RES
    with torch.device("meta"):
        their_prior = diffusers.PriorTransformer(**reference.prior_kwargs(prior))
        their_unet = diffusers.UNet2DConditionModel(**reference.unet_kwargs(decoder.unet))
        their_text_proj = UnCLIPTextProjModel(**reference.text_proj_kwargs(decoder))
        their_super_res = diffusers.UNet2DModel(**reference.unet_kwargs(super_res))
    z, states, mask = jnp.zeros((1, 768)), jnp.zeros((1, 77, 768)), jnp.ones((1, 77), bool)
    t = jnp.zeros((1,), jnp.int32)
    target = shapes(Prior(prior), z, t, z, states, mask)
    check_one_to_one(reference.prior_table(), prior_state(their_prior), target)
    cond = {"z_i": z, "z_t": z, "text_states": states, "text_mask": mask}
    target = shapes(Decoder(decoder), jnp.zeros((1, 64, 64, 3)), t, cond)
    state = decoder_state(their_unet, their_text_proj)
    check_one_to_one(reference.decoder_table(decoder), state, target)
    target = shapes(UNet(super_res), jnp.zeros((1, 64, 64, 6)), t)
    check_one_to_one(reference.unet_table(super_res), their_super_res.state_dict(), target)
