"""What the benchmark of the box counts, on drawings that are made up."""

import dataclasses
import importlib
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import box
from tests import tiny
from unclip_jax.data.datasets import DataConfig
from unclip_jax.errors import UserError
from unclip_jax.metrics.nearest import Nearest, by_chance, copies, errors, top
from unclip_jax.metrics.vectors import Vectors

RNG = np.random.default_rng(0)
EMOJI = np.array([0, 1, 2, 3, 0, 1, 2, 0, 4])  # of nine drawings, the last two held out
STYLES = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2])


@pytest.fixture
def real():
    features = RNG.normal(size=(5, 16))[EMOJI] + 0.1 * RNG.normal(size=(9, 16))
    images = RNG.integers(0, 256, (9, 8, 8, 3), np.uint8)
    captions = [f"{emoji}, {style} style" for emoji, style in zip(EMOJI, STYLES, strict=True)]
    vectors, first = Vectors(features, features.astype(np.float32)), {"train": 0, "heldout": 7}
    codes = list("abcde")
    return box.Drawings(images, captions, EMOJI, codes, STYLES, np.arange(9), first, vectors)


def nearest_of(real):
    return Nearest(real.vectors.features, real.emoji, real.same)


def test_a_drawing_is_its_own_nearest_and_a_strangers_is_not(real):
    nearest = nearest_of(real)
    rows = np.arange(9)
    right = nearest.figures(real.vectors.features, rows)
    assert right == dict.fromkeys(("concept_top1", "concept_top5", "own_top1", "own_top5"), 1.0)
    wrong = nearest.figures(real.vectors.features[[8] * 8], rows[:8])
    assert wrong["concept_top1"] == 0.0 and wrong["own_top1"] == 0.0


def test_scale_and_offset_of_a_feature_do_not_count(real):
    moved = real.vectors.features * np.geomspace(1e-3, 1e3, 16) + np.arange(16)
    rows, hidden = np.arange(7), np.arange(7)
    found = [
        nearest_of(real._replace(vectors=Vectors(f, f))).figures(f[rows], rows, hidden)
        for f in (real.vectors.features, moved.astype(np.float32))
    ]
    assert found[0] == found[1] and found[0]["concept_top1"] > 0


def test_another_style_is_judged_without_itself(real):
    rows = np.array([0, 1, 3, 4, 8])
    others = real.others(rows)
    assert others.tolist() == [4, 5, -1, 7, -1]  # the next of the emoji; the last has the first
    assert real.others(np.array([7])).tolist() == [0]
    nearest = nearest_of(real)
    found = nearest.figures(real.vectors.features[[4, 5]], rows[:2], others[:2])
    assert found["concept_top1"] == 1.0  # another of the emoji is near, though it is hidden
    assert found["own_top5"] == 1.0


def test_chance_is_what_random_drawings_score(real):
    nearest = nearest_of(real)
    rows = np.array([0, 1, 8])
    chance = nearest.chance(rows)
    drawn = np.stack([RNG.permutation(9)[:5] for _ in range(20_000)])
    for row in rows:
        one = nearest.chance(np.array([row]))
        hit = EMOJI[drawn] == EMOJI[row]
        assert abs(one["concept_top1"] - hit[:, 0].mean()) < 0.02
        assert abs(one["concept_top5"] - hit.any(axis=1).mean()) < 0.02
    assert chance["own_top1"] == pytest.approx(1 / 9)
    assert chance["own_top5"] == pytest.approx(5 / 9)


def test_equal_pictures_are_one_drawing(real):
    """Two flags that are drawn alike: either is right, and neither is the other's other drawing."""
    features = real.vectors.features.copy()
    features[1] = features[0]
    same = np.array([0, 0, 2, 3, 4, 5, 6, 7, 8])
    shared = real._replace(vectors=Vectors(features, features), same=same)
    rows = np.array([0, 1])
    for own in (0, 1):
        found = nearest_of(shared).figures(features[[own, own]], rows)
        assert found["concept_top1"] == found["own_top1"] == 1.0
    hidden = nearest_of(shared).figures(features[rows], rows, rows)
    assert hidden["own_top5"] == 0.0
    assert nearest_of(shared).chance(rows)["own_top1"] == pytest.approx(2 / 9)


def test_errors_are_mean_squares_of_pixels_from_minus_one_to_one(real):
    found = errors(real.images[:3], real.images, block=4)
    pixels = real.images / 127.5 - 1
    expected = ((pixels[:3, None] - pixels[None]) ** 2).mean(axis=(2, 3, 4))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_copies_are_counted_and_real_ones_are_not_their_own_copies(real):
    train, own = real.rows("train"), np.array([0, 1, 8])
    assert train.tolist() == list(range(7)) and real.rows("heldout").tolist() == [7, 8]
    drawn = np.stack([real.images[0], real.images[5], 255 - real.images[8]])
    same = own[:, None] == train
    found = copies(drawn, real.images[own], real.images[train], same)
    assert found["drawn"] == pytest.approx(2 / 3)  # of any training drawing
    assert found["drawn_own"] == pytest.approx(1 / 3)
    assert found["real"] == 0.0 and found["real_nearest"] > 0.1
    twice = real.images[[0, 1, 2, 3, 4, 5, 0]]  # 6 is 0 drawn again
    assert copies(drawn, real.images[own], twice, same)["real"] == pytest.approx(1 / 3)


def test_the_style_classifier_tells_palettes_blurred_or_not():
    palettes = RNG.integers(0, 256, (3, 4, 3))
    labels = RNG.integers(0, 3, 60)
    images = palettes[labels[:, None, None], RNG.integers(0, 4, (60, 4, 4))].astype(np.uint8)
    images = images.repeat(4, axis=1).repeat(4, axis=2)
    classifier = box.StyleClassifier(images[:30], labels[:30])
    for changed in (images[30:], [box.halved(x) for x in images[30:]]):
        assert classifier.accuracy(changed, labels[30:]) > 0.9
    assert classifier.accuracy(images[30:], (labels[30:] + 1) % 3) < 0.1


def test_halving_keeps_what_is_coarse_and_noise_is_small():
    flat = np.full((16, 16, 3), (10, 200, 30), np.uint8)
    np.testing.assert_array_equal(box.halved(flat), flat)
    checks = np.indices((16, 16)).sum(0)[..., None].repeat(3, -1) % 2 * 255
    assert np.ptp(box.halved(checks.astype(np.uint8))) == 0
    noise = box.noisy(np.full((64, 64, 3), 128, np.uint8), 0) / 127.5 - 128 / 127.5
    assert noise.std() == pytest.approx(box.NOISE, rel=0.1)


def test_what_the_networks_saw_is_kept_for_the_same_clip(tmp_path, monkeypatch):
    asked, source = [], SimpleNamespace(fingerprint="f")
    net = SimpleNamespace(name="lite0:112")
    vectors = Vectors(RNG.normal(size=(2, 4)), RNG.normal(size=(2, 6)))
    seen = box.Real(source, 64, np.arange(2), np.array([1, 0]), vectors, [bytes(16), b"ab" * 8])

    def measurer(clip):
        return SimpleNamespace(
            read=lambda config: asked.append(config) or seen, judge=clip, network=net
        )

    monkeypatch.setattr(box, "load", lambda config: source)
    monkeypatch.setattr(box, "clip_fingerprint", lambda judge: judge)
    for clip, times in (("a", 1), ("a", 1), ("b", 2)):
        found = box.looked_at(measurer(clip), DataConfig(), tmp_path)
        assert len(asked) == times
        np.testing.assert_array_equal(found.vectors.z_i, vectors.z_i)
        np.testing.assert_array_equal(found.vectors.features, vectors.features)
        assert found.labels.tolist() == [1, 0] and found.alike == seen.alike
    assert box.looked_at(measurer("a"), DataConfig(), None) is seen


def test_words_find_what_is_called_so():
    scores = np.array([[3.0, 2, 1, 0, -1, -2, -3], [-3, -2, -1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]])
    right = np.zeros((3, 7), bool)
    right[0, 0] = right[1, 3] = right[2, [0, 1]] = True  # ranks 1, 4, and 6 with 7
    found = top(scores, {"drawing": right})
    assert found == {"drawing_top1": pytest.approx(1 / 3), "drawing_top5": pytest.approx(2 / 3)}
    chance = by_chance({"drawing": right})
    assert chance["drawing_top1"] == pytest.approx((1 / 7 + 1 / 7 + 2 / 7) / 3)
    assert chance["drawing_top5"] == pytest.approx((5 / 7 + 5 / 7 + 1 - 1 / 21) / 3)


@pytest.mark.parametrize("num", [6, 7, 8, 1, 0, -1])
def test_as_many_captions_as_training_has_are_refused_before_anything_is_looked_at(
    num, real, monkeypatch
):
    monkeypatch.setattr(box, "load", lambda config: real.captions[:7])
    args = SimpleNamespace(num=num, heldout=1, judge=None, batch_size=1, keep=None)
    with pytest.raises(UserError, match=rf"--num: got {num}, expected 2 to 5, as training has 7"):
        box.Bench(SimpleNamespace(decoder=SimpleNamespace(stage=tiny.DECODER)), "some", args)


def test_every_walk_begins_with_the_canvas_under_the_noise_of_its_own_first_step(monkeypatch):
    """A network that sees no noise gives back what sampling began with: canvas and noise."""
    monkeypatch.setitem(sys.modules, "box", box)
    box_sampling = importlib.import_module("benchmarks.box_sampling")
    stage = dataclasses.replace(tiny.ON_CANVAS, from_canvas=True)
    params = tiny.params(stage) | {"canvas": tiny.params(tiny.CANVAS)}
    keys = box_sampling.example_keys(jax.random.key(0), 2)
    cond = stage.condition_of(tiny.batch(2, 16))
    ways = SimpleNamespace(_batches=lambda: [np.arange(2)], conds=[cond], keys=keys)
    sampling = dataclasses.replace(stage.sampling, method="ddim", spacing=(500,), clip_x_0=0.0)

    def blind(*_):
        return lambda x_t, t: jnp.zeros((*x_t.shape[:-1], 6))

    part = SimpleNamespace(stage=stage, params=params)
    found = box_sampling.Ways.draw(ways, part, blind, sampling)
    noise = box_sampling.initial_noise(keys, stage.x_shape)[0]
    alpha, sigma = (x.item() for x in stage.diffusion.levels(jnp.int32(500), jnp.zeros(())))
    canvas = tiny.call(stage, "draw_canvas", params, cond)
    np.testing.assert_allclose(found, canvas + sigma / alpha * noise, atol=1e-4)
