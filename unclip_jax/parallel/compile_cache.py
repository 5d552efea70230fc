"""Compiled programs are kept between processes, so that only the first one waits for them.

Commands ask for it; the library itself leaves JAX as it finds it. JAX's own settings go first:
JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false keeps nothing.
"""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

import jax

from unclip_jax.common.files import default_cache_dir

LIMIT = 2**30  # bytes; the programs used longest ago go first
LEAST_SECONDS = 0.3  # what compiles sooner is not kept


def use() -> None:
    """Keep compiled programs in the cache folder from now on, unless JAX was told what to keep."""
    if jax.config.jax_compilation_cache_dir is not None:
        return
    _drop_half_written(folder())
    jax.config.update("jax_compilation_cache_dir", str(folder()))
    jax.config.update("jax_compilation_cache_max_size", LIMIT)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)


def _drop_half_written(folder: Path) -> None:
    """Remove programs in the midst of whose writing a process was killed.

    JAX writes a program, then when it was last used. With one that lacks the latter, it cannot
    tell which to drop, and would keep no new program ever again. If the writer still lives, it only
    compiles once more.
    """
    for program in folder.glob("*-cache"):
        if not program.with_name(program.name.removesuffix("cache") + "atime").exists():
            program.unlink(missing_ok=True)


def folder() -> Path:
    """Where they are kept: apart for each kind of processor, which they are compiled for.

    A home folder may be shared by machines of several kinds.
    """
    kind = f"{platform.machine()} {platform.processor()} {_features()}"
    return default_cache_dir() / "compiled" / hashlib.sha256(kind.encode()).hexdigest()[:8]


def _features() -> str:
    """What the processor can do, as Linux lists it; "" elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
