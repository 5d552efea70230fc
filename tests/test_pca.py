"""Principal components: closed forms, NumPy's SVD as a witness, and merging in any order."""

import functools

import numpy as np
import pytest

from unclip_jax.errors import UserError
from unclip_jax.metrics.pca import fit, rank
from unclip_jax.metrics.vectors import Moments


def spread_over_decades(n, e, seed=0):
    """Correlated vectors whose variances fall from 1 to 1e-10, far from the origin."""
    rng = np.random.default_rng(seed)
    axes, _ = np.linalg.qr(rng.normal(size=(e, e)))
    return (rng.normal(size=(n, e)) * np.logspace(0, -5, e)[None]) @ axes + 3.0


def merged(parts):
    return functools.reduce(Moments.merge, [Moments.of(part) for part in parts])


def test_components_agree_with_the_singular_values_of_all_the_data():
    z = spread_over_decades(300, 12)
    components = fit(Moments.of(z))
    _, singular, rows = np.linalg.svd(z - z.mean(axis=0, keepdims=True), full_matrices=False)
    np.testing.assert_allclose(components.eigenvalues, singular**2 / 299, rtol=1e-4)
    assert np.all(np.diff(components.eigenvalues) <= 0)
    alignment = np.abs(np.sum(components.components * rows, axis=1))
    np.testing.assert_allclose(alignment, 1.0, atol=1e-8)
    np.testing.assert_allclose(components.mean, z.mean(axis=0), rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_any_chunks_in_any_order_give_what_one_pass_gives(seed):
    rng = np.random.default_rng(seed)
    z = spread_over_decades(400, 9)
    cuts = np.sort(rng.choice(np.arange(1, 400), 20, replace=False))
    parts = np.split(z[rng.permutation(400)], cuts)
    assert min(map(len, parts)) >= 1
    one, many = Moments.of(z), merged(parts)
    backwards = merged(parts[::-1])
    hosts = merged(parts[:7]).merge(merged(parts[7:]))
    for other in (many, backwards, hosts):
        assert other.count == 400
        np.testing.assert_allclose(other.mean, one.mean, rtol=1e-12)
        np.testing.assert_allclose(other.scatter, one.scatter, rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(fit(other).eigenvalues, fit(one).eigenvalues, rtol=1e-3)


def test_moments_of_float32_chunks_keep_variances_that_a_float32_sum_would_lose():
    """A direction of variance 1e-8 beside one of variance 1, in ten thousand chunks."""
    rng = np.random.default_rng(0)
    z = (rng.normal(size=(20_000, 2)) * np.array([[1.0, 1e-4]])).astype(np.float32)
    found = fit(merged(np.split(z, 10_000))).eigenvalues
    np.testing.assert_allclose(found, np.var(z.astype(np.float64), axis=0, ddof=1), rtol=1e-4)


def test_variance_is_conserved():
    z = spread_over_decades(50, 7)
    components = fit(Moments.of(z))
    total = np.var(z, axis=0, ddof=1).sum()
    assert components.eigenvalues.sum() == pytest.approx(total, rel=1e-12)
    assert components.kept(7) == 1.0
    for dims in (1, 3, 7):
        coordinates = components.project(z, dims)
        lost = z - components.reconstruct(coordinates)
        kept = 1 - np.sum(lost**2) / (49 * total)
        assert components.kept(dims) == pytest.approx(kept, abs=1e-9)
        # The coordinates are uncorrelated, with the eigenvalues as variances.
        covariance = np.atleast_2d(np.cov(coordinates.T))
        np.testing.assert_allclose(covariance, np.diag(components.eigenvalues[:dims]), atol=1e-12)


def test_rank_counts_dimensions_up_to_the_fraction():
    # Variances 90, 9, 0.9, 0.1 per cent: exactly orthogonal, by signs.
    signs = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], float)
    z = np.concatenate([signs, -signs]) * np.sqrt([[90.0, 9.5, 0.5]])
    components = fit(Moments.of(z))
    assert [components.rank(f) for f in (0.5, 0.9 - 1e-9, 0.95, 0.99, 0.999, 1.0)] == [
        1, 1, 2, 2, 3, 3,
    ]  # fmt: skip
    assert rank(z) == 2 and rank(z, 0.999) == 3


def test_the_rank_of_vectors_in_a_subspace_is_its_dimension():
    rng = np.random.default_rng(1)
    z = rng.normal(size=(200, 5)) @ rng.normal(size=(5, 40)) + 1.0
    assert rank(z, 1 - 1e-9) == 5
    assert rank(z[:3], 1 - 1e-9) == 2  # n vectors span n - 1 dimensions about their mean
    assert rank(z[:1]) == rank(np.full((50, 40), 0.1)) == 0


def test_the_sign_of_a_component_does_not_depend_on_the_data():
    z = spread_over_decades(80, 6)
    for components in (fit(Moments.of(z)).components, fit(Moments.of(-z)).components):
        largest = np.abs(components).argmax(axis=1)
        assert np.all(np.take_along_axis(components, largest[:, None], axis=1) > 0)


@pytest.mark.parametrize(
    ("z", "message"),
    [
        (np.zeros((0, 4)), "expected .n, e. with n >= 1"),
        (np.zeros(4), "expected .n, e."),
        (np.full((3, 2), np.nan), "not finite"),
        (np.zeros((1, 4)), "at least 2"),
        (np.zeros((9, 4)), "collapsed"),
        (np.full((9, 4), 0.1), "collapsed"),
    ],
)
def test_wrong_data_is_named(z, message):
    with pytest.raises(UserError, match=message):
        fit(Moments.of(z))
