"""The folder of a run: on a disk, or in a bucket.

In a bucket lie the checkpoints, which Orbax writes there, and copies of all else, which is written
to a folder here and sent from time to time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from unclip_jax.common import extras
from unclip_jax.common.files import default_cache_dir, remove_leftovers, write_text
from unclip_jax.data.shards.storage import is_address
from unclip_jax.errors import UserError, one_line, wrong
from unclip_jax.parallel import distributed
from unclip_jax.training import lock

WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before each further attempt
EVERY = 30.0  # seconds between two looks at what is new
# What a run that goes on elsewhere needs of its former lives.
_NEEDED = ("metrics.jsonl", "changes.jsonl", "goodput.json", "run.json")
_STAYS = ("lock",)

T = TypeVar("T")


def patiently(call: Callable[[], T], what: str) -> T:
    """`call()`, tried again after a failure that may pass, which is told in a line.

    Raises:
        UserError: it failed every time.
        FileNotFoundError, PermissionError: as they come; they do not pass.
    """
    for wait in (*WAITS, None):
        try:
            return call()
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:
            if wait is None:
                do = "look at the network and the rights, then run the same command again"
                raise UserError(f"{what}: failed ({one_line(error)}); {do}") from error
            again = f"trying again in {wait:g} s"
            print(f"{what}: failed ({one_line(error)}); {again}", file=sys.stderr, flush=True)
            time.sleep(wait)
    raise AssertionError


def holder(workdir: Path) -> str | None:
    """The process that trains in a workdir, in words; None if none does.

    In a bucket that takes as long as one may be silent.
    """
    if is_address(workdir):
        return lock.lease_holder(Bucket(str(workdir)))
    return lock.holder(workdir)


class Workdir:
    """Where a run writes.

    Attributes:
        name: as it was given.
        local: the folder here, of all but the checkpoints.
        bucket: the folder in a bucket; None where `local` is all.
    """

    def __init__(self, workdir: str | Path) -> None:
        """Make the folder here; UserError if it cannot be, or if no such bucket can be written."""
        self.name, self.bucket = str(workdir), None
        if is_address(workdir):
            self.bucket = Bucket(self.name)
            key = hashlib.sha256(self.name.rstrip("/").encode()).hexdigest()[:16]
            self.local = default_cache_dir() / "workdirs" / key
        elif self.name == "":
            raise wrong("workdir", self.name, "a folder, or gs://BUCKET/FOLDER")
        else:
            self.local = Path(workdir).expanduser().absolute()
        try:
            self.local.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"workdir {str(self.local)!r}: cannot be created ({error})") from error

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        if self.bucket is None:
            return self.local / "checkpoints"
        from etils import epath

        return epath.Path(self.name) / "checkpoints"

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """It is this run's alone, and free of what killed ones left. All processes call it.

        UserError if another run has it.
        """
        if not distributed.is_lead():
            yield
            return
        with contextlib.ExitStack() as stack:
            if self.bucket is not None:
                stack.enter_context(self.bucket.lease())
                self.bucket.fetch(self.local)
                stack.enter_context(self.bucket.mirrored(self.local))
            else:
                stack.enter_context(lock.hold(self.local))
            for folder in (self.local, self.local / "previews"):
                remove_leftovers(folder)
            yield

    def check(self) -> None:
        """Raise UserError if another run has taken it over."""
        if self.bucket is not None:
            self.bucket.check()

    def run(self) -> str:
        """A name that this run has in all its lives, and no other run. All processes call it."""
        path, name = self.local / "run.json", None
        if distributed.is_lead():
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                name = str(json.loads(path.read_text(encoding="utf-8"))["run"])
            if not name:
                name = secrets.token_hex(8)
                write_text(path, json.dumps({"run": name}) + "\n")
                sent(self)
        return distributed.gather(name)[0]


class Bucket:
    """A folder of a bucket, of which one process writes all that is no checkpoint."""

    def __init__(self, url: str) -> None:
        """Find the store; UserError where Orbax writes to no such one, or what opens it lacks."""
        scheme, _, rest = url.partition("://")
        if scheme != "gs" or not rest.strip("/"):
            do = "mount other stores as a folder, see docs/pods.md"
            raise wrong("workdir", url, "a folder, or gs://BUCKET/FOLDER", do)
        self.url = url.rstrip("/")
        try:
            import fsspec

            self._files = fsspec.filesystem("gs")
        except ImportError as error:
            install = f"install what reads it: {extras.how('gcs')}"
            raise UserError(f"workdir {url!r}: {one_line(error)}; {install}") from error
        self._lease: lock.Lease | None = None
        self._sent: dict[str, tuple[int, int]] = {}
        self._sending = threading.Lock()

    def _path(self, name: str) -> str:
        return f"{self.url}/{name}"

    def read(self, name: str) -> bytes | None:
        """What a file holds; None if there is none."""
        with contextlib.suppress(FileNotFoundError):
            self._files.invalidate_cache()
            return patiently(lambda: self._files.cat_file(self._path(name)), self._path(name))
        return None

    def write(self, name: str, content: bytes) -> None:
        """Write a file, whole."""
        path = self._path(name)
        patiently(lambda: self._files.pipe_file(path, content), path)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            patiently(lambda: self._files.rm_file(self._path(name)), self._path(name))

    @contextlib.contextmanager
    def lease(self) -> Iterator[None]:
        """It is this process's alone, or UserError."""
        self._lease = lock.Lease(self, self.url)
        with self._lease:
            yield

    def check(self) -> None:
        """Raise UserError if another run has taken it over."""
        if self._lease is not None:
            self._lease.check()

    def fetch(self, local: Path) -> None:
        """Bring what an earlier life wrote, and nothing of another run, into a folder here."""
        found = {name: self.read(name) for name in _NEEDED}
        if not any(found.values()):
            shutil.rmtree(local, ignore_errors=True)
        local.mkdir(parents=True, exist_ok=True)
        for name, content in found.items():
            if content is not None:
                (local / name).write_bytes(content)
            else:
                (local / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def mirrored(self, local: Path) -> Iterator[None]:
        """Send what is new in a folder here every now and then, and at last."""
        over = threading.Event()

        def keep() -> None:
            while not over.wait(EVERY):
                with contextlib.suppress(UserError, OSError):  # told; sent at last, or told again
                    self.send(local)

        thread = threading.Thread(target=keep, name="mirror of the workdir", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self.send(local)

    def send(self, local: Path, names: Sequence[str] = ()) -> None:
        """Send the files of a folder here that are new or have changed; or of these names alone."""
        with self._sending:
            for path in [local / name for name in names] or sorted(local.rglob("*")):
                name = path.relative_to(local).as_posix()
                if not path.is_file() or name in _STAYS or path.name.endswith(".tmp"):
                    continue
                stat = path.stat()
                state = (stat.st_mtime_ns, stat.st_size)
                if self._sent.get(name) != state:
                    self.write(name, path.read_bytes())
                    self._sent[name] = state


def sent(workdir: Workdir) -> None:
    """Send what a run that goes on needs to the bucket, if the workdir is in one; the lead does."""
    if workdir.bucket is not None and distributed.is_lead():
        workdir.bucket.send(workdir.local, _NEEDED)
