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
from unclip_jax.parallel.cpu import memory as host_memory

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

# Every second of many blocks is freed, before and after JAX says that it compiled for so long; then
# the bytes of the holes, the pages that the process holds, and whether the other blocks are whole.
HOLES = """
import ctypes, os, re, sys
import jax
from unclip_jax.parallel.cpu import memory as host_memory

assert host_memory.keep_freed()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.fopen.restype = ctypes.c_void_p, ctypes.c_void_p

def holes():
    path = os.path.join(sys.argv[1], "heap.xml")
    stream = ctypes.c_void_p(libc.fopen(path.encode(), b"w"))
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    first = open(path).read().split("</sizes>")[0]
    found = [map(int, x) for x in re.findall('from="(.+?)" to="(.+?)" total="(.+?)"', first)]
    return sum(total for least, most, total in found if least > 1024 and most < 2**19)

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

sizes = [1500 + 37 * i for i in range(3000)]
blocks = [libc.malloc(size) for size in sizes]
for i, (block, size) in enumerate(zip(blocks, sizes)):
    ctypes.memset(block, i % 251, size)
for block in blocks[::2]:
    libc.free(ctypes.c_void_p(block))
found = []
for seconds in (0.5, 2.0):
    jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", seconds)
    found += [holes(), resident()]
kept = zip(range(3000), blocks, sizes)
whole = all(ctypes.string_at(b, n) == bytes([i % 251]) * n for i, b, n in kept if i % 2)
print(*found, whole)
"""

LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")  # "[always] madvise never"

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="the C library is not glibc"
)


def printed(script: str, *argv: str, **environment: str) -> list[str]:
    """What it prints, in words, where the environment says nothing of malloc but this."""
    told = ("MALLOC_", "GLIBC_TUNABLES")
    done = subprocess.run(
        [sys.executable, "-c", script, *argv],
        env={k: v for k, v in os.environ.items() if not k.startswith(told)} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def ran(script: str = SCRIPT, **environment: str) -> tuple[bool, int, bool]:
    """Whether memory is kept, how many pages were new, whether some are to be large."""
    kept, faults, advised = printed(script, **environment)
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


def test_the_holes_of_a_long_compilation_are_set_aside_and_their_pages_given_back(tmp_path):
    *found, whole = printed(HOLES, str(tmp_path))
    before, held_before, after, held_after = map(int, found)
    assert before > 70e6 and after < before / 4
    assert held_before - held_after > 50e6
    assert whole == "True"


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_what_the_environment_says_of_malloc_is_left(name):
    assert_as_found(*ran(**{name: "" if name == "GLIBC_TUNABLES" else "4"}))


def test_other_devices_are_left():
    on_tpu = SCRIPT.replace("done =", "jax.default_backend = lambda: 'tpu'\ndone =")
    assert_as_found(*ran(on_tpu))
