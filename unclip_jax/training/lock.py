"""One run at a time on a workdir: a lock that a killed process leaves behind does not hold."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from unclip_jax.errors import UserError


@contextlib.contextmanager
def hold(workdir: Path) -> Iterator[None]:
    """Hold `workdir`; UserError if another process does, or the file system cannot lock.

    The kernel lets go when the process ends, however it ends. It is a POSIX record lock, where
    filelock takes `flock`: what a killed run has started does not hold it, and `holder` needs no
    more than to read.
    """
    path = workdir / "lock"
    with path.open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise UserError(f"{path}: cannot be locked ({error}); use a local disk") from error
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(
                f"workdir {str(workdir)!r}: in use by {holder}; wait for that run, stop it, or"
                " choose another workdir"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def holder(workdir: Path) -> str | None:
    """The process that holds `workdir`, in words; None if none does."""
    path = workdir / "lock"
    if not path.is_file():
        return None
    with path.open() as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return file.read().strip() or "another process"
    return None
