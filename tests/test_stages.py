"""What the stages promise: frozen CLIP in, dropped conditions, guidance, independence."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from unclip_jax import stages
from unclip_jax.diffusion.gaussian import Diffusion
from unclip_jax.errors import UserError
from unclip_jax.stages import normalisation
from unclip_jax.stages.clip import belonging, contrastive_loss
from unclip_jax.stages.conditioning import example_keys, random_timesteps, text_mask
from unclip_jax.stages.degrade import BSR
from unclip_jax.stages.pixels import resize, to_float, to_uint8
from unclip_jax.stages.upsampler import random_crops
from unclip_jax.training import heldout

ALL = [tiny.CLIP, tiny.PRIOR, tiny.CANVAS, tiny.DECODER, tiny.ON_CANVAS, tiny.UPSAMPLER]
NOISED = dataclasses.replace(tiny.UPSAMPLER, noise_max=0.5, noise_level=0.1)


def image_size(stage):
    return stage.image_size or 16


@pytest.mark.parametrize("stage", ALL, ids=lambda s: s.kind)
def test_describe_and_build_are_inverse(stage):
    again = stages.build(stages.describe(stage))
    assert again == stage
    assert hash(again) == hash(stage)


@pytest.mark.parametrize("stage", ALL, ids=lambda s: s.kind)
def test_loss_is_finite_and_every_weight_learns(stage):
    params = tiny.params(stage)
    batch = tiny.batch(6, image_size(stage))

    def loss(network):
        return stage.loss(params | {"network": network}, batch, jax.random.key(0))[0]

    value, grads = jax.jit(jax.value_and_grad(loss))(params["network"])
    assert np.isfinite(value)
    dead = [
        jax.tree_util.keystr(path)
        for path, g in jax.tree_util.tree_leaves_with_path(grads)
        if not np.any(np.asarray(g))
    ]
    assert not dead


@pytest.mark.parametrize("stage", (*ALL, NOISED), ids=lambda s: s.kind)
def test_a_stage_says_what_it_reads_and_makes(stage):
    key, params = jax.random.key(0), jax.eval_shape(stage.init, jax.random.key(0))
    batch = stage.batch_spec(4)
    assert set(batch) == stage.reads
    jax.eval_shape(stage.loss, params, batch, key)
    for name in batch:
        without = {n: x for n, x in batch.items() if n != name}
        with pytest.raises((KeyError, UserError), match=name):
            jax.eval_shape(stage.loss, params, without, key)
    assert set(stage.figures) <= set(heldout.FIGURES) and stage.preview in heldout.PREVIEWS
    if stage.makes is None:
        return

    def sample(params, batch):
        settings = {name: jnp.float32(one.default) for name, one in stage.settings.items()}
        return stage.sample(params, example_keys(key, 4), stage.condition_of(batch), **settings)

    fields = stage.conditions.items()
    given = {name: jax.ShapeDtypeStruct((4, *f.shape), f.dtype) for name, f in fields}
    size = stage.image_size
    expected = (4, size, size, 3) if stage.makes[0] == "images" else (4, stage.model.embed_dim)
    assert jax.eval_shape(sample, params, given).shape == expected
    assert all(hasattr(stage, f"{name}_drop") for name in stage.drops)


ON_CANVAS = pytest.param(tiny.ON_CANVAS, id="on_canvas", marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "stage", [s if s is not tiny.ON_CANVAS else ON_CANVAS for s in ALL], ids=lambda s: s.kind
)
def test_loss_depends_on_key_only_where_there_is_noise(stage):
    params, batch = tiny.params(stage), tiny.batch(4, image_size(stage))
    loss = jax.jit(lambda key: stage.loss(params, batch, key)[0])
    first, again, other = (loss(jax.random.key(i)) for i in (0, 0, 1))
    assert first == again
    assert (first == other) == (stage.kind == "clip")


def test_contrastive_loss_of_identical_embeddings_is_log_of_the_batch():
    z = jnp.ones((8, 4)) / 2.0
    loss, accuracy = contrastive_loss(z, z, jnp.float32(10.0))
    np.testing.assert_allclose(loss, np.log(8), rtol=1e-6)
    assert accuracy == 1 / 8


def test_contrastive_loss_against_a_loop():
    rng = np.random.default_rng(0)
    z_i, z_t = rng.normal(size=(2, 5, 3))
    logits = 3.0 * z_i @ z_t.T
    total = 0.0
    for i in range(5):
        for row in (logits[i], logits[:, i]):
            total -= np.log(np.exp(row[i]) / np.exp(row).sum())
    loss, _ = contrastive_loss(jnp.asarray(z_i), jnp.asarray(z_t), jnp.float32(3.0))
    np.testing.assert_allclose(loss, total / 10, rtol=1e-5)


def test_equal_captions_and_pictures_are_positives():
    """A CLIP that knows 4 things, asked 40 times: nothing is wrong, so nothing is to be learned."""
    z = jnp.eye(4)[jnp.arange(40) % 4]
    value_and_grad = jax.value_and_grad(lambda *z: contrastive_loss(*z, 100.0), (0, 1), True)
    (loss, accuracy), grads = value_and_grad(z, z)
    assert accuracy == 1.0 and abs(loss) < 1e-4
    assert max(float(jnp.abs(g).max()) for g in grads) < 1e-4


def test_contrastive_loss_of_repeats_against_a_loop():
    """Soft targets less their entropy, over what any row says belongs together."""
    rng = np.random.default_rng(1)
    pictures, captions = np.array([0, 0, 1, 2, 3, 3]), np.array([0, 1, 1, 2, 3, 3])
    z_i, z_t = rng.normal(size=(4, 3))[pictures], rng.normal(size=(4, 3))[captions]
    known = set(zip(pictures, captions, strict=True))  # (1, 0) is not: no row says so
    belongs = np.array([[(u, v) in known for v in captions] for u in pictures])
    assert belongs.sum() == 2 * 3 + 2 + 1 + 4
    np.testing.assert_array_equal(
        belonging(*(jnp.uint32(x)[:, None] for x in (pictures, captions))), belongs
    )
    logits, total, right = 3.0 * z_i @ z_t.T, 0.0, 0
    for these, own in ((logits, belongs), (logits.T, belongs.T)):
        for row, mine in zip(these, own, strict=True):
            chances = np.exp(row) / np.exp(row).sum()
            target = mine / mine.sum()
            total += np.sum(target[mine] * np.log(target[mine] / chances[mine]))
            right += mine[row.argmax()]
    for given in ((), (jnp.uint32(pictures), jnp.uint32(captions))):
        loss, accuracy = contrastive_loss(jnp.asarray(z_i), jnp.asarray(z_t), 3.0, *given)
        np.testing.assert_allclose(loss, total / 12, rtol=1e-5)
        np.testing.assert_allclose(accuracy, right / 12, rtol=1e-6)


def test_without_repeats_the_contrastive_loss_is_the_paper_s_bit_for_bit():
    rng = np.random.default_rng(2)
    z_i, z_t = jnp.asarray(normalisation.unit(rng.normal(size=(2, 64, 16)).astype(np.float32)))

    def paper(z_i, z_t, scale):
        similar = jnp.einsum("ie,je->ij", z_i, z_t)
        own = scale * jnp.einsum("ie,ie->i", z_i, z_t)
        losses = [jax.nn.logsumexp(scale * similar, axis=axis) - own for axis in (1, 0)]
        return 0.5 * jnp.mean(losses[0] + losses[1])

    for scale in (1.0, 14.3, 100.0):
        assert contrastive_loss(z_i, z_t, scale)[0] == paper(z_i, z_t, scale)


def test_pictures_of_one_number_are_the_same_picture():
    """However training has scaled and shifted them."""
    params, batch = tiny.params(tiny.CLIP), tiny.batch(6, 16)
    loss = lambda **more: tiny.call(tiny.CLIP, "loss", params, batch | more, jax.random.key(0))[1]  # noqa: E731
    alone, pairs = loss(), loss(picture=jnp.arange(6) // 2)
    assert alone["guess_loss"] == pytest.approx(np.log(6))
    assert pairs["guess_loss"] == pytest.approx(np.log(3))


def test_clip_embeddings_are_unit_and_take_any_image_size():
    params = tiny.params(tiny.CLIP)
    for size in (16, 23):
        z_i = tiny.call(tiny.CLIP, "encode_image", params, to_float(tiny.batch(2, size)["image"]))
        np.testing.assert_allclose(jnp.linalg.norm(z_i, axis=1), 1.0, rtol=1e-5)
    raw = dataclasses.replace(tiny.CLIP, unit_embeddings=False)
    z_raw = tiny.call(raw, "encode_image", params, to_float(tiny.batch(2, 23)["image"]))
    np.testing.assert_allclose(normalisation.unit(z_raw), z_i, atol=1e-6)


@pytest.mark.parametrize("shift", [0.4, 1.0, 3.0])
def test_timesteps_are_drawn_as_often_as_the_diffusion_says(shift):
    diffusion = Diffusion(steps=20, timestep_shift=shift)
    drawn = random_timesteps(jax.random.key(0), 400_000, diffusion)
    assert drawn.dtype == jnp.int32 and drawn.shape == (400_000,)
    often = np.bincount(drawn, minlength=20) / 400_000
    np.testing.assert_allclose(often, diffusion.timestep_probabilities(), atol=3e-3)
    assert diffusion.timestep_probabilities().sum() == pytest.approx(1.0)


def test_a_shift_lowers_the_log_snr_of_what_is_trained_on():
    """Of the cosine schedule, by its own formula -2 log tan(pi t / 2), at the quartiles of t."""
    drawn = random_timesteps(jax.random.key(0), 100_000, Diffusion(timestep_shift=3.0))
    found = np.quantile(Diffusion().process().log_snr[drawn], [0.75, 0.5, 0.25])
    unmoved = -2 * np.log(np.tan(np.pi * np.asarray([0.25, 0.5, 0.75]) / 2))
    fall = (unmoved - found) / math.log(3)
    assert (fall > 1.5).all() and (fall < 2.0).all()


def test_whitening_is_exact_and_invertible():
    z = jnp.asarray(np.random.default_rng(0).normal(2.0, 3.0, (500, 4)), jnp.float32)
    stats = normalisation.whitening([z[:7], z[7:]])
    white = normalisation.normalise(stats, z)
    np.testing.assert_allclose(white.mean(0), 0.0, atol=1e-5)
    np.testing.assert_allclose(white.std(0), 1.0, rtol=1e-5)
    np.testing.assert_allclose(normalisation.denormalise(stats, white), z, rtol=1e-5, atol=1e-5)


def test_whitening_refuses_a_collapsed_clip():
    with pytest.raises(UserError, match="collapsed"):
        normalisation.whitening([jnp.ones((10, 4))])


def test_the_paper_scale_multiplies_unit_embeddings_by_17_2():
    z = normalisation.unit(jax.random.normal(jax.random.key(0), (200, 1024)))
    scaled = normalisation.normalise(normalisation.scaling(1024), z)
    assert abs(float(scaled.std()) - 0.54) < 0.01  # 17.2 / sqrt(1024)


def test_prior_keeps_the_draw_nearest_to_the_caption():
    params, batch = tiny.params(tiny.PRIOR), tiny.batch(3, 16)
    cond = tiny.PRIOR.condition(batch["tokens"], normalisation.unit(batch["z_t"]))
    keys = example_keys(jax.random.key(5), 3)
    halves = jax.vmap(jax.random.split)(keys)
    draws = [tiny.call(tiny.PRIOR, "draw", params, halves[:, j], cond) for j in range(2)]
    dots = [jnp.sum(draw * cond["z_t"], axis=1) for draw in draws]
    best = tiny.call(tiny.PRIOR, "sample", params, keys, cond)
    np.testing.assert_allclose(jnp.sum(best * cond["z_t"], axis=1), jnp.maximum(*dots), atol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(best, axis=1), 1.0, rtol=1e-5)


def test_the_text_mask_runs_through_the_first_end_token():
    tokens = jnp.asarray([[7, 1, 9, 0, 0], [7, 9, 0, 9, 9], [7, 1, 2, 3, 9], [7, 1, 2, 3, 4]])
    mask = np.asarray(text_mask(tokens, 10))
    assert mask.dtype == bool
    assert mask.sum(-1).tolist() == [3, 2, 5, 5]
    assert (np.sort(mask, axis=-1)[:, ::-1] == mask).all()  # a prefix


def test_prior_ignores_a_dropped_caption():
    params, batch = tiny.params(tiny.PRIOR), tiny.batch(2, 16)
    other = tiny.batch(2, 16, seed=9)
    x_t, t = batch["z_i"], jnp.asarray([3, 700])
    conds = [tiny.PRIOR.condition(b["tokens"], b["z_t"]) for b in (batch, other)]
    nulls = [tiny.PRIOR.null({}, cond) for cond in conds]

    def predicted(cond):
        encoded = tiny.call(tiny.PRIOR, "encode", params, cond)
        return tiny.call(tiny.PRIOR, "denoise", params, x_t, t, encoded)

    kept, dropped = ([predicted(cond) for cond in some] for some in (conds, nulls))
    assert not np.allclose(kept[0], kept[1], atol=1e-4)
    np.testing.assert_allclose(dropped[0], dropped[1], atol=1e-6)


def test_decoder_null_depends_on_neither_embedding_nor_caption():
    params, x_t = tiny.params(tiny.DECODER), jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    outputs = []
    for seed in (0, 9):
        batch = tiny.batch(2, 16, seed=seed)
        null = tiny.DECODER.null({}, tiny.DECODER.condition(batch["tokens"], batch["z_i"]))
        encoded = tiny.call(tiny.DECODER, "encode", params, null)
        outputs.append(
            tiny.call(tiny.DECODER, "denoise", params, x_t, jnp.asarray([5, 900]), encoded)
        )
    np.testing.assert_allclose(*outputs, atol=1e-6)


def test_guidance_of_one_is_the_conditional_model():
    params, batch = tiny.params(tiny.DECODER), tiny.batch(2, 16)
    cond = tiny.DECODER.condition(batch["tokens"], batch["z_i"])
    keys = example_keys(jax.random.key(0), 2)
    guided = tiny.call(tiny.DECODER, "sample", params, keys, cond, guidance_scale=1.0)
    alone = tiny.call(tiny.DECODER, "sample", params, keys, cond, guidance_scale=1.0, null=cond)
    stronger = tiny.call(tiny.DECODER, "sample", params, keys, cond, guidance_scale=4.0)
    np.testing.assert_array_equal(guided, alone)
    assert not np.allclose(guided, stronger, atol=1e-3)


@pytest.mark.parametrize("stage", [tiny.DECODER, tiny.UPSAMPLER], ids=lambda s: s.kind)
def test_a_sample_does_not_depend_on_its_batch_mates(stage):
    params, batch = tiny.params(stage), tiny.batch(3, 16)
    if stage is tiny.DECODER:
        cond = stage.condition(batch["tokens"], batch["z_i"])
    else:
        cond = to_float(batch["image"])
    keys = example_keys(jax.random.key(1), 3)
    together = tiny.call(stage, "sample", params, keys, cond)
    alone = tiny.call(stage, "sample", params, keys[2:], jax.tree.map(lambda x: x[2:], cond))
    np.testing.assert_allclose(together[2:], alone, atol=2e-5)


def test_upsampler_conditions_on_the_low_resolution_picture():
    params, batch = tiny.params(tiny.UPSAMPLER), tiny.batch(2, 16)
    keys = example_keys(jax.random.key(1), 2)
    low = to_float(batch["image"])
    out = tiny.call(tiny.UPSAMPLER, "sample", params, keys, low)
    assert out.shape == (2, 32, 32, 3)
    assert not np.allclose(out, tiny.call(tiny.UPSAMPLER, "sample", params, keys, -low), atol=1e-3)
    with pytest.raises(UserError, match=r"low.s shape: got \(2, 8, 8, 3\), expected \[any, 16"):
        tiny.call(tiny.UPSAMPLER, "sample", params, keys, jnp.zeros((2, 8, 8, 3)))


def test_crops_of_a_pair_stay_aligned():
    rows, columns = jnp.meshgrid(jnp.arange(12.0), jnp.arange(12.0), indexing="ij")
    image = jnp.stack([rows, columns], axis=-1)
    crops = np.asarray(random_crops(jax.random.key(0), jnp.stack([image] * 50), 5))
    assert crops.shape == (50, 5, 5, 2)
    for crop in crops:
        row, column = crop[0, 0]
        np.testing.assert_array_equal(crop[..., 0] - row, np.arange(5)[:, None] * np.ones((1, 5)))
        np.testing.assert_array_equal(crop[..., 1] - column, np.arange(5) * np.ones((5, 1)))
    corners = crops[:, 0, 0]
    assert corners.min() == 0 and corners.max() == 7  # every position can be drawn, edges too


def test_pixels_survive_the_round_trip():
    levels = jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16, 1)
    np.testing.assert_array_equal(to_uint8(to_float(levels)), levels)
    assert to_float(levels).min() == -1.0 and to_float(levels).max() == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: dataclasses.replace(tiny.DECODER, diffusion=Diffusion()), "expected 3"),
        (lambda: dataclasses.replace(tiny.UPSAMPLER, low_size=5), "divisor"),
        (lambda: dataclasses.replace(tiny.UPSAMPLER, crop=0.3), "whole"),
        (lambda: dataclasses.replace(tiny.PRIOR, draws=0), "draws: got 0, expected an integer, 1"),
        (lambda: stages.build({"kind": "priro"}), "expected one of ar_prior, canvas, class"),
        (lambda: stages.build({"kind": "clip", "model": {"ptach": 3}}), "did you mean patch"),
    ],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(UserError, match=message):
        change()


LOW = jnp.zeros((1, 16, 16, 3))


@pytest.mark.parametrize("size", [32, 5])
def test_resize_is_torchs_antialiased_bicubic(size):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    reference = torch.nn.functional.interpolate(
        torch.from_numpy(x).permute(0, 3, 1, 2), size=size, mode="bicubic", antialias=True
    )
    np.testing.assert_allclose(resize(x, size), reference.permute(0, 2, 3, 1), atol=2e-6)


@pytest.mark.parametrize("corruption", ["none", "gaussian", "bsr"])
def test_training_pairs_are_a_picture_and_its_small_self(corruption):
    """The low-resolution image shows what is beside it, whatever corrupted it."""
    stage = dataclasses.replace(
        tiny.UPSAMPLER, corruption=corruption, blur_probability=1.0, bsr=BSR(noise_level=(0, 0))
    )
    images = jnp.repeat(jnp.repeat(to_float(tiny.batch(6, 4)["image"]), 8, 1), 8, 2)
    x_0, low, level = tiny.call(stage, "pairs", jax.random.key(0), jax.random.key(1), images)
    assert x_0.shape == low.shape == (6, 16, 16, 3) and level is None
    assert 0 < np.mean((low - x_0) ** 2) < 0.5 * np.mean((jnp.roll(low, 1, axis=0) - x_0) ** 2)
    again, other, _ = tiny.call(stage, "pairs", jax.random.key(2), jax.random.key(1), images)
    np.testing.assert_array_equal(again, x_0)
    assert (corruption != "none") == bool(np.any(other != low))


def test_without_augmentation_no_param_knows_of_it():
    plain = jax.eval_shape(tiny.UPSAMPLER.init, jax.random.key(0))
    noised = jax.eval_shape(NOISED.init, jax.random.key(0))
    assert set(noised["network"]) - set(plain["network"]) == {"level"}
    noised["network"].pop("level")
    assert jax.tree.map(jnp.shape, noised) == jax.tree.map(jnp.shape, plain)


def test_augmentation_noises_by_the_level_it_tells():
    """(low - sqrt(alpha_bar) clean) / sqrt(1 - alpha_bar) is standard normal at every level."""
    stage = dataclasses.replace(NOISED, corruption="none", low_size=32)
    images = to_float(tiny.batch(60, 32)["image"])
    key = jax.random.key(0)
    x_0, low, level = tiny.call(stage, "pairs", key, jax.random.key(1), images)
    assert 0 <= level.min() < 50 and 450 < level.max() <= 500  # of 1000 steps
    process = stage.diffusion.process()
    i = np.asarray(level)[:, None, None, None]
    noise = (low - process.sqrt_alpha_bar[i] * x_0) / process.sqrt_one_minus_alpha_bar[i]
    np.testing.assert_allclose(noise.mean((1, 2, 3)), 0.0, atol=0.25)
    np.testing.assert_allclose(noise.std((1, 2, 3)), 1.0, atol=0.15)


def test_an_augmented_upsampler_trains_and_hears_its_level():
    params, batch = tiny.params(NOISED), tiny.batch(4, 32)

    def loss(network):
        return NOISED.loss({"network": network}, batch, jax.random.key(0))[0]

    grads = jax.jit(jax.grad(loss))(params["network"])["level"]
    assert all(np.any(np.asarray(g)) for g in jax.tree.leaves(grads))

    keys, low = example_keys(jax.random.key(1), 2), to_float(tiny.batch(2, 16)["image"])

    def sample(keys, low, level):
        return tiny.call(NOISED, "sample", params, keys, low, noise_level=jnp.float32(level))

    little, much = sample(keys, low, 0.1), sample(keys, low, 0.5)
    assert not np.allclose(little, much, atol=1e-2)
    np.testing.assert_array_equal(tiny.call(NOISED, "sample", params, keys, low), little)
    swapped = sample(keys[::-1], low[::-1], 0.1)[::-1]
    np.testing.assert_allclose(swapped, little, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: dataclasses.replace(tiny.UPSAMPLER, corruption="blur"), "none, gaussian, bsr"),
        (
            lambda: dataclasses.replace(tiny.UPSAMPLER, corruption="bsr", crop=1 / 32),
            "expected a multiple of 2",
        ),
        (lambda: dataclasses.replace(tiny.UPSAMPLER, noise_level=0.1), "noise_max = 0.0"),
        (lambda: dataclasses.replace(NOISED, noise_max=2.0), "stage.noise_max: got 2.0"),
        (
            lambda: NOISED.sample({}, example_keys(jax.random.key(0), 1), LOW, noise_level=0.9),
            "noise_level: got 0.9, expected 0 to stage.noise_max = 0.5",
        ),
        (
            lambda: tiny.UPSAMPLER.sample(
                {}, example_keys(jax.random.key(0), 1), LOW, noise_level=jnp.float32(0.1)
            ),
            "trained without",
        ),
    ],
)
def test_wrong_corruptions_are_named(change, message):
    with pytest.raises(UserError, match=message):
        change()
