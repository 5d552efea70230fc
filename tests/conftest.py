"""Shared settings of the test suite: CPU, and no silent broadcasting between ranks.

Programs are compiled without most of the compiler's optimisations: the networks are tiny, compiling
them is most of the work, and test_manipulate.py takes half its time. `make test-all` optimises.
Commands leave malloc as it is, since what makes computing faster makes compiling slower. Workers
share the cores, so PyTorch has one thread in each. Tracing makes garbage by the million and little
of it in cycles: it is looked for less often.
"""

import gc
import os
from pathlib import Path

from tests.xla_flags import xla_flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # subprocesses inherit it
os.environ.setdefault("XLA_FLAGS", xla_flags())
os.environ.setdefault("GLIBC_TUNABLES", "")  # see unclip_jax.parallel.cpu.memory
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A program that another process is just writing into the cache is compiled instead.
os.environ.setdefault("PYTHONWARNINGS", "ignore:Error reading persistent compilation cache")

import jax
import pytest

from tests import compiling

jax.config.update("jax_numpy_rank_promotion", "raise")
gc.set_threshold(20_000, 20, 20)

# Files that take half a minute go first, so that no worker is left alone with one at the end.
LONG = (
    "test_commands", "test_app", "test_doctor", "test_wrong_inputs", "test_classifier",
    "test_sample_tasks", "test_stages", "test_sharding", "test_canvas", "test_manipulate",
    "test_karlo_training", "test_convert_karlo", "test_multihost", "test_kandinsky_networks",
    "test_kandinsky_pipeline", "test_cpu_devices", "test_guidance_once", "test_export", "test_box",
    "test_app_browser", "test_ar_prior", "test_related", "test_training", "test_faults",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Order the files; within a file nothing changes."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


GROWTH = 2**29
_resident = 0  # bytes, when programs were last dropped


def resident() -> int:
    """Bytes of memory that this process holds; where that is not told, more at every call."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return _resident + GROWTH


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Drop compiled programs after a file, once half a gigabyte of them has piled up.

    The next file finds those that every file needs.
    """
    global _resident
    yield
    if resident() >= _resident + GROWTH:
        jax.clear_caches()
        _resident = resident()


@pytest.fixture(scope="module")
def no_curves():
    """Leave out the plots of runs of a few steps, which take longer than the steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unclip_jax.training.writers.plot_metrics", lambda workdir: None)
        yield


@pytest.fixture
def optimised():
    """The whole test compiles as users do; see `compiling.optimised`."""
    with compiling.optimised():
        yield
