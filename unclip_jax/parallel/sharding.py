"""The device mesh and what lies where on it.

`MeshConfig` says how many devices lie along each axis of the mesh, and `axes` which axes of arrays
those split. The compiler inserts every collective. No stage knows how many devices there are, and
none of this changes what is computed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from unclip_jax.common.params import is_weights
from unclip_jax.errors import UserError, wrong
from unclip_jax.parallel import axes
from unclip_jax.parallel.axes import DATA, FSDP, SPATIAL, TENSOR

Tree = TypeVar("Tree")

REST = -1
AUTO = 0
AXES = (DATA, FSDP, SPATIAL, TENSOR)  # of the mesh, from the slowest network to the fastest


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices lie along each axis of the mesh; -1, once, stands for all that are left.

    Of 8 devices, MeshConfig() trains data parallel, MeshConfig(data=1, fsdp=8) with everything
    split, and MeshConfig(fsdp=2, tensor=2) in three ways at once.

    Attributes:
        data: copies of the model. Each has its own share of the batch.
        fsdp: devices that split a copy's params, averages and optimizer state. Each has its own
            share of the batch here, too.
        spatial: devices that share the same images, each with a band of rows: for U-Nets with
            fewer examples than devices, or with images too large for the memory of one.
        tensor: devices that compute the parts of one block together.
        slices: groups of devices with a slow network between them, which only `data` crosses: each
            has as many whole copies of the model. No axis of its own. 0 asks the devices of TPUs
            which slice each is in, and takes all others for one group. Elsewhere say it: 8 nodes of
            GPUs are 8 slices. Processes that follow each other are in the same one.
    """

    data: int = REST
    fsdp: int = 1
    spatial: int = 1
    tensor: int = 1
    slices: int = AUTO

    def __post_init__(self) -> None:
        """Check every field."""
        if not isinstance(self.slices, int) or self.slices < AUTO:
            raise wrong("mesh.slices", self.slices, "a number of slices, or 0 to ask the devices")
        sizes = self._axes()
        for name, value in sizes.items():
            if not isinstance(value, int) or (value != REST and value < 1):
                raise wrong(f"mesh.{name}", value, "a number of devices, or -1")
        if list(sizes.values()).count(REST) > 1:
            raise UserError(f"mesh: got {self.text}, expected -1 for one axis at most")
        if self.spatial != 1 and self.tensor != 1:
            raise UserError(
                f"mesh: got {self.text}, expected spatial or tensor to be 1: images are not split"
                " beside features; set one of them to 1"
            )

    def _axes(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in AXES}

    @property
    def text(self) -> str:
        """The axes in words."""
        return ", ".join(f"{name} {value}" for name, value in self._axes().items())

    def shape(self, devices: int) -> tuple[int, ...]:
        """The mesh's shape, in the order of `AXES`, on so many devices.

        Raises:
            UserError: the axes' product is not the number of devices.
        """
        sizes = tuple(self._axes().values())
        fixed = math.prod(size for size in sizes if size != REST)
        whole = tuple(devices // fixed if size == REST else size for size in sizes)
        if math.prod(whole) != devices:
            raise UserError(
                f"mesh: got {self.text}, whose product does not make the {devices} devices there"
                " are; change one of them, or set one to -1"
            )
        return whole


def make_mesh(
    config: MeshConfig = MeshConfig(), devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The mesh of all `devices` (every device of every process by default).

    Neighbours along "tensor" or "spatial" are nearest to each other, then those along "fsdp": that
    is where the traffic is. Only "data" leaves a slice. The axes are Auto: the compiler propagates
    shardings, as Linen expects.

    Raises:
        UserError: the config does not fit the number of devices, or that of slices.
    """
    devices = jax.devices() if devices is None else devices
    data, *rest = config.shape(len(devices))
    groups = by_slice(devices, config.slices)
    if data % len(groups):
        raise UserError(
            f"mesh: got {config.text}, which makes data {data}, expected a multiple of the"
            f" {len(groups)} slices: only data goes from slice to slice; lower the others to a"
            f" product that divides the {len(groups[0])} devices of a slice, and let mesh.data"
            " take the rest"
        )
    # A pod's own axes may have to be split: 8 along "fsdp" is half a side of 16 x 16 chips.
    inside = (data // len(groups), *rest)
    grids = [
        mesh_utils.create_device_mesh(inside, group, allow_split_physical_axes=True)
        for group in groups
    ]
    return Mesh(np.concatenate(grids), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def by_slice(devices: Sequence[jax.Device], slices: int = AUTO) -> list[list[jax.Device]]:
    """The devices of each slice, in order; see `MeshConfig.slices`.

    Raises:
        UserError: these TPUs are in another number of slices, or slices would not be equal.
    """
    # A TPU in the only slice has no index; GPUs have one for each host.
    told = [getattr(device, "slice_index", 0) for device in devices]
    if devices[0].platform == "tpu":
        slices = slices or len(set(told))
        if slices != len(set(told)):
            raise wrong("mesh.slices", slices, f"{len(set(told))}, which these TPUs are in")
    if slices in (AUTO, 1):
        return [list(devices)]
    if len(devices) % slices:
        raise wrong("mesh.slices", slices, f"a divisor of the {len(devices)} devices there are")
    order = sorted(zip(told, devices, strict=True), key=lambda d: (d[0], d[1].process_index))
    each = len(devices) // slices
    found = [order[first : first + each] for first in range(0, len(order), each)]
    if len(set(told)) == slices and any(len({index for index, _ in group}) > 1 for group in found):
        raise wrong("mesh.slices", slices, "slices of as many devices each", "leave some out")
    return [[device for _, device in group] for group in found]


def local_mesh(mesh: Mesh) -> Mesh:
    """A mesh of this process's devices alone, on which params are split as far as they go."""
    devices = list(mesh.local_devices)
    tensor = min(mesh.shape[TENSOR], len(devices))
    fsdp = min(mesh.shape[FSDP], len(devices) // tensor)
    return make_mesh(MeshConfig(fsdp=fsdp, tensor=tensor), devices)


def host_device() -> jax.Device:
    """The host itself as a device: for arrays that one accelerator may be too small to hold.

    Raises:
        UserError: JAX was told to do without it.
    """
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        given = jax.config.jax_platforms
        expected = "cpu among them, where params are made before they are split"
        raise wrong("JAX_PLATFORMS", given, expected, f"set JAX_PLATFORMS={given},cpu") from error


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an array [b, ...] whose rows are split over the devices."""
    return NamedSharding(mesh, axes.spec(("batch",)))


def microbatch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of [microbatches, b, ...]: every microbatch is split over the devices."""
    return NamedSharding(mesh, axes.spec((None, "batch")))


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """The sharding of every array in a stage's params, or in anything made like them.

    Averages and an optimizer's state go where the params of the same path go. Constants, which
    stand beside networks, and scalars stay whole.

    Args:
        tree: arrays or their shapes: params, or a state that holds trees of params.
        mesh: where they go.

    Raises:
        UserError: a param has no row in `axes.PARAM_AXES`, or an axis of the mesh does not divide
            one of its axes.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec(_names(path), leaf.shape, mesh)), tree
    )


def _names(path: Sequence[Any]) -> tuple[str, ...]:
    """The keys on a path from the network's name on; none for what is in no network."""
    keys = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
    starts = [i for i, key in enumerate(keys) if is_weights(key)]
    return keys[starts[0] :] if starts else ()


def _spec(path: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    if not path or not shape:
        return PartitionSpec()
    names = axes.of_param(path, len(shape)).names
    if not axes.splits_params(mesh):
        return PartitionSpec()
    for name, size in zip(names, shape, strict=True):
        if size % axes.split(mesh, name):
            (axis,) = axes.MESH_AXES[name]
            split = f"the axis {name!r} of {'/'.join(path)}, which it splits"
            do = "lower it, and let mesh.data take the rest"
            raise wrong(f"mesh.{axis}", mesh.shape[axis], f"a divisor of {size}, {split}", do)
    return axes.spec(names)


def check_batch_size(batch_size: int, mesh: Mesh, grad_accum: int = 1) -> None:
    """Raise UserError unless every microbatch splits evenly over the devices."""
    parts = axes.split(mesh, "batch") * grad_accum
    if batch_size % parts:
        factors = [f"mesh.{axis} {mesh.shape[axis]}" for axis in axes.MESH_AXES["batch"]]
        product = " x ".join([*factors, f"train.grad_accum {grad_accum}"])
        expected = f"a multiple of {parts} ({product})"
        raise wrong("train.batch_size", batch_size, expected, "change one of them")


def check_spatial(mesh: Mesh, rows: int) -> None:
    """Raise UserError unless the mesh leaves images whole, or splits them evenly.

    Args:
        mesh: what a stage is to train on.
        rows: of the first feature map of its U-Net; 0 where it has none.
    """
    spatial = mesh.shape[SPATIAL]
    if spatial > 1 and (rows == 0 or rows % spatial):
        divisor = f"a divisor of the {rows} rows that its U-Net has of an image"
        expected = divisor if rows else "1, as this stage has no U-Net"
        raise wrong("mesh.spatial", spatial, expected, "change it, and let mesh.data take the rest")


@dataclasses.dataclass(frozen=True)
class DataShard:
    """Which share of every batch a process reads: share `index` of `count`."""

    index: int
    count: int


def data_shard(mesh: Mesh, process: int | None = None) -> DataShard:
    """The share of the batch whose rows lie on this process's devices (or another's).

    Processes that hold the parts of the same blocks or of the same images hold the same rows, and
    read the same share.

    Raises:
        UserError: the processes' rows overlap without being the same, so that no shares fit.
    """
    process = jax.process_index() if process is None else process
    rows: dict[int, set[int]] = {}
    grid = mesh.devices.reshape(axes.split(mesh, "batch"), -1)
    for row, devices in enumerate(grid):
        for device in devices:
            rows.setdefault(device.process_index, set()).add(row)
    shares = sorted({tuple(sorted(found)) for found in rows.values()})
    once = sorted(row for share in shares for row in share) == list(range(len(grid)))
    if not once or len({len(share) for share in shares}) != 1:
        raise wrong(
            f"mesh.{TENSOR if mesh.shape[TENSOR] > 1 else SPATIAL}",
            grid.shape[1],
            f"a divisor or a multiple of the devices of a process ({len(mesh.local_devices)}), so"
            " that each one reads whole shares of the batch",
        )
    return DataShard(shares.index(tuple(sorted(rows[process]))), len(shares))


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Put this process's share of a batch on its devices; returns without waiting.

    Args:
        batch: arrays [b / count, ...], the rows of this process's `data_shard`.
        mesh: where they go.

    Returns:
        Arrays [b, ...] over all processes, whose rows are split evenly over the devices.

    Raises:
        UserError: the devices do not divide b.
    """
    where, count = batch_sharding(mesh), data_shard(mesh).count
    for array in batch.values():
        check_batch_size(len(array) * count, mesh)
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), where)
    return {
        name: jax.make_array_from_process_local_data(
            where, np.asarray(array), (len(array) * count, *array.shape[1:])
        )
        for name, array in batch.items()
    }


def spread(tree: Tree, rows: int, mesh: Mesh) -> Tree:
    """Arrays [rows, ...] of this process split over the devices by rows; all others whole.

    Rows that the devices do not divide stay together, on every device.
    """
    divides = rows % axes.split(mesh, "batch") == 0

    def spread_one(x: jax.Array) -> jax.Array:
        by_rows = divides and jnp.ndim(x) > 0 and len(x) == rows
        return jax.device_put(x, batch_sharding(mesh) if by_rows else replicated(mesh))

    return jax.tree.map(spread_one, tree)


def place(tree: Tree, shardings: Any) -> Tree:
    """Put arrays, the same in every process, where `shardings` says.

    Each process copies to its devices only what they hold. Arrays that are somewhere already are
    copied: what is done to them there changes nothing here.
    """
    return jax.tree.map(_placed, tree, shardings)


def _placed(x: Any, where: NamedSharding) -> jax.Array:
    if where.is_fully_addressable:
        return jax.device_put(x, where, may_alias=False)
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, where, lambda index: whole[index])


def describe(mesh: Mesh) -> dict[str, Any]:
    """Number, kind and arrangement of the devices, for the log."""
    return {
        "devices": mesh.size,
        "kind": mesh.devices.flat[0].device_kind,
        "mesh": ", ".join(f"{name} {size}" for name, size in mesh.shape.items()),
    }
