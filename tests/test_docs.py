"""The documentation: every module is in the reference, and the code of a tutorial runs."""

import importlib
import re
from pathlib import Path

import pytest

from tests import tiny
from unclip_jax import __main__
from unclip_jax.common import command_line
from unclip_jax.common.grids import read_png_metadata
from unclip_jax.weights import box

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
HEADING = re.compile(r"^#+ (unclip_jax[\w.]*)$", re.MULTILINE)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")

# What commands are made of and nobody imports; their pages say what they do.
COMMANDS = (
    "unclip_jax.app",
    "unclip_jax.pipeline.tasks",
    "unclip_jax.training.doctor",
)
SAME_ELSEWHERE = {"unclip_jax"}


def documented() -> list[str]:
    return [
        name
        for page in (DOCS / "reference").glob("*.md")
        for name in HEADING.findall(page.read_text(encoding="utf-8"))
    ]


def modules() -> set[str]:
    """Every module with something in it that others may import."""
    found = set()
    for path in (ROOT / "unclip_jax").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] in ("__main__", "command") or ".".join(parts).startswith(COMMANDS):
            continue
        if parts[-1] == "__init__":
            parts = parts[:-1]
            if not re.search(r"^def |^class ", path.read_text(encoding="utf-8"), re.MULTILINE):
                continue  # a package that only gathers what its modules define
        found.add(".".join(parts))
    return found - SAME_ELSEWHERE


def test_every_module_is_in_the_reference_once():
    names = documented()
    assert len(names) == len(set(names))
    missing = modules() - set(names)
    assert not missing, "add them to a page in docs/reference"
    for name in names:
        assert importlib.util.find_spec(name), f"docs/reference names {name}, which is not there"


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda path: path.stem)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if not target.startswith(("http", "#", "mailto:")):
            path = page.parent / target.partition("#")[0]
            assert path.exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda path: path.stem)
def test_every_page_is_reached_from_the_index(page):
    trees = re.findall(r"```\{toctree\}\n(.*?)```", (DOCS / "index.md").read_text(), re.DOTALL)
    reference = (DOCS / "reference" / "index.md").read_text(encoding="utf-8")
    listed = "\n".join(trees).split()
    listed += [f"reference/{name}" for name in reference.split("```{toctree}")[1].split()]
    name = page.relative_to(DOCS).with_suffix("").as_posix()
    assert name == "index" or name in listed


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* captions are longer than")  # than the tiny model reads
def test_the_tutorial_on_samplers_is_a_program(tmp_path, monkeypatch, capsys):
    """Its blocks run in order, and the figures that they print are those in the comments."""
    tiny.model().save(tmp_path)
    monkeypatch.setattr(box, "folder", lambda: tmp_path)
    page = (DOCS / "tutorials" / "samplers_in_your_code.md").read_text(encoding="utf-8")
    names: dict = {}
    for language, code in BLOCK.findall(page):
        assert language == "python"
        exec(compile(code, "tutorial", "exec"), names)
    points = names["points"]
    assert abs(points.mean(axis=0) - names["params"]["mean"][0]).max() < 0.05
    assert abs(points.std(axis=0) - 0.5).max() < 0.03
    assert "(3, 5, 2)" in capsys.readouterr().out
    assert abs(names["jax"].grad(names["distance"])(0.5) - 1) < 0.1
    assert names["images"].shape == (2, 16, 16, 3)


def test_the_tutorial_on_folders_names_what_there_is():
    """Configs, flags of configs and commands; the commands themselves take minutes."""
    page = (DOCS / "tutorials" / "train_on_your_folder.md").read_text(encoding="utf-8")
    named = re.findall(r"--config=([\w/]+)", page)
    assert named and set(named) <= set(command_line.configs())
    used = re.findall(r"^\s*unclip (\w+)", page, re.MULTILINE)
    assert used and set(used) <= set(__main__.COMMANDS)
    from configs.emoji import decoder

    config = decoder.get_config()
    flat = set(config.to_dict()) | {path for path, _ in _leaves(config.to_dict())}
    for flag in re.findall(r"--config\.([\w.]+)", page):
        assert flag in flat, f"--config.{flag}: no such field"


def _leaves(tree, path=()):
    for name, part in tree.items():
        if isinstance(part, dict):
            yield from _leaves(part, (*path, name))
        else:
            yield ".".join((*path, name)), part


@pytest.mark.parametrize("picture", sorted(DOCS.glob("images/*.png")), ids=lambda path: path.name)
def test_pictures_name_no_place_on_the_machine_that_drew_them(picture):
    """Their metadata has the settings they were drawn with, of which some are paths."""
    assert not [text for text in read_png_metadata(picture).values() if '"/' in text]
