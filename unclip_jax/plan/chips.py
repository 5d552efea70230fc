"""TPU chips by their published figures, and topologies of them that the compiler knows."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import math
import os
import re
from collections.abc import Iterator

import jax
from jax.experimental import topologies

from unclip_jax.common import extras
from unclip_jax.errors import UserError, one_line, wrong

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip's peak figures, from cloud.google.com/tpu/docs (pages v4, v5e, v5p, v6e).

    Attributes:
        bf16: FLOP/s of bfloat16 matrix products.
        hbm_bytes: memory that the compiler lets a program have, a little under what is sold.
        hbm_rate: bytes/s between memory and core.
        ici_rate: bytes/s that the chip sends to its neighbours over all links together.
        axes: axes of a topology: 2 for a grid "16x16", 3 for "4x4x8".
    """

    bf16: float
    hbm_bytes: float
    hbm_rate: float
    ici_rate: float
    axes: int


CHIPS = {
    "v4": Chip(275e12, 31.25 * GIB, 1228e9, 300e9, 3),
    "v5e": Chip(197e12, 15.75 * GIB, 819e9, 200e9, 2),
    "v5p": Chip(459e12, 95.74 * GIB, 2765e9, 600e9, 3),
    "v6e": Chip(918e12, 31.25 * GIB, 1600e9, 400e9, 2),
}
EXAMPLES = "v4:4x4x8, v5e:16x16, v5p:4x4x8, v6e:16x16"


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of a pod: how many chips of which kind, and how they are wired.

    Attributes:
        kind: a key of `CHIPS`.
        sides: chips along each axis.
    """

    kind: str
    sides: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Topology:
        """The topology that a name such as "v5p:4x4x8" means.

        UserError if there is no such chip, or if its topologies have another number of axes.
        """
        found = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", text)
        kind = found and found[1]
        if kind not in CHIPS:
            form = f"CHIP:AxB or CHIP:AxBxC with a chip among {', '.join(CHIPS)}"
            raise wrong("--topology", text, f"{form}, such as {EXAMPLES}")
        sides = tuple(int(side) for side in found[2].split("x"))
        if len(sides) != CHIPS[kind].axes or 0 in sides:
            example = next(e for e in EXAMPLES.split(", ") if e.startswith(kind))
            axes = f"{CHIPS[kind].axes} axes of at least 1 for {kind}"
            raise wrong("--topology", text, f"{axes}, as in {example}")
        return cls(kind, sides)

    @property
    def name(self) -> str:
        """What `parse` reads, and the compiler too."""
        return f"{self.kind}:{'x'.join(map(str, self.sides))}"

    @property
    def chip(self) -> Chip:
        """The figures of one chip."""
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        """How many there are."""
        return math.prod(self.sides)

    def devices(self) -> list[jax.Device]:
        """Devices to compile for, which cannot run anything.

        UserError if the TPU compiler is not installed, or knows no such topology.
        """
        check_compiler()
        # No metadata server to ask, and another process may hold the library's lock.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        try:
            with _without_chatter():
                found = topologies.get_topology_desc(platform="tpu", topology_name=self.name)
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
