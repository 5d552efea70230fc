"""Run the notebooks of this folder, and save what they show in them.

    python colab/run.py --write            # all of them; what they print and draw is saved
    python colab/run.py --smoke            # every cell, in seconds, on tiny models; saves nothing
    python colab/run.py --smoke sample     # one notebook
    python colab/run.py --stamp            # runs nothing; see below
    python colab/run.py --colab sample     # as in Colab: a new venv, an empty folder, the wheel

A notebook's cell tagged "parameters" holds its settings, as a reader gets them. What this run needs
otherwise goes into a cell behind it, which is not saved. A saved notebook carries the digest of the
code that ran, so that a later change of the code shows (tests/test_notebooks.py).

The badge, the first cell (install.py) and the kind of runtime are the same in all: `stamp` writes
them, and README's badges. Where the repository is stands in one place, [project.urls] of
pyproject.toml; while it has no address there, badges lead to Colab, and the first cell takes the
wheel.

Needs `pip install -e ".[notebooks]"`; finetune_karlo and kandinsky make stand-ins for public
weights with PyTorch and diffusers, `.[parity]`, and are left out where those are missing.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

COLAB = Path(__file__).resolve().parent
ROOT = COLAB.parent
NAMES = ("sample", "edit", "train_your_own", "jitted_sampler", "finetune_karlo", "kandinsky")
PUBLIC = ("finetune_karlo", "kandinsky")  # whose weights stand-ins are made for
WIDEST = 720  # of a saved picture, in pixels
COLOURS = 64  # of a saved picture

# What each needs beside the core: extras of pyproject.toml, and a package that each brings.
EXTRAS = {
    "sample": "",
    "edit": "train,emoji",
    "train_your_own": "train",
    "jitted_sampler": "train",  # its plots
    "finetune_karlo": "train,emoji",
    "kandinsky": "",
}
NEEDS = {"train": "grain", "emoji": "resvg_py"}
RUNTIME = {"accelerator": "GPU", "gpuType": "T4"}  # what Colab offers first

# Settings with which a notebook takes seconds; a tiny model goes into MODEL.
SMOKE: dict[str, dict[str, Any]] = {
    "sample": {},
    "edit": {"STEPS": 4},
    "jitted_sampler": {"POINTS": 50},
    "train_your_own": {  # just past each stage's warm-up
        "STEPS": {"clip": 22, "prior": 32, "decoder": 52, "upsampler": 32}
    },
    "finetune_karlo": {"STEPS": 2, "WHOLE_STEPS": 2},
    "kandinsky": {"STEPS": 2},
}
# For finetune_karlo's stand-in, see karlo_parameters.
STAND_IN = {
    "DTYPE": "float32",
    "STEPS": 200,
    "LEARNING_RATE": 3e-3,
    "WHOLE_STEPS": 60,
    "WHOLE_LEARNING_RATE": 3e-3,
}


def path_of(name: str) -> Path:
    """The file of a notebook."""
    return COLAB / f"{name}.ipynb"


def digest(notebook: nbformat.NotebookNode) -> str:
    """SHA-256 of the code of all cells but the one that installs, in order."""
    code = [
        cell.source
        for cell in notebook.cells
        if cell.cell_type == "code" and cell.metadata.get("tags") != ["install"]
    ]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()


def repository() -> str:
    """Where the project is, as pyproject.toml says; "" while it says nothing."""
    about = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return about.get("urls", {}).get("Repository", "").removesuffix(".git").rstrip("/")


def in_colab(name: str, address: str) -> str:
    """Where a badge leads: to the notebook in Colab, or to Colab while the project is nowhere."""
    colab, github = "https://colab.research.google.com/", "https://github.com/"
    if not address.startswith(github):
        return colab
    return f"{colab}github/{address.removeprefix(github)}/blob/main/colab/{name}.ipynb"


def badge(name: str, address: str) -> str:
    """The line that opens a notebook in Colab."""
    image = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    link = f"{image}({in_colab(name, address)})"
    how = "Upload this notebook there (*File, Upload notebook*); its first cell asks for the wheel."
    return link if "/github/" in link else f"{link} {how}"


def stamp_readme(text: str, address: str) -> str:
    """README, whose badges lead where the notebooks' do."""
    for name in NAMES:
        image = rf"(\]\(colab/{name}\.ipynb\) \[!\[Open in Colab\]\[colab\]\])\([^)]*\)"
        text, count = re.subn(image, rf"\1({in_colab(name, address)})", text)
        assert count == 1, f"README.md: {count} badges of {name}, expected one"
    return text


def install_cell(name: str, address: str) -> str:
    """The code of the first cell."""
    extras = EXTRAS[name]
    needs = [NEEDS[extra] for extra in filter(None, extras.split(","))]
    code = (COLAB / "install.py").read_text(encoding="utf-8").rstrip("\n")
    for field, value in (("REPOSITORY", address), ("EXTRAS", extras), ("NEEDS", needs)):
        empty = "[]" if isinstance(value, list) else '""'
        code = code.replace(f"{field} = {empty}", f"{field} = {json.dumps(value)}", 1)
    return code


def stamp(name: str, notebook: nbformat.NotebookNode, address: str) -> None:
    """Write what all notebooks share into one: badge, first cell, kind of runtime."""
    title, *rest = notebook.cells[0].source.split("\n")
    while rest and (not rest[0] or rest[0].startswith("[![")):
        rest.pop(0)
    notebook.cells[0].source = "\n".join([title, "", badge(name, address), "", *rest])
    first = next(cell for cell in notebook.cells if cell.metadata.get("tags") == ["install"])
    first.source = install_cell(name, address)
    notebook.metadata["accelerator"] = RUNTIME["accelerator"]
    notebook.metadata["colab"] = {"name": f"{name}.ipynb", "provenance": []} | {
        "gpuType": RUNTIME["gpuType"]
    }


def execute(
    name: str,
    parameters: Mapping[str, Any],
    timeout: int = 3600,
    folder: Path = COLAB,
    kernel: str = "python3",
    environment: Mapping[str, str] | None = None,
) -> nbformat.NotebookNode:
    """A notebook, run from top to bottom.

    Args:
        name: which.
        parameters: to set after the cell tagged "parameters".
        timeout: seconds for one cell.
        folder: where it runs.
        kernel: what runs it.
        environment: of the kernel; by default this process's, with this clone before all else.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path_of(name), as_version=4)
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
    place = tags.index(["parameters"]) + 1
    setting = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    notebook.cells.insert(place, nbformat.v4.new_code_cell(setting))

    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = environment or {
        "UNCLIP_JAX_CACHE": str(ROOT / ".cache" / "unclip_jax"),
        "JAX_PLATFORMS": "cpu",  # unless who runs this says another
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
    }
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name=kernel,
        resources={"metadata": {"path": str(folder)}},
        extra_arguments=["--log-level=40"],  # errors alone
    )
    client.execute(env=dict(environment))
    del notebook.cells[place]
    return notebook


def machine(work: Path) -> None:
    """What Colab starts with, in `work`, outside of any clone: a venv with jax and a kernel alone.

    Its folder `content` is empty but for the wheel, which is built.
    """
    folder, venv = work / "content", work / "venv"
    folder.mkdir(parents=True)

    def call(*command: str | Path) -> None:
        subprocess.run([*map(str, command)], check=True)

    call(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, ROOT)
    call(sys.executable, "-m", "venv", venv)
    jax = importlib.metadata.version("jax")
    python = venv / "bin" / "python"
    call(python, "-m", "pip", "install", "--quiet", f"jax=={jax}", "ipykernel")
    spec = work / "jupyter" / "kernels" / "colab" / "kernel.json"
    spec.parent.mkdir(parents=True)
    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec.write_text(json.dumps({"argv": argv, "display_name": "Colab", "language": "python"}))


def execute_as_in_colab(name: str, work: Path) -> nbformat.NotebookNode:
    """A notebook, on tiny models, in a `machine`.

    Its own first cell installs the wheel and what it needs, so this asks package indices and takes
    minutes. Where several share a machine, those with fewer extras come first.
    """
    own = work / name
    own.mkdir()
    given = smoke_parameters(name, own)
    kept = {n: v for n, v in os.environ.items() if n not in ("PYTHONPATH", "VIRTUAL_ENV")}
    programs = work / "venv" / "bin"
    kept |= {"JAX_PLATFORMS": "cpu", "PATH": f"{programs}{os.pathsep}{kept['PATH']}"}
    os.environ["JUPYTER_PATH"] = str(work / "jupyter")
    try:
        return execute(name, given, folder=work / "content", kernel="colab", environment=kept)
    finally:
        del os.environ["JUPYTER_PATH"]


# --------------------------------------------------------------------------- what runs are given


def smoke_parameters(name: str, work: Path) -> dict[str, Any]:
    """Settings of the smoke form, with tiny models and all that is written in `work`."""
    parameters = dict(SMOKE[name])
    if name == "finetune_karlo":
        return karlo_parameters(work, image_size=6, levels=1) | parameters
    if name == "kandinsky":
        return kandinsky_parameters(work) | parameters
    if name == "train_your_own":
        return {"WORK": str(work / "work")} | parameters
    sys.path.insert(0, str(ROOT))
    from tests import tiny

    tiny.model().save(work / "model")
    return {"MODEL": str(work / "model")} | parameters


def karlo_parameters(work: Path, image_size: int, levels: int) -> dict[str, Any]:
    """A Karlo of random weights in diffusers' layout, small in everything, in its stead."""
    sys.path.insert(0, str(ROOT))
    from tests import karlo_folders

    sizes = karlo_folders.tiny(
        12, 3, 35, (1, 2)[:levels], (image_size // levels,), image_size, 1, "quick_gelu"
    )
    folders = [work / "text2im", work / "variations"]
    for folder, pipeline in zip(folders, karlo_folders.pipelines(sizes, work / "tok"), strict=True):
        pipeline.save_pretrained(folder)
    return {"KARLO": [*map(str, folders)], "WORK": str(work / "work")}


def kandinsky_parameters(work: Path) -> dict[str, Any]:
    """Likewise a Kandinsky, of pictures of 32 x 48 px."""
    sys.path.insert(0, str(ROOT))
    from tests import kandinsky_folders

    kandinsky_folders.pipelines(work)
    folders = [str(work / name) for name in ("prior", "decoder")]
    return {"KANDINSKY": folders, "DTYPE": "float32", "SIZE": (32, 48), "STEPS": 10}


def _from_root(value: Any) -> Any:
    """Paths as a notebook names them, so that none of this machine is printed in one it saves."""
    if isinstance(value, list):
        return [_from_root(each) for each in value]
    return os.path.relpath(value, ROOT) if os.path.isabs(str(value)) else value


def has_public() -> bool:
    """Whether stand-ins for public weights can be made."""
    return all(map(importlib.util.find_spec, ("torch", "diffusers", "transformers")))


# ------------------------------------------------------------------------------- what is saved


def write(name: str, notebook: nbformat.NotebookNode) -> None:
    """Save a notebook that ran, with small pictures and nothing that differs from run to run."""
    count = 0
    stamp(name, notebook, repository())
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        count += 1
        cell.execution_count = count
        cell.outputs = [_saved(output, count) for output in _merged(cell.outputs)]
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.metadata["unclip_jax"] = {"executed": digest(notebook)}
    nbformat.validate(notebook)
    nbformat.write(notebook, path_of(name))


def _merged(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Outputs without warnings, in which text that was printed piece by piece is one."""
    merged: list[nbformat.NotebookNode] = []
    for output in outputs:
        if output.get("name") == "stderr":  # of the machine that ran it; what fails is no stream
            continue
        if merged and "text" in output and merged[-1].get("name") == output.name:
            merged[-1].text += output.text
        else:
            merged.append(output)
    return merged


def _saved(output: nbformat.NotebookNode, count: int) -> nbformat.NotebookNode:
    if "execution_count" in output:
        output.execution_count = count
    if "image/png" in output.get("data", {}):
        picture = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).convert("RGB")
        if picture.width > WIDEST:
            height = round(picture.height * WIDEST / picture.width)
            picture = picture.resize((WIDEST, height), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        picture.quantize(COLOURS).save(file, format="PNG", optimize=True)
        output.data = {"image/png": base64.b64encode(file.getvalue()).decode()}
        output.metadata = {}
    return output


# ------------------------------------------------------------------------------------ command


def main(argv: list[str]) -> None:
    """Run the notebooks that are named, or all."""
    parser = argparse.ArgumentParser(description="Run the notebooks in colab/.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--smoke", action="store_true", help="in seconds, on tiny models")
    parser.add_argument("--write", action="store_true", help="save what the notebooks show")
    parser.add_argument("--stamp", action="store_true", help="badge and first cell alone")
    parser.add_argument("--colab", action="store_true", help="as in Colab, on tiny models")
    parser.add_argument("--model", metavar="DIR", help="instead of the model in the package")
    args = parser.parse_args(argv)
    if (args.smoke or args.colab) and args.write:
        parser.error("--write: expected alone; the tiny models of --smoke and --colab draw nothing")
    if unknown := sorted(set(args.names) - set(NAMES)):
        parser.error(f"names: got {', '.join(unknown)}, expected some of {', '.join(NAMES)}")

    if args.stamp:
        readme = ROOT / "README.md"
        text = stamp_readme(readme.read_text(encoding="utf-8"), repository())
        readme.write_text(text, encoding="utf-8")
    names = args.names or NAMES
    if args.colab:
        run_as_in_colab(names)
        return
    for name in names:
        if args.stamp:
            notebook = nbformat.read(path_of(name), as_version=4)
            stamp(name, notebook, repository())
            nbformat.write(notebook, path_of(name))
            continue
        if not can_run(name):
            continue
        work = ROOT / "build" / "colab" / name
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        print(f"{name} ...", flush=True)
        if args.smoke:
            notebook = execute(name, smoke_parameters(name, work))
        else:
            notebook = execute(name, parameters(name, work, args.model))
        if args.write:
            write(name, notebook)


def run_as_in_colab(names: Sequence[str]) -> None:
    """Run some notebooks in one machine, each before those that need more extras."""
    with tempfile.TemporaryDirectory() as work:
        machine(Path(work))
        for name in sorted(names, key=lambda name: len(EXTRAS[name])):
            if can_run(name):
                print(f"{name} ...", flush=True)
                execute_as_in_colab(name, Path(work))


def can_run(name: str) -> bool:
    """Whether what a notebook stands on can be made; says so if not."""
    if name in PUBLIC and not has_public():
        print(f"{name}: left out, for PyTorch and diffusers are missing")
        return False
    return True


def parameters(name: str, work: Path, model: str | None) -> dict[str, Any]:
    """Settings of the whole form: as in the notebook, but for what it stands on and writes."""
    if name in PUBLIC or name == "train_your_own":
        if name == "finetune_karlo":
            given = karlo_parameters(work, image_size=16, levels=2) | STAND_IN
        elif name == "kandinsky":
            given = kandinsky_parameters(work)
        else:
            given = {"WORK": str(work / "work")}
        return {key: _from_root(value) for key, value in given.items()}
    return {"MODEL": str(Path(model).resolve())} if model else {}


if __name__ == "__main__":
    main(sys.argv[1:])
