"""safetensors files, mapped into memory: what is in one, before any of it is read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from safetensors import SafetensorError, safe_open

from unclip_jax.errors import UserError

_DTYPES = {"BF16": "bfloat16", "BOOL": "bool"} | {f"F{n}": f"float{n}" for n in (16, 32, 64)}
_DTYPES |= {f"{c}{n}": f"{w}{n}" for c, w in (("I", "int"), ("U", "uint")) for n in (8, 16, 32, 64)}


@contextlib.contextmanager
def mapped(path: Path) -> Iterator[Any]:
    """The safetensors library's view of a file, while the block lasts.

    Raises:
        UserError: it is damaged, or cannot be read.
    """
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: a safetensors file that is damaged or cut short ({error}); copy or download"
            " it again"
        ) from error


def shapes(file: Any, path: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every array in an open file, in the order of the file.

    Raises:
        UserError: one of a dtype that NumPy does not have.
    """
    found = {}
    for name in file.offset_keys():
        entry = file.get_slice(name)
        dtype = _DTYPES.get(entry.get_dtype())
        if dtype is None:
            raise UserError(
                f"{path}: tensor {name!r} is of {entry.get_dtype()}, expected one of"
                f" {', '.join(_DTYPES)}; get the weights in 16 or 32 bits"
            )
        found[name] = jax.ShapeDtypeStruct(tuple(entry.get_shape()), jnp.dtype(dtype))
    return found
