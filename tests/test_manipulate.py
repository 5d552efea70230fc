"""Latents that give their pictures back, ways between them, and what must never compile twice."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from unclip_jax.diffusion import gaussian as dm
from unclip_jax.diffusion import samplers
from unclip_jax.errors import UserError
from unclip_jax.metrics import pca
from unclip_jax.pipeline import manipulate
from unclip_jax.pipeline.manipulate import Latents, Walk, slerp
from unclip_jax.pipeline.manipulate.latents import decode, knowing, noise
from unclip_jax.stages import DecoderStage
from unclip_jax.stages.pixels import to_float, to_uint8

STEPS = 4  # a stride of 250 timesteps
TWO = 2  # pictures computed together, wherever possible, so that few programs are compiled
KEY = jax.random.key(7)
compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: "backend_compile" in event and compiled.append(event)
)


def pictures(number=2, side=16, seed=0):
    """Smooth random pictures, uint8 [number, side, side, 3]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side * 2 * np.pi
    wave = sum(np.sin(a * x + b * y + c) for a, b, c in rng.uniform(-2, 2, (4, 3)))
    colours = rng.uniform(-1, 1, (number, 1, 1, 3))
    return np.uint8(127.5 + 31 * wave[None, :, :, None] * colours)


@pytest.fixture(scope="module")
def model():
    return tiny.model()


def walk_of(**fields) -> Walk:
    """A guided walk of few steps."""
    return Walk(**{"steps": STEPS, "guidance_scale": 2.0, "batch_size": TWO} | fields)


# ------------------------------------------------------------------------------------- slerp


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def angle(a, b):
    """Between the rows of a and b, in float64 and without arccos, which is blunt near 0."""
    a, b = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (a, b))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    return 2 * np.arctan2(np.linalg.norm(a - b, axis=1), np.linalg.norm(a + b, axis=1))


@pytest.mark.parametrize("shape", [(3, 8), (2, 4, 4, 3), (1, 2)])
def test_slerp_ends_exactly_at_its_ends(shape):
    a, b = random(shape), 5 * random(shape, 1)
    np.testing.assert_array_equal(slerp(a, b, 0.0), a)
    np.testing.assert_array_equal(slerp(a, b, 1.0), b)


def test_slerp_turns_at_constant_speed_in_the_plane_of_its_ends():
    a, b = random((1, 8)), 3 * random((1, 8), 1)
    thetas = np.linspace(0, 1, 9, dtype=np.float32)
    way = np.asarray(slerp(np.repeat(a, 9, 0), np.repeat(b, 9, 0), thetas))
    whole = angle(a, b)[0]
    np.testing.assert_allclose(angle(way[:-1], way[1:]), whole / 8, atol=1e-6)
    np.testing.assert_allclose(angle(np.repeat(a, 9, 0), way), whole * thetas, atol=1e-6)
    lengths = np.linalg.norm(way, axis=1)
    np.testing.assert_allclose(np.diff(lengths), (lengths[-1] - lengths[0]) / 8, rtol=1e-4)
    assert np.linalg.matrix_rank(np.concatenate([a, b, way]), tol=1e-5) == 2


def test_slerp_of_orthogonal_unit_vectors_is_the_quarter_circle():
    found = slerp(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]]), 1 / 3)
    np.testing.assert_allclose(found, [[np.cos(np.pi / 6), np.sin(np.pi / 6)]], atol=1e-7)


def test_slerp_of_parallel_vectors_changes_the_length_alone():
    a = random((2, 8))
    np.testing.assert_allclose(slerp(a, 3 * a, 0.25), 1.5 * a, rtol=1e-5)
    np.testing.assert_allclose(slerp(a, a, 0.7), a, atol=1e-6)


def test_slerp_of_opposite_vectors_is_half_a_circle_at_constant_speed():
    a = random((1, 8))
    thetas = np.linspace(0, 1, 7, dtype=np.float32)
    way = np.asarray(slerp(np.repeat(a, 7, 0), np.repeat(-a, 7, 0), thetas))
    np.testing.assert_allclose(angle(way[:-1], way[1:]), np.pi / 6, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(way, axis=1), np.linalg.norm(a), rtol=1e-5)


def test_slerp_with_a_zero_vector_keeps_the_others_direction():
    a = random((1, 8))
    np.testing.assert_allclose(slerp(np.zeros_like(a), a, 0.5), a / 2, rtol=1e-6)
    np.testing.assert_allclose(slerp(a, np.zeros_like(a), 0.25), 0.75 * a, rtol=1e-6)
    assert not np.asarray(slerp(0 * a, 0 * a, 0.5)).any()


def test_slerp_refuses_shapes_that_do_not_fit():
    with pytest.raises(UserError, match="two equal shapes"):
        slerp(random((2, 8)), random((2, 7)), 0.5)
    with pytest.raises(UserError, match="one theta"):
        slerp(random((2, 8)), random((2, 8)), np.zeros(3))


# ---------------------------------------------------------------------------------- latents


class Gaussian(DecoderStage):
    """A decoder with the perfect network for pictures whose pixels are all N(0, SPREAD^2)."""

    def encode(self, params, cond):
        return {}

    def denoise(self, params, x_t, t, encoded, dropout_key=None):
        process = self.diffusion.process()
        alpha = dm.at(process.sqrt_alpha_bar, t, x_t)
        sigma = dm.at(process.sqrt_one_minus_alpha_bar, t, x_t)
        x_0 = alpha * SPREAD**2 * x_t / (alpha**2 * SPREAD**2 + sigma**2)
        return dm.target(self.diffusion, process, x_0, t, dm.eps_from_x_0(process, x_t, t, x_0))


SPREAD = 0.5


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
def test_x_t_is_that_of_the_true_flow_and_leads_back_the_more_steps_the_closer(model, prediction):
    diffusion = dm.Diffusion(prediction=prediction)
    config = tiny.DECODER.model
    unet = dataclasses.replace(config.unet, out_channels=3)  # no learned variance
    stage = Gaussian(model=dataclasses.replace(config, unet=unet), diffusion=diffusion)
    gaussian = dataclasses.replace(model, decoder=model.decoder._replace(stage=stage))
    images = pictures()
    # The flow's quantiles stay where they are: x_T is x_0 times the ratio of the spreads.
    errors, ratios = [], []
    for steps in (25, 250):
        walk = Walk(steps)
        x_T = manipulate.encode(gaussian, images, walk).x_T
        process = diffusion.process(walk.sampling(gaussian).spacing)
        spread = np.sqrt(process.alpha_bar[-1] * SPREAD**2 + 1 - process.alpha_bar[-1])
        expected = np.asarray(to_float(images)) * (spread / SPREAD)
        errors.append(np.abs(x_T - expected).max() / np.abs(expected).max())
        ratios.append(manipulate.reconstruct(gaussian, KEY, images, walk, upsample=False)[1].min())
    assert errors[1] < errors[0] / 4 and errors[1] < 0.02
    assert ratios[1] > ratios[0] + 10 and ratios[1] > 35


def test_without_eta_the_same_latent_is_the_same_picture_bit_for_bit(model):
    walk = walk_of()
    latents = manipulate.encode(model, pictures(), walk)
    once = manipulate.pictures(model, KEY, latents, walk, upsample=False)
    again = manipulate.pictures(model, jax.random.key(99), latents, walk, upsample=False)
    np.testing.assert_array_equal(once, again)
    full = [manipulate.pictures(model, KEY, latents, walk) for _ in range(2)]
    np.testing.assert_array_equal(*full)
    assert full[0].shape == (2, 32, 32, 3)


def test_variations_differ_more_with_more_eta_and_not_without(model):
    latents = manipulate.encode(model, pictures(), walk_of())

    def spread(eta):
        made = manipulate.pictures(model, KEY, latents, walk_of(eta=eta), num=3, upsample=False)
        return float(np.std(made[:3].astype(np.float64), axis=0).mean())

    assert spread(0.0) == 0.0
    assert spread(1.0) > spread(0.3) > 0.0


def test_a_picture_does_not_depend_on_its_batch(model):
    images, walk = pictures(3), walk_of(eta=1.0)
    together = manipulate.encode(model, images, walk)
    backwards = manipulate.encode(model, images[::-1], walk)
    np.testing.assert_allclose(backwards.x_T[::-1], together.x_T, rtol=1e-3, atol=1e-3)
    made = manipulate.pictures(model, KEY, together, walk, num=3)
    assert made.shape == (9, 32, 32, 3)
    alone = Latents(*(part[[2, 0]] for part in together))
    expected = manipulate.pictures(model, KEY, alone, walk, num=3)
    assert np.abs(made[[6, 7, 8, 0, 1, 2]].astype(int) - expected).max() <= 1


def test_random_latents_are_what_the_pipeline_draws(model):
    z_i = jnp.asarray(random((2, tiny.DIM)))
    keys = jax.random.split(KEY, 2)
    start = Latents(z_i, manipulate.noise(model, keys))
    mine = manipulate.decode(model, keys, start, walk_of(caption="a dog"))
    sampling = samplers.Sampling("ddim", "ddim4", clip_x_0=1.0)
    stage = dataclasses.replace(model.decoder.stage, sampling=sampling)
    pipeline = dataclasses.replace(model, decoder=model.decoder._replace(stage=stage))
    theirs = pipeline.decode(keys, z_i, ["a dog"] * 2, guidance_scale=2.0)
    np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_pictures_of_any_sizes_and_modes_are_encoded(model):
    images = [
        np.full((1, 1, 3), 200, np.uint8),
        np.zeros((40, 9), np.uint8),
        np.full((7, 300, 4), 90, np.uint8),
        pictures(1, 16)[0],
    ]
    latents = manipulate.encode(model, images, walk_of())
    assert latents.z_i.shape == (4, tiny.DIM) and latents.x_T.shape == (4, 16, 16, 3)
    assert np.isfinite(latents.x_T).all()


# ------------------------------------------------------------------------------------- edits


def test_interpolation_begins_and_ends_with_the_latents_themselves(model):
    ends = manipulate.encode(model, pictures(), walk_of())
    way = manipulate.interpolate(ends, 5)
    for part, end in zip(way, ends, strict=True):
        np.testing.assert_array_equal(part[[0, -1]], end)
    kept = manipulate.interpolate(ends, 5, x_T=ends.x_T[1])
    np.testing.assert_array_equal(kept.z_i, way.z_i)
    assert (kept.x_T == ends.x_T[1]).all()


def test_a_text_diff_of_nothing_is_the_reconstruction(model):
    walk = Walk(STEPS, batch_size=TWO)
    images = pictures()
    latents = manipulate.encode(model, images, walk)
    turned = manipulate.text_diff(model, latents, "a dog", "a cat", [0.0, 0.5])
    made = manipulate.pictures(model, KEY, turned, walk)
    np.testing.assert_array_equal(made[::2], manipulate.reconstruct(model, KEY, images, walk)[0])
    assert np.abs(made[::2].astype(int) - made[1::2]).mean() > 0


def test_a_text_diff_turns_z_i_towards_the_difference_of_the_captions(model):
    z_i = 3 * random((2, tiny.DIM))  # not of length one, as Karlo's
    latents = Latents(z_i, random((2, 16, 16, 3)))
    z_t0, z_t = np.asarray(model.embed_text(["a dog", "a cat"]))
    direction = np.repeat((z_t - z_t0)[None], 2, axis=0)
    turned = manipulate.text_diff(model, latents, "a dog", "a cat", [0.25, 1.0])
    whole = angle(z_i, direction)
    np.testing.assert_allclose(angle(z_i, turned.z_i[::2]), whole / 4, atol=1e-5)
    np.testing.assert_allclose(angle(turned.z_i[1::2], direction), 0, atol=1e-5)
    lengths = np.linalg.norm(turned.z_i, axis=1)
    np.testing.assert_allclose(lengths, np.repeat(np.linalg.norm(z_i, axis=1), 2), rtol=1e-5)
    np.testing.assert_array_equal(turned.x_T, np.repeat(latents.x_T, 2, axis=0))


@pytest.mark.parametrize(
    ("prediction", "variance", "method"),
    [
        ("eps", "learned_range", "ddpm"),
        ("eps", "fixed_small", "ddim"),
        ("x_0", "fixed_small", "ddim"),
        ("v", "fixed_small", "dpm++"),
    ],
)
def test_what_is_known_comes_out_of_any_sampler_unchanged(prediction, variance, method):
    diffusion = dm.Diffusion(prediction=prediction, variance=variance)
    picture = jnp.asarray(random((2, 4, 4, 3))).clip(-1, 1)
    hole = jnp.asarray(np.arange(4) < 2)[None, :, None, None]
    fraction = [jnp.zeros((2, 4, 4, 3))] * diffusion.learned_variance

    def network(x_t, t):
        return jnp.concatenate([0.1 * x_t, *fraction], axis=-1)

    denoise = knowing(network, picture, hole, diffusion)
    keys = jax.random.split(KEY, 4)
    x_0 = samplers.sample(
        denoise,
        samplers.normal(keys[:2], (4, 4, 3)),
        keys[2:],
        diffusion,
        samplers.Sampling(method, "10", clip_x_0=1.0),
    )
    np.testing.assert_allclose(x_0[:, 2:], picture[:, 2:], atol=1e-4)
    assert np.abs(x_0[:, :2] - picture[:, :2]).mean() > 0.1


def test_inpainting_changes_the_hole_alone(model):
    image = pictures(1, 40)[0]
    hole = np.zeros((20, 20), bool)
    hole[5:15, :10] = True
    for caption in ("a dog", ""):
        walk = walk_of(eta=1.0, caption=caption)
        made = manipulate.inpaint(model, KEY, image, hole, walk, num=2)
        given = manipulate.latents.squared([image], 32)[0]
        kept = np.ones((32, 32), bool)
        kept[8:24, :16] = False
        np.testing.assert_allclose(made[:, kept], np.repeat(given[None, kept], 2, axis=0), atol=9)
        far = kept.copy()  # where resizing the picture mixes nothing of the hole in
        far[6:26, :18] = False
        np.testing.assert_array_equal(made[:, far], np.repeat(given[None, far], 2, axis=0))
        assert np.abs(made[:, ~kept].astype(int) - given[None, ~kept]).mean() > 5
        assert np.abs(made[0].astype(int) - made[1]).mean() > 1


def test_without_a_caption_what_the_hole_hides_has_no_part_in_filling_it(model):
    image = pictures(1, 16)[0]
    hole = np.zeros((16, 16), bool)
    hole[4:12, 4:12] = True
    other = np.where(hole[..., None], 255 - image, image)
    made = [
        manipulate.inpaint(model, KEY, x, hole, walk_of(eta=1.0), num=2, upsample=False)
        for x in (image, other)
    ]
    np.testing.assert_array_equal(*made)


def test_upscaling_enters_where_the_picture_fills_the_input(model):
    wide = dataclasses.replace(
        tiny.UPSAMPLER, low_size=32, model=dataclasses.replace(tiny.UPSAMPLER.model, image_size=64)
    )
    second = model.upsamplers[0]._replace(stage=wide)
    model = dataclasses.replace(model, upsamplers=(*model.upsamplers, second))
    for side, entered in ((1, 16), (31, 16), (33, 32)):
        low, made = manipulate.upscale(model, KEY, pictures(1, side)[0], num=2, batch_size=TWO)
        assert low.shape == (entered, entered, 3) and made.shape == (2, 64, 64, 3)
    exact = pictures(1, 16)[0]
    low, _ = manipulate.upscale(model, KEY, exact, num=2)
    np.testing.assert_array_equal(low, exact)


# ------------------------------------------------------------------------------------ probes


def test_all_principal_components_give_the_embedding_back_and_few_keep_its_length():
    z = random((50, tiny.DIM)) * np.linspace(3, 0.1, tiny.DIM, dtype=np.float32)[None] + 1
    components = pca.fit(pca.Moments.of(z))
    left = manipulate.pca_embeddings(components, z[:3], [2, 5, tiny.DIM]).reshape(3, 3, -1)
    np.testing.assert_allclose(left[:, 2], z[:3], rtol=1e-5, atol=1e-5)
    lengths = np.linalg.norm(z[:3], axis=1)
    np.testing.assert_allclose(np.linalg.norm(left, axis=2), np.tile(lengths, (3, 1)).T, rtol=1e-5)
    assert (angle(left[:, 0], z[:3]) > angle(left[:, 2], z[:3])).all()


def test_the_prior_ablation_gives_the_decoder_three_different_embeddings(model):
    walk = walk_of()
    rows = manipulate.ablate_prior(model, KEY, ["a dog", "a cat"], walk, upsample=False)
    assert rows.shape == (3, 2, 16, 16, 3)
    keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(2))
    x_T = manipulate.noise(model, keys)
    with_z_t = Latents(model.embed_text(["a dog", "a cat"]), x_T)
    expected = manipulate.decode(model, keys, with_z_t, walk, captions=["a dog", "a cat"])
    np.testing.assert_array_equal(rows[1], to_uint8(expected))
    assert all(np.abs(rows[i].astype(int) - rows[j]).max() > 0 for i, j in ((0, 1), (1, 2), (0, 2)))


def test_zero_shot_probabilities_follow_the_cosines(model):
    labels = ["a dog", "a cat", "a red apple"]
    z_t = np.asarray(model.embed_text(labels))
    found = manipulate.zero_shot(model, 5 * z_t, labels)  # pictures that are their captions
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)
    assert (found.argmax(axis=1) == np.arange(3)).all()
    scale = np.exp(np.asarray(model.clip.params["network"]["log_scale"]))
    unit = z_t / np.linalg.norm(z_t, axis=1, keepdims=True)
    np.testing.assert_allclose(
        np.log(found[0, 0] / found[0, 1]), scale * (1 - unit[0] @ unit[1]), rtol=1e-3
    )


@pytest.mark.parametrize("word", ["iPod", "i", "a very long word indeed", "яблоко", "🍎"])
def test_a_word_is_written_on_the_lower_part_of_a_picture(word):
    image = np.full((100, 150, 3), (40, 90, 200), np.uint8)
    written = manipulate.overlay(image, word)
    assert written.shape == (100, 100, 3)
    assert (written[:50] == image[:50, :100]).all()
    assert (written[50:] == 255).all(axis=-1).any() and written[50:].min() < 30
    assert manipulate.overlay(np.zeros((1, 1, 3), np.uint8), word).shape == (64, 64, 3)


# ----------------------------------------------------------------------------- compiled once


def everything(model, *, seed, guidance, eta, theta, captions):
    """Every manipulation once."""
    images, key = pictures(2, 16, seed), jax.random.key(seed)
    walk = walk_of(eta=eta, guidance_scale=guidance, caption=captions[0])
    latents = manipulate.encode(model, images, walk)
    manipulate.reconstruct(model, key, images, Walk(STEPS, batch_size=TWO))
    manipulate.pictures(model, key, latents, walk, num=2)
    manipulate.pictures(model, key, manipulate.interpolate(latents, 3), walk)
    turned = manipulate.text_diff(model, latents, *captions, [0.0, theta])
    manipulate.pictures(model, key, turned, walk)
    hole = np.eye(16, dtype=bool)
    manipulate.inpaint(model, key, images[0], hole, walk, num=2)
    manipulate.upscale(model, key, images[0], num=2)
    manipulate.ablate_prior(model, key, captions, walk)
    manipulate.zero_shot(model, manipulate.embed(model, images), captions)


def test_another_caption_seed_scale_theta_or_eta_compiles_nothing(model):
    everything(model, seed=0, guidance=2.0, eta=0.0, theta=0.2, captions=["a dog", "a red apple"])
    before = len(compiled)
    assert before, "compilations are counted"
    everything(model, seed=1, guidance=3.5, eta=0.7, theta=0.4, captions=["a cat", "x"])
    assert len(compiled) == before


# ------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda m: Walk(eta=1.5), "eta: got 1.5"),
        (lambda m: Walk(eta=float("nan")), "eta: got nan"),
        (lambda m: Walk(guidance_scale=float("inf")), "guidance_scale: got inf"),
        (lambda m: Walk(batch_size=0), "batch_size: got 0"),
        (lambda m: manipulate.encode(m, pictures(), Walk(1)), "steps: got 1, expected 2 to"),
        (lambda m: manipulate.encode(m, pictures(), Walk(999)), "an integer stride over"),
        (lambda m: manipulate.encode(m, [], Walk(STEPS)), "images: got .., expected at least one"),
        (
            lambda m: manipulate.encode(m, [np.zeros((4, 4, 3))], Walk(STEPS)),
            r"images\[0\].*uint8",
        ),
        (
            lambda m: manipulate.encode(dataclasses.replace(m, clip=None), pictures(), Walk(STEPS)),
            "has no CLIP",
        ),
        (lambda m: manipulate.interpolate(Latents(np.zeros((3, 8)), np.zeros(3)), 5), "got 3"),
        (lambda m: manipulate.interpolate(Latents(np.zeros((2, 8)), np.zeros(2)), 1), "frames"),
        (lambda m: diff(m, "a dog", "a dog", [0.1]), "the same embedding"),
        (lambda m: diff(m, "a dog", " ", [0.1]), "prompts"),
        (lambda m: diff(m, "a dog", "a cat", [1.1]), "theta"),
        (lambda m: diff(m, "a dog", "a cat", []), "theta"),
        (lambda m: paint(m, np.zeros((16, 16), bool)), "nothing to paint"),
        (lambda m: paint(m, np.ones((16, 24), bool)), "proportions"),
        (
            lambda m: manipulate.upscale(dataclasses.replace(m, upsamplers=()), KEY, pictures()[0]),
            "no upsampler",
        ),
        (
            lambda m: manipulate.pca_embeddings(
                pca.fit(pca.Moments.of(random((9, 8)))), random((1, 8)), [9]
            ),
            "from 1 to CLIP's 8",
        ),
        (lambda m: manipulate.zero_shot(m, random((1, 8)), ["one"]), "at least two"),
        (lambda m: manipulate.overlay(pictures()[0], " "), "word"),
    ],
)
def test_what_is_wrong_is_named(model, wrong, message):
    with pytest.raises(UserError, match=message):
        wrong(model)


def diff(model, source, target, thetas):
    latents = Latents(random((1, tiny.DIM)), random((1, 16, 16, 3)))
    return manipulate.text_diff(model, latents, source, target, thetas)


def paint(model, hole):
    return manipulate.inpaint(model, KEY, pictures()[0], hole, Walk(STEPS))


def test_a_decoder_of_captions_alone_has_nothing_to_edit(model):
    config = dataclasses.replace(tiny.DECODER.model, embed_dim=0)
    stage = dataclasses.replace(tiny.DECODER, model=config)
    glide = dataclasses.replace(model, decoder=model.decoder._replace(stage=stage))
    with pytest.raises(UserError, match="reads captions alone"):
        manipulate.encode(glide, pictures(), Walk(STEPS))


def test_a_walk_leads_away_from_a_negative_caption(model):
    """At scale 0 it arrives there, with z_i dropped."""
    keys, z_i = jax.random.split(jax.random.key(3), TWO), model.embed_text(["x", "y"])
    latents = Latents(np.asarray(z_i), noise(model, keys))
    walk = walk_of(guidance_scale=0.0, caption="a dog", negative="a cat")
    found = decode(model, keys, latents, walk)
    cat = walk_of(guidance_scale=1.0, caption="a cat")
    there = decode(model, keys, latents, cat, keep_z_i=False)
    np.testing.assert_allclose(found, there, atol=2e-4)
    assert np.abs(found - decode(model, keys, latents, walk_of(guidance_scale=0.0))).max() > 0.01
    with pytest.raises(UserError, match="guidance_scale: got None, expected above 1"):
        Walk(negative="a cat")
