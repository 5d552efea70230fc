"""What a compiled program moves, read from its HLO text: collectives, and bytes of memory.

The compiler's own analysis counts the body of a loop once. Here each computation counts as often as
it runs: a loop's turns are the constant that its condition compares its counter with less where the
counter starts, or what the compiler noted.

Collectives are also inside fusions. A TPU scatters what it reduces in one, and spreads a collective
over several that compute beside it. To another slice a program sends through its host, over the
data centre's network (DCN).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping

from unclip_jax.plan.collectives import COLLECTIVES, DCN, Collective, added_up

BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
    "f8e4m3fn": 8, "f8e5m2": 8,
}  # fmt: skip
PRODUCTS = ("dot", "convolution", "ragged-dot")
KERNELS = ("__cublas", "__cudnn", "tpu_custom_call")  # of which calls are products
# They move nothing, or name what others move.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call",
    "conditional", "after-all", "partition-id", "replica-id", "iota", "opt-barrier",
}  # fmt: skip

_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAME = r"%?([\w.\-]+)"
_INSTRUCTION = re.compile(rf"^\s*(?:ROOT )?{_NAME} = (.*?[\]}})]) ([a-z][\w\-]*)\((.*)$")
_HEADER = re.compile(rf"^(ENTRY )?{_NAME} \(.*\{{$")
_CALLED = re.compile(rf"(?:calls|to_apply|body|condition)={_NAME}")
_CHAIN = re.compile(r'chain_id="(\d+)"')
_MEGASCALE = re.compile(r'_xla_megascale_(target|transfer_type)=("[^"]*"|\{\{.*?\}\})')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_FAST_MEMORY = re.compile(r"S\([1-9]\d*\)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: its result's type, its opcode, its operands' names and the rest of the line."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str

    @property
    def number(self) -> int | None:
        """Which parameter it is, if it is one."""
        return int(self.rest.split(")")[0]) if self.opcode == "parameter" else None

    @property
    def constant(self) -> int | None:
        """The integer that it is, if it is one."""
        known = self.opcode == "constant" and self.type.startswith("s32[]")
        return int(self.rest.split(")")[0]) if known else None

    @property
    def is_counter(self) -> bool:
        """Whether it takes an integer out of what a loop carries."""
        return self.opcode == "get-tuple-element" and self.type.startswith("s32[]")


def all_products(found: Iterable[tuple[str, tuple[int, int]]]) -> dict[str, tuple[int, int]]:
    """Products by kind: their counts add up, and the largest is the largest of all."""
    totals: dict[str, tuple[int, int]] = {}
    for kind, (count, size) in sorted(found):
        before, largest = totals.get(kind, (0, 0))
        totals[kind] = (before + count, max(largest, size))
    return totals


def array_bytes(text: str, *, slow_only: bool = False) -> int:
    """Bytes of all the arrays in a type; with `slow_only`, of those in HBM alone."""
    total = 0
    for dtype, sides, layout in _ARRAY.findall(text):
        if dtype in BITS and not (slow_only and _FAST_MEMORY.search(layout)):
            elements = math.prod(int(side) for side in sides.split(",") if side)
            total += elements * BITS[dtype] // 8
    return total


class Program:
    """A program's computations by name."""

    def __init__(self, text: str, devices: int) -> None:
        """Read the text of a compiled program that runs on so many devices."""
        self.devices = devices
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            header = _HEADER.match(line)
            if header:
                current = self.computations.setdefault(header[2], {})
                self.entry = header[2] if header[1] else self.entry
            elif (found := _INSTRUCTION.match(line)) is not None:
                name, type_, opcode, rest = found.groups()
                inside, after = _split_parenthesis(rest)
                names = tuple(re.findall(r"%([\w.\-]+)", inside))
                current[name] = Instruction(name, type_, opcode, names, f"{inside}){after}")

    @functools.cached_property
    def runs(self) -> dict[str, int]:
        """How often each computation runs that is not part of a fusion or a reduction."""
        runs: dict[str, int] = collections.Counter()

        def visit(name: str, times: int) -> None:
            runs[name] += times
            for instruction in self.computations[name].values():
                called = dict(re.findall(rf"(body|condition)={_NAME}", instruction.rest))
                if instruction.opcode == "while":
                    turns = self._turns(instruction, called["condition"], self.computations[name])
                    visit(called["body"], times * turns)
                elif instruction.opcode == "conditional":
                    branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
                    pair = r"(?:true|false)_computation=" + _NAME
                    texts = branches[1].split(", ") if branches else []
                    for branch in texts or re.findall(pair, instruction.rest):
                        visit(branch.lstrip("%"), times)
                elif instruction.opcode in ("call", "async-start"):
                    for inner in _CALLED.findall(instruction.rest):
                        visit(inner, times)

        visit(self.entry, 1)
        return dict(runs)

    def _turns(self, loop: Instruction, condition: str, around: Mapping[str, Instruction]) -> int:
        """How often a loop turns; 1 where that is known only at run time."""
        noted = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
        if noted:
            return int(noted[1])
        asked = self.computations[condition].values()
        ends = {i.constant for i in asked if i.constant is not None}
        places = {int(i.rest.rpartition("index=")[2]) for i in asked if i.is_counter}
        if len(ends) != 1:
            return 1
        start = _start(around[loop.operands[0]], places.pop(), around) if len(places) == 1 else 0
        return max(ends.pop() - start, 0)

    def _executed(self) -> Iterator[tuple[Instruction, dict[str, Instruction], int]]:
        for name, times in self.runs.items():
            for instruction in self.computations[name].values():
                yield instruction, self.computations[name], times

    def collectives(self) -> tuple[Collective, ...]:
        """All that runs among several devices, by kind and size of group."""
        return added_up(
            (found, times) for name, times in self.runs.items() for found in self._among(name)
        )

    def _among(self, name: str) -> Iterator[Collective]:
        """The collectives of one run of a computation, those inside its fusions included.

        One that is spread over several fusions is a part of each; they have its chain in common.
        """
        chains: set[str] = set()
        for around, scatters in self._computations(name):
            for instruction in around.values():
                found = self._collective(instruction, around)
                chain = _CHAIN.search(instruction.rest)
                if found is None or (chain and chain[1] in chains):
                    continue
                chains |= {chain[1]} if chain else set()
                yield dataclasses.replace(found, kind="reduce-scatter") if scatters else found

    def _computations(self, name: str) -> Iterator[tuple[dict[str, Instruction], bool]]:
        """A computation and those of its fusions, and whether each scatters what it reduces."""
        yield self.computations[name], name.startswith("all-reduce-scatter")
        for instruction in self.computations[name].values():
            if instruction.opcode == "fusion":
                yield from self._computations(_CALLED.search(instruction.rest)[1])

    def _collective(
        self, instruction: Instruction, around: Mapping[str, Instruction]
    ) -> Collective | None:
        """What an instruction sends to other devices; None if it sends nothing."""
        kind = instruction.opcode.removesuffix("-start")
        operands = instruction.operands
        if kind == "send" and (found := dict(_MEGASCALE.findall(instruction.rest))):
            how = found["transfer_type"].strip('"').lower().replace("_", "-")
            kind = DCN + ("collective-permute" if how == "one-to-one" else how)
            group, operands = _slices(found["target"].strip('"')), operands[:1]
        elif kind in COLLECTIVES:
            group = self._group(instruction.rest)
        else:
            return None
        if group == 1 and kind != "collective-permute":
            return None
        return Collective(kind, group, sum(array_bytes(around[o].type) for o in operands), 1)

    def _group(self, rest: str) -> int:
        """Devices in a collective's group, in any of the forms that HLO writes groups in."""
        listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
        if listed:
            return len(listed[1].split(","))
        shaped = re.search(r"replica_groups=\[(\d+),(\d+)\]", rest)
        if shaped:
            return int(shaped[2])
        meshed = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest)
        if meshed:
            sides = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", meshed[1])}
            return math.prod(sides[name] for name in re.findall(r"'([^']+)'", meshed[2]))
        return self.devices

    def products(self) -> dict[str, tuple[int, int]]:
        """Matrix products, convolutions and calls of others' kernels: how many, and of what size.

        By kind and the dtype of the first operand, such as "convolution bf16", or by a kernel's
        name. They are counted as they stand in the text, a loop's body once; the size is that of
        the largest first operand, in bytes.
        """
        found: list[tuple[str, tuple[int, int]]] = []
        for around in self.computations.values():
            for instruction in around.values():
                called = _TARGET.search(instruction.rest)
                kernel = called and called[1].startswith(KERNELS)
                operand = around.get(next(iter(instruction.operands), ""))
                if operand and (kernel or instruction.opcode in PRODUCTS):
                    kind = called[1] if called else instruction.opcode
                    dtype = _ARRAY.search(operand.type)[1]
                    found.append((f"{kind} {dtype}", (1, array_bytes(operand.type))))
        return all_products(found)

    def bytes(self) -> int:
        """Bytes that one device moves between memory and core.

        An instruction reads its operands and writes its result; a fusion keeps all else inside.
        What only slices an array touches the slice alone. What lies in the core's own memory costs
        nothing.
        """
        return sum(
            times * self._bytes_of(instruction, around)
            for instruction, around, times in self._executed()
            if instruction.opcode not in FREE and not instruction.opcode.endswith("-done")
        )

    def _bytes_of(self, instruction: Instruction, around: dict[str, Instruction]) -> int:
        def size(name: str) -> int:
            return array_bytes(around[name].type, slow_only=True)

        written = array_bytes(instruction.type, slow_only=True)
        if instruction.opcode.endswith("-start") or instruction.opcode in ("send", "recv"):
            return written  # its result repeats the operands
        if instruction.opcode == "dynamic-slice":
            return 2 * written
        if instruction.opcode == "dynamic-update-slice":
            return 2 * size(instruction.operands[1])
        if instruction.opcode != "fusion":
            return written + sum(map(size, instruction.operands))
        inner = self.computations[_CALLED.search(instruction.rest)[1]]
        carried = _carried(inner)
        last = list(inner.values())[-1]
        if carried and last.opcode != "tuple":  # the first of several fusions, or the last one
            return written if "AsyncCollectiveStart" in last.rest else 0
        sliced, updated = self._touched(inner)
        if carried:
            arrays = [found[0] for found in _ARRAY.finditer(instruction.type)]
            pairs = zip(last.operands, arrays, strict=True)
            written -= sum(array_bytes(a, slow_only=True) for o, a in pairs if o in carried)
            sliced |= {inner[name].number: 0 for name in carried if inner[name].number is not None}
        read = 0
        for i, operand in enumerate(instruction.operands):
            whole = size(operand)
            read += min(whole, sliced[i]) if i in sliced else whole
        return read + (min(written, updated) if updated is not None else written)

    def _touched(self, inner: dict[str, Instruction]) -> tuple[dict[int, int], int | None]:
        """Bytes read of those parameters that a fusion only slices, and written if it updates one.

        A fusion inside may be what slices. A parameter that is updated in place is read nowhere.
        """
        users: dict[str, list[Instruction]] = collections.defaultdict(list)
        for instruction in inner.values():
            for operand in dict.fromkeys(instruction.operands):
                users[operand].append(instruction)

        def ends(name: str) -> Iterator[int | None]:
            """Bytes that each use reads of a sliced array; None of one that reads it whole."""
            for user in users[name]:
                if user.opcode in ("bitcast", "copy", "convert") and users[user.name]:
                    yield from ends(user.name)
                elif user.opcode == "dynamic-slice":
                    yield array_bytes(user.type)
                elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                    yield 0
                elif user.opcode == "fusion":
                    called = self.computations[_CALLED.search(user.rest)[1]]
                    sliced, _ = self._touched(called)
                    places = [i for i, o in enumerate(user.operands) if o == name]
                    yield from (sliced.get(place) for place in places)
                else:
                    yield None

        sliced: dict[int, int] = {}
        updated = None
        for instruction in inner.values():
            if instruction.opcode == "dynamic-update-slice":
                updated = array_bytes(inner[instruction.operands[1]].type)
            if instruction.opcode != "parameter":
                continue
            reads = list(ends(instruction.name))
            if reads and None not in reads:
                sliced[instruction.number] = sum(reads)
        return sliced, updated


def _carried(inner: Mapping[str, Instruction]) -> set[str]:
    """What a fusion has of a collective that is spread over several, and only hands on.

    The first of them begins it, and moves the bytes; the others compute beside it.
    """
    spread = [i for i in inner.values() if i.opcode in COLLECTIVES and _CHAIN.search(i.rest)]
    if not spread:
        return set()
    through = {o for o in list(inner.values())[-1].operands if inner[o].opcode == "parameter"}
    return through.union(*({i.name, *i.operands} for i in spread))


def _start(carried: Instruction, place: int, around: Mapping[str, Instruction]) -> int:
    """Where the counter of a loop starts; 0 where that is known only at run time."""
    if carried.opcode != "tuple":
        return 0
    found = around[carried.operands[place]]
    while found.opcode in ("copy", "bitcast") and found.operands[0] in around:
        found = around[found.operands[0]]
    return found.constant or 0


def _slices(target: str) -> int:
    """How many slices a target of a send names, in any of its three forms.

    "{1,2}x{0:15}" has each by its number, or a first and a last one. An all-to-all has groups of
    devices, and a permutation pairs of them, {{100003->200000},{200003->100000}}: device 3 of slice
    1 is 100003.
    """
    if target.startswith("{{"):
        named = target if "->" in target else target.split("}")[0]
        return len({int(device) // 100_000 for device in re.findall(r"\d+", named)})
    parts = [part.split(":") for part in target[1:].split("}")[0].split(",")]
    return sum(int(part[-1]) - int(part[0]) + 1 for part in parts)


def _split_parenthesis(text: str) -> tuple[str, str]:
    """What is before and after the parenthesis that closes one opened just before `text`."""
    depth = 1
    for i, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return text[:i], text[i + 1 :]
    return text, ""
