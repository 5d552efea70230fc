"""Memory of the host: how much there is, and that what a program frees on a CPU is kept.

XLA's CPU programs allocate their temporaries anew at every call, gigabytes of them for a U-Net's
training step. From glibc they come as blocks of the system's own, in pages of 4 KiB, each zeroed at
its first touch, and go back at once. Keeping them, in pages of 2 MiB, saves a tenth to a quarter of
such a step (docs/performance.md). XLA then takes longer to compile, for its threads wait for each
other at the one heap. So what computes for long asks for this, `train.py` above all; the library
itself leaves the process as it finds it.
"""

from __future__ import annotations

import ctypes
import os
import platform

import jax
import numpy as np

# glibc's malloc.h: one heap for all threads, as only the first one grows beyond 64 MiB; no block
# of the system's own; nothing given back; and grown by 64 MiB at a time.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_SETTINGS = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 64 * 2**20))

_MADV_HUGEPAGE = 14  # Linux's mman.h
LARGE_PART = 2  # one part in so many of the machine's memory may be in large pages


def keep_freed() -> bool:
    """Keep freed memory in this process from now on, where JAX computes on a CPU.

    Call it before anything asks for devices: JAX's threads hold to the heap that they find. The
    process then holds the most that it ever held, in large pages where Linux has them for those
    that ask. Nothing is done without glibc, or where the environment says how malloc is to work
    (MALLOC_*, GLIBC_TUNABLES). On other devices nothing is kept, and threads share a heap.

    Returns:
        Whether memory is kept.
    """
    told = "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ)
    if told or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    one_heap = libc.mallopt(_M_ARENA_MAX, 1) == 1  # before the next line, which makes threads
    if jax.default_backend() != "cpu":
        return False
    kept = all([libc.mallopt(name, value) == 1 for name, value in _SETTINGS])
    _use_large_pages(libc)
    return one_heap and kept


def total_bytes() -> int:
    """Bytes of the machine's memory; the largest int64 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not POSIX: as if there were enough
        return np.iinfo(np.int64).max


def _use_large_pages(libc: ctypes.CDLL) -> None:
    """Ask for large pages where the heap will grow: all of a block that is freed untouched.

    Where there is no room for such a block, or no such pages, the heap stays as it is.
    """
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size, page = total_bytes() // LARGE_PART, os.sysconf("SC_PAGE_SIZE")
    block = libc.malloc(size)
    if block:
        start = -(-block // page) * page
        libc.madvise(start, (block + size - start) // page * page, _MADV_HUGEPAGE)
        libc.free(block)
