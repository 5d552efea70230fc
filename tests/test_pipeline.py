"""The whole model: folders that describe themselves, pictures that depend on seed and caption."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from tests import tiny
from unclip_jax.errors import UserError
from unclip_jax.pipeline.drawing import sample_stage
from unclip_jax.pipeline.unclip import UnCLIP
from unclip_jax.weights import folder as model_folder
from unclip_jax.weights.trained import load_part


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture
def folder(model, tmp_path):
    model.save(tmp_path / "model")
    return tmp_path / "model"


def generate(model, prompts, seed=0, **options):
    return model.generate(jax.random.key(seed), prompts, **options)


def test_pictures_have_the_last_upsampler_size(model):
    assert generate(model, ["a dog", "a cat"], num=2).shape == (4, 32, 32, 3)
    small = generate(model, ["a dog"], upsample=False)
    assert small.shape == (1, 16, 16, 3) and small.dtype == np.uint8


def test_a_picture_depends_on_seed_and_caption_and_on_nothing_else(model):
    pictures = generate(model, ["a dog", "a red apple", "a cat"], num=2)
    alone = generate(model, ["a red apple"], num=2)
    batched = generate(model, ["a dog", "a red apple", "a cat"], num=2, batch_size=4)
    # At most one level of 255 by rounding; most pixels are equal.
    assert np.abs(pictures[2:4].astype(int) - alone).max() <= 1
    assert np.abs(pictures.astype(int) - batched).max() <= 1
    assert np.abs(pictures[0].astype(int) - pictures[2]).mean() > 0.01  # another caption
    assert np.abs(pictures[2].astype(int) - pictures[3]).mean() > 1  # another sample
    assert np.abs(generate(model, ["a red apple"], seed=1).astype(int) - alone[:1]).mean() > 1


def test_some_pictures_of_a_seed_are_drawn_without_the_others(model):
    """Bit for bit, where as many are computed together."""
    options = {"batch_size": 2, "upsample": False}
    whole = generate(model, ["a dog"], num=6, **options)
    np.testing.assert_array_equal(generate(model, ["a dog"], first=3, num=2, **options), whole[3:5])
    image = np.zeros((2, 16, 16, 3), np.uint8)
    every = model.variations(jax.random.key(0), image, num=4, **options)
    some = model.variations(jax.random.key(0), image, num=[1, 2], first=[3, 0], **options)
    np.testing.assert_array_equal(some, every[[3, 4, 5]])


def test_prompts_may_have_numbers_and_seeds_of_their_own(model):
    keys, options = [jax.random.key(5), jax.random.PRNGKey(9)], {"batch_size": 1, "upsample": False}
    keys[1] = jax.random.wrap_key_data(keys[1])
    prompts = ["a dog", "a cat"]
    ragged = model.generate(keys, prompts, num=[1, 3], first=[2, 0], **options)
    np.testing.assert_array_equal(ragged[:1], generate(model, prompts[:1], 5, num=3, **options)[2:])
    np.testing.assert_array_equal(ragged[1:], generate(model, prompts[1:], 9, num=3, **options))
    none = model.generate(keys[1], prompts, num=[0, 1], **options)
    np.testing.assert_array_equal(none, ragged[1:2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num": [1]}, "how many values of num: got 1, expected one for all or 2, one each"),
        ({"num": [0, 0]}, "num: got .*expected at least one sample"),
        ({"num": [1, -1]}, r"num\[1\]: got -1"),
        ({"first": -1}, "first: got -1"),
        ({"first": 2**31}, "first: got 2147483648, expected numbers of samples below"),
        ({"first": True}, "first: got True"),
        (
            {"key": jax.random.split(jax.random.key(0), 3)},
            "key's shape: got .3,., expected one key",
        ),
        ({"key": 3}, "keys: got 'int'"),
    ],
)
def test_numbers_and_seeds_that_do_not_fit_are_named(model, options, message):
    given = {"key": jax.random.key(0), "prompts": ["a", "b"]} | options
    with pytest.raises(UserError, match=message):
        model.generate(**given)


def test_every_stage_reports_its_steps_in_order_and_draws_the_same(model):
    seen = []
    watched = generate(model, ["a dog"], progress=lambda *step: seen.append(step))
    expected = {"prior": 4, "decoder": 4, "upsampler 32": 3}
    assert list(dict.fromkeys(stage for stage, _, _ in seen)) == list(expected)
    for stage, steps in expected.items():
        done = [i for name, i, n in seen if name == stage and n == steps]
        assert done[0] == 1 and done[-1] == steps and done == sorted(set(done))
    assert np.abs(watched.astype(int) - generate(model, ["a dog"])).max() <= 1


def test_what_progress_raises_ends_the_sampling_and_breaks_nothing(model):
    seen = []

    def stop(stage, done, steps):
        seen.append(stage)
        if stage == "decoder":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, ["a dog"], progress=stop)
    assert seen[-1] == "decoder" and "upsampler 32" not in seen
    assert generate(model, ["a dog"], progress=lambda *_: None).shape == (1, 32, 32, 3)


def test_another_prompt_seed_or_guidance_compiles_nothing(model):
    generate(model, ["a dog"], guidance_scale=2.0)
    before = sample_stage.programs()
    generate(model, ["two cats"], seed=7, guidance_scale=3.5, prior_guidance_scale=2.0)
    assert sample_stage.programs() == before


def test_save_and_load_give_the_same_pictures(model, folder):
    again = UnCLIP.load(folder)
    assert again.prior.stage == model.prior.stage
    np.testing.assert_array_equal(generate(again, ["a dog"]), generate(model, ["a dog"]))


def test_load_finds_the_model_folder_of_a_workdir(model, tmp_path):
    model.save(tmp_path / "flat")
    for name in ("clip", "prior", "decoder"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "flat" / name).rename(tmp_path / "runs" / name / "model")
    loaded = UnCLIP.load(tmp_path / "runs")
    assert loaded.upsamplers == ()
    assert load_part(tmp_path / "runs" / "clip").stage.kind == "clip"


def test_a_stage_of_another_clip_is_refused(model):
    other = model.clip._replace(params=tiny.params(tiny.CLIP, seed=42))
    with pytest.raises(UserError, match="trained with CLIP"):
        dataclasses.replace(model, clip=other).check()


def test_an_upsampler_of_another_size_is_refused(model):
    stage = dataclasses.replace(tiny.UPSAMPLER, low_size=8)
    wrong = model.upsamplers[0]._replace(stage=stage)
    with pytest.raises(UserError, match="starts from 8 px"):
        dataclasses.replace(model, upsamplers=(wrong,)).check()


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompts: got .., expected at least one caption"),
        ("a dog", {}, "expected a list"),
        (["a dog", " "], {}, r"prompts\[1\]"),
        ([None], {}, r"prompts\[0\]"),
        (["a dog"], {"num": 0}, "num: got 0"),
        (["a dog"], {"batch_size": -1}, "batch_size: got -1"),
    ],
)
def test_bad_prompts_are_named(model, prompts, options, message):
    with pytest.raises(UserError, match=message):
        generate(model, prompts, **options)


def test_folders_that_are_no_model(folder, tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        UnCLIP.load(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no trained stage"):
        UnCLIP.load(tmp_path / "empty")
    with pytest.raises(UserError, match="holds a clip, expected a prior"):
        load_part(folder / "clip", kind="prior")
    (folder / "prior" / "config.json").unlink()
    with pytest.raises(UserError, match=r"prior.*found params.safetensors"):
        UnCLIP.load(folder)


def test_a_list_of_no_folders_is_no_box_model():
    for none in ([], (), iter([])):
        with pytest.raises(UserError, match=r"model: got \[\], expected a folder or more, or None"):
            UnCLIP.load(none)


def test_a_model_may_lack_a_prior_but_not_a_decoder(folder, model):
    shutil.rmtree(folder / "prior")
    without = UnCLIP.load(folder)
    with pytest.raises(UserError, match="no prior"):
        generate(without, ["a red apple"])
    picture = np.zeros((1, 20, 30, 3), np.uint8)
    ours = without.variations(jax.random.key(0), picture, upsample=False)
    whole = model.variations(jax.random.key(0), picture, upsample=False)
    np.testing.assert_array_equal(ours, whole)
    shutil.copytree(folder / "clip", folder / "second")
    with pytest.raises(UserError, match="at most one clip, found 2 clip"):
        UnCLIP.load(folder)
    shutil.rmtree(folder / "second")
    shutil.rmtree(folder / "decoder")
    with pytest.raises(UserError, match="expected one decoder"):
        UnCLIP.load(folder)


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (
            {"clip": np.zeros((2, 4, 8))},
            "got 'clip', expected some of decoder, prior, upsampler_32",
        ),
        ({"decoder": np.zeros((3, 4, 16, 16, 3))}, "expected one for each of 2 pictures"),
        ({"decoder": np.float32(0)}, "expected one for each of 2 pictures"),
        ({"decoder": np.zeros((2, 3, 16, 16, 3))}, "noise's shape: got"),
        ({"prior": np.zeros((2, 4, 8))}, "noise"),
    ],
)
def test_noise_that_does_not_fit_is_named(model, noise, message):
    with pytest.raises(UserError, match=message):
        model.generate(jax.random.key(0), ["a", "b"], upsample=False, noise=noise)


@pytest.mark.parametrize(
    "images", [np.zeros((1, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8), np.zeros((1, 8, 8), np.uint8)]
)
def test_variations_of_something_else_are_refused(model, images):
    with pytest.raises(UserError, match="expected uint8"):
        model.variations(jax.random.key(0), images)


def test_an_unknown_dtype_is_named(folder):
    with pytest.raises(UserError, match="got 'fp16', expected one of float32, bfloat16"):
        UnCLIP.load(folder, dtype="fp16")


def test_a_narrow_copy_is_still_its_clip(folder, tmp_path):
    """Rounded to half the size, CLIP keeps the name that the prior and the decoder know it by."""
    UnCLIP.load(folder).save(tmp_path / "small", dtype="bfloat16")
    small = UnCLIP.load(tmp_path / "small", dtype="bfloat16")
    assert small.prior.params["network"]["query"].dtype == "bfloat16"
    assert small.prior.params["normalisation"]["mean"].dtype == "float32"
    assert small.decoder.stage.model.unet.dtype == "bfloat16"


def test_a_clip_as_train_writes_it_is_still_itself_when_rounded_in_memory(model, folder):
    """Its description has no fingerprint, unlike one that `save` wrote."""
    model_folder.save_stage(
        folder / "clip", params=model.clip.params, description=model.clip.description
    )
    small = UnCLIP.load(folder, dtype="bfloat16")
    assert small.clip.params["network"]["text_projection"]["kernel"].dtype == "bfloat16"


def test_a_stage_of_another_config_is_refused_with_the_arrays_named(folder):
    path = folder / "prior" / "config.json"
    config = json.loads(path.read_text())
    config["description"]["stage"]["model"]["width"] = 32
    del config["checksum"]
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="another shape"):
        UnCLIP.load(folder)


@pytest.mark.parametrize("prompt", ["🍎", "שלום עולם", "a" * 5000, "<|endoftext|>", "&amp;amp;"])
@pytest.mark.filterwarnings("ignore:.*cut")
def test_any_caption_gives_a_picture(model, prompt):
    assert generate(model, [prompt], upsample=False).shape == (1, 16, 16, 3)


# ------------------------------------------------------------------------------- negative prompts


def test_at_scale_0_guidance_arrives_at_the_negative_prompt(model):
    """cond + (0 - 1) (cond - null) is the null: the negative caption, without z_i."""
    keys, z_i = jax.random.split(jax.random.key(1), 2), model.embed_text(["x", "y"])
    noise = np.array(jax.random.normal(jax.random.key(2), (2, 4, 16, 16, 3)))
    noise[:, 1:] = 0.0  # of the learned variance, which is never guided
    settings = {"guidance_scale": 0.0, "noise": noise}
    away = model.decode(keys, z_i, ["a dog"] * 2, negative=["a cat", ""], **settings)
    there = model.condition(z_i, ["a cat", ""]) | {"z_i_mask": np.zeros(2, bool)}
    stage, params = model.decoder.stage, model.decoder.params
    expected = tiny.call(stage, "sample", params, keys, there, noise=noise)
    np.testing.assert_allclose(away, expected, atol=2e-4)

    one = model.prior._replace(stage=dataclasses.replace(model.prior.stage, draws=1))
    single = dataclasses.replace(model, prior=one)
    found = single.sample_prior(keys, ["a dog"] * 2, negative=["a cat", ""], guidance_scale=0.0)
    cat = single.sample_prior(keys, ["a cat"] * 2, guidance_scale=1.0)
    nothing = single.sample_prior(keys, ["a dog"] * 2, guidance_scale=0.0)
    np.testing.assert_allclose(found[0], cat[0], atol=2e-4)
    np.testing.assert_allclose(found[1], nothing[1], atol=2e-4)
    assert np.abs(found[0] - nothing[0]).max() > 0.01


def test_negative_prompts_are_for_all_or_for_each_and_compile_once(model):
    prompts, options = ["a dog", "a cat"], {"num": 2, "upsample": False}
    plain = generate(model, prompts, **options).astype(int)
    assert np.all(generate(model, prompts, negative=["", " "], **options) == plain)
    first = generate(model, prompts, negative=["a red apple", ""], **options).astype(int)
    before = sample_stage.programs()
    both = generate(model, prompts, negative="a red apple", **options).astype(int)
    generate(model, prompts, negative="a snake", guidance_scale=2.5, **options)
    assert sample_stage.programs() == before
    assert np.abs(first[:2] - both[:2]).max() <= 1 and np.abs(first[2:] - plain[2:]).max() <= 1
    assert np.abs(both - plain).reshape(4, -1).max(axis=1).min() > 1
    image = np.zeros((1, 16, 16, 3), np.uint8)
    other = model.variations(jax.random.key(0), image, negative="a dog", upsample=False)
    alone = model.variations(jax.random.key(0), image, upsample=False)
    assert np.abs(other.astype(int) - alone).max() > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negative": ["a"]}, "how many negative prompts: got 1, expected one for all"),
        ({"negative": ["a", None]}, r"negative\[1\]: got None"),
        (
            {"negative": "a", "guidance_scale": 1, "prior_guidance_scale": 1},
            "guidance scale of 1 nothing leads away",
        ),
    ],
)
def test_negative_prompts_that_lead_nowhere_are_refused(model, options, message):
    with pytest.raises(UserError, match=message):
        generate(model, ["a dog", "a cat"], **options)
