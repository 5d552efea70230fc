"""The canvas: what it computes, how it trains, and what a decoder makes of it."""

import dataclasses
import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy.special import erf

from configs import base
from tests import tiny
from unclip_jax import stages
from unclip_jax.common.params import TRAINED, flatten, is_weights
from unclip_jax.data.datasets import DataConfig
from unclip_jax.data.embeddings.shards import VALID
from unclip_jax.data.embeddings.store import EmbeddingStore
from unclip_jax.data.records import BadRecord
from unclip_jax.diffusion import guidance
from unclip_jax.errors import UserError
from unclip_jax.models.canvas import CanvasConfig
from unclip_jax.models.dit import DiTConfig
from unclip_jax.pipeline import manipulate
from unclip_jax.pipeline.unclip import UnCLIP
from unclip_jax.stages.conditioning import example_keys
from unclip_jax.training import command, prepare, prior_samples, save
from unclip_jax.training.config import TrainConfig
from unclip_jax.training.doctor import workdir
from unclip_jax.training.doctor.command import examine
from unclip_jax.training.fine_tuning import Origin
from unclip_jax.weights import folder as model_folder
from unclip_jax.weights.adapters import read_adapters
from unclip_jax.weights.export import program
from unclip_jax.weights.trained import load_part

STAGE, DECODER = tiny.CANVAS, tiny.ON_CANVAS
PLAIN = dataclasses.replace(STAGE, input_noise=0.0, z_i_drop=0.0, z_t_drop=0.0)


def stats(params, name="normalisation"):
    """Params with a normalisation that is not the identity."""
    e = tiny.DIM
    found = {"mean": jnp.linspace(-0.5, 0.5, e), "std": jnp.linspace(0.5, 2.0, e)}
    return params | {name: found}


PARAMS = stats(tiny.params(STAGE), "z_t_normalisation")
FULL = tiny.params(DECODER) | {"canvas": PARAMS}


def by_hand(params, z_i, z_t):
    """The picture that the perceptron draws, in NumPy."""
    network = jax.tree.map(lambda x: np.asarray(x, np.float64), params["network"])

    def normalised(z, name):
        return (np.asarray(z) - params[name]["mean"][None]) / params[name]["std"][None]

    def product(h, name):
        return h @ network[name]["kernel"] + network[name]["bias"][None]

    def gelu(x):
        return x * (1 + erf(x / np.sqrt(2))) / 2

    def norm(x):
        return x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + 1e-6)

    c = [normalised(z_i, "normalisation"), normalised(z_t, "z_t_normalisation")]
    h = gelu(product(np.concatenate(c, axis=1), "in"))
    h = h + gelu(product(norm(h), "hidden_0"))
    return product(norm(h), "pixels").reshape(-1, 8, 8, 3)


def test_it_is_the_perceptron_of_its_formula():
    batch = tiny.batch(3, 16)
    found = tiny.call(STAGE, "draw", PARAMS, STAGE.condition_of(batch))
    np.testing.assert_allclose(found, by_hand(PARAMS, batch["z_i"], batch["z_t"]), atol=1e-5)
    large = tiny.call(STAGE, "sample", PARAMS, example_keys(jax.random.key(0), 3), batch)
    assert large.shape == (3, 16, 16, 3)


BASIS = dataclasses.replace(
    STAGE, model=dataclasses.replace(STAGE.model, centres=40, layers=0, width=12)
)


def pictures(count, captions=3):
    """So many pictures' z_i and z_t, of several captions each, as `Stage.fit_constants` reads."""
    z_i, z_t = np.random.default_rng(0).standard_normal((2, count * captions, tiny.DIM))
    return np.float32(np.repeat(z_i[:count], captions, axis=0)), np.float32(z_t)


def test_radial_basis_functions_are_those_of_their_formula():
    z_i, z_t = pictures(5, captions=1)
    params = stats(tiny.params(BASIS), "z_t_normalisation")
    drawn = tiny.call(BASIS, "draw", params, {"z_i": z_i, "z_t": z_t})
    c = {name: np.asarray(x, np.float64) for name, x in flatten(params["network"]).items()}
    stat = params["z_t_normalisation"]
    x = np.concatenate([z_i, (z_t - stat["mean"][None]) / stat["std"][None]], axis=1)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    near = np.exp(
        np.exp(c["basis/log_scale"]) * (x @ c["basis/centres/kernel"] + c["basis/centres/bias"])
    )
    h = 30 * near / near.sum(1, keepdims=True) @ c["basis/values/kernel"]
    expected = h @ c["pixels/kernel"] + c["pixels/bias"]
    np.testing.assert_allclose(drawn, expected.reshape(-1, 8, 8, 3), atol=1e-5)
    # Of nothing at all it draws something, and how that changes with its input is finite.
    none = jax.grad(lambda z: jnp.sum(BASIS.apply(params, z)))(jnp.zeros((2, 2 * tiny.DIM)))
    assert np.all(np.isfinite(none))


def test_radial_basis_functions_kept_in_bfloat16_are_as_sharp():
    """What is kept in half the bytes computes what its values in float32 do."""
    z = dict(zip(("z_i", "z_t"), pictures(5, captions=1), strict=True))
    params = tiny.params(BASIS)
    params["network"]["basis"]["log_scale"] = jnp.float32(3.0)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params["network"])
    whole = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    # Not compiled: XLA leaves out the rounding between two operations that it joins.
    found, expected = (BASIS.draw(params | {"network": network}, z) for network in (half, whole))
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("count", [40, 20, 90])
def test_centres_begin_as_the_first_pair_of_each_picture(count):
    z_i, z_t = pictures(count)
    cuts = (0, 3, 7, 50, len(z_i))  # a picture's captions are in two chunks

    def chunks():
        return ((z_i[a:b], z_t[a:b]) for a, b in itertools.pairwise(cuts))

    found = BASIS.fit_constants("whiten", chunks)
    kernel = np.asarray(found["network"]["basis"]["centres"]["kernel"]).T
    x = (z_i - z_i.mean(0)) / z_i.std(0), 2 * (z_t - z_t.mean(0)) / z_t.std(0)
    x = np.concatenate(x, axis=1)[::3]
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(kernel, x[np.arange(40) * count // 40], atol=1e-5)


def test_a_run_begins_with_centres_among_its_data_and_learns_them(folder, no_curves):
    def centres(steps):
        stage = run(folder, BASIS, "basis", train={"steps": steps})
        return np.asarray(stage.params["network"]["basis"]["centres"]["kernel"])

    begun, later = centres(2), centres(4)
    np.testing.assert_allclose(np.linalg.norm(begun, axis=0), 1.0, atol=0.05)
    assert 0 < np.max(np.abs(later - begun)) < 0.1  # and no new ones when it goes on


@pytest.mark.parametrize("penalty", ["squared", "charbonnier"])
def test_the_loss_is_that_of_the_picture_averaged_down(penalty):
    batch = tiny.batch(3, 16)
    stage = dataclasses.replace(PLAIN, penalty=penalty)
    loss, own = tiny.call(stage, "loss", PARAMS, batch, jax.random.key(0))
    picture = np.asarray(batch["image"], np.float64).reshape(3, 8, 2, 8, 2, 3).mean((2, 4))
    off = by_hand(PARAMS, batch["z_i"], batch["z_t"]) - (picture / 127.5 - 1)
    squared = np.mean(off**2)
    expected = {"squared": squared, "charbonnier": np.mean(np.sqrt(off**2 + 0.03**2))}
    np.testing.assert_allclose(loss, expected[penalty], rtol=1e-5)
    if penalty == "charbonnier":
        np.testing.assert_allclose(own["squared_error"], squared, rtol=1e-5)


def test_a_dropped_input_is_its_mean_and_noise_is_of_the_size_said():
    batch = tiny.batch(4, 16)
    none = jnp.zeros(4, bool)
    kept = {"z_i": ~none, "z_t": none}
    found = tiny.call(STAGE, "draw", PARAMS, STAGE.condition_of(batch), kept)
    mean = np.tile(PARAMS["z_t_normalisation"]["mean"], (4, 1))
    np.testing.assert_allclose(found, by_hand(PARAMS, batch["z_i"], mean), atol=1e-5)
    # Noise on z_i alone, in units of its standard deviation: the same as noise on the input.
    params = stats(PARAMS)
    z = jnp.zeros((20_000, tiny.DIM))
    moved = stages.canvas.noised(jax.random.key(0), z, params["normalisation"], 0.3)
    np.testing.assert_allclose(
        np.std(moved, axis=0), 0.3 * params["normalisation"]["std"], rtol=0.03
    )
    assert stages.canvas.noised(jax.random.key(0), z, params["normalisation"], 0.0) is z


# -------------------------------------------------------------------------- the decoder with it


def given(rows=3, **changes):
    return DECODER.condition_of(tiny.batch(rows, 16) | changes)


def test_the_decoder_sees_what_the_canvas_draws_of_what_is_there():
    cond = given()
    canvas = tiny.call(DECODER, "draw_canvas", FULL, cond)
    drawn = np.clip(by_hand(PARAMS, cond["z_i"], cond["z_t"]), -1.05, 1.05)
    rows = [Image.fromarray(np.float32(x)) for x in np.moveaxis(drawn, 3, 1).reshape(-1, 8, 8)]
    rows = [np.asarray(x.resize((16, 16), Image.Resampling.BILINEAR)) for x in rows]
    expected = np.moveaxis(np.reshape(rows, (3, 3, 16, 16)), 1, 3)
    np.testing.assert_allclose(canvas, expected, atol=1e-5)
    # Without a caption it is drawn of z_i, without z_i of the caption, and without both of neither.
    none, e = jnp.zeros(3, bool), jnp.zeros((3, tiny.DIM))
    silent = DECODER.condition_of(tiny.batch(3, 16), jnp.zeros((3, tiny.CONTEXT), bool))
    mean = e + PARAMS["z_t_normalisation"]["mean"][None]
    for given_cond, z_i, z_t in (
        (silent, cond["z_i"], mean),
        (cond | {"z_i_mask": none}, e, cond["z_t"]),
        (DECODER.null(FULL, cond), e, mean),
    ):
        found = tiny.call(DECODER, "draw_canvas", FULL, given_cond)
        same = {"z_i": z_i, "z_t": z_t, "z_i_mask": ~none, "text_mask": cond["text_mask"]}
        np.testing.assert_array_equal(found, tiny.call(DECODER, "draw_canvas", FULL, same))


def test_training_makes_the_canvas_worse_and_sampling_does_not():
    cond = given(400)
    clean = tiny.call(DECODER, "draw_canvas", FULL, cond)
    keys = [jax.random.key(i) for i in (0, 0, 1)]
    one, again, other = (tiny.call(DECODER, "draw_canvas", FULL, cond, key) for key in keys)
    np.testing.assert_array_equal(one, again)
    assert np.any(one != other)
    silent = dataclasses.replace(DECODER, canvas_noise=0.0)
    worse = np.asarray(tiny.call(silent, "draw_canvas", FULL, cond, keys[0]))
    whole = np.mean(np.all(np.isclose(worse, clean, atol=1e-6), axis=(1, 2, 3)))
    assert abs(whole - 0.75 * 0.85) < 0.08
    kept = dataclasses.replace(silent, canvas_z_i_drop=0.0, canvas_z_t_drop=0.0)
    np.testing.assert_allclose(
        tiny.call(kept, "draw_canvas", FULL, cond, keys[0]), clean, atol=1e-6
    )


def test_guidance_leads_away_from_the_canvas_of_nothing_and_rows_are_apart():
    cond, keys = given(), example_keys(jax.random.key(3), 3)
    sample = functools.partial(tiny.call, DECODER, "sample", FULL)
    three = sample(keys, cond, guidance_scale=jnp.float32(2.0))
    one = {name: x[1:2] for name, x in cond.items()}
    np.testing.assert_allclose(
        sample(keys[1:2], one, guidance_scale=jnp.float32(2.0))[0], three[1], atol=1e-5
    )
    x_t, t = jax.random.normal(jax.random.key(1), (3, 16, 16, 3)), jnp.full(3, 500)
    own, null = (
        tiny.call(DECODER, "denoise", FULL, x_t, t, tiny.call(DECODER, "encode", FULL, c))
        for c in (cond, DECODER.null(FULL, cond))
    )
    denoise = guidance.classifier_free(
        lambda x, t, encoded: tiny.call(DECODER, "denoise", FULL, x, t, encoded),
        cond, DECODER.null(FULL, cond), 3.0, learned_variance=True,
        encode=lambda c: tiny.call(DECODER, "encode", FULL, c),
    )  # fmt: skip
    expected = own[..., :3] + 2.0 * (own - null)[..., :3]
    np.testing.assert_allclose(denoise(x_t, t)[..., :3], expected, atol=1e-4)


def test_sampling_begins_with_the_canvas_where_it_is_told_to():
    """A network that sees no noise gives back what sampling began with: canvas and noise."""
    sampling = dataclasses.replace(DECODER.sampling, method="ddim", spacing=(500,), clip_x_0=0.0)
    begun = dataclasses.replace(DECODER, from_canvas=True, sampling=sampling)
    cond, keys = given(), example_keys(jax.random.key(3), 3)
    noise = np.random.default_rng(0).normal(size=(3, 1, 16, 16, 3)).astype(np.float32)
    alpha, sigma = (x.item() for x in DECODER.diffusion.levels(jnp.int32(500), jnp.zeros(())))
    canvas = tiny.call(DECODER, "draw_canvas", FULL, cond)

    def blind(denoise):
        return lambda x_t, t: jnp.zeros((*x_t.shape[:-1], 6))

    found = begun.draw(FULL, keys, cond, noise=jnp.asarray(noise), guide=blind)
    np.testing.assert_allclose(found, canvas + sigma / alpha * noise[:, 0], atol=1e-4)
    plain = dataclasses.replace(begun, from_canvas=False)
    found = plain.draw(FULL, keys, cond, noise=jnp.asarray(noise), guide=blind)
    np.testing.assert_allclose(found, noise[:, 0] / alpha, atol=1e-4)
    with pytest.raises(UserError, match=r"stage\.from_canvas: got True, expected False"):
        dataclasses.replace(tiny.DECODER, from_canvas=True)


def test_edits_go_on_working():
    """`tests/test_manipulate.py` says what they do; here the decoder has a canvas."""
    plain = tiny.model()
    decoder = plain.decoder._replace(stage=DECODER, params=FULL)
    model = dataclasses.replace(plain, decoder=decoder)
    walk = manipulate.Walk(steps=2, guidance_scale=2.0, batch_size=2)
    images, key = np.asarray(tiny.batch(2, 16)["image"]), jax.random.key(0)
    latents = manipulate.encode(model, images, walk)
    turned = manipulate.text_diff(model, latents, "a dog", "a cat", [0.0, 1.0])
    between = manipulate.interpolate(latents, 2)
    for some in (turned, between):
        made = manipulate.pictures(model, key, some, walk, upsample=False)
        assert made.shape == (len(some.z_i), 16, 16, 3)
    hole = np.zeros((16, 16), bool)
    hole[4:12, 4:12] = True
    filled = manipulate.inpaint(model, key, images[0], hole, walk, num=2, upsample=False)
    np.testing.assert_allclose(filled[:, ~hole], np.stack([images[0]] * 2)[:, ~hole], atol=1)
    assert np.any(filled[:, hole] != images[0][None, hole])


def test_it_is_exported_for_any_number_of_pictures():
    sampler = program.sampler(DECODER, "decoder")
    assert {"tokens", "text_mask", "z_i", "z_t"} < set(sampler.inputs)
    exported = program.program(sampler, flatten(FULL), ("cpu",))
    (images,) = jax.tree.leaves(exported.out_avals)
    assert str(images.shape) == "(b, 16, 16, 3)"


def test_a_canvas_of_any_size_is_enlarged():
    decoder = tiny.DECODER.with_canvas(dataclasses.replace(STAGE.model, size=12))
    shapes = jax.eval_shape(decoder.init, jax.random.key(0))
    cond = decoder.condition_of(tiny.batch(2, 16))
    found = jax.eval_shape(lambda p: decoder.draw_canvas(p, cond), shapes)
    assert found.shape == (2, 16, 16, 3)


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"unet\.in_channels: got 3, expected 6: x_t's and"):
        dataclasses.replace(tiny.DECODER, canvas=STAGE.model)
    with pytest.raises(UserError, match=r"canvas\.embed_dim: got 9, expected stage\.model\.embed"):
        tiny.DECODER.with_canvas(CanvasConfig(embed_dim=9))
    with pytest.raises(UserError, match=r"stage\.canvas: got .*width=16.*expected .*width=17"):
        DECODER.with_canvas(dataclasses.replace(STAGE.model, width=17))
    with pytest.raises(UserError, match="a prior takes no canvas"):
        tiny.PRIOR.with_canvas(STAGE.model)
    for changes, message in (
        ({"image_size": 12}, "image_size: got 12, expected a multiple of stage.model.size = 8"),
        ({"penalty": "l1"}, "penalty: got 'l1', expected one of squared, charbonnier"),
        ({"input_noise": -1.0}, "input_noise: got -1.0"),
        ({"z_t_drop": 1.0}, "z_t_drop: got 1.0"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(STAGE, **changes)


# ------------------------------------------------------------------------------- as runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with pictures, and the workdirs of a tiny CLIP and a decoder without a canvas."""
    folder = tmp_path_factory.mktemp("canvas")
    rng = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for i in range(40):
        pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{i:02d}.png")
        (folder / "pictures" / f"{i:02d}.txt").write_text(f"picture {i}\nthe same {i}")
    clip = tiny.params(tiny.CLIP)
    about = {"stage": stages.describe(tiny.CLIP)}
    model_folder.save_stage(folder / "clip", params=clip, description=about)
    for part, name in ((tiny.model().decoder, "plain"), (tiny.model().prior, "prior")):
        model_folder.save_stage(folder / name, params=part.params, description=part.description)
    return folder


def run(folder, stage, name, **settings):
    """Train for a few steps in `folder`/`name`, as the command does."""
    config = config_of(folder, stage, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "parse", lambda argv: None)
        patch.setattr(command.command_line, "name_of", lambda values: "a config of this test")
        for flag, value in (("CONFIG", config), ("WORKDIR", str(folder / name))):
            patch.setattr(command, flag, type("Flag", (), {"value": value}))
        for flag in ("DISTRIBUTED", "COORDINATOR", "PROCESSES", "PROCESS", "PROFILE"):
            value = {"DISTRIBUTED": "off", "PROFILE": ""}.get(flag)
            patch.setattr(command, flag, type("Flag", (), {"value": value}))
        command.main([])
    return load_part(folder / name)


def config_of(folder, stage, train=None, **settings):
    data = DataConfig(name=str(folder / "pictures"), cache_dir=str(folder / "cache"))
    train = {"batch_size": 8, "steps": 4, "checkpoint_every": 2, "log_every": 2} | (train or {})
    train = TrainConfig(**{"eval_every": 4, "preview_every": 4} | train)
    given = {"previews": 2, "clip": str(folder / "clip")} | settings
    return base.make(stage, data, train, **given)


@pytest.fixture(scope="module")
def trained(folder, no_curves):
    """A canvas and a decoder on it, after a few steps."""
    canvas = run(folder, STAGE, "canvas")
    quick = {"train": {"preview_every": 0}, "canvas": str(folder / "canvas")}
    return canvas, run(folder, tiny.DECODER, "decoder", **quick)


def test_it_trains_and_a_decoder_trains_on_it(folder, trained):
    canvas, decoder = trained
    assert canvas.stage == STAGE and (folder / "canvas/previews/step_00000004.png").is_file()
    # Both normalisations are those of the training set.
    prepared = prepare.prepare(config_of(folder, STAGE))
    z_i, z_t = (np.concatenate(z) for z in zip(*prepared.source.chunks(), strict=True))
    for z, name in ((z_i, "normalisation"), (z_t, "z_t_normalisation")):
        np.testing.assert_allclose(canvas.params[name]["mean"], z.mean(0), atol=1e-6)
        np.testing.assert_allclose(canvas.params[name]["std"], z.std(0), rtol=1e-4)

    assert decoder.stage == DECODER
    same = jax.tree.map(np.array_equal, decoder.params["canvas"], canvas.params)
    assert all(jax.tree.leaves(same))
    # What unclip save makes of the checkpoint is the same, with nothing else given.
    save.main(["--workdir", str(folder / "decoder"), "--out", str(folder / "saved")])
    saved = load_part(folder / "saved")
    assert jax.tree.all(jax.tree.map(np.array_equal, saved.params, decoder.params))


@pytest.mark.slow
def test_the_doctor_can_look_at_both(folder, trained):
    for name in ("canvas", "decoder"):
        found = examine(workdir.read(folder / name), str(folder / "clip"))
        assert "data_not_seen" not in [finding.name for finding in found]


def test_what_was_trained_draws_from_half_the_bytes(folder, trained):
    model = dataclasses.replace(tiny.model(), decoder=trained[1])
    model.check()
    model.save(folder / "half", "bfloat16")
    stored, _ = model_folder.load_stage(folder / "half" / "decoder")
    dtypes = {name: {x.dtype.name for x in jax.tree.leaves(part)} for name, part in stored.items()}
    assert dtypes["network"] == {"bfloat16"} and dtypes["normalisation"] == {"float32"}
    canvas_dtypes = {
        n: {x.dtype.name for x in jax.tree.leaves(p)} for n, p in stored["canvas"].items()
    }
    assert canvas_dtypes == {
        "network": {"bfloat16"}, "normalisation": {"float32"}, "z_t_normalisation": {"float32"},
    }  # fmt: skip
    again = UnCLIP.load(folder / "half")
    pictures = again.generate(jax.random.key(0), ["picture 3"], upsample=False)
    assert pictures.shape == (1, 16, 16, 3)


@pytest.mark.slow
def test_a_decoder_with_a_canvas_resumes_bit_for_bit(folder, no_curves):
    if not (folder / "canvas").exists():
        run(folder, STAGE, "canvas")
    flags = {"canvas": str(folder / "canvas")}
    stage = dataclasses.replace(tiny.DECODER, z_i_noise=0.1)
    whole = run(folder, stage, "whole", **flags)
    run(folder, stage, "parts", train={"steps": 2}, **flags)
    parts = run(folder, stage, "parts", **flags)
    assert jax.tree.all(jax.tree.map(np.array_equal, whole.params, parts.params))
    other = run(folder, STAGE, "other", train={"learning_rate": 1e-2})
    assert np.any(other.params["network"]["in"]["bias"])
    with pytest.raises(UserError, match="canvas"):
        run(folder, stage, "parts", train={"steps": 6}, canvas=str(folder / "other"))


# ------------------------------------------------------------------- the prior's own z_i


def test_each_pair_has_the_priors_samples_of_its_own_caption(folder, monkeypatch):
    monkeypatch.setattr(prior_samples, "PAIRS_PER_PART", 30)
    monkeypatch.setattr(prior_samples, "BATCH", 16)
    flags = {"prior": str(folder / "prior"), "prior_samples": 3}
    given = prepare.prepare(config_of(folder, STAGE, **flags))
    (cached,) = (folder / "cache" / "prior_samples").iterdir()
    parts = sorted(cached.iterdir())
    assert len(parts) == -(-len(given.source) // 30) > 1
    pairs = (0, 1, 29, 30, len(given.source) - 1)
    records = [given.source[i] for i in pairs]
    model = tiny.model()
    for number in range(3):
        keys = jnp.stack(
            [jax.random.fold_in(jax.random.fold_in(jax.random.key(0), i), number) for i in pairs]
        )
        text = jnp.asarray(model.tokens(model.prior, [record["caption"] for record in records]))
        cond = tiny.PRIOR.condition(text, jnp.stack([record["z_t"] for record in records]))
        expected = tiny.call(
            tiny.PRIOR, "sample", model.prior.params, keys, cond,
            guidance_scale=tiny.PRIOR.guidance_scale,
        )  # fmt: skip
        found = [record[prior_samples.NAME][number] for record in records]
        np.testing.assert_allclose(found, expected, atol=1e-5)
    # A part that is missing is drawn again, the same; those that are there are not touched.
    whole, times = np.load(parts[1]), parts[0].stat().st_mtime_ns
    parts[1].unlink()
    prepare.prepare(config_of(folder, STAGE, **flags))
    np.testing.assert_array_equal(np.load(parts[1]), whole)
    assert parts[0].stat().st_mtime_ns == times and sorted(cached.iterdir()) == parts


@pytest.mark.parametrize("damage", ["", "no array", "cut", "an archive", "shape", "dtype"])
def test_a_part_that_is_not_what_was_kept_is_drawn_again(damage, folder):
    config = config_of(folder, STAGE, prior=str(folder / "prior"), prior_samples=1)
    whole = np.copy(prepare.prepare(config).source[3][prior_samples.NAME])
    files = (folder / "cache" / "prior_samples").rglob("*.npy")
    (path,) = (p for p in files if np.load(p).shape[1] == 1)
    kept = path.read_bytes()
    others = {"shape": np.zeros((3, 1, tiny.DIM), np.float32), "dtype": np.load(path).astype("f8")}
    if damage in others:
        np.save(path, others[damage])
    else:
        content = {"cut": kept[:-9], "an archive": b"PK\x03\x04" + kept[4:]}
        path.write_bytes(content.get(damage, damage.encode()))
    np.testing.assert_array_equal(prepare.prepare(config).source[3][prior_samples.NAME], whole)
    assert path.read_bytes() == kept


class Pairs(list):
    """A source and its store at once; what is None in it can't be read."""

    name = where = "some pairs"

    def __init__(self, captions, z_i):
        super().__init__(
            types.SimpleNamespace(caption=caption, z_i=z, flags=VALID, name=caption)
            for caption, z in zip(captions, z_i, strict=True)
        )
        self.store = self

    def __getitem__(self, index):
        if (pair := super().__getitem__(index)) is None:
            raise BadRecord(f"pair {index} of some pairs: damaged")
        return pair


def test_a_pair_that_cannot_be_read_has_no_sample_and_is_named(folder, monkeypatch, caplog):
    at, bad = EmbeddingStore.at, {4, 9}

    def damaged(self, shard, page, row):
        if row in bad:
            raise BadRecord(f"pair {row} of a shard: damaged")
        return at(self, shard, page, row)

    config = config_of(folder, STAGE, prior=str(folder / "prior"), prior_samples=4)
    monkeypatch.setattr(EmbeddingStore, "at", damaged)
    source = prepare.prepare(config).source
    for row in bad:
        assert caplog.text.count(f"skipped pair {row} of a shard: damaged") == 1
    with pytest.raises(BadRecord):
        source[4]
    bad.clear()  # it was the network: then the pair's own z_i is there
    found = {row: source[row] for row in (3, 4)}
    np.testing.assert_array_equal(found[4][prior_samples.NAME], np.tile(found[4]["z_i"], (4, 1)))
    assert not np.any(found[3][prior_samples.NAME] == found[3]["z_i"])


def test_a_store_that_cannot_be_read_at_all_is_no_store_without_samples():
    source = Pairs(["a dog"] * 3 + ["a cat"], np.eye(4, dtype=np.float32))
    alike = prior_samples.Alike(source)
    source[:] = [None] * 4
    with pytest.raises(UserError, match="some pairs: can't be read any more"):
        alike.read(range(4))
    with pytest.raises(UserError, match="some pairs: every one of the 4 records read is bad"):
        prior_samples.Alike(source)


@pytest.mark.parametrize("count", [2, 3, 5, 9])
def test_copies_of_a_picture_all_have_its_samples(count):
    rng = np.random.default_rng(count)
    for _ in range(20):
        z_i, away = rng.standard_normal((2, 24)).astype(np.float32)
        alike = prior_samples.Alike(Pairs(["a flag"] * (count + 1), [*[z_i] * count, -z_i]))
        drawn = np.tile(z_i + away / 3, (count + 1, 1))
        found = alike.own(range(count + 1), drawn)
        np.testing.assert_array_equal(found[:count], drawn[:count])
        np.testing.assert_array_equal(found[count], -z_i)


def test_lengths_of_pictures_are_found_once_and_not_for_every_sample(monkeypatch):
    z_i = np.random.default_rng(0).standard_normal((50, 24)).astype(np.float32)
    alike = prior_samples.Alike(Pairs(["a flag"] * 50, z_i))
    norm, normed = np.linalg.norm, []
    monkeypatch.setattr(np.linalg, "norm", lambda x, **how: normed.append(x) or norm(x, **how))
    drawn = z_i[[0, 7, 2]]
    expected = z_i[:3]  # the second is of another picture
    np.testing.assert_array_equal(alike.own(range(3), drawn), expected)
    assert all(len(x) <= 3 for x in normed)


def test_a_sample_is_of_the_picture_that_it_is_nearest_to():
    said = ["a dog", "a cat", "a dog", "a dog, blob style", "a dog"]
    z_i = np.float32(np.eye(5)) * np.float32([1, 1, 9, 1, 1])[:, None]  # lengths say nothing
    store = source = Pairs(said, z_i)
    store[4].flags = 0  # a bad pair is no picture
    drawn = np.float32(
        [[0.6, 0, 0.5, 0, 0.9], [0, 0, 1, 0, 0], [0.6, 0, 0.5, 0, 0], [1, 0, 0, 0, 0]]
    )
    found = prior_samples.Alike(source).own(range(4), drawn)
    expected = drawn.copy()
    expected[2] = store[2].z_i  # nearer to the first, so that one's alone
    np.testing.assert_array_equal(found, expected)


def test_as_many_rows_as_asked_take_a_sample():
    rows = 1000
    batch = {"z_i": jnp.zeros((rows, 2)), "image": jnp.zeros(rows)}
    batch[prior_samples.NAME] = jnp.broadcast_to(jnp.arange(1.0, 5.0)[None, :, None], (rows, 4, 2))

    def taken(share, seed=0):
        def loss(params, batch, key):
            assert set(batch) == {"z_i", "image"} and params == {} and key == jax.random.key(seed)
            return batch["z_i"], {}

        z_i, _ = prior_samples.Mixed(loss, share)({}, batch, jax.random.key(seed))
        np.testing.assert_array_equal(z_i[:, 0], z_i[:, 1])
        return np.asarray(z_i[:, 0])

    assert not taken(0.0).any() and taken(1.0).all()
    counts = np.bincount(taken(0.6).astype(int), minlength=5) / rows
    np.testing.assert_allclose(counts, [0.4, 0.15, 0.15, 0.15, 0.15], atol=0.05)
    np.testing.assert_array_equal(taken(0.6), taken(0.6))
    assert np.any(taken(0.6) != taken(0.6, seed=1))


def test_a_run_on_the_priors_samples_resumes_bit_for_bit(folder, no_curves):
    flags = {"prior": str(folder / "prior")}
    stage = dataclasses.replace(STAGE, z_i_noise=0.1)
    whole = run(folder, stage, "sampled", **flags)
    run(folder, stage, "sampled_parts", train={"steps": 2}, **flags)
    parts = run(folder, stage, "sampled_parts", **flags)
    assert jax.tree.all(jax.tree.map(np.array_equal, whole.params, parts.params))
    plain = run(folder, stage, "unsampled")
    assert not jax.tree.all(jax.tree.map(np.array_equal, whole.params, plain.params))
    assert whole.description["prior"]["share"] == 0.5
    with pytest.raises(UserError, match="prior"):
        run(folder, stage, "sampled_parts", train={"steps": 6}, prior_share=0.6, **flags)


def test_what_a_run_needs_is_asked_for(folder):
    for stage, changes, message in (
        (STAGE, {"prior": str(folder / "clip")}, "holds a clip, expected a prior"),
        (tiny.PRIOR, {"prior": str(folder / "prior")}, "a prior is not drawn of z_i"),
        (STAGE, {"prior_share": 1.5}, r"config\.prior_share: got 1\.5"),
        (STAGE, {"prior_samples": 0}, r"config\.prior_samples: got 0"),
    ):
        with pytest.raises(UserError, match=message):
            prepare.prepare(config_of(folder, stage, **changes))
    with pytest.raises(UserError, match=r"config\.canvas: empty, expected the folder"):
        prepare.prepare(config_of(folder, DECODER))
    with pytest.raises(UserError, match="holds a clip, expected a canvas"):
        prepare.prepare(config_of(folder, tiny.DECODER, canvas=str(folder / "clip")))
    about = {"stage": stages.describe(STAGE), "clip_fingerprint": "0" * 16}
    model_folder.save_stage(folder / "strange", params=tiny.params(STAGE), description=about)
    with pytest.raises(UserError, match="a clip takes no canvas"):
        prepare.prepare(config_of(folder, tiny.CLIP, canvas=str(folder / "strange")))
    with pytest.raises(UserError, match="was trained with CLIP 0000000000000000, but config"):
        prepare.prepare(config_of(folder, tiny.DECODER, canvas=str(folder / "strange")))


@pytest.fixture(scope="module")
def two_canvases(folder):
    """Beside the others "one" and "two", canvases, and "on_one", a decoder that has the first."""
    about = tiny.model().decoder.description
    kept = {name: tiny.params(STAGE, seed) for seed, name in enumerate(("one", "two"), 1)}
    for name, params in kept.items():
        told = about | {"stage": stages.describe(STAGE)}
        model_folder.save_stage(folder / name, params=params, description=told)
    params = tiny.params(DECODER) | {"canvas": kept["one"]}
    told = about | {"stage": stages.describe(DECODER)}
    model_folder.save_stage(folder / "on_one", params=params, description=told)
    return kept


@pytest.mark.parametrize(
    ("init", "canvas"), [("plain", "two"), ("on_one", "two"), ("on_one", "")], ids=str
)
def test_adapters_are_saved_with_the_canvas_that_they_were_trained_on(
    folder, two_canvases, init, canvas
):
    stage, where = DECODER if init == "on_one" else tiny.DECODER, str(folder / init)
    flags = {"canvas": str(folder / canvas) if canvas else "", "init": where}
    lora = {"rank": 2, "convolutions": True}
    run = prepare.prepare(config_of(folder, stage, lora=lora, **flags))
    begun = run.init_params()
    assert run.stage == DECODER
    kept = {n: x for n, x in begun.items() if n == TRAINED or not is_weights(n)}
    origin = save.origin_of(run.description, where, run.stage)
    exported = run.export(begun)
    saved = save.whole(kept, run.description, origin)  # of a checkpoint, which has no more
    expected = tiny.params(DECODER) if init == "on_one" else origin.params()
    expected = expected | {"canvas": two_canvases[canvas or "one"]}
    for found in (exported, saved):
        found, wanted = flatten(found), flatten(expected)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_how_a_decoder_samples_with_its_canvas_is_free(folder, two_canvases):
    assert Origin.read(str(folder / "on_one"), {"from_canvas": True}).stage.from_canvas


@pytest.mark.slow
def test_a_run_of_adapters_that_is_given_a_canvas_is_saved_as_it_was_exported(folder, two_canvases):
    flags = {"init": str(folder / "plain"), "canvas": str(folder / "two")}
    lora = {"rank": 2, "convolutions": True}
    made = run(folder, tiny.DECODER, "adapted", lora=lora, train={"preview_every": 0}, **flags)
    out, alone = folder / "adapted_saved", folder / "adapted.safetensors"
    for path in (out, alone):
        told = ["--workdir", str(folder / "adapted"), "--init", flags["init"]]
        save.main([*told, "--out", str(path)])
    saved = load_part(out)
    first, again = map(read_adapters, (folder / "adapted" / "lora.safetensors", alone))
    assert first.about == again.about and first.about["canvas"] == made.description["canvas"]
    assert first.kernels.keys() == again.kernels.keys()
    for name, kernel in first.kernels.items():
        for one, other in zip(kernel, again.kernels[name], strict=True):
            np.testing.assert_array_equal(one, other)
    assert saved.stage == made.stage == DECODER
    assert jax.tree.all(jax.tree.map(np.array_equal, saved.params, made.params))
    assert jax.tree.all(jax.tree.map(np.array_equal, made.params["canvas"], two_canvases["two"]))
    assert np.any(made.params["network"]["unet"]["conv_in"]["kernel"][:, :, 3:])  # it is looked at


UNET = tiny.DECODER.model.unet
PATCHED = dataclasses.replace(UNET, patch=2, pixel_channels=4, attention_sizes=(8,))
DIT = DiTConfig(
    image_size=16, out_channels=6, patch=4, width=16, layers=1, heads=2, context_dim=16
)  # fmt: skip
NARROW = dataclasses.replace(DIT, bottleneck=8, pixel_channels=4)


@pytest.mark.parametrize(
    ("unet", "first"),
    [
        pytest.param(UNET, "conv_in", id="unet"),
        pytest.param(PATCHED, "conv_in", id="patched", marks=pytest.mark.slow),
        pytest.param(DIT, "from_pixels", id="dit"),
        pytest.param(NARROW, "narrow", id="narrow", marks=pytest.mark.slow),
    ],
)
def test_a_decoder_that_is_given_a_canvas_draws_the_same_at_first(unet, first, tmp_path):
    model = dataclasses.replace(tiny.DECODER.model, unet=unet)
    stage = dataclasses.replace(tiny.DECODER, model=model)
    before, about = tiny.params(stage), {"stage": stages.describe(stage)}
    model_folder.save_stage(tmp_path / "plain", params=before, description=about)
    asked = stages.describe(stage.with_canvas(STAGE.model))
    origin = Origin.read(str(tmp_path / "plain"), asked)
    params = origin.params()
    shapes = jax.eval_shape(origin.stage.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    batch = tiny.batch(2, 16)
    x_t, t = jax.random.normal(jax.random.key(0), (2, 16, 16, 3)), jnp.array([3, 900])
    found, expected = (
        tiny.call(s, "denoise", p, x_t, t, tiny.call(s, "encode", p, s.condition_of(batch)))
        for s, p in ((origin.stage, params), (stage, before))
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)  # the sums have other partial sums
    moved = jax.tree.map(lambda x: x + 0.1, params["network"]["unet"][first])
    network = params["network"] | {"unet": params["network"]["unet"] | {first: moved}}
    other = params | {"network": network}
    one, two = (
        tiny.call(
            origin.stage, "denoise", p, x_t, t,
            tiny.call(origin.stage, "encode", p, origin.stage.condition_of(batch | {"z_t": z_t})),
        )
        for p, z_t in ((other, batch["z_t"]), (other, -batch["z_t"]))
    )  # fmt: skip
    assert np.any(np.asarray(one) != two)


def test_no_other_change_of_the_input_is_taken(folder):
    for overrides, message in (
        ({"model": {"unet": {"in_channels": 6}}}, "in_channels"),
        ({"canvas": {"embed_dim": 8}}, "in_channels: got 3, expected 6"),
        ({"model": {"embed_dim": 9}}, "model.embed_dim is 9, but there 8"),
    ):
        with pytest.raises(UserError, match=message):
            Origin.read(str(folder / "plain"), overrides)
