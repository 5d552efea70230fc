"""Memory that a program frees on a CPU is kept for what it allocates next.

XLA's CPU programs allocate their temporaries anew at every call. Large ones glibc takes from the
system each time and gives back at once, and the system zeroes every page of them again, which costs
a decoder's step a tenth of its time (docs/performance.md). Commands that compute ask for this; the
library itself leaves the process as it finds it.
"""

from __future__ import annotations

import ctypes
import os
import platform

import jax

# glibc's malloc.h, and values for each: no block of its own from the system, nothing given back,
# and the heap grown by 64 MiB at a time.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_SETTINGS = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 64 * 2**20))


def keep_freed() -> bool:
    """Keep freed memory in this process from now on, where JAX computes on a CPU.

    The process then holds the most that it ever held. Nothing is done on other devices, without
    glibc, or where the environment says how malloc is to work (MALLOC_*, GLIBC_TUNABLES).

    Returns:
        Whether anything was set.
    """
    told = "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ)
    if told or platform.libc_ver()[0] != "glibc" or jax.default_backend() != "cpu":
        return False
    libc = ctypes.CDLL(None)
    return all([libc.mallopt(name, value) == 1 for name, value in _SETTINGS])
