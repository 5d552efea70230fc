"""Memory of the host: how much there is, and that what a program frees on a CPU is kept.

XLA's CPU programs allocate their temporaries anew at every call, gigabytes of them for a U-Net's
training step. From glibc they come as blocks of the system's own, in pages of 4 KiB, each zeroed at
its first touch, and go back at once. Keeping them, in pages of 2 MiB, saves a tenth to a quarter of
such a step (docs/performance.md). XLA then takes longer to compile, for its threads wait for each
other at the one heap. So what computes for long asks for this, `train.py` above all; the library
itself leaves the process as it finds it.

A compiler leaves that heap full of holes, 80,000 of them after a U-Net's training step, and at
every larger allocation glibc looks through those of about the right size. So after each long
compilation the holes are set aside: allocated, their pages given back to the system, and never
used again.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from xml.etree import ElementTree

import jax
import numpy as np

# glibc's malloc.h: one heap for all threads, as only the first one grows beyond 64 MiB; no block
# of the system's own; nothing given back; and grown by 64 MiB at a time.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_SETTINGS = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 64 * 2**20))

_MADV_DONTNEED, _MADV_HUGEPAGE = 4, 14  # Linux's mman.h
LARGE_PART = 2  # one part in so many of the machine's memory may be in large pages

# Holes of these sizes glibc keeps in lists of several sizes, which it goes through one by one.
_HOLE_BYTES = range(1024, 2**19)
_HEADER_BYTES, _SIZE_UNIT = 8, 16  # of a block, on machines of 64 bits
_COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's event
LONG_SECONDS = 1.0  # a compilation after which holes are set aside


def keep_freed() -> bool:
    """Keep freed memory in this process from now on, where JAX computes on a CPU.

    Call it before anything asks for devices: JAX's threads hold to the heap that they find. The
    process then holds the most that it ever held, in large pages where Linux has them for those
    that ask, but for the holes that compilations leave. Nothing is done without glibc, or where the
    environment says how malloc is to work (MALLOC_*, GLIBC_TUNABLES). On other devices nothing is
    kept, and threads share a heap.

    Returns:
        Whether memory is kept.
    """
    told = "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ)
    if told or platform.libc_ver()[0] != "glibc":
        return False
    libc = _glibc()
    one_heap = libc.mallopt(_M_ARENA_MAX, 1) == 1  # before the next line, which makes threads
    if jax.default_backend() != "cpu":
        return False
    kept = all([libc.mallopt(name, value) == 1 for name, value in _SETTINGS])
    _use_large_pages(libc)
    jax.monitoring.register_event_duration_secs_listener(_after_compiling)
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
    size = total_bytes() // LARGE_PART
    block = libc.malloc(size)
    if block:
        _advise(libc, block, size, _MADV_HUGEPAGE)
        libc.free(block)


def _after_compiling(event: str, seconds: float, **_: object) -> None:
    if event == _COMPILED and seconds > LONG_SECONDS:
        _set_holes_aside(_glibc())


def _set_holes_aside(libc: ctypes.CDLL) -> None:
    """Allocate the heap's holes, the largest first, and give back the pages within them."""
    for size, count in reversed(_holes(libc)):
        for _ in range(count):
            block = libc.malloc(size)
            if block:
                _advise(libc, block, size, _MADV_DONTNEED)


def _holes(libc: ctypes.CDLL) -> list[tuple[int, int]]:
    """Of each list of free blocks in the first heap, the bytes that all have, and how many."""
    text, length = ctypes.c_void_p(), ctypes.c_size_t()
    stream = libc.open_memstream(ctypes.byref(text), ctypes.byref(length))
    if not stream:
        return []  # no memory for the text
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    heaps = ElementTree.fromstring(ctypes.string_at(text, length.value))
    libc.free(text)
    found = []
    for sizes in heaps.iterfind("heap[@nr='0']/sizes/size"):
        least, most, count = (int(sizes.get(name)) for name in ("from", "to", "count"))
        if least in _HOLE_BYTES and most in _HOLE_BYTES:
            found.append((least // _SIZE_UNIT * _SIZE_UNIT - _HEADER_BYTES, count))
    return found


def _advise(libc: ctypes.CDLL, block: int, size: int, advice: int) -> None:
    """Tell Linux about the whole pages in a block."""
    page = os.sysconf("SC_PAGE_SIZE")
    start, end = -(-block // page) * page, (block + size) // page * page
    if start < end:
        libc.madvise(start, end - start, advice)


@functools.cache
def _glibc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    libc.malloc.argtypes, libc.malloc.restype = [size], pointer
    libc.free.argtypes = [pointer]
    libc.madvise.argtypes = [pointer, size, ctypes.c_int]
    libc.open_memstream.argtypes, libc.open_memstream.restype = [pointer, pointer], pointer
    libc.malloc_info.argtypes = [ctypes.c_int, pointer]
    libc.fclose.argtypes = [pointer]
    return libc
