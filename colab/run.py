"""Run the notebooks of this folder, and save what they show in them.

    python colab/run.py --write            # all of them; what they print and draw is saved
    python colab/run.py --smoke            # every cell, in seconds, on tiny models; saves nothing
    python colab/run.py --smoke sample     # one notebook

A notebook's cell tagged "parameters" holds its settings, as a reader gets them. What this run needs
otherwise goes into a cell behind it, which is not saved. A saved notebook carries the digest of the
code that ran, so that a later change of the code shows (tests/test_notebooks.py).

Needs `pip install -e ".[notebooks]"`; finetune_karlo makes its stand-in for Karlo with PyTorch and
diffusers, `.[parity]`, and is left out where those are missing.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.util
import io
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

COLAB = Path(__file__).resolve().parent
ROOT = COLAB.parent
NAMES = ("sample", "edit", "train_your_own", "jitted_sampler", "finetune_karlo")
WIDEST = 720  # of a saved picture, in pixels
COLOURS = 64  # of a saved picture

# Settings with which a notebook takes seconds; a tiny model goes into MODEL.
SMOKE: dict[str, dict[str, Any]] = {
    "sample": {},
    "edit": {"STEPS": 4},
    "jitted_sampler": {"POINTS": 50},
    "train_your_own": {  # just past each stage's warm-up
        "STEPS": {"clip": 22, "prior": 32, "decoder": 52, "upsampler": 32}
    },
    "finetune_karlo": {"STEPS": 2, "WHOLE_STEPS": 2},
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
    """SHA-256 of the code of all cells, in order."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()


def execute(name: str, parameters: Mapping[str, Any], timeout: int = 3600) -> nbformat.NotebookNode:
    """A notebook, run from top to bottom.

    Args:
        name: which.
        parameters: to set after the cell tagged "parameters".
        timeout: seconds for one cell.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path_of(name), as_version=4)
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
    place = tags.index(["parameters"]) + 1
    setting = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    notebook.cells.insert(place, nbformat.v4.new_code_cell(setting))

    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        "UNCLIP_JAX_CACHE": str(ROOT / ".cache" / "unclip_jax"),
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
    }
    client = NotebookClient(
        notebook,
        timeout=timeout,
        resources={"metadata": {"path": str(COLAB)}},
        extra_arguments=["--log-level=40"],  # errors alone
    )
    client.execute(env=environment)
    del notebook.cells[place]
    return notebook


# --------------------------------------------------------------------------- what runs are given


def smoke_parameters(name: str, work: Path) -> dict[str, Any]:
    """Settings of the smoke form, with tiny models and all that is written in `work`."""
    parameters = dict(SMOKE[name])
    if name == "finetune_karlo":
        return karlo_parameters(work, image_size=6, levels=1) | parameters
    if name == "train_your_own":
        return {"WORK": _from_root(work / "work")} | parameters
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
    return {
        "KARLO": [_from_root(folder) for folder in folders],
        "WORK": _from_root(work / "work"),
    }


def _from_root(path: Path) -> str:
    """As a notebook names it, so that no path of this machine is printed in one that is saved."""
    return os.path.relpath(path, ROOT)


def has_karlo() -> bool:
    """Whether a stand-in for Karlo can be made."""
    return all(map(importlib.util.find_spec, ("torch", "diffusers", "transformers")))


# ------------------------------------------------------------------------------- what is saved


def write(name: str, notebook: nbformat.NotebookNode) -> None:
    """Save a notebook that ran, with small pictures and nothing that differs from run to run."""
    count = 0
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
    """Outputs in which text that was printed piece by piece is one."""
    merged: list[nbformat.NotebookNode] = []
    for output in outputs:
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
    parser.add_argument("--model", metavar="DIR", help="instead of the model in the package")
    args = parser.parse_args(argv)
    if args.smoke and args.write:
        parser.error("--smoke with --write: expected one of them; tiny models draw nothing to show")
    if unknown := sorted(set(args.names) - set(NAMES)):
        parser.error(f"names: got {', '.join(unknown)}, expected some of {', '.join(NAMES)}")

    for name in args.names or NAMES:
        if name == "finetune_karlo" and not has_karlo():
            print(f"{name}: left out, for PyTorch and diffusers are missing")
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


def parameters(name: str, work: Path, model: str | None) -> dict[str, Any]:
    """Settings of the whole form: as in the notebook, but for what it stands on and writes."""
    if name == "finetune_karlo":
        return karlo_parameters(work, image_size=16, levels=2) | STAND_IN
    if name == "train_your_own":
        return {"WORK": _from_root(work / "work")}
    return {"MODEL": str(Path(model).resolve())} if model else {}


if __name__ == "__main__":
    main(sys.argv[1:])
