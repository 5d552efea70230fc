"""Compiling for devices that may not be there, and what a compiled program needs of a chip."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterable

import jax

from unclip_jax.plan.chips import GIB, Chip
from unclip_jax.plan.collectives import Collective, added_up
from unclip_jax.plan.hlo import Program

# The compiler tries fewer ways to tile a fusion: convolutions take half as long to compile, and the
# program needs the same memory.
QUICK = {"xla_jf_fusion_max_instruction_count_for_window_config": "1"}


_REFUSED = re.compile(
    r"(?:Used |memory required for [\w ]*\()(?P<size>[\d.]+)(?P<unit>[KMGT])"
    r"(?: of [\d.]+[KMGT] hbm|\) exceeds available HBM)"
)


class TooLarge(Exception):
    """A program that does not fit into a chip's memory; the message says what it would need."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one compiled program needs of each chip.

    Attributes:
        arguments: bytes of its arguments.
        results: bytes of its results that are not arguments' memory used again.
        temporary: bytes that it needs besides.
        moved: bytes between memory and core.
        collectives: bytes among chips.
        donated: bytes of arguments whose memory results take.
        products: see `Program.products`.
        compile_s: seconds that the compiler took, which say nothing of the program.
    """

    arguments: int
    results: int
    temporary: int
    moved: int
    collectives: tuple[Collective, ...]
    donated: int
    products: dict[str, tuple[int, int]]
    compile_s: float = dataclasses.field(compare=False)

    @property
    def peak(self) -> int:
        """Bytes of memory in all."""
        return self.arguments + self.results + self.temporary


def compiled(lowered: jax.stages.Lowered, devices: int, options: dict[str, str]) -> Measured:
    """Compile a program, and read what it needs; TooLarge if the compiler says that it won't fit.

    Args:
        lowered: the program.
        devices: of a slice.
        options: of the compiler.
    """
    began = time.perf_counter()
    try:
        program = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if (used := _REFUSED.search(str(error))) is None:
            raise
        needed = float(used["size"]) * 1024 ** (1 + "KMGT".index(used["unit"]))
        raise TooLarge(f"{needed / GIB:.2f} GiB") from error
    seconds = time.perf_counter() - began
    memory = program.memory_analysis()
    text = Program(program.as_text(), devices)
    return Measured(
        arguments=memory.argument_size_in_bytes,
        results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        moved=text.bytes(),
        collectives=text.collectives(),
        donated=memory.alias_size_in_bytes,
        products=text.products(),
        compile_s=seconds,
    )


def together(parts: Iterable[tuple[Measured, int]]) -> tuple[int, tuple[Collective, ...]]:
    """Bytes moved and collectives of several programs, each run so many times."""
    parts = list(parts)
    collectives = added_up((c, times) for part, times in parts for c in part.collectives)
    return sum(part.moved * times for part, times in parts), collectives


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The time of a program by the chip's rates (Williams et al. 2009), in seconds.

    Attributes:
        compute: of its FLOPs at the peak of bfloat16.
        memory: of its bytes.
        network: of what it sends inside its slice, on all links at once, by ring algorithms.
        dcn: of what it sends to other slices.
    """

    compute: float
    memory: float
    network: float
    dcn: float = 0.0

    @classmethod
    def of(
        cls, chip: Chip, flops: float, moved: float, collectives: Iterable[Collective]
    ) -> Roofline:
        """That of what one chip computes, moves and sends."""
        sent = {False: 0.0, True: 0.0}
        for c in collectives:
            sent[c.between_slices] += c.sent
        return cls(
            compute=flops / chip.bf16,
            memory=moved / chip.hbm_rate,
            network=sent[False] / chip.ici_rate,
            dcn=sent[True] / chip.dcn_rate,
        )

    @property
    def least(self) -> float:
        """The time if all overlap entirely: no program is faster."""
        return max(dataclasses.astuple(self))

    @property
    def most(self) -> float:
        """The time if nothing overlaps."""
        return sum(dataclasses.astuple(self))
