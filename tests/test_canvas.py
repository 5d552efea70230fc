"""The canvas: what it computes, how it trains, and what a decoder makes of it."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy.special import erf

from tests import tiny
from tests.canvas_runs import config_of, fill, run
from unclip_jax import stages
from unclip_jax.common.params import flatten
from unclip_jax.diffusion import guidance
from unclip_jax.errors import UserError
from unclip_jax.models.canvas import CanvasConfig
from unclip_jax.pipeline import manipulate
from unclip_jax.pipeline.unclip import UnCLIP
from unclip_jax.stages.conditioning import example_keys
from unclip_jax.training import prepare, save
from unclip_jax.training.doctor import workdir
from unclip_jax.training.doctor.command import examine
from unclip_jax.weights import folder as model_folder
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
    folder = tmp_path_factory.mktemp("canvas")
    fill(folder)
    return folder


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
