"""Shared settings of the test suite: CPU, and no silent broadcasting between ranks.

Programs are compiled without most of the compiler's optimisations: the networks are tiny, compiling
them is most of the work, and test_manipulate.py takes half its time. `make test-all` optimises.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # subprocesses inherit it
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
def no_curves():
    """Leave out the plots of runs of a few steps, which take longer than the steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unclip_jax.report.plot_metrics", lambda workdir: None)
        yield


@pytest.fixture
def optimised():
    """Compile as users do, where the last digits of many steps are compared."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
