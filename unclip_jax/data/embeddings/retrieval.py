"""Embeddings as clip-retrieval and embedding-reader lay them out.

    img_emb/img_emb_0.npy     text_emb/text_emb_0.npy     metadata/metadata_0.parquet

Row n of each file is of the same pair. Nothing says which CLIP made them: whoever reads them
compares some with what its own CLIP makes of their captions.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from unclip_jax.common import extras
from unclip_jax.data import contents as digests
from unclip_jax.data import texts
from unclip_jax.data.embeddings import entries
from unclip_jax.data.embeddings.folders import Folder
from unclip_jax.data.embeddings.shards import FIRST, HELDOUT, VALID, Meta, Pair
from unclip_jax.data.records import BadRecord, is_heldout
from unclip_jax.data.shards import pages
from unclip_jax.errors import UserError, one_line, wrong

FOLDERS = ("img_emb", "text_emb", "metadata")
_NAMES = ("image_path", "key", "url", "__key__", "image_url")
_READ_TOGETHER = 8192  # pairs of a chunk
_LOOKED_AT = 256  # rows that say whether embeddings have length one


class _Part(NamedTuple):
    """The pairs of one file of each folder."""

    z_i: np.ndarray  # [n, e], mapped into memory
    z_t: np.ndarray
    names: list[str]
    captions: list[str]


class RetrievalStore:
    """Such a folder, as an `embeddings.store.EmbeddingStore`.

    Attributes:
        where: its path or URL.
        meta: what the files say; no fingerprint of a CLIP and no tokens.
        flags: uint8 `[N]`, as `embeddings.shards` has them; VALID where there is a caption.
    """

    def __init__(self, where: str | os.PathLike, cache_dir: str | os.PathLike, caption_key: str):
        """Read what the pairs are, and map their embeddings.

        Raises:
            UserError: files lack, can't be read, or don't fit each other; or the metadata have no
                captions.
        """
        folders = {name: Folder(f"{where}/{name}", cache_dir) for name in FOLDERS}
        self.where, self._caption_key = os.fspath(where), caption_key
        self._cache = pathlib.Path(cache_dir)
        files = {name: _numbered(folder.names()) for name, folder in folders.items()}
        numbers = sorted(files["img_emb"])
        for name, found in files.items():
            if sorted(found) != numbers or not numbers:
                more = ", made with --enable_text True" if name == "text_emb" else ""
                raise UserError(
                    f"embeddings: {self.where}: {len(numbers)} files in img_emb and {len(found)} in"
                    f" {name}; expected one in {', '.join(FOLDERS)} for each part{more}"
                )
        self._parts = []
        for number in numbers:
            paths = {name: str(folders[name].file(files[name][number])) for name in FOLDERS}
            self._parts.append(self._part(paths))
        self._ends = np.cumsum([len(part.names) for part in self._parts])
        self.meta = self._meta()
        self.flags = np.array([*self._flags()], np.uint8)
        self.remote = False  # what it reads are copies
        content = entries.of_flags(self.flags)
        rows, told, whole = pages.read_end(lambda a, b: content[a:b], len(content))
        self.images, directory = entries.images([told]), rows.tobytes()
        self.table = pages.Table(whole[None], lambda *place: directory)  # its pages are `flags`

    def __len__(self) -> int:
        """The number of pairs."""
        return self.meta.count

    def check(self, **expected: Any) -> None:
        """Compare fields of `meta` but the CLIP's fingerprint, which nothing here says."""
        expected.pop("clip_fingerprint", None)
        self.meta.check(self.where, "compute them again, or give the CLIP they are of", **expected)

    def valid(self, index: int) -> Pair:
        """The pair at `index`; `records.BadRecord` if it has no caption, or is not finite."""
        part = int(np.searchsorted(self._ends, index, "right"))
        found, row = self._parts[part], index - (int(self._ends[part - 1]) if part else 0)
        name, caption = found.names[row], found.captions[row]
        z_i, z_t = (np.asarray(z[row], np.float32) for z in (found.z_i, found.z_t))
        if not caption:
            raise BadRecord(f"{name}: no caption")
        if not (np.isfinite(z_i).all() and np.isfinite(z_t).all()):
            raise BadRecord(f"{name}: its embeddings are not finite")
        return Pair(index, int(self.flags[index]), name, caption, np.zeros(0, np.int32), z_i, z_t)

    def at(self, shard: int, page: int, row: int) -> Pair:
        """The pair that has a place, as an `EmbeddingStore` of one shard says it."""
        return self.valid(entries.PAIRS * page + row)

    def flags_of(self, shard: int, page: int) -> np.ndarray:
        """The flags of a page."""
        return self.flags[entries.PAIRS * page :][: entries.PAIRS]

    def chunks(
        self, among: entries.Among | None = None, parted: tuple[int, int] = (0, 1)
    ) -> entries.Chunks:
        """All valid (z_i, z_t), float32 `[n, e]`, of those `among`, in order; of one part of n."""
        counts = self.flags & VALID > 0
        if among is not None:
            counts &= among(self.flags) if callable(among) else among
        for end, part in [*zip(self._ends, self._parts, strict=True)][parted[0] :: parted[1]]:
            for start in range(0, len(part.names), _READ_TOGETHER):
                rows = slice(start, min(start + _READ_TOGETHER, len(part.names)))
                first = int(end) - len(part.names)
                mine = counts[first + rows.start : first + rows.stop]
                z_i, z_t = (np.asarray(z[rows], np.float32)[mine] for z in (part.z_i, part.z_t))
                finite = np.isfinite(z_i).all(axis=1) & np.isfinite(z_t).all(axis=1)
                if finite.any():
                    yield z_i[finite], z_t[finite]

    def _part(self, paths: dict[str, str]) -> _Part:
        arrays = [_mapped(paths[name]) for name in FOLDERS[:2]]
        names, captions = self._metadata(paths["metadata"])
        if len({len(names), *map(len, arrays)}) > 1 or arrays[0].shape != arrays[1].shape:
            shapes = ", ".join(str(list(array.shape)) for array in arrays)
            raise UserError(
                f"embeddings: {self.where}: {shapes} and {len(names)} rows in files of one number;"
                " they are not of the same pairs"
            )
        return _Part(*arrays, names, captions)

    def _metadata(self, path: str) -> tuple[list[str], list[str]]:
        """The names and captions of a part; an empty caption where there is none that is text."""
        parquet = extras.load("pyarrow.parquet", "parquet", f"embeddings: {self.where}")
        try:
            table = parquet.ParquetFile(path)
            fields = table.schema_arrow.names
            key = self._caption_key or texts.field_of(fields, texts.CAPTION_FIELDS)
            if key not in fields:
                raise wrong(
                    "caption_key", key or "caption", f"a column of {path}: {', '.join(fields)}"
                )
            name = texts.field_of(fields, _NAMES)
            rows = table.read([key, name] if name else [key]).to_pylist()
        except (OSError, ValueError) as error:  # Arrow's errors are both
            raise UserError(
                f"embeddings: {path}: not readable as parquet ({one_line(error)})"
            ) from error
        captions = []
        for row in rows:
            try:
                captions.append(texts.one(row[key]))
            except texts.NotText as error:
                raise UserError(
                    f"embeddings: {path}: {key!r} is {error}; set caption_key"
                ) from error
        file = os.path.basename(path)
        names = (str(row[name]) if name else "" for row in rows)
        return [one or f"{file} row {n}" for n, one in enumerate(names)], captions

    def _flags(self) -> Iterator[int]:
        last = None
        for part in self._parts:
            for name, caption in zip(part.names, part.captions, strict=True):
                held = HELDOUT if is_heldout(name) else 0
                yield held | (VALID if caption else 0) | (FIRST if name != last else 0)
                last = name

    def _meta(self) -> Meta:
        first = np.asarray(self._parts[0].z_i[:_LOOKED_AT], np.float32)
        lengths = np.linalg.norm(first, axis=1)
        digest = hashlib.sha256(b"clip-retrieval 2")
        for part in self._parts:
            for texts_of in (part.names, part.captions):
                digest.update("\0".join(texts_of).encode("utf-8", "surrogatepass"))
            files = [str(z.filename) for z in (part.z_i, part.z_t)]
            digest.update(digests.of_files(self.where, files, self._cache).tobytes())
        return Meta(
            clip_fingerprint="",
            data_fingerprint=digest.hexdigest()[:16],
            count=int(self._ends[-1]),
            width=first.shape[1],
            context_length=0,
            vocab_size=0,
            unit_embeddings=bool(np.allclose(lengths, 1.0, atol=0.01)),
            dtype=self._parts[0].z_i.dtype.name,
        )


def is_layout(where: str, cache_dir: str) -> bool:
    """Whether a folder is laid out so."""
    names = Folder(where, cache_dir).names()
    return "meta.json" not in names and bool(names & set(FOLDERS[:2]))


def _numbered(names: set[str]) -> dict[int, str]:
    """The files with a number before their suffix, by that number."""
    found = {name: re.search(r"(\d+)\.(?:npy|parquet)$", name) for name in names}
    return {int(match[1]): name for name, match in found.items() if match}


def _mapped(path: str) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"embeddings: {path}: not readable as .npy ({one_line(error)})") from error
    if array.ndim != 2 or not len(array) or array.dtype not in (np.float16, np.float32):
        raise UserError(
            f"embeddings: {path}: {array.dtype} {list(array.shape)}; expected float16 or float32"
            " [n, e]"
        )
    return array
