"""Imports point one way, as docs/design.md says, and users' code never needs the test extras."""

import ast
import functools
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "unclip_jax"

# The rooms, floor by floor: a room may import those of the floors below it, and none of its own.
FLOORS = (
    {"errors"},
    {"common"},
    {"diffusion", "metrics"},
    {"data", "parallel"},
    {"models"},
    {"stages"},
    {"weights"},
    {"training", "pipeline"},
    {"app", "evaluate", "plan", "train_all"},
    {"__main__"},
)

# What only some rooms may import from outside.
RESERVED = {
    "flax": {"models"},
    "torch": set(),
    "transformers": {"weights"},
    "diffusers": set(),
    "tensorflow": set(),
    "pickle": set(),
    "gradio": {"app"},
}


def files() -> list[Path]:
    return [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


def name_of(path: Path) -> str:
    """The dotted name of a file's module, below the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path) for path in files()}


@functools.cache
def imported(path: Path) -> set[str]:
    """Full dotted names of every module a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(path: Path) -> set[str]:
    """The modules of this package that a file imports, by their names below the package."""
    found = set()
    for name in imported(path):
        package, _, name = name.partition(".")
        if package == "unclip_jax" and name:
            found.add(name if name in MODULES else name.rpartition(".")[0])
    return found


def cycle_among(edges: dict[str, set[str]]) -> set[str]:
    """The nodes that cannot be put in an order in which every arrow points back."""
    left = {node: set(uses) - {node} for node, uses in edges.items()}
    while ready := {node for node, uses in left.items() if not uses & set(left)}:
        for node in ready:
            del left[node]
    return set(left)


def test_every_room_has_its_floor():
    found = {name.split(".")[0] for name in MODULES}
    assert found == set().union(*FLOORS), "add the room to FLOORS and to docs/design.md"


def test_imports_point_down():
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    wrong = [
        f"{name_of(path)} imports {other}"
        for path in files()
        for other in ours(path)
        if other.split(".")[0] != (room := name_of(path).split(".")[0])
        and floor[other.split(".")[0]] >= floor[room]
    ]
    assert not wrong


def test_inside_a_room_nothing_climbs():
    """Neither among a folder's files and subfolders, nor among all modules, is there a circle."""
    edges: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for path in files():
        name = name_of(path).split(".")
        for other in map(str.split, (o.replace(".", " ") for o in ours(path))):
            shared = next(
                (i for i, (a, b) in enumerate(zip(name, other, strict=False)) if a != b), None
            )
            if shared is not None:
                edges[".".join(name[:shared])][name[shared]].add(other[shared])
                edges[".".join(name[:shared])][other[shared]] |= set()
    assert {
        folder: stuck for folder, inside in edges.items() if (stuck := cycle_among(inside))
    } == {}
    assert not cycle_among({name_of(path): ours(path) for path in files()})


def test_no_room_imports_what_is_reserved():
    wrong = [
        f"{name_of(path)} imports {name}"
        for path in files()
        for name in imported(path)
        if (room := name_of(path).split(".")[0]) not in RESERVED.get(name.split(".")[0], {room})
    ]
    assert not wrong
