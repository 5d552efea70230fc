"""Freed memory is kept where JAX computes on a CPU, and only there."""

import os
import platform
import subprocess
import sys

import pytest

from unclip_jax import host_memory

SCRIPT = """
import ctypes, sys
from unclip_jax import host_memory

class Mallinfo(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype, libc.malloc.restype = Mallinfo, ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]

def of_the_system():
    "Blocks that malloc has from the system for one allocation each, while there is a large one."
    pointer = libc.malloc(2**28)
    blocks = libc.mallinfo2().hblks
    libc.free(pointer)
    return blocks

before = of_the_system()
done = host_memory.keep_freed()
after = of_the_system()
print(done, after - before, libc.mallinfo2().fordblks >= 2**28)
"""


def ran(**environment):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")


@glibc
def test_a_large_block_comes_from_the_heap_and_stays_there():
    assert ran() == ["True", "-1", "True"]


@glibc
def test_what_the_environment_says_of_malloc_is_left():
    assert ran(MALLOC_ARENA_MAX="4") == ["False", "0", "False"]


def test_other_devices_are_left(monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "tpu")
    assert not host_memory.keep_freed()
