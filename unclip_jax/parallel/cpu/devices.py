"""A CPU's cores as several devices, which share a batch as the chips of a pod do.

With one device XLA computes one operation after the other and splits each over the cores. With
more, each device takes rows of the batch, and they wait for each other only where rows meet, which
takes a tenth to a third off a U-Net's time (docs/performance.md). All devices use the same
threads, so that a batch that they do not divide still has every core, on one of them; a large
U-Net's images are split by their height instead.

Commands that compute ask for this; the library itself leaves JAX as it finds it.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import jax
import jaxlib.version
from jax.sharding import Mesh

from unclip_jax.errors import UserError
from unclip_jax.parallel import sharding
from unclip_jax.parallel.cpu import memory as host_memory
from unclip_jax.parallel.sharding import MeshConfig

AT_MOST = 8  # no machine of more cores has been measured
MEMORY_PART = 4  # all copies of what every device holds may take one part in so many

# XLA ends a process in which a device has waited 40 seconds for another, as it may where a step
# takes minutes. These raise that to a day. A release that does not know them ends as it starts.
PATIENCE = (
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=600"
    " --xla_cpu_collective_call_terminate_timeout_seconds=86400"
)
PATIENT_RELEASES = ("0.10.",)

_made = 0


def use() -> int:
    """Let JAX see the CPU as several devices. Call it before anything asks for devices.

    They are as many as the process has cores, down to a power of two, and at most `AT_MOST`.
    Nothing is done where the environment says how many there are to be (JAX_NUM_CPU_DEVICES, or
    XLA_FLAGS), where JAX has its devices already, in one of several processes, or with a release
    of JAX that is not among `PATIENT_RELEASES`.

    Returns:
        How many there are to be; 0 where nothing was done.
    """
    global _made
    flags = os.environ.get("XLA_FLAGS", "")
    told = "xla_force_host_platform_device_count" in flags or jax.config.jax_num_cpu_devices > 0
    known = jaxlib.version.__version__.startswith(PATIENT_RELEASES)
    if told or not known or jax.distributed.is_initialized():
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
    config: MeshConfig = MeshConfig(), *, rows: int = 0, held_bytes: Callable[[], int]
) -> Mesh:
    """The mesh of all devices; of those that `use` made, as many as serve.

    Args:
        config: the mesh that is asked for.
        rows: of a batch, which the devices are to divide; 0 where that is not known.
        held_bytes: gives the bytes of one copy of what every device is to hold.

    Raises:
        UserError: the config does not fit the number of devices.
    """
    devices = jax.devices()
    if devices[0].platform != "cpu" or not _made:
        return sharding.make_mesh(config, devices)
    copies = max(1, host_memory.total_bytes() // MEMORY_PART // max(held_bytes(), 1))
    counts = [2**i for i in reversed(range(len(devices).bit_length()))]
    serving = [count for count in counts if _serves(config, count, rows, copies)]
    return sharding.make_mesh(config, devices[: serving[0]] if serving else devices)


def _serves(config: MeshConfig, count: int, rows: int, copies: int) -> bool:
    """Whether so many devices make the mesh, divide the rows and leave enough memory."""
    try:
        data, fsdp, spatial, *_ = config.shape(count)
    except UserError:
        return False
    return rows % (data * fsdp) == 0 and data * spatial <= copies


def _cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1
