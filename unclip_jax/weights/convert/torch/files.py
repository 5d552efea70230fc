"""PyTorch's weight files without PyTorch: where each tensor lies in the file, and reading it.

Two containers are read. Since PyTorch 1.6, and always for TorchScript, a file is a zip archive of
stored (never compressed) entries: one pickle that describes the tensors, and one entry for the
bytes of each storage. Before 1.6 it was five pickles in a row (a magic number, a version, the
machine it was written on, the description, the keys of the storages), and the storages after them.
Either way, opening a file reads the description alone; a tensor's bytes are read when asked for.
"""

from __future__ import annotations

import dataclasses
import io
import os
import sys
import zipfile
from typing import BinaryIO

import numpy as np

from unclip_jax.errors import UserError
from unclip_jax.weights.convert.torch.layout import Storage, StoredTensor, named_tensors
from unclip_jax.weights.convert.torch.pickles import MAX_PICKLE_BYTES, read_pickle

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_LOCAL_HEADER = 30  # bytes of a zip entry's own header before its name and extra field
_ENCRYPTED = 0x1


@dataclasses.dataclass(frozen=True)
class TorchFile:
    """The tensors of an open PyTorch file, unread.

    Attributes:
        file: the open file.
        where: its path, for messages.
        tensors: by name, in the order of the file.
        starts: the byte at which each storage begins, by its key.
        byteorder: of the numbers in the storages, "little" or "big".
    """

    file: BinaryIO
    where: str
    tensors: dict[str, StoredTensor]
    starts: dict[str, int]
    byteorder: str

    def read(self, name: str) -> np.ndarray:
        """One tensor, C-contiguous, in memory of its own.

        Raises:
            UserError: the file has become shorter.
        """
        tensor = self.tensors[name]
        itemsize = tensor.dtype.itemsize
        self.file.seek(self.starts[tensor.storage.key] + tensor.offset * itemsize)
        data = np.fromfile(self.file, np.uint8, tensor.span * itemsize)
        if len(data) != tensor.span * itemsize:
            raise UserError(f"{self.where}: ends inside tensor {name!r}; download it again")
        if self.byteorder != sys.byteorder:
            data = data.view(f"u{itemsize}").byteswap()
        # A dimension of one element never steps, whatever its stride says.
        steps = [
            stride * itemsize if length > 1 else 0
            for length, stride in zip(tensor.shape, tensor.strides, strict=True)
        ]
        values = np.ndarray(tensor.shape, tensor.dtype, data, strides=steps if data.size else None)
        return np.asarray(values, order="C")


# --- Zip archives ---------------------------------------------------------------------------


def open_zip(file: BinaryIO, where: str) -> TorchFile:
    """Describe the tensors of a zip archive that `torch.save` or `torch.jit.save` wrote.

    Args:
        file: an open file on disk.
        where: its path, for messages.

    Raises:
        UserError: another kind of zip, a damaged one, or whatever `read_pickle` refuses.
    """
    entries = _entries(file, where)
    folders = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
    roots = [folder for folder in folders if folder.count("/") == 1]
    if len(roots) != 1:
        raise UserError(
            f"{where}: a zip archive with {len(roots)} entries */data.pkl, expected one, as PyTorch"
            " writes it; if weight files are packed in it, unpack it"
        )
    root = roots[0]
    byteorder = "little"  # before 2.1 PyTorch didn't say
    if f"{root}byteorder" in entries:
        byteorder = _content(file, entries[f"{root}byteorder"], where).decode("ascii", "replace")
    if byteorder not in ("little", "big"):
        raise UserError(f"{where}: byteorder is {byteorder[:20]!r}, expected 'little' or 'big'")
    description = io.BytesIO(_content(file, entries[f"{root}data.pkl"], where))
    tree, _ = read_pickle(description, where)
    tensors = named_tensors(tree, where)
    starts = {}
    for storage in {tensor.storage.key: tensor.storage for tensor in tensors.values()}.values():
        place = f"{root}data/{storage.key}"
        entry = entries.get(place)
        if entry is None or entry.file_size != storage.nbytes:
            found = "is missing" if entry is None else f"has {entry.file_size} bytes"
            raise UserError(
                f"{where}: entry {place[:80]!r} {found}, expected {storage.nbytes} bytes"
                f" ({storage.numel} of {storage.dtype.name}); download the file again"
            )
        starts[storage.key] = _start(file, entry, where)
    return TorchFile(file, where, tensors, starts, byteorder)


def _entries(file: BinaryIO, where: str) -> dict[str, zipfile.ZipInfo]:
    """The entries of a zip archive by name."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
        raise UserError(
            f"{where}: a zip archive that is damaged or cut short ({error}); download it again"
        ) from error
    by_name = {entry.filename: entry for entry in entries}
    if len(by_name) != len(entries):
        raise UserError(f"{where}: a zip archive with two entries of one name; download it again")
    return by_name


def _start(file: BinaryIO, entry: zipfile.ZipInfo, where: str) -> int:
    """The byte at which a stored entry's content begins."""
    what = f"{where}: entry {entry.filename[:80]!r}"
    compressed = entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size
    if compressed or entry.flag_bits & _ENCRYPTED:
        raise UserError(
            f"{what} is compressed or encrypted, which PyTorch never does; unpack the archive and"
            " zip it again without compression (zip -0)"
        )
    size = os.fstat(file.fileno()).st_size
    if 0 <= entry.header_offset < size:
        file.seek(entry.header_offset)
        header = file.read(_LOCAL_HEADER)
        names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        start = entry.header_offset + _LOCAL_HEADER + names
        if header[:4] == b"PK\x03\x04" and start + entry.file_size <= size:
            return start
    raise UserError(f"{what} isn't where the archive says; download the file again")


def _content(file: BinaryIO, entry: zipfile.ZipInfo, where: str) -> bytes:
    """The bytes of a stored entry that is read whole."""
    if entry.file_size > MAX_PICKLE_BYTES:
        raise UserError(
            f"{where}: entry {entry.filename[:80]!r} has {entry.file_size} bytes, expected at most"
            f" {MAX_PICKLE_BYTES}; save the weights alone, without what else the file holds"
        )
    file.seek(_start(file, entry, where))
    return file.read(entry.file_size)


# --- Before PyTorch 1.6 ---------------------------------------------------------------------


def open_legacy(file: BinaryIO, where: str) -> TorchFile:
    """Describe the tensors of a file that `torch.save` wrote before 1.6.

    Args:
        file: an open file on disk, at its start.
        where: its path, for messages.

    Raises:
        UserError: another version of the format, a big-endian file, a damaged one, or whatever
            `read_pickle` refuses.
    """
    stream = io.BytesIO(file.read(MAX_PICKLE_BYTES))
    magic, version, machine = (read_pickle(stream, where)[0] for _ in range(3))
    if magic != LEGACY_MAGIC or version != _LEGACY_VERSION:
        what = f"another version of PyTorch's old format than {_LEGACY_VERSION}"
        raise UserError(f"{where}: {what}; save the weights again as safetensors")
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        what = "written on a big-endian machine, in PyTorch's old format, expected little-endian"
        raise UserError(f"{where}: {what}; save the weights again as safetensors")
    tree, storages = read_pickle(stream, where)
    keys, _ = read_pickle(stream, where)
    starts = _legacy_starts(file, stream.tell(), keys, storages, where)
    return TorchFile(file, where, named_tensors(tree, where), starts, "little")


def _legacy_starts(
    file: BinaryIO, position: int, keys: object, storages: dict[str, Storage], where: str
) -> dict[str, int]:
    """Where each storage begins: they follow in the order of their keys, each after its length."""
    in_order = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not in_order or sorted(keys) != sorted(storages):
        raise UserError(
            f"{where}: the storages in the file aren't those it describes; download it again"
        )
    size = os.fstat(file.fileno()).st_size
    starts = {}
    for key in keys:
        storage = storages[key]
        file.seek(position)
        numel = int.from_bytes(file.read(8), "little")
        starts[key] = position + 8
        position += 8 + storage.nbytes
        if numel != storage.numel or position > size:
            what = f"a storage of {storage.numel} elements where {numel} are said to follow"
            end = f"up to byte {position} of {size}; the file is damaged or cut short"
            raise UserError(f"{where}: {what}, {end}, download it again")
    return starts
