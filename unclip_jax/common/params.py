"""The convention that every stage's params follow, and what is asked of any tree of them.

Params are nested dicts of arrays. Of a stage's top-level entries only "network" trains; those whose
name ends so hold weights, trained or frozen; the others are constants, but for the params of
another stage or network that stands in this one ("canvas", "autoencoder"), where the same holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

Params = dict[str, Any]

# The top-level entry of a stage's params that training moves. All others travel with it as they
# are: constants (the normalisation, the empty caption) and frozen networks.
TRAINED = "network"

# How many names a message lists before it only counts.
_LISTED = 3


def is_weights(name: str) -> bool:
    """Whether an entry of a stage's params holds a network's weights, trained or frozen.

    The others hold constants, which keep their own dtype wherever weights are rounded.
    """
    return name.endswith(TRAINED)


def in_weights(path: str) -> bool:
    """Whether an array, by its names joined by "/", belongs to a network's weights."""
    return any(map(is_weights, path.split("/")))


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts to one dict with names joined by "/", sorted."""
    flat = {}
    for name in sorted(params):
        if not isinstance(name, str) or "/" in name or not name:
            raise ValueError(f"param name {prefix}{name!r}: expected a string without a slash")
        value = params[name]
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}/"))
        else:
            flat[prefix + name] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
    """The inverse of `flatten`."""
    params: Params = {}
    for name, value in flat.items():
        *parents, leaf = name.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return params


def fingerprint(params: Params) -> str:
    """16 hex digits that change with any name, shape, dtype or bit of the params."""
    mark = Fingerprint()
    for name, value in flatten(params).items():
        mark.add(name, np.asarray(value, order="C"))
    return mark.hexdigest()


class Fingerprint:
    """`fingerprint` of arrays that come one by one, in the order of `flatten`."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._digest = hashlib.sha256()

    def add(self, name: str, array: np.ndarray) -> None:
        """Take the next array."""
        self._digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        self._digest.update(array.reshape(-1).view(np.uint8).data)

    def hexdigest(self) -> str:
        """16 hex digits for the arrays taken so far."""
        return self._digest.hexdigest()[:16]


def compare_shapes(
    found: Mapping[str, Any],
    expected: Mapping[str, Any],
    conforms: Callable[[np.dtype, np.dtype], bool] = np.dtype.__eq__,
) -> str:
    """How two flat dicts of things with shape and dtype differ, in words; "" if they agree."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    misshapen = [
        f"{name} is {_shape(found[name])}, expected {_shape(expected[name])}"
        for name in expected
        if name in found
        and not (
            tuple(found[name].shape) == tuple(expected[name].shape)
            and conforms(jnp.dtype(found[name].dtype), jnp.dtype(expected[name].dtype))
        )
    ]
    parts = [
        f"{len(entries)} {word} ({listing(entries)})"
        for word, entries in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape or dtype", misshapen),
        )
        if entries
    ]
    return "; ".join(parts)


def _shape(array: Any) -> str:
    return f"{jnp.dtype(array.dtype).name}{list(array.shape)}"


def listing(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    shown = ", ".join(names[:_LISTED])
    return shown if len(names) <= _LISTED else f"{shown} and {len(names) - _LISTED} more"
