"""Files that are either the old one or the new one, never half of either; where caches go."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from unclip_jax.errors import UserError


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


def write_text(path: Path, text: str) -> None:
    """Make `path` a UTF-8 file that holds `text`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_place(flag: str, path: Path) -> None:
    """Raise UserError, which names the flag, unless a file can be written at `path`.

    The folder that it is to lie in is made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} '{path}': cannot be written ({error}); give another") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(
            f"{flag} '{path}': cannot be written; give the name of a file in a folder that you may"
            " write to"
        )


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left of `replacing`; only for whoever alone writes in `folder`."""
    for path in folder.glob(".*.[0-9]*.tmp"):
        path.unlink(missing_ok=True)
