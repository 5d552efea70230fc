"""A CPU's cores as several devices, which share a batch as the chips of a pod do.

With one device XLA computes one operation after the other and splits each over the cores. With
more, each device takes rows of the batch, and they wait for each other only where rows meet
(docs/performance.md). All devices use the same threads, so a batch that they do not divide goes to
one of them, with every core; a large U-Net's images are split by their height instead.

Commands that compute ask for this; the library itself leaves JAX as it finds it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TypeVar

import jax
import jaxlib.version
from jax.sharding import Mesh

from unclip_jax.errors import UserError
from unclip_jax.parallel import axes, sharding
from unclip_jax.parallel.cpu import memory
from unclip_jax.parallel.sharding import MeshConfig

Tree = TypeVar("Tree")

AT_MOST = 8  # no machine of more cores has been measured
MEMORY_PART = 4  # all copies of what every device holds may take one part in so many

# The `UNetConfig.work` from which on devices split one image: that of 64 channels at 64 px and four
# levels is above, the box's upsampler is below.
LEAST_SPLIT = 2**26

# XLA ends a process in which a device has waited 40 seconds for another, as it may where a step
# takes minutes. These raise that to a day. A jaxlib that does not know them ends as it starts.
PATIENCE = (
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=600"
    " --xla_cpu_collective_call_terminate_timeout_seconds=86400"
)
TRIED = ("0.10.", "0.11.", "0.12.")  # releases of jaxlib that know them

_made = 0


def use() -> int:
    """Let JAX see the CPU as several devices. Call it before anything asks for devices.

    They are as many as the process has cores, down to a power of two, and at most `AT_MOST`.
    Nothing is done where the environment says how many there are to be (JAX_NUM_CPU_DEVICES, or
    XLA_FLAGS), where JAX has its devices already, or in one of several processes. With a jaxlib
    that is not among `TRIED` nothing is done either, and a line says so.

    Returns:
        How many there are to be; 0 where nothing was done.
    """
    global _made
    flags = os.environ.get("XLA_FLAGS", "")
    told = "xla_force_host_platform_device_count" in flags or jax.config.jax_num_cpu_devices > 0
    if told or jax.distributed.is_initialized():
        return 0
    version = jaxlib.version.__version__
    if not version.startswith(TRIED):
        logging.warning(
            "on a CPU, cores are no devices of their own with jaxlib %s: it is untried"
            " whether it knows %s",
            version,
            PATIENCE,
        )
        return 0
    count = 2 ** (min(_cores(), AT_MOST).bit_length() - 1)
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        return 0
    os.environ["XLA_FLAGS"] = f"{PATIENCE} {flags}".strip()  # read when devices are asked for
    _made = count
    return count


def make_mesh(
    config: MeshConfig = MeshConfig(),
    *,
    rows: int = 0,
    held_bytes: Callable[[], int] = lambda: 0,
    most: int = AT_MOST,
) -> Mesh:
    """The mesh of all devices; of those that `use` made, as many as serve.

    Args:
        config: the mesh that is asked for.
        rows: of a batch, which the devices are to divide; 0 where that is not known.
        held_bytes: gives the bytes that each copy of the model has of its own, as a state of
            training has; weights that are only read are in memory once.
        most: devices that serve, where the config leaves it open.

    Raises:
        UserError: the config does not fit the number of devices.
    """
    devices = jax.devices()
    if devices[0].platform != "cpu" or not _made:
        return sharding.make_mesh(config, devices)
    copies = max(1, memory.total_bytes() // MEMORY_PART // max(held_bytes(), 1))
    counts = [2**i for i in reversed(range(len(devices).bit_length()))]
    serving = [count for count in counts if _serves(config, count, rows, copies)]
    few = [count for count in serving if count <= most] or serving
    return sharding.make_mesh(config, devices[: few[0]] if few else devices)


def _serves(config: MeshConfig, count: int, rows: int, copies: int) -> bool:
    """Whether so many devices make the mesh, divide the rows and leave enough memory."""
    try:
        data, fsdp, spatial, *_ = config.shape(count)
    except UserError:
        return False
    if data % max(config.slices, 1):
        return False
    return rows % (data * fsdp) == 0 and data * spatial <= copies


def for_rows(tree: Tree, rows: int, mesh: Mesh, *, work: int = 0) -> tuple[Tree, Mesh]:
    """Params and the mesh on which they compute a batch: all devices, or on a CPU perhaps one.

    A CPU's devices share its cores. If they cannot split the rows, every device computes the whole
    batch, and each slows the others down. The first device alone then does it with all cores, and
    already has a copy of the params. Large images stay on all devices: they are split by height
    (`axes.constrain`), which repays the longer compilation.

    Args:
        tree: arrays on `mesh`.
        rows: of the batch; 1 where nothing spreads batches.
        mesh: where they lie.
        work: `UNetConfig.work` of the network; 0 where it is no U-Net.

    Returns:
        The arrays, and the mesh that they are on.
    """
    first = mesh.devices.flat[0]
    splits = rows % axes.split(mesh, "batch") == 0 or axes.splits_params(mesh)
    if first.platform != "cpu" or splits or work >= LEAST_SPLIT:
        return tree, mesh

    def as_first_has(x: jax.Array) -> jax.Array:
        return next(shard.data for shard in x.addressable_shards if shard.device == first)

    return jax.tree.map(as_first_has, tree), sharding.make_mesh(devices=[first])


def _cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1
