"""GLIDE and Imagen as settings of the decoder: what they read, and that they train and sample."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests import t5_folder, tiny
from tests.networks import normal, prefix_mask, random_params
from unclip_jax import stages
from unclip_jax.common.params import flatten
from unclip_jax.diffusion.samplers import Sampling
from unclip_jax.errors import UserError
from unclip_jax.models.decoder import DecoderConfig, masked_mean
from unclip_jax.models.text_encoder import TextConfig
from unclip_jax.models.unet import UNetConfig
from unclip_jax.stages.conditioning import example_keys
from unclip_jax.training import loop, prepare
from unclip_jax.weights import folder as model_folder
from unclip_jax.weights.t5 import T5
from unclip_jax.weights.trained import load_part

WIDTH, LENGTH, SIDE = 10, 7, 8
UNET = UNetConfig(
    image_size=SIDE, out_channels=6, channels=8, channel_mults=(1,), res_blocks=1,
    attention_sizes=(SIDE,), head_channels=8, context_dim=12, groups=4,
)  # fmt: skip
TEXT = TextConfig(vocab_size=tiny.VOCAB, context_length=tiny.CONTEXT, width=12, layers=1, heads=2)
SAMPLING = Sampling(method="ddpm", spacing="3", clip_x_0=1.0, dynamic_percentile=99.5)

GLIDE = stages.DecoderStage(model=DecoderConfig(unet=UNET, text=TEXT), sampling=SAMPLING)
IMAGEN = dataclasses.replace(
    GLIDE, model=DecoderConfig(unet=UNET, text_width=WIDTH, pool_text=True), states_length=LENGTH
)
UNCONDITIONAL = dataclasses.replace(
    GLIDE, model=DecoderConfig(unet=dataclasses.replace(UNET, context_dim=0))
)
ALL = {"glide": GLIDE, "imagen": IMAGEN, "unconditional": UNCONDITIONAL}


def batch(size, seed=0):
    """What each of the three reads, and what none of them does."""
    states = {
        "text_states": normal(seed, size, LENGTH, WIDTH),
        "text_mask": prefix_mask([LENGTH - i % 4 for i in range(size)], LENGTH),
    }
    return tiny.batch(size, SIDE, seed) | states


def params_of(stage):
    """Params with every leaf random."""
    x_t, t = jnp.zeros((1, SIDE, SIDE, 3)), jnp.zeros((1,), jnp.int32)
    return {"network": random_params(stage.network, x_t, t, stage.condition_of(batch(1)))}


@functools.partial(jax.jit, static_argnames="stage")
def output(stage, params, cond):
    b = len(cond["text_mask"])
    x_t = normal(3, b, SIDE, SIDE, 3)
    return stage.denoise(params, x_t, jnp.arange(b), stage.encode(params, cond))


@functools.partial(jax.jit, static_argnames="stage")
def sample(stage, params, keys, cond, guidance_scale):
    return stage.sample(params, keys, cond, guidance_scale=guidance_scale)


@pytest.mark.parametrize("stage", ALL.values(), ids=ALL)
def test_every_weight_learns_and_no_clip_is_needed(stage):
    shapes = jax.eval_shape(stage.init, jax.random.key(0))
    assert set(shapes) == {"network"}, "there is no z_i to normalise"
    params = params_of(stage)
    reads = {name: x for name, x in batch(6).items() if name not in ("z_i", "z_t")}

    def loss(network):
        return stage.loss({"network": network}, reads, jax.random.key(0))[0]

    value, grads = jax.jit(jax.value_and_grad(loss))(params["network"])
    assert np.isfinite(value)
    flat = flatten(grads)
    assert not [name for name, grad in flat.items() if not np.any(grad)]


@pytest.mark.parametrize("stage", [GLIDE, IMAGEN], ids=["glide", "imagen"])
def test_the_caption_is_read_and_a_dropped_one_is_not(stage):
    params = params_of(stage)
    one, other = (stage.condition_of(batch(3, seed)) for seed in (0, 9))
    if stage is IMAGEN:
        other["text_mask"] = one["text_mask"]
    assert jnp.abs(output(stage, params, one) - output(stage, params, other)).max() > 1e-3
    nulls = [stage.null(params, cond) for cond in (one, other)]
    dropped = [output(stage, params, null) for null in nulls]
    np.testing.assert_allclose(*dropped, atol=1e-6)


def test_states_under_the_padding_are_not_read():
    params, cond = params_of(IMAGEN), IMAGEN.condition_of(batch(4))
    noise = normal(5, *cond["text_states"].shape)
    other = cond | {
        "text_states": jnp.where(cond["text_mask"][..., None], cond["text_states"], noise)
    }
    np.testing.assert_allclose(
        output(IMAGEN, params, cond), output(IMAGEN, params, other), atol=1e-6
    )


def test_the_pooled_text_is_the_mean_over_its_tokens():
    states, lengths = normal(0, 3, LENGTH, WIDTH), [LENGTH, 2, 0]
    pooled = masked_mean(states, prefix_mask(lengths, LENGTH))
    for row, length in enumerate(lengths):
        expected = states[row, :length].mean(0) if length else np.zeros(WIDTH)
        np.testing.assert_allclose(pooled[row], expected, atol=1e-6)


@pytest.mark.parametrize("stage", ALL.values(), ids=ALL)
def test_samples_are_each_their_own_and_in_range(stage):
    params, keys = params_of(stage), example_keys(jax.random.key(2), 3)
    cond = stage.condition_of(batch(3))
    images = sample(stage, params, keys, cond, 2.0)
    assert images.shape == (3, SIDE, SIDE, 3)
    assert jnp.abs(images).max() <= 1.0 + 1e-6
    mates = jnp.array([2, 0, 0])  # the last example in other company, and first
    other = sample(stage, params, keys[mates], jax.tree.map(lambda x: x[mates], cond), 2.0)
    np.testing.assert_allclose(other[0], images[2], atol=1e-5)
    unguided = sample(stage, params, keys, cond, 1.0)
    assert np.allclose(images, unguided, atol=1e-3) == (stage is UNCONDITIONAL)


def test_pooling_needs_states():
    with pytest.raises(UserError, match="pool_text: got True, expected False, as text_width is 0"):
        dataclasses.replace(GLIDE.model, pool_text=True)


# ---------------------------------------------------------------- from a config to pictures


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Eight small pictures with captions in the words that the tests' T5 knows."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, caption in enumerate(["a red square", "a blue dog", "green cat", "black disc"] * 2):
        Image.new("RGB", (20, 20), (30 * i, 90, 200 - 20 * i)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return t5_folder.write(tmp_path_factory.mktemp("t5"))


def smoke(name, pictures, cache):
    """A config's smoke variant on the pictures, with a U-Net of one level."""
    config = importlib.import_module(f"configs.emoji.{name}").get_config("smoke")
    config.data.update({"name": str(pictures), "split": "all", "cache_dir": str(cache)})
    config.heldout_split = "all"
    config.train.update({"batch_size": 4, "steps": 2})
    config.stage.model.unet.update(
        {"channels": 32, "channel_mults": (1,), "attention_sizes": (16,), "context_dim": 24}
    )
    if name == "glide":
        config.stage.model.text.update({"width": 24, "layers": 1})
    else:
        config.stage.model.text_width = t5_folder.CONFIG.width
    return config


@pytest.mark.slow
def test_glide_needs_no_other_model(pictures, tmp_path):
    """Its config reads pictures and captions alone; previews are drawn from captions."""
    run = prepare.prepare(smoke("glide", pictures, tmp_path))
    assert not {"clip_fingerprint", "t5"} & set(run.description)
    params, batch = run.init_params(), next(run.batches())
    assert set(batch) == {"image", "tokens", "index"}
    loss, _ = jax.jit(run.stage.loss)(params, batch, jax.random.key(0))
    assert jnp.isfinite(loss)
    images, captions = zip(*run.preview(params, 0), strict=True)
    assert images[0].shape == (64, 128, 3), "beside the true picture"
    assert captions[0] in ("a red square", "a blue dog", "green cat", "black disc")


@pytest.mark.slow
def test_imagen_trains_and_its_folder_samples_with_the_same_t5(pictures, t5, tmp_path):
    config = smoke("imagen", pictures, tmp_path)
    config.t5 = str(t5)
    run = prepare.prepare(config)

    def export(params, step):
        model_folder.save_stage(tmp_path / "model", params=params, description=run.description)

    loop.train(
        loss_fn=run.stage.loss, init_params=run.init_params, batches=run.batches(),
        config=run.train, workdir=tmp_path / "run", description=run.description,
        evaluate=run.evaluate, export=export,
    )  # fmt: skip

    stage, params, description = load_part(tmp_path / "model", kind="decoder")
    encoder = T5.load(t5, stage.states_length, description["t5"]["dtype"])
    assert encoder.fingerprint == description["t5"]["fingerprint"]
    found = encoder.encode(["a red square", "a blue dog"])
    cond = stage.condition(found["text_states"], mask=found["text_mask"])
    keys = example_keys(jax.random.key(0), 2)
    images = sample(stage, params, keys, cond, stage.guidance_scale)
    assert images.shape == (2, 64, 64, 3) and jnp.abs(images).max() <= 1.0 + 1e-6


@pytest.mark.parametrize(
    ("name", "t5_given", "change", "message"),
    [
        ("imagen", False, {}, "config.t5: empty, expected the folder of a T5"),
        ("imagen", True, {"stage.model.text_width": 17}, "--config.stage.model.text_width=16"),
        ("imagen", True, {"t5_dtype": "float16"}, "dtype: got 'float16', expected one of float32"),
        (
            "imagen",
            True,
            {"stage.states_length": 1},
            "context_length: got 1, .*integer, 2",
        ),
        ("glide", True, {}, "config.t5: got .* but this decoder reads no text states"),
    ],
)
def test_a_t5_that_does_not_fit_is_named(name, t5_given, change, message, pictures, t5, tmp_path):
    config = smoke(name, pictures, tmp_path)
    config.t5 = str(t5) if t5_given else ""
    config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=message):
        prepare.prepare(config)


def test_the_stages_say_that_they_stand_on_no_clip():
    assert not {"z_i", "z_t"} & (GLIDE.reads | IMAGEN.reads)
    assert "z_i" in tiny.DECODER.reads and {"z_i", "z_t"} <= tiny.PRIOR.reads
    assert stages.build(stages.describe(IMAGEN)) == IMAGEN
