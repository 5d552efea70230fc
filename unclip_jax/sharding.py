"""The device mesh and what lies where on it.

Training is data parallel: params are replicated, and the batch is split over the mesh's one axis,
"data". A loss that averages over the batch then averages over all devices, since the compiler
inserts the all-reduce; nothing in a stage knows how many devices there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from unclip_jax.errors import UserError

Tree = TypeVar("Tree")

DATA = "data"


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all `devices` (every device by default) along the axis "data".

    The axis is Auto: the compiler propagates shardings, as Linen expects.
    """
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (DATA,), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an array [b, ...] whose rows are split over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def microbatch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of [microbatches, b, ...]: every microbatch is split over the devices."""
    return NamedSharding(mesh, PartitionSpec(None, DATA))


def check_batch_size(batch_size: int, mesh: Mesh, grad_accum: int = 1) -> None:
    """Raise UserError unless every microbatch splits evenly over the devices."""
    devices = mesh.shape[DATA]
    if batch_size % (devices * grad_accum):
        raise UserError(
            f"train.batch_size: got {batch_size}, expected a multiple of {devices * grad_accum}"
            f" ({devices} devices x train.grad_accum {grad_accum}); change one of them"
        )


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Put host arrays [b, ...] on the devices, rows split evenly; returns without waiting.

    Raises:
        UserError: the number of devices does not divide b.
    """
    for array in batch.values():
        check_batch_size(len(array), mesh)
    return jax.device_put(dict(batch), batch_sharding(mesh))


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """Put a pytree of arrays, whole, on every device."""
    return jax.device_put(tree, replicated(mesh))


def describe(mesh: Mesh) -> dict[str, Any]:
    """Number and kind of the devices, for the log."""
    return {"devices": mesh.size, "kind": mesh.devices.flat[0].device_kind}
