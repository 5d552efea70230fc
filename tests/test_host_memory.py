"""Freed memory is kept where JAX computes on a CPU, and only there."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

# A program with a temporary of 150 MB, on one of JAX's threads, which is quick even unoptimised.
# Pages that were not there before are counted at each call; the first calls, which find the memory,
# are not the least.
SCRIPT = """
import resource
import jax, jax.numpy as jnp
from unclip_jax import host_memory

done = host_memory.keep_freed()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

program = jax.jit(lambda x, y: (x @ y) @ y.T)
x, y = jnp.ones((12_000, 8)), jnp.ones((8, 3_000))
found = []
for _ in range(6):
    before = faults()
    program(x, y).block_until_ready()
    found.append(faults() - before)
flags = [line.split() for line in open("/proc/self/smaps") if line.startswith("VmFlags")]
print(done, min(found), any("hg" in names for names in flags))
"""

LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")  # "[always] madvise never"

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="the C library is not glibc"
)


def ran(script: str = SCRIPT, **environment: str) -> tuple[bool, int, bool]:
    """Whether memory is kept, how many pages were new, whether some are to be large."""
    told = ("MALLOC_", "GLIBC_TUNABLES")
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={k: v for k, v in os.environ.items() if not k.startswith(told)} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    kept, faults, advised = done.stdout.split()
    return kept == "True", int(faults), advised == "True"


def assert_as_found(kept: bool, faults: int, advised: bool) -> None:
    """Nothing is kept, and nothing asks for large pages."""
    assert not kept and not advised
    if LARGE_PAGES.exists() and "[always]" not in LARGE_PAGES.read_text():
        assert faults > 10_000


def test_a_programs_temporaries_are_memory_that_was_there_before():
    kept, faults, advised = ran()
    assert kept and faults < 1000
    assert advised or not LARGE_PAGES.exists()


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_what_the_environment_says_of_malloc_is_left(name):
    assert_as_found(*ran(**{name: "" if name == "GLIBC_TUNABLES" else "4"}))


def test_other_devices_are_left():
    on_tpu = SCRIPT.replace("done =", "jax.default_backend = lambda: 'tpu'\ndone =")
    assert_as_found(*ran(on_tpu))
