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
    pending = [("", 0, tree)]
    entries = 0
    while pending:
        name, depth, value = pending.pop()
        if isinstance(value, StoredTensor):
            if name in found:
                what = f"two tensors are named {name!r} once keys are joined by dots"
                raise UserError(f"{where}: {what}; save them again under other names")
            if problem := value.problem():
                raise UserError(f"{where}: tensor {name!r} {problem}; download the file again")
            found[name] = value
            continue
        if depth > MAX_DEPTH:
            what = f"containers nested more than {MAX_DEPTH} deep, or inside themselves"
            raise UserError(f"{where}: {what}; {REMEDY}")
        if not isinstance(value, _CONTAINERS):
            continue
        entries += len(value)
        if entries > MAX_ENTRIES:
            what = f"its containers unfold to over {MAX_ENTRIES} entries"
            raise UserError(f"{where}: {what}; {REMEDY}")
        children = []
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            if not isinstance(child, (*_CONTAINERS, StoredTensor)):
                continue
            path = f"{name}.{key}" if depth else str(key)
            if len(path) > MAX_NAME_LENGTH:
                what = f"a name of {len(path)} characters, {path[:40]!r}..."
                raise UserError(f"{where}: {what}; expected at most {MAX_NAME_LENGTH}")
            children.append((path, depth + 1, child))
        pending.extend(reversed(children))
    return found
