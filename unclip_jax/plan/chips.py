"""Chips by their published figures, and topologies of them that a compiler knows without one."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import math
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import topologies

from unclip_jax.common import extras
from unclip_jax.errors import UserError, one_line, wrong
from unclip_jax.parallel.flops import PEAKS
from unclip_jax.plan import cuda

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak figures of what JAX calls a device: a TPU chip (of tpu7x half a one), or a GPU.

    TPUs: docs.cloud.google.com/tpu/docs, the pages v4, v5e, v5p, v6e and tpu7x. There is no rate of
    a GPU: what its kernels reach depends on tuning that needs one.

    Attributes:
        bf16: FLOP/s of bfloat16 matrix products.
        hbm_bytes: memory that the compiler lets a program have, a little under what is sold; of a
            GPU, the three quarters that JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says more.
        hbm_rate: bytes/s between memory and core.
        ici_rate: bytes/s that it sends to its neighbours over all links together.
        dcn_rate: bytes/s that it sends to other slices, its share of what a pod or host sends.
        axes: axes of a topology: 2 for a grid "16x16", 3 for "4x4x8".
        devices: on one chip.
        gpu: whether it is one.
    """

    hbm_bytes: float
    axes: int
    bf16: float = 0.0
    hbm_rate: float = 0.0
    ici_rate: float = 0.0
    dcn_rate: float = 0.0
    devices: int = 1
    gpu: bool = False


CHIPS = {
    "v4": Chip(31.25 * GIB, 3, PEAKS["TPU v4"], 1228e9, 300e9, 6.25e9),
    "v5e": Chip(15.75 * GIB, 2, PEAKS["TPU v5e"], 819e9, 200e9, 3.125e9),
    "v5p": Chip(95.74 * GIB, 3, PEAKS["TPU v5"], 2765e9, 600e9, 6.25e9),
    "v6e": Chip(31.25 * GIB, 2, PEAKS["TPU v6"], 1600e9, 400e9, 12.5e9),
    "tpu7x": Chip(94.75 * GIB, 3, PEAKS["TPU7x"], 7380e9 / 2, 300e9, 6.25e9, devices=2),
    "h100": Chip(0.75 * cuda.MEMORY, 2, gpu=True),
}
EXAMPLES = "v4:4x4x8, v5e:16x16, v5p:4x4x8, v6e:16x16, tpu7x:4x4x4, h100:8x8, 2xv5p:4x4x8"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of a pod: how many chips of which kind, and how they are wired.

    Attributes:
        kind: a key of `CHIPS`.
        sides: chips along each axis of a slice; of GPUs, those of a host, and the hosts.
        slices: equal ones, between which there is the data centre's network.
    """

    kind: str
    sides: tuple[int, ...]
    slices: int = 1

    @classmethod
    def parse(cls, text: str) -> Topology:
        """The topology that a name such as "v5p:4x4x8" or "2xv5p:4x4x8" means.

        UserError if there is no such chip, or if its topologies have another number of axes.
        """
        found = re.fullmatch(r"(?:(\d+)x)?([a-z0-9]+):(\d+(?:x\d+)*)", text.replace(" ", ""))
        kind = found and found[2]
        if kind not in CHIPS:
            form = f"CHIP:AxB or CHIP:AxBxC with a chip among {', '.join(CHIPS)}"
            raise wrong("--topology", text, f"{form}, such as {EXAMPLES}")
        chip = CHIPS[kind]
        slices, sides = int(found[1] or 1), tuple(int(side) for side in found[3].split("x"))
        if len(sides) != chip.axes or 0 in (*sides, slices):
            example = next(e for e in EXAMPLES.split(", ") if e.startswith(kind))
            axes = f"{chip.axes} axes of at least 1 for {kind}"
            raise wrong("--topology", text, f"{axes}, as in {example}")
        if chip.gpu and slices > 1:
            hosts = f"{kind}:{sides[0]}x{sides[1] * slices}"
            raise wrong("--topology", text, f"GPUs of a host x hosts, such as {hosts}")
        return cls(kind, sides, slices)

    @property
    def name(self) -> str:
        """What `parse` reads."""
        slices = f"{self.slices}x" if self.slices > 1 else ""
        return f"{slices}{self.kind}:{'x'.join(map(str, self.sides))}"

    @property
    def chip(self) -> Chip:
        """The figures of one device."""
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        """How many there are, in all slices."""
        return math.prod(self.sides) * self.slices

    @property
    def device_count(self) -> int:
        """How many devices JAX makes of them."""
        return self.chips * self.chip.devices

    def devices(self) -> list[jax.Device]:
        """Devices to compile for, which cannot run anything.

        UserError if the compiler is not installed, or knows no such topology.
        """
        if self.chip.gpu:
            return cuda.devices(*self.sides)
        check_compiler()
        # No metadata server to ask, and another process may hold the library's lock.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        name = f"{self.kind}:{'x'.join(map(str, self.sides))}"
        options: dict[str, Any] = {"num_slices": self.slices} if self.slices > 1 else {}
        if math.prod(self.sides) == 1:
            options["chips_per_host_bounds"] = (1, 1, 1)
        try:
            with _without_chatter():
                found = topologies.get_topology_desc(name, "tpu", **options)
        except Exception as error:  # the compiler's errors share no class
            raise UserError(
                f"--topology={self.name}: the TPU compiler knows no such slice ({one_line(error)});"
                f" try one such as {EXAMPLES}"
            ) from error
        return list(found.devices)


def check_compiler() -> None:
    """Raise UserError unless the TPU compiler is there, of the release that this jax reads."""
    install = f"{extras.how('plan')}, which needs no TPU"
    try:
        found = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        text = f"libtpu: not installed, and it is the TPU's compiler; {install}"
        raise UserError(text) from None
    pins = (re.match(r"libtpu==([\d.]+)\.\*", r) for r in importlib.metadata.requires("jax") or ())
    pinned = next((pin[1] for pin in pins if pin), None)
    if pinned is not None and not f"{found}.".startswith(f"{pinned}."):
        raise UserError(
            f"libtpu: got {found}, expected {pinned}.*, whose programs jax {jax.__version__} reads;"
            f" {install}"
        )


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Keep what libtpu says of the missing TPU while it loads off stderr."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
