"""Weight files as other projects publish them, opened without PyTorch and read tensor by tensor.

    with open_tensors("ViT-L-14.pt") as source:
        for name, expected in source.shapes.items():
            array = source.read(name)

Reads safetensors, PyTorch's files (zip, TorchScript and the format before 1.6) and models cut into
shards with an index. Nothing in a file is executed: see `torch_pickle`. What a file is, its first
bytes tell; its name doesn't matter. Memory holds one tensor at a time, and what the caller keeps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path

import jax
import numpy as np

from unclip_jax.errors import UserError
from unclip_jax.weights.convert.torch.files import LEGACY_MAGIC, open_legacy, open_zip
from unclip_jax.weights.mapped import mapped, shapes

_HEAD = 512  # bytes that tell what a file is
_MAX_HEADER = 100_000_000  # of a safetensors file, as that format's own limit
_MAX_INDEX_BYTES = 64 << 20
_LISTED = 3  # names a message shows before it only counts


Shapes = dict[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class Tensors:
    """Named tensors that are read one at a time.

    Attributes:
        shapes: shape and dtype of each by name, unread, in the order of the file; of shards, one
            shard after another, which is the cheap order to read them in.
        origin: where they come from, for messages.
    """

    shapes: Shapes
    _read: Callable[[str], np.ndarray]
    origin: str

    def read(self, name: str) -> np.ndarray:
        """One tensor, with the shape and dtype that `shapes` gives.

        Raises:
            UserError: no tensor of that name, or the file was damaged meanwhile.
        """
        if name not in self.shapes:
            held = f"{len(self.shapes)} ({_listing(list(self.shapes))})"
            raise UserError(f"{self.origin}: no tensor {name!r} among its {held}")
        return self._read(name)

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray], origin: str) -> Tensors:
        """Arrays that are in memory."""
        shapes = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in arrays.items()}
        return cls(shapes, arrays.__getitem__, origin)

    def select(self, choose: Callable[[str], str | None]) -> Tensors:
        """Those that `choose` gives a name, under that name."""
        names = {new: old for old in self.shapes if (new := choose(old)) is not None}
        shapes = {new: self.shapes[old] for new, old in names.items()}
        return Tensors(shapes, lambda name: self.read(names[name]), self.origin)

    def prefixed(self, prefix: str) -> Tensors:
        """These, with `prefix` before their names."""
        return self.select(lambda name: prefix + name)

    def within(self, prefix: str) -> Tensors:
        """Those whose names begin with `prefix`, without it."""
        return self.select(lambda n: n[len(prefix) :] if n.startswith(prefix) else None)

    def of_training(self, prefix: str) -> Tensors:
        """The weights in a checkpoint of training, without `prefix`; others as they are."""
        has_more = any(name.startswith("state_dict.") for name in self.shapes)
        inside = self.within("state_dict.") if has_more else self
        return inside.select(lambda name: name.removeprefix(prefix))

    def join(self, other: Tensors, prefix: str = "") -> Tensors:
        """These and others, whose names get `prefix`."""
        other = other.prefixed(prefix) if prefix else other

        def read(name: str) -> np.ndarray:
            return (other if name in other.shapes else self).read(name)

        return Tensors(self.shapes | other.shapes, read, f"{self.origin} and {other.origin}")


@contextlib.contextmanager
def open_tensors(path: str | Path) -> Iterator[Tensors]:
    """Open a weight file, or the index of a sharded one, for reading tensor by tensor.

    Args:
        path: a safetensors file, a PyTorch file (.bin, .pt, .th, .ckpt, .pth), or an index such as
            model.safetensors.index.json, whose shards lie beside it. In PyTorch files, the keys of
            nested dicts and the places in lists and tuples are joined by ".", and so are the
            attributes of TorchScript modules, so "state_dict.model.x" and "visual.conv1.weight".

    Yields:
        The file's tensors; they can be read until the block ends.

    Raises:
        UserError: no such file, an unknown or damaged one, one that holds anything but tensors
            and plain containers, or tensors of a dtype that isn't supported.
    """
    path = Path(path)
    with (_open_shards if _kind(path) == "index" else _open_file)(path) as source:
        yield source


@contextlib.contextmanager
def _open_file(path: Path) -> Iterator[Tensors]:
    """Open one file that holds tensors."""
    kind = _kind(path)
    if kind == "index":
        raise UserError(f"{path}: an index where a shard was expected; download the model again")
    if kind == "safetensors":

        def read(name: str) -> np.ndarray:  # mapped anew for each, so that pages don't pile up
            with mapped(path) as file:
                return file.get_tensor(name)

        with mapped(path) as file:
            found = shapes(file, path)
        yield Tensors(found, read, str(path))
        return
    with path.open("rb") as file:
        torch_file = (open_zip if kind == "zip" else open_legacy)(file, str(path))
        found = {n: jax.ShapeDtypeStruct(t.shape, t.dtype) for n, t in torch_file.tensors.items()}
        yield Tensors(found, torch_file.read, str(path))


def _listing(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_LISTED])
    return shown if len(names) <= _LISTED else f"{shown} and {len(names) - _LISTED} more"


# --- What a file is -------------------------------------------------------------------------


def _kind(path: Path) -> str:
    """What a file holds, by its first bytes: "safetensors", "zip", "legacy" or "index"."""
    try:
        if path.is_dir():
            do = "give one weight file in it, or the index json of its shards"
            raise UserError(f"{path}: a folder; {do}")
        if not path.exists():
            raise UserError(f"{path}: no such file; download it first, or correct the path")
        if not path.is_file():
            raise UserError(f"{path}: not a regular file; copy it to one")
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from error
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _MAX_HEADER:
        return "safetensors"
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head.startswith(b"\x80") and LEGACY_MAGIC.to_bytes(10, "little") in head[:32]:
        return "legacy"
    if head.lstrip().startswith(b"{"):
        return "index"
    what, remedy = _guess(head)
    raise UserError(
        f"{path}: {what}; expected safetensors, a PyTorch weight file, or the index json of a"
        f" model's shards; {remedy}"
    )


def _guess(head: bytes) -> tuple[str, str]:
    """What a file that can't be read may be, and what to do."""
    if not head:
        return "empty", "download it again"
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the weights", "run `git lfs pull`, or download the file"
    if head.lstrip().startswith(b"<"):
        return "a web page", "download the file itself, logged in if need be"
    if head[257:262] == b"ustar":
        return "a tar archive, as PyTorch before 0.2 wrote", "unpack it, or save the weights again"
    if head.startswith(b"\x1f\x8b"):
        return "compressed by gzip", "unpack it"
    if head.startswith(b"\x80"):
        return "a bare Python pickle, which is a program", "save its arrays as safetensors"
    return "not a weight file of a known kind", "download it again if it should be one"


# --- Shards ---------------------------------------------------------------------------------


@contextlib.contextmanager
def _open_shards(index: Path) -> Iterator[Tensors]:
    """Open a model in shards: each is looked into once, then opened again when read from."""
    shard_of = _read_index(index)
    shards = list(dict.fromkeys(shard_of.values()))
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        which = f"{len(missing)} of its {len(shards)} shards are not beside it"
        raise UserError(f"{index}: {which} ({_listing(missing)}); download them")
    found = {}
    for shard in shards:
        with _open_file(index.parent / shard) as source:
            listed = {name for name in shard_of if shard_of[name] == shard}
            _check_listed(index, shard, listed, source.shapes.keys())
            found.update(source.shapes)
    with contextlib.closing(_Shards(index.parent, shard_of)) as opened:
        yield Tensors(found, opened.read, str(index))


def _check_listed(index: Path, shard: str, listed: Set[str], held: Set[str]) -> None:
    """The index and a shard must name the same tensors."""
    for names, problem in (
        (sorted(listed - held), "lists tensors that aren't in"),
        (sorted(held - listed), "doesn't list tensors that are in"),
    ):
        if names:
            do = "the files are of different downloads, get them all again"
            raise UserError(f"{index}: {problem} {shard}: {_listing(names)}; {do}")


class _Shards:
    """Reads from shards, of which one is open at a time."""

    def __init__(self, folder: Path, shard_of: dict[str, str]):
        self._folder, self._shard_of = folder, shard_of
        self._opened = contextlib.ExitStack()
        self._shard: str | None = None
        self._source: Tensors | None = None

    def read(self, name: str) -> np.ndarray:
        shard = self._shard_of[name]
        if shard != self._shard:
            self.close()
            self._source = self._opened.enter_context(_open_file(self._folder / shard))
            self._shard = shard
        return self._source.read(name)

    def close(self) -> None:
        self._opened.close()
        self._shard = self._source = None


def _read_index(path: Path) -> dict[str, str]:
    """Which shard holds each tensor: names to plain file names."""
    size = path.stat().st_size
    if size > _MAX_INDEX_BYTES:
        raise UserError(f"{path}: {size} bytes of json, expected an index of at most 64 MiB")
    try:
        index = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, not JSON ({error}); download it again") from error
    shard_of = index.get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        expected = "expected a weight file, or the index json of a model's shards"
        raise UserError(f"{path}: a json file without weight_map; {expected}")
    for name, shard in shard_of.items():
        if not isinstance(shard, str) or not _is_plain(shard):
            raise UserError(
                f"{path}: tensor {name!r} is in {shard!r:.80}, expected the name of a file beside"
                " the index; download it again"
            )
    return shard_of


def _is_plain(name: str) -> bool:
    """Whether a name is that of a file in the folder itself, on any system."""
    return name not in ("", ".", "..") and name.isprintable() and not set(name) & set("/\\:")
