"""Imports point one way, as docs/design.md says, and users' code never needs the test extras."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "unclip_jax"

# Each part of the package, and the parts it may import. Order is the direction.
ALLOWED = {
    "errors": set(),
    "files": {"errors"},
    "box": {"errors"},
    "compile_cache": {"files"},
    "host_memory": set(),
    "loops": set(),
    "config": {"errors"},
    "command_line": {"errors"},
    "schedules": {"errors"},
    "diffusion": {"errors", "schedules"},
    "losses": {"errors", "diffusion", "schedules"},
    "degrade": {"errors"},
    "guidance": {"errors", "diffusion"},
    "samplers": {"errors", "diffusion", "loops", "schedules"},
    "axes": {"errors"},
    "models": {"errors", "axes"},
    "presets": {"models"},
    "pca": {"errors"},
    "stages": {
        "errors", "axes", "config", "degrade", "diffusion", "guidance", "loops", "losses",
        "models", "pca", "samplers",
    },
    "data": {"errors", "files"},
    "checkpoint": {"errors"},
    "hub": {"errors"},
    "parts": {"errors", "checkpoint", "sharding", "stages"},
    "data/embed": {"errors", "data", "distributed", "parts", "stages"},
    "clip_text": {"data", "parts", "stages"},
    "convert": {
        "errors", "checkpoint", "clip_text", "data", "diffusion", "hub", "models", "parts",
        "presets", "samplers", "sharding", "stages",
    },
    "train_config": {"errors"},
    "distributed": {"errors"},
    "preemption": {"distributed"},
    "sharding": {"errors", "axes", "checkpoint"},
    "cpu_devices": {"errors", "host_memory", "sharding"},
    "feed": {"errors", "distributed", "sharding", "train_config"},
    "muon": {"axes"},
    "optim": {"checkpoint", "muon", "train_config"},
    "train_step": {"axes", "optim", "sharding", "train_config"},
    "checksums": set(),
    "lock": {"errors"},
    "resume": {"errors", "checkpoint", "checksums", "distributed", "train_config"},
    "grids": {"errors", "files"},
    "report": {"errors", "files"},
    "training": {
        "errors", "checkpoint", "config", "distributed", "feed", "files", "grids", "lock", "optim",
        "preemption", "report", "resume", "sharding", "train_config", "train_step",
    },
    "t5": {"errors", "checkpoint", "convert", "data", "models"},
    "pipeline": {
        "errors", "axes", "box", "checkpoint", "clip_text", "convert", "data", "hub", "loops",
        "parts", "sharding", "stages", "t5",
    },
    "on_all_devices": {"cpu_devices", "pipeline", "sharding"},
    "text_states": {"data"},
    "lora": {"errors", "checkpoint"},
    "fine_tuning": {"errors", "checkpoint", "lora", "parts", "stages"},
    "plan": {
        "errors", "axes", "command_line", "config", "files", "optim", "sharding", "stages",
        "train_config", "train_step",
    },
    "save": {
        "errors", "checkpoint", "config", "fine_tuning", "lora", "resume", "sharding", "stages",
    },
    "classes": {"errors", "data", "parts", "stages"},
    "evaluation": {"errors", "pca"},
    "evaluate": {
        "errors", "compile_cache", "convert", "cpu_devices", "data", "evaluation", "files", "grids",
        "host_memory", "models", "on_all_devices", "parts", "pca", "pipeline", "sharding",
        "stages",
    },
    "export": {"errors", "box", "checkpoint", "models", "parts", "stages"},
    "figures": {"data", "evaluation", "pca", "pipeline", "stages", "text_states"},
    "needs": {
        "errors", "classes", "clip_text", "data", "files", "parts", "pipeline", "stages", "t5",
    },
    "runs": {
        "errors", "checkpoint", "classes", "clip_text", "config", "cpu_devices", "data", "figures",
        "fine_tuning", "lora", "needs", "parts", "sharding", "stages", "t5", "text_states",
        "train_config", "train_step",
    },
    "analytic": {
        "errors", "checkpoint", "losses", "needs", "parts", "runs", "samplers", "stages",
        "text_states",
    },
    "class_conditional": {
        "errors", "classes", "grids", "guidance", "parts", "pipeline", "stages",
    },
    "manipulate": {
        "errors", "axes", "data", "diffusion", "evaluation", "guidance", "loops", "pca", "pipeline",
        "samplers", "stages",
    },
    "tasks": {
        "errors", "compile_cache", "cpu_devices", "data", "figures", "files", "grids",
        "manipulate", "on_all_devices", "pca", "pipeline", "stages",
    },
    "doctor": {
        "errors", "checkpoint", "config", "data", "diffusion", "files", "lock", "needs", "parts",
        "pipeline", "report", "resume", "save", "sharding", "stages", "text_states",
        "train_config",
    },
    "app": {
        "errors", "compile_cache", "cpu_devices", "data", "files", "manipulate", "pipeline",
        "tasks",
    },
}  # fmt: skip

# What only some parts may import from outside.
RESERVED = {
    "flax": {"models"},
    "torch": set(),
    "transformers": set(),
    "diffusers": set(),
    "tensorflow": set(),
    "pickle": set(),
    "gradio": {"app"},
}


COMMANDS = ("data/embed",)  # parts by themselves, though they lie in another's folder


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE).with_suffix("")
    return relative.as_posix() if relative.as_posix() in COMMANDS else relative.parts[0]


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


def files() -> list[Path]:
    return [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


def test_every_part_has_its_place():
    found = {part_of(path) for path in files()}
    assert found == set(ALLOWED), "add the part to ALLOWED and to docs/design.md"


def test_imports_point_one_way():
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in files()
        for name in imported(path)
        if name.startswith("unclip_jax.")
        and name.split(".")[1] not in ALLOWED[part_of(path)] | {part_of(path)}
    ]
    assert not wrong


def test_no_part_imports_what_is_reserved():
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in files()
        for name in imported(path)
        if part_of(path) not in RESERVED.get(name.split(".")[0], {part_of(path)})
    ]
    assert not wrong


def test_the_rules_have_no_cycle():
    done: set[str] = set()
    while len(done) < len(ALLOWED):
        ready = {p for p, uses in ALLOWED.items() if p not in done and uses - {p} <= done}
        assert ready, f"a cycle among {set(ALLOWED) - done}"
        done |= ready
