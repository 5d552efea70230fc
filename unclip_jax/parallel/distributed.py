"""Several processes as one run: how they find each other, and what they tell each other.

Every process runs the same program on its own devices; arrays span all of them. What is not an
array goes from process to process here.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from unclip_jax.common import checks
from unclip_jax.errors import UserError, wrong

MODES = ("auto", "on", "off")


class Launcher(NamedTuple):
    """The variables by which a launcher that JAX does not know numbers its processes."""

    count: str
    index: str
    local_count: str
    local_index: str


LAUNCHERS = {
    "torchrun": Launcher("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK"),
    "MPICH": Launcher("PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS", "MPI_LOCALRANKID"),
    "MVAPICH": Launcher(
        "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
    ),
    "Flux": Launcher("FLUX_JOB_SIZE", "FLUX_TASK_RANK", "", "FLUX_TASK_LOCAL_ID"),
    "JAX": Launcher("JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "", ""),
}  # fmt: skip
KUBERNETES = "Kubernetes"


def environment(variables: Mapping[str, str]) -> str | None:
    """What started this process as one of several, by its environment; None if nothing did.

    Slurm's `srun`, Open MPI's `mpirun` and the `LAUNCHERS` say how many processes there are, GKE
    and queued resources which hosts a TPU slice has. An indexed job of Kubernetes says only which
    one this is.
    """
    if _number(variables.get("SLURM_NTASKS")) > 1 and "SLURM_STEP_NODELIST" in variables:
        return "Slurm"
    if _number(variables.get("OMPI_COMM_WORLD_SIZE")) > 1:
        return "Open MPI"
    hosts = [host for host in variables.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    if len(hosts) > 1 or _number(variables.get("MEGASCALE_NUM_SLICES")) > 1:
        return "TPU pod"
    for name, launcher in LAUNCHERS.items():
        if _number(variables.get(launcher.count)) > 1 and launcher.index in variables:
            return name
    if not hosts and "JOB_COMPLETION_INDEX" in variables:
        return KUBERNETES
    return None


def _number(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 0


def initialize(
    mode: str = "auto",
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Join the other processes of this run. Call it before anything asks for devices.

    Args:
        mode: "auto" joins where the three others are given or `environment` finds something, "on"
            always (JAX then asks the TPU's metadata, Slurm, Open MPI or Kubernetes), "off" never.
        coordinator_address: host:port of process 0, which every process can reach.
        num_processes: how many there are; None if a launcher says it.
        process_id: this one, from 0; likewise.

    Raises:
        UserError: the mode is unknown, an argument is missing or has no meaning, or the others
            cannot be reached.
    """
    checks.choice("--distributed", mode, MODES)
    given = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    explicit = {name: value for name, value in given.items() if value is not None}
    found = environment(os.environ)
    if mode != "off" and found in LAUNCHERS and explicit.keys() <= {"coordinator_address"}:
        explicit = _told(found, os.environ, coordinator_address)
        given |= {name: explicit.get(name) for name in given}
    _check(explicit, given, mode)
    if mode == "off" or (mode == "auto" and not explicit and found is None):
        return
    if found == KUBERNETES and not explicit and importlib.util.find_spec("kubernetes") is None:
        index = os.environ["JOB_COMPLETION_INDEX"]
        raise UserError(
            f"--distributed={mode}: this is process {index} of an indexed job of Kubernetes, which"
            " says nowhere of how many; pip install kubernetes, by which JAX asks it, or give"
            " --coordinator_address=HOST:PORT --num_processes=N --process_id=$JOB_COMPLETION_INDEX,"
            " or --distributed=off if it is the only one"
        )
    try:
        jax.distributed.initialize(**explicit)
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise UserError(
            f"--distributed={mode}: the processes of this run did not find each other ({reason});"
            " start one on every host at about the same time, or name them with"
            " --coordinator_address=HOST:PORT --num_processes=N --process_id=I"
        ) from error


def _told(name: str, variables: Mapping[str, str], address: str | None) -> dict[str, Any]:
    """What a launcher's variables tell JAX; UserError if they don't say where process 0 is."""
    launcher = LAUNCHERS[name]
    address = address or variables.get("JAX_COORDINATOR_ADDRESS")
    port = _number(variables.get("MASTER_PORT"))
    if not address and name == "torchrun" and port and "MASTER_ADDR" in variables:
        # torchrun itself listens there.
        free = port + 1 if "TORCHELASTIC_RUN_ID" in variables else port
        address = f"{variables['MASTER_ADDR']}:{free}"
    count, index = variables[launcher.count], variables[launcher.index]
    if not address and name in ("MPICH", "MVAPICH") and importlib.util.find_spec("mpi4py"):
        return {"cluster_detection_method": "mpi4py"}
    if not address:
        raise UserError(
            f"--coordinator_address: missing, and {name} started this process as number {index} of"
            f" {count} ({launcher.index}, {launcher.count}) but does not say where number 0 is;"
            " give it as HOST:PORT, or --distributed=off if each is to run alone"
        )
    told = {
        "coordinator_address": address,
        "num_processes": _number(count),
        "process_id": _number(index),
    }
    several = _number(variables.get(launcher.local_count)) > 1
    if several and "JAX_LOCAL_DEVICE_IDS" not in variables:  # a GPU for each
        told["local_device_ids"] = [_number(variables.get(launcher.local_index))]
    return told


def _check(explicit: Mapping[str, Any], given: Mapping[str, Any], mode: str) -> None:
    """The three go together, and mean something."""
    if not explicit or "cluster_detection_method" in explicit:
        return
    if mode == "off":
        raise UserError(f"--distributed=off: contradicts --{next(iter(explicit))}; give one alone")
    missing = [name for name in given if name not in explicit]
    if missing:
        raise UserError(f"--{missing[0]}: missing, expected with --{next(iter(explicit))}")
    address, count, index = given.values()
    host, _, port = address.rpartition(":")
    if not host or not 0 < _number(port) < 65536:
        raise wrong("--coordinator_address", address, "HOST:PORT")
    checks.count("--num_processes", count)
    if not 0 <= index < count:
        raise wrong("--process_id", index, f"0 to {count - 1}")


def check_initialized() -> None:
    """Raise UserError where devices of other hosts are there, but not the processes behind them."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UserError(
            f"--distributed: got auto, but these devices belong to {jax.process_count()} hosts;"
            " give --distributed=on on every one of them"
        )


def is_lead() -> bool:
    """Whether this process is the one that writes what there is one of."""
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """What every process gives, JSON-able, in order of processes. All must call it."""
    if jax.process_count() == 1:
        return [value]
    return [json.loads(text) for text in gather_bytes(json.dumps(value).encode())]


def gather_bytes(content: bytes) -> list[bytes]:
    """What every process gives, in order of processes. All must call it."""
    if jax.process_count() == 1:
        return [content]
    sizes = multihost_utils.process_allgather(np.int32(len(content)))
    padded = np.zeros(max(1, int(sizes.max())), np.uint8)
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:n]) for row, n in zip(rows, sizes, strict=True)]


def gather_arrays(arrays: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The arrays by name that every process gives, of any dtypes and shapes, as `gather`."""
    content = io.BytesIO()
    np.savez(content, **arrays)
    found = []
    for each in gather_bytes(content.getvalue()):
        with np.load(io.BytesIO(each), allow_pickle=False) as file:
            found.append({name: file[name] for name in file.files})
    return found


def whole(x: Any) -> np.ndarray:
    """An array as NumPy, in every process, also if it spans processes. All must call it."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def fetch(tree: Any, *, lead_only: bool = False) -> Any:
    """Arrays that span processes, whole, as NumPy. All must call it.

    One array after another, so that a device holds no more than one of them whole; nor does a
    process's memory, if the lead alone keeps them and the others get None in their places.
    """
    keeps = is_lead() or not lead_only

    def kept(x: jax.Array) -> np.ndarray | None:
        found = whole(x)
        return found if keeps else None

    return jax.tree.map(kept, tree)


def stop_requested(step: int) -> bool:
    """Whether some process got SIGTERM, and this is the step after which all of them stop.

    JAX agrees on one step for all processes. All must call it at every step.
    """
    return multihost_utils.reached_preemption_sync_point(step)
