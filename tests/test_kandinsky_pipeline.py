"""Kandinsky 2.2 whole, against diffusers' pipelines on the same noise; and what else it can do."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests import kandinsky_folders as folders
from tests.kandinsky_folders import SIDE, Feed, first, noise_of
from unclip_jax import stages
from unclip_jax.common import config as settings
from unclip_jax.common.params import flatten, unflatten
from unclip_jax.errors import UserError
from unclip_jax.pipeline import manipulate
from unclip_jax.pipeline.drawing import DECODER, NEGATIVE, PRIOR, stage_keys
from unclip_jax.pipeline.manipulate import Latents, Walk, latents, masks
from unclip_jax.pipeline.tasks import command, inputs
from unclip_jax.pipeline.unclip import UnCLIP
from unclip_jax.stages.conditioning import example_keys
from unclip_jax.stages.pixels import to_uint8
from unclip_jax.training import prepare

torch, diffusers = folders.torch, folders.diffusers

PROMPT = "two dogs in the snow"
KEY = jax.random.key(3)
PRIOR_STEPS, STEPS = 3, 3
WALK = Walk(steps=STEPS, eta=1.0, guidance_scale=4.0)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """diffusers' pipelines, and the folder they are saved in."""
    base = tmp_path_factory.mktemp("kandinsky")
    return folders.pipelines(base), base


def loaded(base, decoder="decoder"):
    """Ours of the same folders, in fewer steps than the published ones."""
    model = UnCLIP.load([base / "prior", base / decoder])
    return UnCLIP(
        model.clip,
        model.prior.respaced("--prior_steps", str(PRIOR_STEPS)),
        model.decoder.respaced("--decoder_steps", str(STEPS)),
    )


@pytest.fixture(scope="module")
def model(reference):
    """The plain decoder's."""
    return loaded(reference[1])


@pytest.fixture
def feed(monkeypatch):
    """Gives diffusers' schedulers and pipelines our noise."""

    def given(*noises):
        noise = Feed(*noises)
        for module in ("scheduling_unclip", "scheduling_ddpm"):
            monkeypatch.setattr(f"diffusers.schedulers.{module}.randn_tensor", noise)
        name = "diffusers.pipelines.kandinsky2_2.pipeline_kandinsky2_2_img2img.randn_tensor"
        monkeypatch.setattr(name, noise)
        return noise

    return given


def prior_noise(keys):
    return noise_of(stage_keys(keys, PRIOR), (12,), PRIOR_STEPS, draws=1)


def negative_noise(keys):
    return prior_noise(stage_keys(keys, NEGATIVE))


def decoder_noise(model, keys):
    return noise_of(stage_keys(keys, DECODER), model.decoder.stage.x_shape, STEPS)


def embeddings(pipeline, feed, noise, prompts, negative=None, scale=4.0):
    """Their z_i of prompts, and what guidance leads away from; noise [rows, steps, e]."""
    feed(noise[:, 1:])
    found = pipeline(
        prompts,
        negative_prompt=negative,
        num_inference_steps=PRIOR_STEPS,
        guidance_scale=scale,
        latents=first(noise[:, 0]),
    )
    return found.image_embeds, found.negative_image_embeds


def drawn(pipeline, feed, noise, z_i, null, model, **told):
    """Their pictures in [-1, 1], channels last."""
    feed(noise[:, 1:])
    height, width = model.decoder.stage.picture_size
    told |= {"height": height, "width": width, "num_inference_steps": STEPS, "output_type": "pt"}
    given = {"image_embeds": z_i, "negative_image_embeds": null, "latents": first(noise[:, 0])}
    images = pipeline(**given, **told).images
    return images.numpy().transpose(0, 2, 3, 1)


def same(ours, theirs, bound=1e-4):
    """Whether the largest difference is less than that of the largest value."""
    assert ours.shape == theirs.shape
    assert np.abs(np.asarray(ours) - theirs).max() < bound * np.abs(theirs).max()


def test_text_to_image_of_96_x_160_is_diffusers(reference, model, feed):
    """z_i and the picture of a caption, without a negative prompt, at a size that is no square."""
    pipelines, _ = reference
    model, keys = model.sized((96, 160)), example_keys(KEY, 1)
    noise = {"prior": prior_noise(keys), "decoder": decoder_noise(model, keys)}
    z_i, null = embeddings(pipelines["prior"], feed, noise["prior"], [PROMPT])
    np.testing.assert_allclose(model.decoder.params["null_z_i"], null[0], atol=1e-5)
    theirs = drawn(pipelines["decoder"], feed, noise["decoder"], z_i, null, model)
    ours_z = model.sample_prior(keys, [PROMPT])
    same(ours_z, z_i.numpy())
    ours = model.decode(keys, ours_z, [PROMPT])
    same(ours, theirs)
    whole = model.generate(KEY, [PROMPT])
    assert whole.shape == (1, 96, 160, 3)
    np.testing.assert_array_equal(whole, np.asarray(to_uint8(ours)))


def test_a_mix_with_weights_away_from_a_caption_is_diffusers(reference, model, feed):
    """A picture and a caption, weighted, and a negative prompt that the prior draws."""
    pipelines, _ = reference
    rng, keys = np.random.default_rng(0), example_keys(KEY, 1)
    size = model.clip.stage.image_size
    picture = rng.integers(0, 256, (size, size, 3), np.uint8)
    weights, noise = [0.7, 0.4], decoder_noise(model, keys)
    of_caption, _ = embeddings(pipelines["prior"], feed, prior_noise(keys), [PROMPT])
    pixels = pipelines["prior"].image_processor(picture, return_tensors="pt").pixel_values
    with torch.no_grad():
        of_picture = pipelines["prior"].image_encoder(pixels).image_embeds
    # They draw the negative prompt beside a prompt, from what is left of the noise.
    both = np.concatenate([prior_noise(keys), negative_noise(keys)])
    _, away = embeddings(pipelines["prior"], feed, both, [PROMPT], ["snow"])
    z_i = weights[0] * of_picture + weights[1] * of_caption
    theirs = drawn(pipelines["decoder"], feed, noise, z_i, away, model)
    things, told = [picture, PROMPT], {"weights": weights, "how": "sum"}
    same(manipulate.mixed(model, keys, things, **told), z_i.numpy())
    same(model.decode(keys, z_i.numpy(), [""], negative=["snow"]), theirs)
    ours = manipulate.mix(model, KEY, things, negative="snow", **told)
    assert np.abs(ours / 127.5 - 1 - np.clip(theirs, -1, 1)).max() < 1.01 / 255
    given = {"decoder": noise, "negative": negative_noise(keys)[:, None]}
    again = model.draw(example_keys(jax.random.key(9), 1), z_i.numpy(), "snow", noise=given)
    assert np.abs(again.astype(int) - ours).max() <= 1


def test_img2img_is_diffusers(reference, model, feed):
    """From MoVQ's latents of a picture, with the noise of two steps of three."""
    pipelines, _ = reference
    rng, keys = np.random.default_rng(2), example_keys(KEY, 1)
    picture = rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    noise, left_out = decoder_noise(model, keys), 1
    z_i = np.asarray(manipulate.embed(model, [picture]))
    null = np.asarray(model.decoder.params["null_z_i"])[None]
    feed(noise[:, :1], noise[:, 1 + left_out :])
    theirs = pipelines["img2img"](
        image=first(picture[None] / 255.0).float(),
        image_embeds=torch.from_numpy(z_i),
        negative_image_embeds=torch.from_numpy(null),
        strength=2 / 3,
        height=SIDE,
        width=SIDE,
        num_inference_steps=STEPS,
        output_type="pt",
    ).images
    start = latents.renoise(model, keys, latents.decoder_size(model, [picture]), WALK, left_out)
    ours = latents.decode(model, keys, Latents(z_i, start), WALK, first=left_out)
    same(np.clip(ours / 2 + 0.5, 0, 1), theirs.numpy().transpose(0, 2, 3, 1))
    made = manipulate.img2img(model, KEY, [picture], WALK, strength=2 / 3)
    np.testing.assert_array_equal(made, np.asarray(to_uint8(ours)))


def test_inpainting_by_nine_channels_is_diffusers(reference, feed):
    """The right half, from MoVQ's latents of the left and the mask beside x_t."""
    pipelines, base = reference
    model, keys = loaded(base, "inpaint"), example_keys(KEY, 1)
    rng, noise = np.random.default_rng(4), decoder_noise(model, keys)
    picture = rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    hole = np.zeros((SIDE, SIDE), bool)
    hole[:, SIDE // 2 :] = True
    shown = masks.filled(picture, hole)
    z_i = np.asarray(manipulate.embed(model, [shown]))
    null = np.asarray(model.decoder.params["null_z_i"])[None]
    told = {"image": first(shown[None] / 127.5 - 1.0).float()}
    told["mask_image"] = torch.from_numpy(hole[None, None].astype(np.float32))
    given = noise, torch.from_numpy(z_i), torch.from_numpy(null), model
    theirs = drawn(pipelines["inpaint"], feed, *given, **told)
    holes = masks.cover(hole, picture, model.decoder.stage.x_shape[:2], wider=1)[None]
    start = Latents(z_i, latents.noise(model, keys))
    around = latents.decoder_size(model, [shown]), holes
    ours = latents.decode(model, keys, start, WALK, known=around)
    same(ours, theirs)
    made = manipulate.inpaint(model, KEY, picture, hole, WALK)
    np.testing.assert_array_equal(made[0, :, : SIDE // 2], picture[:, : SIDE // 2])
    np.testing.assert_array_equal(made[0][hole], np.asarray(to_uint8(ours))[0][hole])


@pytest.mark.slow
def test_a_hint_is_followed_as_by_diffusers(reference, feed):
    """A depth map in colour, beside the latents of a picture that is no square."""
    _, base = reference
    pipeline, size, keys = folders.hinted(base), (64, 128), example_keys(KEY, 1)
    model = loaded(base, "hint").sized(size)
    rng, noise = np.random.default_rng(8), decoder_noise(model, keys)
    hint, z_i = rng.integers(0, 256, (*size, 3), np.uint8), rng.standard_normal((1, 12))
    null = np.array(model.decoder.params["null_z_i"])[None]
    z_i = z_i.astype(np.float32)
    given = noise, torch.from_numpy(z_i), torch.from_numpy(null), model
    theirs = drawn(pipeline, feed, *given, hint=first(hint[None] / np.float32(255)))
    same(model.hinted(hint).decode(keys, z_i, [""]), theirs)
    with pytest.raises(UserError, match=r"hint: got None, expected a picture, .* --hint FILE"):
        model.decode(keys, z_i, [""])


def test_the_plain_decoder_fills_in_by_masking(model):
    """What is kept is the picture; what was in the hole changes nothing."""
    rng, size = np.random.default_rng(5), (20, SIDE)
    picture, hole = rng.integers(0, 256, (40, 64, 3), np.uint8), np.zeros((40, 64), bool)
    hole[10:30, 20:50] = True
    scratched = np.where(hole[..., None], np.uint8(255), picture)
    wide = model.sized(size)
    made = manipulate.inpaint(wide, KEY, picture, hole, WALK)
    assert made.shape == (1, *size, 3)
    kept = ~masks.cover(hole, picture, size)[..., 0]
    np.testing.assert_array_equal(made[0][kept], masks.kept(picture, hole, size)[kept])
    np.testing.assert_array_equal(manipulate.inpaint(wide, KEY, scratched, hole, WALK), made)


@pytest.mark.slow
def test_everything_else_of_the_pipeline_draws_latents_too(model):
    """Inversion, interpolation, text diff, variations: of pictures that are no squares."""
    rng, walk, size = np.random.default_rng(6), Walk(steps=STEPS), (20, SIDE)
    pair = [rng.integers(0, 256, (30, 50, 3), np.uint8) for _ in range(2)]
    wide = model.sized(size)
    found = manipulate.encode(wide, pair, walk)
    assert found.x_T.shape == (2, 5, SIDE // 4, 4)
    ways = manipulate.interpolate(found, 2)
    turned = manipulate.text_diff(wide, found, "a cat", "a dog", [0.0])
    made = manipulate.pictures(wide, KEY, ways, walk)
    assert made.shape == (2, *size, 3)
    again, ratios = manipulate.reconstruct(wide, KEY, pair, walk)
    # The ends of the way, a turn by nothing and what comes back are the same pictures.
    np.testing.assert_array_equal(made, again)
    np.testing.assert_array_equal(manipulate.pictures(wide, KEY, turned, walk), again)
    assert np.isfinite(ratios).all()


def test_the_command_line_names_two_folders_a_size_and_steps(reference):
    _, base = reference
    told = ["text2im", "--prompt", PROMPT, "--width", "40", "--decoder_steps", "7"]
    args = command.parse([*told, "--model", str(base / "decoder"), str(base / "prior")])
    found = inputs.load(args)
    assert found.picture_size == (SIDE, 40)
    assert found.decoder.stage.sampling.spacing == "leading:7:1"
    assert found.prior.stage.sampling.spacing == "25"


def test_one_converted_folder_is_the_same_model(model, tmp_path):
    model.save(tmp_path)
    again = UnCLIP.load(tmp_path)
    assert again.parts().keys() == {"clip", "prior", "decoder"}
    for name, part in again.parts().items():
        assert jax.tree.all(jax.tree.map(np.array_equal, part.params, model.parts()[name].params))
    steps = model.decoder.stage.sampling
    assert dataclasses.replace(again.decoder.stage, sampling=steps) == model.decoder.stage


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("name", ["prior", "decoder"])
@pytest.mark.parametrize("variant", ["", "whole", "smoke", "plan"])
def test_configs_build(name, variant):
    config = importlib.import_module(f"configs.kandinsky.{name}").get_config(variant)
    given = settings.build(prepare.Settings, config)
    assert given.init == f"runs/kandinsky/{name}" and given.clip == "runs/kandinsky/clip"
    assert bool(given.lora.rank) == (variant in ("", "smoke"))
    if variant == "plan":
        stage = stages.build(given.stage)
        assert stage.model.embed_dim == 1280
        assert stage.image_size == (512 if name == "decoder" else 0)


@pytest.fixture(scope="module")
def converted(model, tmp_path_factory):
    """The model's folder, and one of pictures with captions."""
    base = tmp_path_factory.mktemp("converted")
    model.save(base / "ours")
    (base / "pictures").mkdir()
    for i, caption in enumerate(["a red apple", "two dogs", "the moon", "black ink"]):
        pixels = np.random.default_rng(i).integers(0, 256, (36, 48, 3), np.uint8)
        Image.fromarray(pixels).save(base / "pictures" / f"{i}.png")
        (base / "pictures" / f"{i}.txt").write_text(caption)
    return base


@pytest.mark.parametrize("name", ["prior", "decoder"])
def test_a_run_starts_from_the_folder_and_saves_what_it_learnt_of_it(model, converted, name):
    """Adapters as they begin change no bit of the folder, MoVQ and nulls included."""
    config = importlib.import_module(f"configs.kandinsky.{name}").get_config("smoke")
    config.init, config.clip = str(converted / "ours" / name), str(converted / "ours" / "clip")
    config.data.update(name=str(converted / "pictures"), split="all", cache_dir=str(converted))
    config.heldout_split = "all"
    run, before = prepare.prepare(config), model.parts()[name].params
    begun = run.init_params()
    assert {x.dtype for x in jax.tree.leaves(begun["base_network"])} == {jnp.dtype("bfloat16")}
    assert set(begun) == {*before, "base_network"}
    adapted = flatten(begun["network"])
    assert all(name.endswith(("lora_a", "lora_b")) for name in adapted)
    saved = flatten(run.export(begun))
    for path, value in flatten(before).items():
        np.testing.assert_array_equal(saved[path], value, err_msg=path)
    [moved] = [n for n in sorted(adapted) if n.endswith("lora_b")][:1]
    learnt = begun | {"network": unflatten(adapted | {moved: adapted[moved] + 1})}
    saved = flatten(run.export(learnt))
    changed = {n for n, x in flatten(before).items() if not np.array_equal(saved[n], x)}
    assert changed == {f"network/{moved.removesuffix('lora_b')}kernel"}


def test_what_cannot_be_trained_is_one_line(model):
    stage = model.decoder.stage
    with pytest.raises(UserError, match=r"config.stage.autoencoder: .* expected none without"):
        stage.check_untrained()
    filling = dataclasses.replace(stage, model=folders.tiny(9).decoder)
    with pytest.raises(UserError, match=r"stage.model.inpaint: got True, expected False"):
        assert filling.reads
    with pytest.raises(UserError, match=r"stage.sides: .* expected a square, to be trained"):
        assert stage.of_size((20, SIDE)).reads


@pytest.mark.slow
def test_the_decoder_learns_from_pictures_alone(model):
    """Its gradient is the network's alone, and a z_i that is dropped is the zero picture's."""
    stage = dataclasses.replace(model.decoder.stage, z_i_drop=0.5)
    params, rng = model.decoder.params, np.random.default_rng(7)
    z_i = rng.standard_normal((2, 12)).astype(np.float32)
    batch = {"image": rng.integers(0, 256, (2, SIDE, SIDE, 3), np.uint8), "z_i": z_i}
    assert stage.reads == batch.keys() and not stage.reads_captions
    encode = jax.jit(lambda cond: stage.encode(params, cond)["emb"])
    null = stage.null(params, stage.condition(z_i=z_i))
    same = stage.condition(z_i=jnp.stack([params["null_z_i"]] * 2))
    np.testing.assert_array_equal(encode(null), encode(same))

    def loss(network):
        return stage.loss(params | {"network": network}, batch, jax.random.key(0))[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(params["network"])
    assert np.isfinite(value) and value > 0
    assert all(np.isfinite(x).all() and np.any(x) for x in jax.tree.leaves(gradient)[:40])


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((30, 42), "size: got '30 x 42', expected multiples of 4 px; give 32 x 40"),
        (0, "size: got 0, expected an integer, 1 or more"),
        ((4, 4, 4), "size: got \\(4, 4, 4\\), expected height and width"),
        ("big", "size: got 'big', expected an integer"),
    ],
)
def test_a_size_that_does_not_fit_is_one_line(model, size, message):
    with pytest.raises(UserError, match=message):
        model.sized(size)


@pytest.mark.parametrize(
    ("asked", "found"), [(["--height", "30"], "'30 x "), (["--width", "0"], "0")]
)
def test_a_size_of_the_command_line_is_named_as_it_was_given(model, asked, found):
    args = command.parse(["text2im", "--prompt", PROMPT, *asked])
    with pytest.raises(UserError, match=f"--height and --width: got {found}"):
        inputs.told_of(args, model)


def test_other_models_have_one_size():
    from tests import tiny

    small = tiny.model()
    with pytest.raises(UserError, match="size: got 64, expected none: the upsamplers start from"):
        small.sized(64)
    with pytest.raises(UserError, match=r"hint: .* expected none"):
        small.hinted(np.zeros((4, 4, 3), np.uint8))


def test_two_folders_that_are_no_public_model_are_one_line(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=r"model: got .* expected one model folder, or"):
        UnCLIP.load([tmp_path / "a", tmp_path / "b"])
