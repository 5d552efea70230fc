"""BSR degradation: its resizing against torch and integrals, its noise, its order, its keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from unclip_jax.errors import UserError
from unclip_jax.stages.degrade import BSR, BSRGAN, bsr
from unclip_jax.stages.degrade.bsr import BLUR, JPEG, NOISE, SHRINK, STEPS, noise_mixing, plan
from unclip_jax.stages.degrade.resample import (
    AREA,
    BICUBIC,
    BILINEAR,
    NEAREST,
    resize_corner,
    resize_matrix,
)

degrade = jax.jit(bsr, static_argnums=(2, 3))
matrix = jax.jit(resize_matrix, static_argnums=4)
GENTLE = BSR(
    isotropic_sigma=(0.0, 0.3), anisotropic_sigma=(0.0, 0.3), noise_level=(0.0, 0.0),
    jpeg_quality=(100, 100),
)  # fmt: skip
N = 12
SIDES = [(12, 5), (12, 12), (7, 11), (12, 1), (1, 4)]


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def smooth(n, size, seed=0):
    """Smooth random pictures in [-0.8, 0.8]."""
    noise = np.random.default_rng(seed).normal(size=(n, size, size, 3))
    blurred = ndimage.gaussian_filter(noise, (0, size / 8, size / 8, 0))
    return np.float32(0.8 * blurred / np.abs(blurred).max())


# ------------------------------------------------------------------------------- resizing


@pytest.mark.parametrize(("old", "new"), SIDES)
@pytest.mark.parametrize(("kind", "mode"), [(BILINEAR, "bilinear"), (BICUBIC, "bicubic")])
def test_interpolation_is_torchs_without_antialiasing(kind, mode, old, new):
    torch = pytest.importorskip("torch")
    image = np.random.default_rng(0).normal(size=(old, old, 3)).astype(np.float32)
    canvas = jnp.full((13, 13, 3), 1e3).at[:old, :old].set(image)
    ours = resize_corner(canvas, matrix(kind, old, new, 1.0, 13))[:new, :new]
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(image).permute(2, 0, 1)[None], size=(new, new), mode=mode
    )
    np.testing.assert_allclose(ours, theirs[0].permute(1, 2, 0), atol=2e-5)


@pytest.mark.parametrize(("old", "new"), SIDES)
def test_area_is_the_mean_of_what_a_pixel_covers(old, new):
    """Witness: differences of the integral of a step function, at the new pixels' borders."""
    values = np.random.default_rng(0).normal(size=old)
    integral = np.concatenate([[0], np.cumsum(values)])
    borders = np.linspace(0, old, new + 1)
    expected = np.diff(np.interp(borders, np.arange(old + 1), integral)) * new / old
    weights = np.asarray(matrix(AREA, old, new, 1.0, 13))
    np.testing.assert_allclose(weights[:new, :old] @ values, expected, atol=1e-5)


def test_nearest_takes_points_of_the_blurred_image_at_the_new_pixels_centres():
    signal = ndimage.gaussian_filter1d(np.random.default_rng(0).normal(size=45), 1.0)
    blurred = ndimage.gaussian_filter1d(signal, 1.5, mode="reflect", radius=30)
    weights = np.asarray(matrix(NEAREST, 45, 9, 1.5, 45))
    np.testing.assert_allclose((weights[:9] @ signal)[1:-1], blurred[2::5][1:-1], atol=1e-5)
    sharp = np.asarray(matrix(NEAREST, 45, 9, 1e-3, 45))
    np.testing.assert_allclose(sharp[:9] @ signal, signal[2::5], atol=1e-6)


@pytest.mark.parametrize("kind", [BILINEAR, BICUBIC, AREA, NEAREST])
def test_every_resize_keeps_a_flat_image_and_looks_at_nothing_outside(kind):
    for old, new in SIDES:
        weights = np.asarray(matrix(kind, old, new, 0.3, 13))
        np.testing.assert_allclose(weights[:new].sum(1), 1.0, atol=1e-5)
        assert not weights[:, old:].any()
        assert np.isfinite(weights).all()


# ------------------------------------------------------------------------------- noise, order


def test_noise_is_independent_grey_or_correlated_and_as_strong_in_each_channel():
    columns = jax.random.normal(jax.random.key(0), (3, 3))
    mixings = [np.asarray(noise_mixing(kind, columns)) for kind in range(3)]
    independent, grey, correlated = (mixing.T @ mixing for mixing in mixings)
    np.testing.assert_allclose(independent, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(grey, np.ones((3, 3)), atol=1e-6)
    np.testing.assert_allclose(np.diag(correlated), 1.0, atol=1e-6)
    assert 0.1 < np.abs(correlated[0, 1]) < 0.99


def test_every_order_is_drawn_and_shrinks_twice():
    orders, sides = jax.jit(jax.vmap(lambda key: plan(key, 64, 16)))(keys(4000))
    orders, sides = np.asarray(orders), np.asarray(sides)
    assert (np.sort(orders, axis=1) == np.sort(STEPS)).all()
    assert len({tuple(order) for order in orders}) == 180  # 6! / (2! 2!)
    for kind in (BLUR, SHRINK, NOISE, JPEG):
        shares = (orders == kind).mean(0)
        np.testing.assert_allclose(shares, STEPS.count(kind) / 6, atol=0.04)
    shrinkings = np.cumsum(orders == SHRINK, axis=1)
    assert (sides[shrinkings == 0] == 64).all()
    assert (sides[shrinkings == 2] == 16).all()
    between = sides[shrinkings == 1]
    assert between.min() == 8 and between.max() in (63, 64)  # factors 1 to 2 * 64 / 16


# ------------------------------------------------------------------------------- the whole


def test_an_example_depends_on_its_own_key_and_image_alone():
    x = smooth(N, 24)
    together = degrade(keys(N), x, 12, BSRGAN)
    assert together.shape == (N, 12, 12, 3) and together.dtype == x.dtype
    others = keys(N, seed=7).at[2].set(keys(N)[2])
    again = degrade(others, jnp.roll(x, 1, axis=0).at[2].set(x[2]), 12, BSRGAN)
    np.testing.assert_array_equal(together[2], again[2])
    assert not np.allclose(together[3], again[3], atol=0.02)


def test_what_comes_out_are_levels_of_an_eight_bit_image():
    low = np.asarray(degrade(keys(N), 3 * smooth(N, 24), 12, BSRGAN))
    assert np.abs(low).max() <= 1
    np.testing.assert_allclose((low + 1) * 127.5, np.round((low + 1) * 127.5), atol=1e-4)


def test_a_flat_image_stays_flat_in_any_order_without_noise():
    flat = jnp.broadcast_to(jnp.asarray([90, 128, 201]) / 127.5 - 1, (N, 24, 24, 3))
    low = degrade(keys(N, seed=3), flat, 12, GENTLE)
    np.testing.assert_allclose(low, flat[:, :12, :12], atol=2.1 / 127.5)  # JPEG rounds colours


def test_gentle_degradation_is_downsampling():
    x = smooth(N, 24)
    low = degrade(keys(N), x, 12, GENTLE)
    plain = x.reshape(N, 12, 2, 12, 2, 3).mean((2, 4))
    assert np.abs(low - plain).mean() < 0.06
    assert np.abs(low.mean((1, 2)) - x.mean((1, 2))).max() < 0.02


def test_nothing_shifts():
    """Turning a ramp by half a circle negates it; a shift by half a pixel would add 0.07."""
    ramp = jnp.broadcast_to(jnp.linspace(-0.8, 0.8, 24)[None, None, :, None], (N, 24, 24, 3))
    for x in (ramp, ramp.transpose(0, 2, 1, 3)):
        low = degrade(keys(N, seed=5), x, 12, GENTLE)
        np.testing.assert_allclose(low, -low[:, ::-1, ::-1], atol=0.03)


def test_the_original_ranges_destroy_more():
    x = smooth(N, 24)
    plain = x.reshape(N, 12, 2, 12, 2, 3).mean((2, 4))
    errors = [
        np.mean((degrade(keys(N), x, 12, settings) - plain) ** 2)
        for settings in (GENTLE, BSR(), BSRGAN)
    ]
    assert 1.5 * errors[0] < errors[1] and 1.5 * errors[1] < errors[2]


def test_bad_input_is_named():
    x, own = smooth(2, 8), keys(2)
    for call, words in [
        (lambda: bsr(own, x[:, :6], 4), r"got \(2, 6, 8, 3\), expected squares"),
        (lambda: bsr(own, x, 9), "low_size: got 9"),
        (lambda: bsr(own, x, 0), "low_size: got 0"),
        (lambda: bsr(own[:1], x, 4), r"keys.s shape: got \(1,\), expected \[2\]"),
        (lambda: bsr(jnp.zeros((2, 3), jnp.uint32), x, 4), "jax.random.split"),
        (lambda: bsr(own, x[..., :2], 4), r"expected \[any, any, any, 3\]"),
        (lambda: BSR(jpeg_quality=(0, 50)), r"BSR.jpeg_quality: got \(0, 50\)"),
        (lambda: BSR(noise_level=(3.0, 2.0)), "BSR.noise_level"),
        (lambda: BSR(blur_radius=(1.0, 2.5)), "BSR.blur_radius: got 1.0, expected an integer"),
        (lambda: BSR(jpeg_probability=1.5), "BSR.jpeg_probability: got 1.5"),
    ]:
        with pytest.raises(UserError, match=words):
            call()
