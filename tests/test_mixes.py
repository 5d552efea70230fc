"""Pictures that begin as others: img2img, mixes; and what a new strength or weight compiles."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from tests import tiny
from unclip_jax.errors import UserError
from unclip_jax.pipeline import manipulate
from unclip_jax.pipeline.manipulate import Walk, mixes, slerp, spherical_mean
from unclip_jax.stages.conditioning import example_keys

KEY = jax.random.key(7)
compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: "backend_compile" in event and compiled.append(event)
)


@pytest.fixture(scope="module")
def model():
    return tiny.model()


def picture(seed=0, side=16):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side * 2 * np.pi
    wave = sum(np.sin(a * x + b * y + c) for a, b, c in rng.uniform(-2, 2, (4, 3)))
    return np.uint8(127.5 + 31 * wave[:, :, None] * rng.uniform(-1, 1, 3))


def levels(a, b):
    return np.abs(np.asarray(a, int) - np.asarray(b, int))


# ------------------------------------------------------------------------------------ the mean


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_the_spherical_mean_of_two_is_slerp():
    a, b = random(6, 5), 3 * random(6, 5, seed=1)
    for theta in (0.0, 0.3, 1.0):
        mean = spherical_mean(np.stack([a, b]), [1 - theta, theta])
        np.testing.assert_allclose(mean, slerp(a, b, theta), atol=2e-5)


def test_the_spherical_mean_of_many_has_the_least_squared_angles():
    vectors, weights = random(4, 3) + 1, np.array([0.1, 0.4, 0.2, 0.3])
    mean = np.asarray(spherical_mean(vectors, 5 * weights), np.float64)
    lengths = np.linalg.norm(vectors, axis=1)
    assert np.linalg.norm(mean) == pytest.approx(weights @ lengths, rel=1e-5)

    def cost(u):
        cosines = vectors.astype(np.float64) @ (u / np.linalg.norm(u)) / lengths
        return weights @ np.arccos(np.clip(cosines, -1, 1)) ** 2

    best = optimize.minimize(
        cost, np.float64(vectors.mean(axis=0)), method="Nelder-Mead", tol=1e-12
    ).x
    np.testing.assert_allclose(mean / np.linalg.norm(mean), best / np.linalg.norm(best), atol=1e-5)
    assert cost(mean) <= cost(best) + 1e-9
    for order in itertools.permutations(range(4)):
        again = spherical_mean(vectors[[*order]], weights[[*order]])
        np.testing.assert_allclose(again, mean, atol=1e-5)


def test_the_spherical_mean_survives_zeros_and_opposites():
    zeros = np.stack([np.zeros(3), [0, 2, 0]])
    np.testing.assert_allclose(spherical_mean(zeros, [1, 1]), [0, 1, 0], atol=1e-6)
    opposite = np.stack([[1.0, 0, 0], [-1.0, 0, 0]])
    assert np.isfinite(spherical_mean(opposite, [1, 1])).all()
    assert np.linalg.norm(spherical_mean(opposite, [1, 1])) == pytest.approx(1)


# ------------------------------------------------------------------------------------- the mixes


def test_a_mix_is_between_what_clip_sees_and_what_the_prior_draws(model):
    keys = example_keys(KEY, 2)
    image, caption = model.embed_image([picture()]), model.sample_prior(keys, ["a dog"] * 2)
    alone = mixes.mixed(model, keys, ["a dog"], [2.0])
    np.testing.assert_allclose(alone, caption, atol=1e-5)
    added = mixes.mixed(model, keys, [picture(), "a dog"], [0.5, -2], how="sum")
    np.testing.assert_allclose(added, 0.5 * image - 2 * caption, atol=1e-5)
    between = mixes.mixed(model, keys, ["a dog", picture()])
    middle = slerp(caption, jnp.repeat(image, 2, axis=0), 0.5)
    np.testing.assert_allclose(between, middle, atol=1e-4)


def test_a_mix_of_one_picture_is_its_variations(model):
    mix = manipulate.mix(model, KEY, [picture()], num=2, upsample=False)
    variations = model.variations(KEY, [picture()], num=2, upsample=False)
    assert levels(mix, variations).max() <= 1


@pytest.mark.parametrize(
    ("things", "options", "message"),
    [
        ([], {}, "things: got .., expected a list"),
        ("a dog", {}, "things: got 'a dog', expected a list"),
        (["a dog", " "], {}, r"prompts\[1\]"),
        (["a", "b"], {"weights": [1]}, "how many weights: got 1, expected one for each of 2"),
        (["a", "b"], {"weights": [1, float("nan")]}, r"weights\[1\]: got nan"),
        (["a", "b"], {"weights": [1, -1]}, "weights: got .1.0, -1.0., expected 0 or more"),
        (["a", "b"], {"weights": [0, 0]}, "not all 0"),
        (["a"], {"how": "mean"}, "how: got 'mean'"),
        (["a"], {"num": 0}, "num: got 0"),
        ([np.zeros((2, 2, 2, 2), np.uint8)], {}, "image"),
    ],
)
def test_a_mix_of_nothing_is_refused(model, things, options, message):
    with pytest.raises(UserError, match=message):
        manipulate.mix(model, KEY, things, **options)


# --------------------------------------------------------------------------------------- img2img


def test_strength_goes_from_the_picture_to_anything(model):
    walk, images = Walk(steps=8, batch_size=2), [picture(), picture(1)]

    def away(strength, **options):
        told = {"strength": strength, "num": 2, "upsample": False, **options}
        drawn = manipulate.img2img(model, KEY, images, walk, **told)
        assert drawn.shape == (4, 16, 16, 3)
        return levels(drawn, np.repeat(images, 2, axis=0)).mean(), drawn

    assert away(0)[1].tolist() == np.repeat(images, 2, axis=0).tolist()
    distances = [away(strength)[0] for strength in (0.001, 0.25, 0.5, 1.0)]
    assert distances == sorted(distances) and distances[-1] > 20
    one, other = away(0.5)[1][:2]
    assert levels(one, other).max() > 1  # from other noise
    mean, same = away(0.5, inverted=True)
    assert mean < distances[2] and levels(same[0], same[1]).max() == 0


def test_inverted_and_drawn_under_the_same_condition_more_of_a_picture_comes_back(model):
    walk = Walk(steps=20, batch_size=1)
    back, other = (
        manipulate.img2img(
            model, KEY, [picture()], walk, strength=0.6, upsample=False, inverted=inverted
        )
        for inverted in (True, False)
    )
    assert levels(back[0], picture()).mean() < 0.5 * levels(other[0], picture()).mean()


def test_a_caption_says_what_to_draw(model):
    told = {"strength": 0.8, "upsample": False}
    dog, cat = (
        manipulate.img2img(model, KEY, [picture()], Walk(steps=4, caption=text), **told)
        for text in ("a dog", "a cat")
    )
    assert levels(dog, cat).max() > 1


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan"), "0.5"])
def test_a_strength_out_of_range_is_refused(model, strength):
    with pytest.raises(UserError, match="strength: got"):
        manipulate.img2img(model, KEY, [picture()], Walk(steps=4), strength=strength)


# ---------------------------------------------------------------------- what is compiled only once


def test_another_strength_scale_weight_caption_or_seed_compiles_nothing(model):
    def everything(seed, strength, weights, scale, caption):
        key, negative = jax.random.key(seed), f"no {caption}"
        walk = Walk(steps=4, guidance_scale=scale, caption=caption, batch_size=2)
        told = {"num": 2, "strength": strength, "upsample": False}
        manipulate.img2img(model, key, [picture(seed)], walk, **told)
        bare = dataclasses.replace(walk, caption="")
        manipulate.img2img(model, key, [picture(seed)], bare, inverted=True, **told)
        for how in mixes.MIXES:
            told = {"how": how, "num": 2, "guidance_scale": scale, "upsample": False}
            things = [picture(seed), caption, picture(seed + 1)]
            manipulate.mix(model, key, things, weights, negative=negative, **told)
        numbers = {"num": [seed, 3 - seed], "first": [seed, 0], "batch_size": 2}
        keys = jax.random.split(key, 2)
        model.generate(keys, [caption, "x"], guidance_scale=scale, upsample=False, **numbers)

    everything(1, 0.5, [1, 2, 3], 2.0, "a dog")
    before = len(compiled)
    assert before, "compilations are counted"
    everything(2, 0.75, [0.5, 0, 9], 3.5, "two cats")
    assert len(compiled) == before
