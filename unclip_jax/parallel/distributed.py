"""Several processes as one run: how they find each other, and what they tell each other.

Every process runs the same program on its own devices; arrays span all of them. What is not an
array goes from process to process here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from unclip_jax.common import checks
from unclip_jax.errors import UserError, wrong

MODES = ("auto", "on", "off")


def environment(variables: Mapping[str, str]) -> str | None:
    """What started this process as one of several, by its environment; None if nothing did.

    Slurm's `srun` and Open MPI's `mpirun` say how many processes there are, GKE and queued
    resources which hosts a TPU slice has.
    """
    if _number(variables.get("SLURM_NTASKS")) > 1 and "SLURM_STEP_NODELIST" in variables:
        return "Slurm"
    if _number(variables.get("OMPI_COMM_WORLD_SIZE")) > 1:
        return "Open MPI"
    hosts = [host for host in variables.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    if len(hosts) > 1 or _number(variables.get("MEGASCALE_NUM_SLICES")) > 1:
        return "TPU pod"
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
        num_processes: how many there are.
        process_id: this one, from 0.

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
    _check(explicit, given, mode)
    if mode == "off" or (mode == "auto" and not explicit and environment(os.environ) is None):
        return
    try:
        jax.distributed.initialize(**explicit)
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise UserError(
            f"--distributed={mode}: the processes of this run did not find each other ({reason});"
            " start one on every host at about the same time, or name them with"
            " --coordinator_address=HOST:PORT --num_processes=N --process_id=I"
        ) from error


def _check(explicit: Mapping[str, Any], given: Mapping[str, Any], mode: str) -> None:
    """The three go together, and mean something."""
    if not explicit:
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
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(text)] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:n])) for row, n in zip(rows, sizes, strict=True)]


def fetch(tree: Any) -> Any:
    """Arrays that span processes, whole, as NumPy in every process. All must call it.

    One array after another, so that a device holds no more than one of them whole.
    """

    def whole(x: jax.Array) -> np.ndarray:
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(whole, tree)


def stop_requested(step: int) -> bool:
    """Whether some process got SIGTERM, and this is the step after which all of them stop.

    JAX agrees on one step for all processes. All must call it at every step.
    """
    return multihost_utils.reached_preemption_sync_point(step)
