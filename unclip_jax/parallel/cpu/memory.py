"""Memory of the host: weights that devices share, and freed memory that is kept for the next step.

**Shared weights.** All devices of a CPU read one copy of what each is to hold whole.

**Kept memory.** XLA's programs on a CPU allocate their temporaries anew at every call, gigabytes
for a U-Net's training step. By default glibc takes them from the system and gives them back at
once, and each page of 4 KiB is zeroed at its first touch. `keep_freed` keeps them, in pages of 2
MiB. It is for what computes for long, `train.py` above all, as compiling takes longer then: its
threads wait for each other at the one heap that can grow. The library itself leaves the process as
it finds it.

**After a compilation** that heap is put in order. Its free pages go back to the system. A compiler
leaves some 80,000 small free blocks, through which glibc would look at each allocation: they are
allocated, and never used. And one free block is made for allocations of middling size, which would
otherwise each break a piece from what one large temporary left, so that the next did not fit.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from typing import Any, TypeVar
from xml.etree import ElementTree

import jax
import numpy as np
from jax.sharding import NamedSharding

from unclip_jax.parallel import sharding

Tree = TypeVar("Tree")

# glibc's malloc.h: one heap for all threads, as only the first one grows beyond 64 MiB; no block
# of the system's own; nothing given back; and grown by 64 MiB at a time.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_SETTINGS = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 64 * 2**20))

_MADV_HUGEPAGE = 14  # Linux's mman.h
LARGE_PART = 2  # one part in so many of the machine's memory may be in large pages

# Holes of these sizes glibc keeps in lists of several sizes, which it goes through one by one.
_HOLE_BYTES = range(1024, 2**19)
_HEADER_BYTES, _SIZE_UNIT = 8, 16  # of a block, on machines of 64 bits
_MIDDLING_BYTES = 2**28
_COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's event
LONG_SECONDS = 1.0  # a compilation after which the heap is put in order


def total_bytes() -> int:
    """Bytes of the machine's memory; the largest int64 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not POSIX: as if there were enough
        return np.iinfo(np.int64).max


# ---------------------------------------------------------------- shared weights


def place(tree: Tree, shardings: Any) -> Tree:
    """`sharding.place`, by which all of a CPU's devices share what each is to hold whole.

    For weights that are read. A step that is given them to write over (`donate_argnums`) gives each
    device a copy of its own.
    """
    return jax.tree.map(_placed, tree, shardings)


def _placed(x: Any, where: NamedSharding) -> jax.Array:
    first = where.mesh.devices.flat[0]
    if first.platform != "cpu" or not (where.is_fully_replicated and where.is_fully_addressable):
        return sharding.place(x, where)
    own = jax.device_put(x, first, may_alias=False)
    return jax.device_put(np.asarray(own), where)  # of the host's memory, so nothing is copied


# ---------------------------------------------------------------- kept memory


def keep_freed() -> bool:
    """Keep freed memory in this process from now on, where JAX computes on a CPU.

    Call it before anything asks for devices: JAX's threads hold to the heap that they find. Nothing
    is done without glibc, or where the environment says how malloc is to work (MALLOC_*,
    GLIBC_TUNABLES). On other devices nothing is kept, and threads share a heap.

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


def _after_compiling(event: str, seconds: float, **_: object) -> None:
    if event == _COMPILED and seconds > LONG_SECONDS:
        _put_in_order(_glibc())


def _put_in_order(libc: ctypes.CDLL) -> None:
    """Give back what is free, set the holes aside, and make room for middling allocations."""
    holes = _holes(libc)
    libc.malloc_trim(0)
    for size, count in reversed(holes):  # the largest first
        for _ in range(count):
            libc.malloc(size)
    _use_large_pages(libc)  # where the heap was cut off
    block = libc.malloc(_MIDDLING_BYTES)
    libc.malloc(1)  # what comes after the block stays apart from it
    libc.free(block)


def _use_large_pages(libc: ctypes.CDLL) -> None:
    """Ask for large pages where the heap will grow: in all of a block that is freed untouched.

    Where there is no room for such a block, or no such pages, the heap stays as it is.
    """
    size, page = total_bytes() // LARGE_PART, os.sysconf("SC_PAGE_SIZE")
    block = libc.malloc(size)
    if block:
        start = -(-block // page) * page
        libc.madvise(start, (block + size) // page * page - start, _MADV_HUGEPAGE)
        libc.free(block)


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


@functools.cache
def _glibc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    libc.malloc.argtypes, libc.malloc.restype = [size], pointer
    libc.free.argtypes = [pointer]
    libc.malloc_trim.argtypes = [size]
    libc.madvise.argtypes = [pointer, size, ctypes.c_int]
    libc.open_memstream.argtypes, libc.open_memstream.restype = [pointer, pointer], pointer
    libc.malloc_info.argtypes = [ctypes.c_int, pointer]
    libc.fclose.argtypes = [pointer]
    return libc
