"""The side files of a store, wherever they are: beside its shards, or made here where they lack."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping

from absl import logging

from unclip_jax.data.embeddings import entries
from unclip_jax.data.embeddings.folders import Folder
from unclip_jax.data.embeddings.shards import Meta
from unclip_jax.data.shards import folders, pages
from unclip_jax.data.shards.ranges import Damaged, Ranges


class Sides:
    """The side files of a store.

    Attributes:
        rows: the directory of the store, `pages.ROW` [shards].
        images: how many images each split has.
        cut: the shards that have another length than when they were written, and which.
    """

    def __init__(self, folder: Folder, meta: Meta, sizes: Mapping[str, int], ranges: Ranges):
        """Read the directory; make what an older version did not write.

        Raises:
            UserError: something is damaged, can't be read, or can't be written.
        """
        self._ranges, self._names = ranges, [entries.name_of(meta, s) for s in range(meta.shards)]
        if lacking := sum(name not in sizes for name in self._names):
            say = logging.info if folder.local else logging.warning  # a disk is read fast
            say(
                "embeddings: %s: %d of %d shards lack what lets single records be read: an older"
                " version wrote them. Each is read through once, and what is found is kept in"
                " cache_dir; the same unclip embed as then adds it to the store",
                folder, lacking, meta.shards,
            )  # fmt: skip
            here = folders.Folder(folder.cache / "contents", "cache_dir")
            self._names = _made_here(folder, meta, here)
            self._ranges = Ranges(here)
            content = _joined(here, self._names, here.sizes())
        elif entries.NAME in sizes:
            with entries.told_of_damage(folder, entries.NAME):
                content = folder.read(entries.NAME, 0, sizes[entries.NAME])
        else:
            content = _joined(folder, self._names, sizes)
        with entries.told_of_damage(folder, entries.NAME):
            self.rows, header, _ = pages.read_end(lambda a, b: content[a:b], len(content))
            if (len(self.rows), self.rows["pairs"].sum()) != (meta.shards, meta.count):
                raise Damaged("it is of another store")
        self.images = header["images"]
        lengths = ((s, sizes[meta.shard_name(s)], n) for s, n in enumerate(header["bytes"]))
        self.cut = {s: f"{now} bytes, expected {n}" for s, now, n in lengths if now != n}

    def read(self, shard: int, offset: int, size: int, crc: int) -> bytes:
        """Bytes of a shard's side file; may raise `Damaged` or `StorageError`."""
        return self._ranges.read(self._names[shard], offset, size, crc)


def _joined(folder: folders.Folder, names: list[str], sizes: Mapping[str, int]) -> bytes:
    return entries.joined(entries.read_ends(folder, names, sizes))


def _made_here(folder: Folder, meta: Meta, here: folders.Folder) -> list[str]:
    """The names of the side files in a folder of caches, once all are there.

    Processes that share it share the work: each goes through the shards in an order of its own.
    """
    shards = range(meta.shards)
    states = [folder.state(meta.shard_name(s)) for s in shards]
    names = [
        f"{hashlib.sha256(state.encode()).hexdigest()[:16]}-{entries.name_of(meta, s)}"
        for s, state in zip(shards, states, strict=True)
    ]
    there = here.names()
    missing = [s for s in shards if names[s] not in there]
    random.SystemRandom().shuffle(missing)
    for shard in missing:
        if not (here.local / names[shard]).exists():
            name = meta.shard_name(shard)
            with entries.told_of_damage(folder, name), folder.copied(name) as path:
                side = entries.of_shard(path, meta, shard, verify=True)
            here.write(names[shard], side)
    return names
