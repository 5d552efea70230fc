"""Shared settings of the test suite: CPU, and no silent broadcasting between ranks."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=1")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Drop compiled programs after each file, which else pile up to gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def quickly():
    """Compile without optimising, and draw no curves: nearly all of a tiny run is those two."""
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unclip_jax.report.plot_metrics", lambda workdir: None)
        yield
    jax.config.update("jax_disable_most_optimizations", False)
