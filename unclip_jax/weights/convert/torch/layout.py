"""Where tensors lie in PyTorch's storages, and what they are called.

PyTorch keeps numbers in storages, flat runs of one dtype, and tensors are strided views of them;
several may share one. Here both are descriptions only. They come from files, so nothing they say
is believed before it is checked: a view must lie inside its storage, and names are bounded in
depth, number and length, so containers that hold themselves, or one another many times over, end
in a `UserError`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from unclip_jax.errors import UserError

MAX_ENTRIES = 1_000_000  # of all containers together, each counted as often as it is reached
MAX_DEPTH = 64
MAX_NAME_LENGTH = 512
# Expanded tensors repeat a small storage; they may not grow beyond this, or beyond the storage.
MAX_EXPANDED_BYTES = 1 << 30
MAX_DIMENSIONS = 64  # NumPy's and PyTorch's own limit

_CONTAINERS = (dict, list, tuple)

REMEDY = (
    "expected only tensors and plain containers; if you trust the file, save its weights again as"
    " safetensors where it was made"
)


@dataclasses.dataclass(frozen=True)
class Storage:
    """A run of `numel` elements of one dtype, somewhere in the file, under a key."""

    key: str
    dtype: np.dtype
    numel: int

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return self.numel * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A strided view of a storage; `offset` and `strides` count elements of `dtype`."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def span(self) -> int:
        """How many elements of the storage lie from its first to its last, both included."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))

    def problem(self) -> str:
        """Why it can't be a view of its storage, in words; "" if it can."""
        sizes = (self.offset, *self.shape, *self.strides)
        if min(sizes) < 0 or len(self.shape) != len(self.strides):
            return f"has offset {self.offset}, shape {self.shape} and strides {self.strides}"
        end = (self.offset + self.span) * self.dtype.itemsize
        if end > self.storage.nbytes:
            return f"ends at byte {end} of a storage of {self.storage.nbytes}"
        nbytes = math.prod(max(n, 1) for n in self.shape) * self.dtype.itemsize
        if nbytes > max(self.storage.nbytes, MAX_EXPANDED_BYTES):
            return f"claims {nbytes} bytes of a storage of {self.storage.nbytes}"
        return ""


def named_tensors(tree: Any, where: str) -> dict[str, StoredTensor]:
    """The tensors of nested containers by name, in the order of the file.

    A name joins the keys that lead to the tensor, or its places in lists and tuples, by ".". A
    tensor that is the whole tree is named "". Strings, numbers and bare storages are passed over.

    Args:
        tree: what `read_pickle` returned.
        where: the file, for messages.

    Raises:
        UserError: two tensors of one name, a tensor that isn't inside its storage, or containers
            beyond the limits above.
    """
    found: dict[str, StoredTensor] = {}
    entries = 0

    def refused(what: str, do: str = REMEDY) -> UserError:
        return UserError(f"{where}: {what}; {do}")

    def walk(value: Any, name: str, depth: int) -> None:
        nonlocal entries
        if isinstance(value, StoredTensor):
            if name in found:
                what = f"two tensors are named {name!r} once keys are joined by dots"
                raise refused(what, "save them again under other names")
            if problem := value.problem():
                raise UserError(f"{where}: tensor {name!r} {problem}; download the file again")
            found[name] = value
            return
        if depth > MAX_DEPTH:
            raise refused(f"containers nested more than {MAX_DEPTH} deep, or inside themselves")
        entries += len(value)
        if entries > MAX_ENTRIES:
            raise refused(f"its containers unfold to over {MAX_ENTRIES} entries")
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(child, (*_CONTAINERS, StoredTensor)):
                path = f"{name}.{key}" if depth else str(key)
                if len(path) > MAX_NAME_LENGTH:
                    what = f"a name of {len(path)} characters, {path[:40]!r}..."
                    raise refused(what, f"expected at most {MAX_NAME_LENGTH}")
                walk(child, path, depth + 1)

    if isinstance(tree, (*_CONTAINERS, StoredTensor)):
        walk(tree, "", 0)
    return found
