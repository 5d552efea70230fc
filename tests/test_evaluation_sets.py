"""Distances between sets of pictures against closed forms, loops and scipy."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from unclip_jax import metrics
from unclip_jax.errors import UserError
from unclip_jax.metrics import precision_recall as manifolds
from unclip_jax.metrics import vectors as module
from unclip_jax.metrics import zero_shot
from unclip_jax.metrics.clip_score import clip_score
from unclip_jax.metrics.cmmd import cmmd
from unclip_jax.metrics.frechet import frechet
from unclip_jax.metrics.precision_recall import precision_recall
from unclip_jax.metrics.vectors import Moments, Vectors, moments


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


# ------------------------------------------------------------------------------------ Fréchet


def by_sqrtm(x, y):
    """The formula as pytorch-fid computes it."""
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(a @ b).real
    means = np.sum((x.mean(0) - y.mean(0)) ** 2)
    return means + np.trace(a) + np.trace(b) - 2 * np.trace(root)


@pytest.mark.parametrize("n", [40, 500])
def test_frechet_is_scipys(n):
    x = normal(n, 12) @ normal(12, 12, seed=1)
    y = normal(n + 7, 12, seed=2) @ normal(12, 12, seed=3) + 0.5
    assert frechet(moments(x), moments(y)) == pytest.approx(by_sqrtm(x, y), rel=1e-9)


def gaussian(mean, covariance, n=1000):
    return Moments(n, np.asarray(mean), np.asarray(covariance) * (n - 1))


def test_frechet_of_commuting_covariances_is_closed():
    # C_1 and C_2 with the same eigenvectors: sum of (sqrt(a) - sqrt(b))^2, and the means'.
    basis = np.linalg.qr(normal(6, 6))[0]
    a, b = np.array([4, 1, 0.25, 9, 0, 1e-8]), np.array([1, 1, 4, 0, 2, 1e-8])
    first = gaussian(np.zeros(6), basis * a @ basis.T)
    second = gaussian(np.full(6, 0.5), basis * b @ basis.T)
    expected = 6 * 0.25 + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    assert frechet(first, second) == pytest.approx(expected, rel=1e-12)


def test_frechet_of_fewer_vectors_than_dimensions():
    # Within 30 coordinates that hold all of them, the distance is the same and scipy's.
    frame = np.linalg.qr(normal(200, 30))[0]
    x, y = normal(20, 30, seed=1), normal(25, 30, seed=2) + 1.0
    flat = frechet(moments(x), moments(y))
    assert frechet(moments(x @ frame.T), moments(y @ frame.T)) == pytest.approx(flat, rel=1e-9)
    assert flat == pytest.approx(by_sqrtm(x, y), rel=1e-4)  # sqrtm of a singular matrix is blunt


def test_a_set_beside_itself_has_distance_zero():
    x = normal(50, 64) * 30 + 100
    assert abs(frechet(moments(x), moments(x))) < 1e-9 * np.var(x) * 64
    assert frechet(moments(x), moments(x + 2.0)) == pytest.approx(64 * 4.0, rel=1e-9)


def test_moments_do_not_depend_on_the_chunks(monkeypatch):
    x = normal(50, 5, seed=1) + 1e4
    whole = moments(x)
    monkeypatch.setattr(module, "_CHUNK", 7)
    pieces = moments(x)
    assert whole.count == pieces.count == 50
    np.testing.assert_allclose(pieces.scatter, whole.scatter, rtol=1e-9)
    np.testing.assert_allclose(whole.scatter / 49, np.cov(x, rowvar=False), rtol=1e-8)


def test_frechet_refuses_what_has_no_covariance():
    with pytest.raises(UserError, match="feature vectors: got 1, expected at least 2"):
        frechet(moments(normal(1, 3)), moments(normal(9, 3)))
    with pytest.raises(UserError, match=r"widths: got \(3, 4\)"):
        frechet(moments(normal(9, 3)), moments(normal(9, 4)))
    with pytest.raises(UserError, match="not finite"):
        moments(np.full((3, 2), np.nan))
    with pytest.raises(UserError, match=r"shape: got \(0, 2\)"):
        moments(np.zeros((0, 2)))


# --------------------------------------------------------------------------------------- CMMD


def by_loops(x, y):
    """Equation by equation: the kernel's three means over all pairs."""

    def mean(a, b):
        values = [
            np.exp(-np.sum((u / np.linalg.norm(u) - v / np.linalg.norm(v)) ** 2) / (2 * 10.0**2))
            for u, v in itertools.product(a, b)
        ]
        return np.mean(values)

    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def test_cmmd_is_the_double_loop(monkeypatch):
    monkeypatch.setattr("unclip_jax.metrics.cmmd._BLOCK", 4)
    x, y = normal(11, 5), 3.0 * normal(9, 5, seed=1) + 1.0
    assert cmmd(x, y) == pytest.approx(by_loops(x, y), rel=1e-9)
    assert cmmd(x, y) == pytest.approx(cmmd(y, x))


def test_cmmd_keeps_its_digits_where_sets_hardly_differ():
    x = normal(60, 8)
    assert cmmd(x, x) == pytest.approx(0.0, abs=1e-12)
    # With so wide a kernel, k = 1 - d^2 / 200 + ...: nearly 5 |difference of the means|^2 * 2.
    y = x + 1e-4 * normal(60, 8, seed=1)
    unit = [z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y)]
    apart = np.sum((unit[0].mean(0) - unit[1].mean(0)) ** 2)
    assert cmmd(x, y) == pytest.approx(10.0 * apart, rel=0.02)


def test_clip_score_counts_angles_and_no_lengths():
    texts = np.array([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    images = np.array([[5.0, 0.0], [1.0, 1.0], [0.0, -1.0]])
    # cosines 1, 1/sqrt 2 and -1, which counts as 0
    assert clip_score(images, texts) == pytest.approx(100 * (1 + np.sqrt(0.5)) / 3)


# ------------------------------------------------------------------------ precision and recall


def test_precision_and_recall_of_sets_on_a_line():
    real = np.array([[0.0], [1.0], [2.0], [3.0]])
    # With one neighbour each real ball has radius 1; the generated ones, 0.5 and 100 apart.
    generated = np.array([[0.5], [1.0], [101.0], [201.0]])
    found = precision_recall(real, generated, neighbours=1)
    assert found["precision"] == 0.5  # 0.5 and 1 lie in [-1, 4]
    # Balls [0, 1], [0.5, 1.5], [1, 201] and [101, 301] hold 0, 1, 2, 3.
    assert found["recall"] == 1.0


def test_precision_and_recall_are_the_loops(monkeypatch):
    monkeypatch.setattr(manifolds, "_BLOCK", 5)
    real, generated = normal(23, 4), 0.8 * normal(17, 4, seed=1) + 0.7

    def fraction(points, manifold):
        radii = [np.sort(np.linalg.norm(manifold - v, axis=1))[3] for v in manifold]
        inside = [
            any(np.linalg.norm(p - v) <= r for v, r in zip(manifold, radii, strict=True))
            for p in points
        ]
        return np.mean(inside)

    found = precision_recall(real, generated)
    assert found == {"precision": fraction(generated, real), "recall": fraction(real, generated)}
    assert 0 < found["precision"] < 1 and 0 < found["recall"] < 1


def test_collapsed_pictures_are_precise_and_recall_nothing():
    real = normal(40, 3)
    found = precision_recall(real, np.repeat(real[:1], 10, axis=0))
    assert found["precision"] == 1.0 and found["recall"] <= 1 / 40
    assert precision_recall(real, real) == {"precision": 1.0, "recall": 1.0}


def test_too_few_for_neighbours():
    with pytest.raises(UserError, match="generated pictures: got 3, expected at least 4"):
        precision_recall(normal(9, 2), normal(3, 2))


# ---------------------------------------------------------------------------------- zero-shot


def test_zero_shot_accuracy_by_angle():
    texts = np.diag([1.0, 10.0, 100.0])  # the longest text is not nearest to everything
    z_i = np.eye(3)[[0, 1, 2, 2]] + 0.1
    assert zero_shot.accuracy(z_i, np.array([0, 1, 2, 0]), texts) == 0.75


def test_direction_of_pictures_that_say_what_texts_say():
    texts = np.eye(4)
    assert zero_shot.direction(texts * 0.3 + 5.0, texts) == pytest.approx(1.0)
    assert zero_shot.direction(-texts, texts) == pytest.approx(-1.0)
    assert zero_shot.direction(np.ones((4, 4)), texts) == 0.0  # no difference, no direction
    texts, means = normal(5, 3), normal(5, 3, seed=1)
    unit = texts / np.linalg.norm(texts, axis=1, keepdims=True)
    cosines = [
        (unit[a] - unit[b])
        @ (means[a] - means[b])
        / (np.linalg.norm(unit[a] - unit[b]) * np.linalg.norm(means[a] - means[b]))
        for a, b in itertools.combinations(range(5), 2)
    ]
    assert zero_shot.direction(means, texts) == pytest.approx(np.mean(cosines))


def test_scores_foretell_accuracy_where_both_come_from_the_same_confusions():
    # Ten classes, some of whose texts point ever further from where their pictures are.
    rng = np.random.default_rng(0)
    wrong = np.linspace(0.0, 1.5, 10)[:, None] * rng.normal(size=(10, 10))
    labels = np.repeat(np.arange(10), 200)
    generated, real = (np.eye(10)[labels] + 0.5 * rng.normal(size=(2000, 10)) for _ in range(2))
    texts = np.eye(10) + wrong
    found = zero_shot.over_subsets((generated, labels), (real, labels), texts, most=40)
    assert all(len(part) == 40 for part in found)
    assert zero_shot.correlation(found.own_class, found.accuracy)["pearson"] > 0.95
    assert zero_shot.correlation(found.direction, found.accuracy)["spearman"] > 0.5


def test_subsets_are_different_and_of_classes_with_real_pictures():
    real_labels = np.repeat([0, 2, 3, 5], 2)  # of classes 1 and 4 there are no pictures
    z_t = np.eye(6)
    found = zero_shot.over_subsets(
        (z_t, np.arange(6)), (z_t[real_labels], real_labels), z_t, most=100
    )
    assert len(found.accuracy) == 6  # pairs among four
    assert (found.accuracy == 1.0).all() and (found.own_class == 1.0).all()
    none = zero_shot.over_subsets((z_t, np.arange(6)), (z_t[:3], np.arange(3)), z_t)
    assert len(none.accuracy) == 0
    assert np.isnan(zero_shot.correlation(none.direction, none.accuracy)["pearson"])


def test_correlations_are_scipys():
    x = np.array([1.0, 2.0, 2.0, 5.0, 3.0])
    y = np.array([0.1, 0.5, 0.4, 0.4, 0.9])
    found = zero_shot.correlation(x, y)
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(x, y).statistic)
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    assert np.isnan(zero_shot.correlation(x, np.ones(5))["spearman"])


# ------------------------------------------------------------------------------------ the room


def test_a_metric_is_found_by_what_its_module_defines():
    names = {function.__module__.split(".")[-1] for function in metrics.found("compare")}
    assert names == {"cmmd", "frechet", "precision_recall"}
    (judge,) = metrics.found("judge")
    drawn = Vectors(normal(9, 3), normal(9, 4), normal(9, 3, seed=1))
    assert judge(drawn) == {"clip_score": clip_score(drawn.z_i, drawn.z_t)}
    real = drawn.rows(np.arange(8))
    found = {}
    for compare in metrics.found("compare"):
        found |= compare(drawn, real)
    assert found == precision_recall(real.features, drawn.features) | {
        "cmmd": cmmd(drawn.z_i, real.z_i),
        "frechet": frechet(moments(drawn.features), moments(real.features)),
    }
