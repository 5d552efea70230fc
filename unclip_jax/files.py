"""Files that are either the old one or the new one, never half of either; where caches go."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def default_cache_dir() -> Path:
    """`$UNCLIP_JAX_CACHE`, else `~/.cache/unclip_jax`."""
    return Path(os.environ.get("UNCLIP_JAX_CACHE") or "~/.cache/unclip_jax").expanduser()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; moved over `path` if the block succeeds.

    The move is atomic: whoever reads `path`, or kills the writer, finds a whole file. If the
    block raises, the temporary file is removed and `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left of `replacing`; only for whoever alone writes in `folder`."""
    for path in folder.glob(".*.[0-9]*.tmp"):
        path.unlink(missing_ok=True)
