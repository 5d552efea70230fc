"""Where a store of embeddings lies."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import tempfile
from collections.abc import Iterator

from unclip_jax.common.files import replacing
from unclip_jax.data.shards import folders


class Folder(folders.Folder):
    """The folder of a store, here or remote; see the base class.

    Attributes:
        cache: where copies of what is in it, and what is found out about it, are kept.
    """

    def __init__(self, where: str | os.PathLike, cache_dir: str | os.PathLike):
        """Name the folder, a path or a URL, and the folder of caches."""
        super().__init__(where, "embeddings")
        digest = hashlib.sha256(str(self).encode()).hexdigest()[:16]
        self.cache = pathlib.Path(cache_dir).expanduser() / "remote_embeddings" / digest

    def file(self, name: str) -> pathlib.Path:
        """The path of a file here, or of a copy, another one when the remote file has changed."""
        if self.local:
            return self.local / name
        copy = self.cache / f"{hashlib.sha256(self.state(name).encode()).hexdigest()[:16]}-{name}"
        if not copy.exists():
            with replacing(copy) as temporary:
                self.fetch(name, temporary)
        return copy

    @contextlib.contextmanager
    def copied(self, name: str) -> Iterator[pathlib.Path]:
        """The path of a file here, or of a copy that is there for the moment."""
        if self.local:
            yield self.local / name
            return
        with tempfile.TemporaryDirectory(prefix="unclip_jax-") as folder:
            self.fetch(name, pathlib.Path(folder) / name)
            yield pathlib.Path(folder) / name
