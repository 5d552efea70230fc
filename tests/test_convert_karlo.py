"""Karlo converted and run, against diffusers' own pipelines on the same random weights."""

import copy
import functools
import json
import shutil

import jax
import numpy as np
import pytest

from tests import karlo_folders
from unclip_jax.common.params import flatten
from unclip_jax.errors import UserError
from unclip_jax.models import ClipConfig
from unclip_jax.parallel import sharding
from unclip_jax.pipeline.unclip import UnCLIP
from unclip_jax.stages.pixels import to_uint8
from unclip_jax.weights.convert import karlo
from unclip_jax.weights.convert.command import main as convert
from unclip_jax.weights.export.command import main as export

torch = karlo_folders.torch
PIXEL_MEAN, PIXEL_STD = ClipConfig().pixel_mean, ClipConfig().pixel_std
# Curly quotes, entities and the like are cleaned by our own tokenizer, and by Karlo's otherwise.
PROMPTS = ["a red apple", "“Two” dogs &amp; a cat’s  🐱 on the moon"]


@pytest.fixture(
    scope="module",
    params=["two levels", pytest.param("three levels", marks=pytest.mark.slow)],
)
def reference(request, tmp_path_factory):
    """Both pipelines of diffusers, and the folders they save."""
    base = tmp_path_factory.mktemp("karlo")
    sizes = karlo_folders.SIZES[request.param]
    text_to_image, variations = karlo_folders.pipelines(sizes, base / "tokenizer")
    text_to_image.save_pretrained(base / "text2im")
    variations.save_pretrained(base / "variations")
    return sizes, text_to_image, variations, base


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One saved text-to-image Karlo."""
    base = tmp_path_factory.mktemp("one")
    text_to_image, _ = karlo_folders.pipelines(karlo_folders.SIZES["two levels"], base / "tok")
    text_to_image.save_pretrained(base / "karlo")
    return base / "karlo"


def picture_errors(ours, theirs):
    """Differences of pictures in [0, 1]; ours are floats in [-1, 1], not yet clipped."""
    return np.abs((np.clip(ours, -1, 1) + 1) / 2 - theirs)


def with_x_T(x_T, steps):
    """What one stage was given, as ours takes it: [b, steps, ...], channels last."""
    stacked = np.stack([x_T, *steps], axis=1)
    return np.moveaxis(stacked, 2, -1) if stacked.ndim == 5 else stacked


@pytest.mark.usefixtures("optimised")
def test_text_to_image_is_diffusers(reference, monkeypatch):
    """The published settings whole: 25, 25 and 7 steps, guidance 4 and 8, the same noise."""
    sizes, pipeline, _, base = reference
    noise = karlo_folders.Noise(0)
    monkeypatch.setattr("diffusers.schedulers.scheduling_unclip.randn_tensor", noise)
    b, e, low = len(PROMPTS), sizes.prior.embed_dim, sizes.decoder.unet.image_size
    high = sizes.super_res.image_size
    theirs = pipeline(
        PROMPTS,
        prior_num_inference_steps=25,
        decoder_num_inference_steps=25,
        super_res_num_inference_steps=7,
        prior_guidance_scale=4.0,
        decoder_guidance_scale=8.0,
        prior_latents=noise((b, e)),
        decoder_latents=noise((b, 3, low, low)),
        super_res_latents=noise((b, 3, high, high)),
        output_type="np",
    ).images
    x_T, steps = noise.given[:3], noise.given[3:]
    assert len(steps) == 24 + 24 + 6
    given = {
        "prior": with_x_T(x_T[0], steps[:24])[:, None],
        "decoder": with_x_T(x_T[1], steps[24:48]),
        f"upsampler_{high}": with_x_T(x_T[2], steps[48:]),
    }
    model = UnCLIP.load(base / "text2im")
    keys = jax.random.split(jax.random.key(0), b)
    z_i = model.sample_prior(keys, PROMPTS, noise=given["prior"])
    small = model.decode(keys, z_i, PROMPTS, noise=given["decoder"])
    images = np.asarray(model.upsample(keys, small, noise=given))
    # Both sides compute in float32, and guidance of 8 over 25 steps blows rounding up in single
    # places: from diffusers in float64 ours was 2.6e-4 away in one, at a mean of 4e-7 from float32.
    errors = picture_errors(images, theirs)
    assert errors.mean() < 2e-6
    assert np.quantile(errors, 0.999) < 1e-4
    assert errors.max() < 0.5 / 255
    whole = model.generate(jax.random.key(1), PROMPTS, noise=given)
    np.testing.assert_array_equal(whole, np.asarray(to_uint8(images)))


@pytest.mark.usefixtures("optimised")
def test_variations_are_diffusers(reference, monkeypatch):
    """A picture in, two variations out; the repository for it has no prior."""
    sizes, _, pipeline, base = reference
    noise = karlo_folders.Noise(1)
    monkeypatch.setattr("diffusers.schedulers.scheduling_unclip.randn_tensor", noise)
    low, high, side = sizes.decoder.unet.image_size, sizes.super_res.image_size, 28
    pictures = np.random.default_rng(2).integers(0, 256, (1, side, side, 3), dtype=np.uint8)
    mean, std = (np.array(s).reshape(1, 1, 1, 3) for s in (PIXEL_MEAN, PIXEL_STD))
    pixels = ((pictures / 255.0 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)
    theirs = pipeline(
        torch.from_numpy(pixels),
        num_images_per_prompt=2,
        decoder_guidance_scale=8.0,
        decoder_latents=noise((2, 3, low, low)),
        super_res_latents=noise((2, 3, high, high)),
        output_type="np",
    ).images
    x_T, steps = noise.given[:2], noise.given[2:]
    given = {
        "decoder": with_x_T(x_T[0], steps[:24]),
        f"upsampler_{high}": with_x_T(x_T[1], steps[24:]),
    }
    model = UnCLIP.load(base / "variations")
    assert model.prior is None
    images = model.variations(jax.random.key(0), pictures, num=2, noise=given)
    assert np.abs(images / 255.0 - theirs).max() < 0.5 / 255 + 1e-4
    with pytest.raises(UserError, match="no prior"):
        model.generate(jax.random.key(0), ["a cat"])


def test_both_repositories_make_one_model(reference):
    _, _, _, base = reference
    parts = karlo.load([base / "text2im", base / "variations"])
    assert parts["prior"] is not None and parts["clip"].stage.model.towers == "both"
    alone = karlo.load([base / "text2im"])["clip"]
    assert alone.stage.model.towers == "text"


def test_karlo_is_loaded_straight_to_a_mesh(reference):
    base, mesh = reference[3], sharding.make_mesh(devices=jax.devices()[:1])
    expected, found = UnCLIP.load(base / "text2im"), UnCLIP.load(base / "text2im", mesh=mesh)
    assert found.mesh == mesh
    for name, part in expected.parts().items():
        there = found.parts()[name].params
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-6), there, part.params)
        wanted = sharding.tree_shardings(there, mesh)
        assert jax.tree.map(lambda x: x.sharding, there) == wanted


# ---------------------------------------------------------------- there and back


def tensors_of(folder):
    """Every tensor in a folder of diffusers, by component and name."""
    from safetensors.numpy import load_file

    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        named = load_file(path).items()
        found |= {f"{path.parent.name}/{name}": array for name, array in named}
    return found


def test_round_trip_is_exact(reference, tmp_path):
    """diffusers to ours by the command, and back: every tensor bit for bit, every setting."""
    sizes, pipeline, _, base = reference
    convert(["karlo", str(base / "text2im"), "--out", str(tmp_path / "ours")])
    asked = {"padding": "max_length", "max_length": sizes.clip.context_length, "truncation": True}
    for model in (UnCLIP.load(tmp_path / "ours"), UnCLIP.load(base / "text2im")):
        expected = pipeline.tokenizer(PROMPTS, **asked).input_ids
        np.testing.assert_array_equal(model.tokens(model.clip, PROMPTS), expected)
    export(["diffusers", "--model", str(tmp_path / "ours"), "--out", str(tmp_path / "theirs")])
    before, after = tensors_of(base / "text2im"), tensors_of(tmp_path / "theirs")
    assert set(before) == set(after)
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array, err_msg=name)
    loaded = type(pipeline).from_pretrained(tmp_path / "theirs")
    assert set(loaded.components) == set(pipeline.components)
    for name in ("prior", "decoder", "super_res_first", "prior_scheduler", "decoder_scheduler"):
        ours, theirs = dict(getattr(loaded, name).config), dict(getattr(pipeline, name).config)
        free = {"downsample_type", "upsample_type", "dropout", "attention_head_dim"}
        different = {k for k in theirs if not k.startswith("_") and ours.get(k) != theirs[k]}
        assert different <= (free if "super" in name else set()), name
    assert loaded.tokenizer(PROMPTS, **asked) == pipeline.tokenizer(PROMPTS, **asked)
    with pytest.raises(UserError, match="exists"):
        export(["diffusers", "--model", str(tmp_path / "ours"), "--out", str(tmp_path / "theirs")])
    decoder = tmp_path / "ours/decoder/config.json"
    config = json.loads(decoder.read_text())
    del config["checksum"]
    side = config["description"]["stage"]["model"]["unet"]["image_size"]
    for changes in ({"patch": 2, "image_size": 2 * side}, {"pixel_channels": 8}):
        described = copy.deepcopy(config)
        described["description"]["stage"]["model"]["unet"] |= changes
        decoder.write_text(json.dumps(described))
        with pytest.raises(UserError, match="another form than Karlo's"):
            export(
                ["diffusers", "--model", str(tmp_path / "ours"), "--out", str(tmp_path / "again")]
            )


def test_variations_go_home_too(reference, tmp_path):
    _, _, pipeline, base = reference
    convert(["karlo", str(base / "variations"), "--out", str(tmp_path / "ours")])
    export(["diffusers", "--model", str(tmp_path / "ours"), "--out", str(tmp_path / "theirs")])
    before, after = tensors_of(base / "variations"), tensors_of(tmp_path / "theirs")
    assert set(before) == set(after)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    type(pipeline).from_pretrained(tmp_path / "theirs")


def same_params(one, other):
    one, other = flatten(one), flatten(other)
    return set(one) == set(other) and all(np.array_equal(one[name], other[name]) for name in one)


BOTH = pytest.param("sharded bin", marks=pytest.mark.slow)


@pytest.mark.parametrize("form", ["bin", "sharded", BOTH, "fp16 variant"])
def test_every_form_of_file_gives_the_same(folder, form, tmp_path):
    pipeline = karlo_folders.diffusers.UnCLIPPipeline.from_pretrained(folder)
    settings = {
        "bin": {"safe_serialization": False},
        "sharded": {"max_shard_size": "20KB"},
        "sharded bin": {"max_shard_size": "20KB", "safe_serialization": False},
        "fp16 variant": {"variant": "fp16"},
    }[form]
    pipeline.save_pretrained(tmp_path / "karlo", **settings)
    if form == "bin":  # transformers 5 writes safetensors whatever it is asked
        text_encoder = tmp_path / "karlo" / "text_encoder"
        torch.save(pipeline.text_encoder.state_dict(), text_encoder / "pytorch_model.bin")
        (text_encoder / "model.safetensors").unlink()
    expected, found = dict(karlo.read([folder])), dict(karlo.read([tmp_path / "karlo"]))
    for name, part in expected.items():
        assert same_params(part.params, found[name].params), name


@pytest.mark.slow
def test_half_precision_stays_half_and_runs(folder, tmp_path):
    pipeline = karlo_folders.diffusers.UnCLIPPipeline.from_pretrained(folder)
    pipeline.to(torch.float16).save_pretrained(tmp_path / "half")
    parts = dict(karlo.read([tmp_path / "half"]))
    kernel = parts["decoder"].params["network"]["unet"]["conv_in"]["kernel"]
    assert kernel.dtype == np.float16
    assert parts["prior"].params["normalisation"]["mean"].dtype == np.float32
    images = UnCLIP.load(tmp_path / "half").generate(jax.random.key(0), ["a cat"])
    assert images.shape == (1, 40, 40, 3)
    convert(["karlo", str(tmp_path / "half"), "--out", str(tmp_path / "ours")])
    again = UnCLIP.load(tmp_path / "ours").generate(jax.random.key(0), ["a cat"])
    np.testing.assert_allclose(again.astype(int), images.astype(int), atol=1)


@pytest.mark.slow
def test_bfloat16_weights_and_compute(folder):
    model = UnCLIP.load(folder, dtype="bfloat16")
    leaves = jax.tree.leaves(model.decoder.params["network"])
    assert {leaf.dtype.name for leaf in leaves} == {"bfloat16"}
    assert model.decoder.stage.model.unet.dtype == "bfloat16"
    assert model.generate(jax.random.key(0), ["a cat"]).shape == (1, 40, 40, 3)


# ---------------------------------------------------------------- damaged and hostile folders


def without(name):
    def damage(folder):
        shutil.rmtree(folder / name)

    return damage


def swap(folder):
    (folder / "prior").rename(folder / "other")
    (folder / "decoder").rename(folder / "prior")
    (folder / "other").rename(folder / "decoder")


def swap_weights(folder):
    one, other = (folder / n / "diffusion_pytorch_model.safetensors" for n in ("prior", "decoder"))
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)


def truncate(folder):
    path = folder / "decoder" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def unlink(folder):
    (folder / "text_proj" / "model.safetensors").unlink(missing_ok=True)
    (folder / "text_proj" / "diffusion_pytorch_model.safetensors").unlink(missing_ok=True)


class Attack:
    def __reduce__(self):
        return (print, ("executed",))


def poison(folder):
    torch.save({"state": Attack()}, folder / "decoder" / "diffusion_pytorch_model.bin")
    (folder / "decoder" / "diffusion_pytorch_model.safetensors").unlink()


def setting(component, field, value, file="config.json"):
    def damage(folder):
        path = folder / component / file
        path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))

    return damage


def rename_tensor(folder):
    from safetensors.numpy import load_file, save_file

    path = folder / "super_res_last" / "diffusion_pytorch_model.safetensors"
    arrays = load_file(path)
    arrays["conv_on.weight"] = arrays.pop("conv_in.weight")
    save_file(arrays, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("decoder"), "no folder 'decoder'"),
        (without("tokenizer"), "no folder 'tokenizer'"),
        (
            setting("prior_scheduler", "variance_type", "learned_range", "scheduler_config.json"),
            "prior_scheduler.*variance_type: got 'learned_range'",
        ),
        (
            setting("", "decoder_scheduler", ["diffusers", "DDPMScheduler"], "model_index.json"),
            "decoder_scheduler: got 'DDPMScheduler', expected one of UnCLIPScheduler",
        ),
        (without("prior_scheduler"), "no folder 'prior_scheduler'"),
        (swap, "num_attention_heads: got None"),
        (swap_weights, "prior.*do not fit.*missing.*unexpected"),
        (truncate, "decoder.*damaged or cut short"),
        (unlink, "text_proj.*no weights"),
        (poison, "decoder.*print"),
        (rename_tensor, "super_res_last.*missing.*conv_in.weight.*unexpected.*conv_on.weight"),
        (setting("prior", "num_layers", 3), "missing.*transformer_blocks.2"),
        (setting("prior", "num_layers", "3"), "num_layers: got '3', expected an integer"),
        (setting("prior", "added_emb_type", None), "added_emb_type is None"),
        (setting("decoder", "act_fn", "gelu"), "act_fn is 'gelu'"),
        (setting("decoder", "new_trick", 7), "new_trick.*does not know"),
        (setting("super_res_last", "norm_num_groups", 2), "differ"),
        (setting("text_encoder", "hidden_act", "relu"), "activation: got 'relu'"),
        (setting("text_encoder", "layer_norm_eps", 1e-6), "layer_norm_eps"),
        (
            setting("prior_scheduler", "prediction_type", "magic", "scheduler_config.json"),
            "prediction_type: got 'magic'",
        ),
        (
            setting("decoder_scheduler", "beta_schedule", "linear", "scheduler_config.json"),
            "beta_schedule is 'linear'",
        ),
        (setting("", "_class_name", "StableDiffusionPipeline", "model_index.json"), "UnCLIPPipe"),
    ],
)
def test_a_damaged_folder_is_one_line(folder, tmp_path, capsys, damage, message):
    copy = tmp_path / "karlo"
    shutil.copytree(folder, copy)
    damage(copy)
    with pytest.raises(UserError, match=message) as error:
        UnCLIP.load(copy)
    assert "\n" not in str(error.value)
    assert "executed" not in capsys.readouterr().out


def test_not_karlo_at_all(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        karlo.load([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="neither model_index"):
        karlo.load([tmp_path])
    with pytest.raises(UserError, match="is no folder"):
        UnCLIP.load(tmp_path / "nowhere")
