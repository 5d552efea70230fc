"""Files that are either the old one or the new one, never half of either; where caches go."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from unclip_jax.errors import UserError


def default_cache_dir() -> Path:
    """`$UNCLIP_JAX_CACHE`, else `~/.cache/unclip_jax`."""
    return Path(os.environ.get("UNCLIP_JAX_CACHE") or "~/.cache/unclip_jax").expanduser()


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; its file takes the place of `path` in one move.

    Readers find the old file or the new one, whole. If the block raises, the old one stays. Any
    number of processes, of any number of hosts, may write at once.

    Args:
        path: of the file; its folder is made where there is none.
        durable: flush the file to the disk before the move, so that not even a power cut leaves
            the name without the content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        yield temporary
        if durable:
            flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Make `path` a UTF-8 file that holds `text`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def making_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, which becomes `path` if the block succeeds.

    Raises:
        OSError: it cannot be made, or a file or a folder with something in it is at `path` by then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what killed writers of a file or folder, or of any, left; for whoever alone writes."""
    for path in folder.glob(f".{glob.escape(name) if name else '*'}.[0-9]*.tmp"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Return once the disk has what was written to a file."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def check_place(flag: str, path: Path) -> None:
    """Raise UserError, which names the flag, unless a file can be written at `path`.

    The folder that it is to lie in is made, and an empty file tried in it.
    """
    _check_place(flag, path, path, "the name of a file in a folder that you may write to")


def check_folder(flag: str, folder: Path) -> None:
    """Raise UserError, which names the flag, unless files can be written in `folder`.

    It is made.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{flag} '{folder}': is a file; give a folder")
    _check_place(flag, folder, folder / "tried", "a folder that you may write to, or a new name")


def _check_place(flag: str, given: Path, path: Path, expected: str) -> None:
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        tried = _temporary(path)
        tried.touch()
        tried.unlink()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error  # without the name that was tried
        raise UserError(f"{flag} '{given}': cannot be written ({why}); give {expected}") from error
