"""Compiled programs are kept between processes, so that only the first one waits for them.

Commands ask for it; the library itself leaves JAX as it finds it. JAX's own settings go first:
JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false keeps nothing.

JAX lets the first of several processes alone write. That would leave the others to compile each
time what runs on their own devices alone (frozen text encoders, for instance), since the key of a
program names its devices, and on CPUs its process. So here each process writes: into a folder that
all share what no other would write, into one of its own everything.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import logging

from unclip_jax.common.files import default_cache_dir

LIMIT = 2**30  # bytes; the programs used longest ago go first
LEAST_SECONDS = 0.3  # what compiles sooner is not kept
_PART = 2**22  # bytes unpacked at a time


def use(shared: str | Path = "") -> None:
    """Keep compiled programs in the cache folder from now on, unless JAX was told what to keep.

    Args:
        shared: where there are several processes, the folder or URL that all of them see and that
            programs are kept in, without a limit; "" for each host's own cache folder.
    """
    several = jax.distributed.is_initialized() and jax.process_count() > 1
    chosen = jax.config.jax_compilation_cache_dir is not None
    if several:
        # CPUs' keys name the process, so that no two write the same.
        _let_all_write(everything=not (chosen or shared) or jax.default_backend() == "cpu")
    if chosen:
        return
    if shared and several:
        where = f"{shared}/compiled/{_kind()}"
        if "://" not in where:
            where = str(Path(where).expanduser().absolute())
            if jax.process_index() == 0:
                _drop_torn(Path(where))
        jax.config.update("jax_compilation_cache_dir", where)
        jax.config.update("jax_compilation_cache_max_size", -1)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
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
    return default_cache_dir() / "compiled" / _kind()


def _kind() -> str:
    """What stands for this kind of processor."""
    kind = f"{platform.machine()} {platform.processor()} {_features()}"
    return hashlib.sha256(kind.encode()).hexdigest()[:8]


def _drop_torn(folder: Path) -> None:
    """Remove programs that a killed process wrote in part: JAX would never write them again."""
    for program in folder.glob("*-cache"):
        if not _is_whole(program):
            program.unlink(missing_ok=True)


def _is_whole(program: Path) -> bool:
    """Whether what JAX packed, by zstandard where it is there, comes to its end."""
    try:
        content = program.read_bytes()
        if content[:4] == b"\x28\xb5\x2f\xfd":
            import zstandard

            unpacking: Any = zstandard.ZstdDecompressor().decompressobj()
        else:
            unpacking = zlib.decompressobj()
        for start in range(0, len(content), _PART):
            unpacking.decompress(content[start : start + _PART])
        return unpacking.eof
    except ImportError:
        return True
    except Exception:  # zstandard has errors of its own
        return False


@functools.cache
def _let_all_write(everything: bool) -> None:
    """Let this process write, though it is not the first: everything, or what is of its devices.

    JAX has no setting for it; where its insides are others than expected, it stays as it is.
    """
    keys_name_devices = jax.default_backend() != "gpu"
    if jax.process_index() == 0 or not (everything or keys_name_devices):
        return
    try:
        from jax._src import compilation_cache, compiler

        compiles, put = compiler._compile_and_write_cache, compilation_cache.put_executable_and_time
    except (ImportError, AttributeError):
        logging.warning("jax %s: each process but the first compiles its own programs anew at"
                        " every start", jax.__version__)  # fmt: skip
        return
    compiler._compile_and_write_cache = _writing(compiles, put, everything)


def _writing(
    compiles: Callable[..., Any], put: Callable[..., Any], everything: bool
) -> Callable[..., Any]:
    """JAX's function that compiles a program, and keeps it, as `_let_all_write` says."""

    @functools.wraps(compiles)
    def compile_and_write(
        backend: Any, module: Any, devices: Any, options: Any, callbacks: Any, name: str, key: str
    ) -> Any:
        began = time.monotonic()
        executable = compiles(backend, module, devices, options, callbacks, name, key)
        took = time.monotonic() - began
        own = all(device.process_index == jax.process_index() for device in devices)
        if (
            (own or everything)
            and not callbacks
            and took >= jax.config.jax_persistent_cache_min_compile_time_secs
        ):
            try:
                put(key, name, executable, backend, int(took))
            except Exception as error:  # the program is right all the same
                logging.warning("compiled programs: %s is not kept (%s)", name, error)
        return executable

    return compile_and_write


def _features() -> str:
    """What the processor can do, as Linux lists it; "" elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
