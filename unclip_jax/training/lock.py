"""One run at a time on a workdir: a lock that a killed process leaves behind does not hold.

On a disk the kernel keeps it. In a bucket it is a file that its holder writes anew every few
seconds: one that no longer changes is nobody's.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, Self

from unclip_jax.errors import UserError

BEAT, PATIENCE = 10.0, 35.0  # seconds between two beats of a lease, and until it counts as dead
LOCK = "lock"


@contextlib.contextmanager
def hold(workdir: Path) -> Iterator[None]:
    """Hold `workdir`; UserError if another process does, or the file system cannot lock.

    The kernel lets go when the process ends, however it ends. It is a POSIX record lock, where
    filelock takes `flock`: what a killed run has started does not hold it, and `holder` needs no
    more than to read.
    """
    path = workdir / LOCK
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
    path = workdir / LOCK
    if not path.is_file():
        return None
    with path.open() as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return file.read().strip() or "another process"
    return None


class Store(Protocol):
    """Where a lease lies."""

    def read(self, name: str) -> bytes | None:
        """What a file holds; None if there is none."""

    def write(self, name: str, content: bytes) -> None:
        """Write a file, whole."""

    def remove(self, name: str) -> None:
        """Remove a file."""


class Lease:
    """The lock of a folder in a bucket; use as a context manager."""

    def __init__(self, store: Store, name: str) -> None:
        """Hold nothing yet; `name` is the folder's, for messages."""
        self._store, self._name = store, name
        self._token, self._beats = secrets.token_hex(8), 0
        self._over, self._lost = threading.Event(), ""

    def __enter__(self) -> Self:
        """Take it, from whoever is dead; UserError if another process holds it."""
        if (holder := lease_holder(self._store)) is not None:
            raise UserError(
                f"workdir {self._name!r}: in use by {holder}; wait for that run, stop it, or choose"
                " another workdir"
            )
        self._beat()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *raised: Any) -> None:
        """Let go."""
        self._over.set()
        self._thread.join()
        if not self._lost:
            with contextlib.suppress(UserError, OSError):
                self._store.remove(LOCK)

    def check(self) -> None:
        """Raise UserError if another run has taken it, thinking that this one was dead."""
        if self._lost:
            raise UserError(
                f"workdir {self._name!r}: {self._lost} has taken it over, as this run was not heard"
                f" of for {PATIENCE:g} s; stop one of the two"
            )

    def _keep(self) -> None:
        while not self._over.wait(BEAT):
            with contextlib.suppress(UserError, OSError):  # told; the next beat may pass
                found = _found(self._store)
                if found and found["token"] != self._token:
                    self._lost = found["holder"]
                    return
                self._beat()

    def _beat(self) -> None:
        self._beats += 1
        beat = {
            "holder": f"process {os.getpid()} on {socket.gethostname()}",
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "token": self._token,
            "beat": self._beats,
        }
        self._store.write(LOCK, json.dumps(beat).encode())


def lease_holder(store: Store) -> str | None:
    """The process that holds a lease, in words; None if none does.

    A lease is watched until it changes, or has not for `PATIENCE` seconds.
    """
    found = _found(store)
    waited = time.monotonic()
    while found and not _is_dead(found) and time.monotonic() - waited < PATIENCE:
        time.sleep(BEAT / 10)
        now = _found(store)
        if now and now != found:
            return now["holder"]
        found = now
    return None


def _found(store: Store) -> dict[str, Any] | None:
    try:
        found = json.loads(store.read(LOCK) or b"null")
        return found if found is None or {"holder", "token"} <= found.keys() else None
    except (ValueError, AttributeError):
        return None


def _is_dead(found: dict[str, Any]) -> bool:
    """Whether the holder was a process of this host that is no more."""
    if found.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(found["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, OverflowError):
        return False
    return int(found["pid"]) == os.getpid()
