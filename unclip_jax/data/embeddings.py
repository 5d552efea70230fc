"""CLIP embeddings of a data set, computed once and stored.

A store is a folder: `z_i.npy` and `z_t.npy`, float32 `[N, e]`, row i for pair i of the
source; `valid.npy`, bool `[N]`, False for pairs whose record is bad; and `meta.json`,
which says which CLIP and which data they belong to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from unclip_jax.data.batches import batches
from unclip_jax.data.datasets import DataConfig
from unclip_jax.data.records import BadRecord, Source
from unclip_jax.errors import UserError

FORMAT = 1  # of the folder; raised when its layout changes


@dataclasses.dataclass(frozen=True)
class EmbeddingStore:
    """Stored embeddings of N pairs, memory-mapped.

    Attributes:
      directory: where they are.
      clip_fingerprint: of the CLIP they were computed with.
      data_fingerprint: of the pairs they were computed from.
      z_i: image embeddings, float32 `[N, e]`.
      z_t: text embeddings, float32 `[N, e]`.
      valid: bool `[N]`: False where the record was bad, and its rows are zeros.
    """

    directory: pathlib.Path
    clip_fingerprint: str
    data_fingerprint: str
    z_i: np.ndarray
    z_t: np.ndarray
    valid: np.ndarray

    def __len__(self) -> int:
        """The number of pairs."""
        return len(self.valid)

    @classmethod
    def open(
        cls, directory: str | os.PathLike, *, clip_fingerprint: str, data_fingerprint: str
    ) -> EmbeddingStore:
        """Opens a store for reading.

        Raises:
          UserError: if there is none, it is damaged, or it belongs to another CLIP or
            other data.
        """
        folder = pathlib.Path(directory)
        try:
            meta = json.loads((folder / "meta.json").read_text())
            arrays = {k: np.load(folder / f"{k}.npy", mmap_mode="r") for k in ("z_i", "z_t")}
            valid = np.load(folder / "valid.npy")
        except FileNotFoundError as error:
            raise UserError(f"embeddings: {folder}: no stored embeddings; compute them") from error
        except (OSError, ValueError) as error:
            raise UserError(
                f"embeddings: {folder}: damaged ({error}); delete it and compute them again"
            ) from error
        expected = {
            "format": FORMAT,
            "clip_fingerprint": clip_fingerprint,
            "data_fingerprint": data_fingerprint,
        }
        for field, value in expected.items():
            if meta.get(field) != value:
                raise UserError(
                    f"embeddings: {folder}: {field} is {meta.get(field)!r}, expected {value!r}; "
                    "compute them again, into another folder"
                )
        shapes = {array.shape for array in arrays.values()}
        if shapes != {(meta["count"], meta["width"])} or len(valid) != meta["count"]:
            raise UserError(
                f"embeddings: {folder}: damaged (shapes {sorted(shapes)}, count {meta['count']}); "
                "delete it and compute them again"
            )
        return cls(folder, clip_fingerprint, data_fingerprint, **arrays, valid=valid)

    @classmethod
    @contextlib.contextmanager
    def create(
        cls,
        directory: str | os.PathLike,
        *,
        clip_fingerprint: str,
        data_fingerprint: str,
        count: int,
        width: int,
    ) -> Iterator[EmbeddingStore]:
        """A store to fill inside a `with`; it appears, whole, when that ends well.

        Args:
          directory: where it will be; must not exist yet.
          clip_fingerprint: of the CLIP.
          data_fingerprint: of the pairs.
          count: N, the number of pairs.
          width: e, CLIP's dimension.

        Raises:
          UserError: if `directory` exists or can't be written.
        """
        folder = pathlib.Path(directory)
        if folder.exists():
            raise UserError(f"embeddings: {folder}: exists; give another folder, or delete it")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        except OSError as error:
            raise UserError(f"embeddings: {folder}: can't be written ({error})") from error
        try:
            rows = {
                key: np.lib.format.open_memmap(
                    partial / f"{key}.npy", "w+", dtype=np.float32, shape=(count, width)
                )
                for key in ("z_i", "z_t")
            }
            valid = np.zeros(count, bool)
            yield cls(partial, clip_fingerprint, data_fingerprint, **rows, valid=valid)
            for array in rows.values():
                array.flush()
            np.save(partial / "valid.npy", valid)
            meta = {
                "format": FORMAT,
                "clip_fingerprint": clip_fingerprint,
                "data_fingerprint": data_fingerprint,
                "count": count,
                "width": width,
                "dtype": "float32",
            }
            (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
            partial.chmod(0o755)  # mkdtemp gives it to its owner alone
            _put_in_place(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _put_in_place(partial: pathlib.Path, folder: pathlib.Path) -> None:
    """Renames a finished folder; where another process was first, its folder stays."""
    try:
        partial.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


Encode = Callable[[np.ndarray, np.ndarray], tuple[Any, Any]]


def compute(
    source: Source,
    config: DataConfig,
    encode: Encode,
    directory: str | os.PathLike,
    *,
    clip_fingerprint: str,
    batch_size: int,
    progress: bool = True,
) -> EmbeddingStore:
    """The embeddings of all pairs of a source, from `directory` if they are there already.

    Run it in one process. Images are not augmented.

    Args:
      source: the pairs.
      config: gives CLIP's image size, context length and vocabulary.
      encode: (images uint8 `[b, s, s, 3]`, tokens int32 `[b, l]`) -> (z_i, z_t), each
        `[b, e]`; always called with `batch_size` rows, so it compiles once.
      directory: where the store is, or will be.
      clip_fingerprint: of the CLIP behind `encode`.
      batch_size: pairs encoded at once.
      progress: whether to show a progress line.

    Raises:
      UserError: if the store there belongs to another CLIP or other data, an embedding
        isn't finite, or every record is bad.
    """
    of = {"clip_fingerprint": clip_fingerprint, "data_fingerprint": source.fingerprint}
    if pathlib.Path(directory).exists():
        return EmbeddingStore.open(directory, **of)
    plain = dataclasses.replace(config, augment=0.0, cache_bytes=0)
    stream = batches(
        source, plain, seed=0, batch_size=batch_size, shuffle=False, epochs=1, drop_remainder=False
    )
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=len(source), desc="CLIP embeddings", disable=None if progress else True)
        )
        store = None
        for batch in stream:
            index = batch["index"]
            z_i, z_t = _encode_padded(encode, batch, batch_size)
            if not (np.isfinite(z_i).all() and np.isfinite(z_t).all()):
                raise UserError(
                    f"clip: embeddings of pairs {index[0]}..{index[-1]} of {source.name} are not "
                    "finite; check the CLIP checkpoint"
                )
            if store is None:
                store = stack.enter_context(
                    EmbeddingStore.create(directory, **of, count=len(source), width=z_i.shape[-1])
                )
            store.z_i[index], store.z_t[index], store.valid[index] = z_i, z_t, True
            bar.update(len(index))
    return EmbeddingStore.open(directory, **of)


def _encode_padded(
    encode: Encode, batch: dict[str, np.ndarray], batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """float32 embeddings `[b, e]` of a batch, filled up with its first row for `encode`."""
    count = len(batch["index"])
    rows = np.arange(batch_size) * (np.arange(batch_size) < count)
    z_i, z_t = encode(batch["image"][rows], batch["tokens"][rows])
    return np.asarray(z_i, np.float32)[:count], np.asarray(z_t, np.float32)[:count]


class WithEmbeddings:
    """A source whose records also carry `z_i` and `z_t`, float32 `[e]`.

    A pair without valid embeddings is a bad record. See `records.Source` for the
    attributes; besides, `store` is the `EmbeddingStore`.
    """

    def __init__(self, source: Source, store: EmbeddingStore):
        """Joins a source, at any image size, to its embeddings.

        Raises:
          UserError: if the store is of other data.
        """
        if store.data_fingerprint != source.fingerprint or len(store) != len(source):
            raise UserError(
                f"embeddings: {store.directory}: computed from other data "
                f"({store.data_fingerprint}) than {source.name} ({source.fingerprint}); "
                "compute them again"
            )
        self.name, self.fingerprint = source.name, source.fingerprint
        self.image_count, self.skipped = source.image_count, source.skipped
        self.image_of = source.image_of
        self._source, self.store = source, store

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the source's classes."""
        return self._source.classes

    def __len__(self) -> int:
        """The number of pairs."""
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The pair at `index`, with its embeddings."""
        record = self._source[index]
        if not self.store.valid[index]:
            raise BadRecord(f"{record['name']}: no embeddings, as it was bad when they were made")
        return {**record, "z_i": self.store.z_i[index], "z_t": self.store.z_t[index]}
