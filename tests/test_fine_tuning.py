"""Starting from a trained stage that is to have more than it had."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from unclip_jax import stages
from unclip_jax.errors import UserError
from unclip_jax.training.fine_tuning import Origin
from unclip_jax.weights import folder as model_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny upsampler, saved."""
    out = tmp_path_factory.mktemp("fine_tuning") / "upsampler"
    about = {"stage": stages.describe(tiny.UPSAMPLER)}
    model_folder.save_stage(out, params=tiny.params(tiny.UPSAMPLER), description=about)
    return out


@pytest.mark.parametrize("dtype", ["", "bfloat16"])
def test_a_new_head_over_pixels_changes_nothing_at_first(folder, dtype):
    origin = Origin.read(str(folder), {"kind": "upsampler", "model": {"pixel_channels": 4}})
    before = tiny.params(tiny.UPSAMPLER)
    params = origin.params(dtype)
    assert set(params["network"]) - set(before["network"]) == {"pixels"}
    assert {x.dtype for x in jax.tree.leaves(params["network"])} == {jnp.dtype(dtype or "float32")}
    assert np.any(params["network"]["pixels"]["conv_in"]["kernel"])
    for first, again in zip(
        jax.tree.leaves(params), jax.tree.leaves(origin.params(dtype)), strict=True
    ):
        np.testing.assert_array_equal(first, again)
    if dtype:
        return
    x, low = jax.random.normal(jax.random.key(0), (2, 2, 32, 32, 3))
    t = jnp.array([3, 900])
    found = tiny.call(origin.stage, "denoise", params, x, t, low)
    expected = tiny.call(tiny.UPSAMPLER, "denoise", before, x, t, low)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_head_that_was_trained_stays_as_it_is(folder, tmp_path):
    grown = Origin.read(str(folder), {"model": {"pixel_channels": 4}})
    about = {"stage": stages.describe(grown.stage)}
    model_folder.save_stage(tmp_path / "grown", params=grown.params(), description=about)
    for channels in (0, 8):
        with pytest.raises(
            UserError, match=rf"model\.pixel_channels is {channels}, but there 4; leave out"
        ):
            Origin.read(str(tmp_path / "grown"), {"model": {"pixel_channels": channels}})
    assert Origin.read(str(tmp_path / "grown"), {}).stage == grown.stage
