"""The notebooks in colab/: what is saved in them, and that every cell runs."""

import base64
import copy
import importlib.metadata
import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")

ROOT = Path(__file__).parent.parent
MOST_BYTES = 800_000
WIDTHS = range(100, 721)


@pytest.fixture(scope="module")
def run():
    """colab/run.py as a module; the folder is no package."""
    spec = importlib.util.spec_from_file_location("colab_run", ROOT / "colab" / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NAMES = sorted(path.stem for path in (ROOT / "colab").glob("*.ipynb"))


def code_cells(name):
    notebook = nbformat.read(ROOT / "colab" / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    return notebook, [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(name):
    return [output for cell in code_cells(name)[1] for output in cell.outputs]


def test_every_notebook_is_run(run):
    assert sorted(run.NAMES) == sorted(run.SMOKE) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_came_from_the_code_as_it_stands(name, run):
    notebook, cells = code_cells(name)
    assert notebook.metadata.unclip_jax.executed == run.digest(notebook), (
        f"the code has changed since it ran; run python colab/run.py --write {name}"
    )
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_saved_and_no_errors(name):
    found = outputs(name)
    assert not [output for output in found if output.output_type == "error"]
    printed = "".join(output.get("text", "") for output in found)
    assert "Traceback" not in printed and str(Path.home()) not in printed.split()
    pngs = [output.data["image/png"] for output in found if "image/png" in output.get("data", {})]
    assert pngs
    for png in pngs:
        picture = Image.open(io.BytesIO(base64.b64decode(png)))
        picture.load()
        assert picture.width in WIDTHS and len(picture.convert("RGB").getcolors(1 << 20)) > 2


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_small_and_opens_in_colab(name, run):
    path = ROOT / "colab" / f"{name}.ipynb"
    assert path.stat().st_size < MOST_BYTES
    notebook, cells = code_cells(name)
    assert notebook.metadata.kernelspec.name == "python3"
    tags = [cell.metadata.get("tags") for cell in cells]
    assert tags[:2] == [["install"], ["parameters"]]
    assert notebook.metadata.accelerator == "GPU" and notebook.metadata.colab.gpuType == "T4"
    assert notebook.cells[0].source.startswith("# ")
    assert "colab-badge.svg" in notebook.cells[0].source
    run.stamp(name, stamped := copy.deepcopy(notebook), run.repository())
    assert stamped == notebook, "run python colab/run.py --stamp"


def test_the_readme_has_a_badge_for_each_notebook(run):
    text = (run.ROOT / "README.md").read_text(encoding="utf-8")
    assert run.stamp_readme(text, run.repository()) == text, "run python colab/run.py --stamp"
    there = run.stamp_readme(text, "https://github.com/some/one")
    assert all(f"/github/some/one/blob/main/colab/{name}.ipynb)" in there for name in run.NAMES)
    assert run.stamp_readme(there, "") == run.stamp_readme(text, "")


def test_an_address_goes_into_badge_and_first_cell(run):
    notebook, _ = code_cells("sample")
    before = copy.deepcopy(notebook)
    run.stamp("sample", notebook, "https://github.com/some/one")
    [title, _, badge, *_] = notebook.cells[0].source.split("\n")
    assert title.startswith("# ")
    assert (
        "(https://colab.research.google.com/github/some/one/blob/main/colab/sample.ipynb)" in badge
    )
    assert 'REPOSITORY = "https://github.com/some/one"' in notebook.cells[1].source
    assert run.digest(notebook) == run.digest(before), "nothing else changes"
    run.stamp("sample", notebook, "")
    assert "asks for the wheel" in notebook.cells[0].source
    assert notebook.cells[0].source.count("colab-badge") == 1
    run.stamp("sample", notebook, run.repository())
    assert notebook == before


# What stands around the first cell: nothing is installed, and pip only says what it was asked.
AROUND = """
import importlib.metadata, importlib.util, json, subprocess, sys, types
lacks, versions, fails = json.loads(sys.argv[1])
real_find, real_run = importlib.util.find_spec, subprocess.run
importlib.util.find_spec = lambda name: None if name in lacks else (
    types.SimpleNamespace() if name == "google.colab" else real_find(name))
importlib.metadata.distributions = lambda: [
    types.SimpleNamespace(name=n, version=v) for n, v in versions.items()]
colab = types.ModuleType("google.colab")
colab.files = types.SimpleNamespace(upload=lambda: {"unclip_jax-9.whl": b""})
sys.modules |= {"google": types.ModuleType("google"), "google.colab": colab}
def run(command, **how):
    if "pip" in command:
        kept = [open(c).read() for c in command if c.endswith("constraints.txt")]
        print("PIP", json.dumps([command[5:], kept]))
        return types.SimpleNamespace(returncode=int(fails and bool(kept)))
    found = '["gpu", "Tesla T4", 1, "0.10.2"]'
    return types.SimpleNamespace(returncode=0, stdout=found, stderr="")
subprocess.run = run
exec(compile(open(sys.argv[2]).read(), "cell", "exec"))
"""
COLABS = {"jax": "0.10.2", "jaxlib": "0.10.2", "jax-cuda12-plugin": "0.10.2", "numpy": "2.3"}


def first_cell(run, folder, *, address="", lacks=("unclip_jax",), fails=False):
    """What the first cell of `edit` prints in a folder, and what it asks of pip."""
    (folder / "cell.py").write_text(run.install_cell("edit", address))
    argv = [sys.executable, "-c", AROUND, json.dumps([lacks, COLABS, fails]), "cell.py"]
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True)
    asked = [json.loads(x[4:]) for x in done.stdout.splitlines() if x.startswith("PIP ")]
    return done.stdout + done.stderr, asked


KEPT = ["jax==0.10.2\njaxlib==0.10.2\njax-cuda12-plugin==0.10.2\n"]


def test_the_first_cell_keeps_colabs_jax_and_takes_the_wheel(run, tmp_path):
    said, asked = first_cell(run, tmp_path)  # nothing is there: Colab asks for the wheel
    wheel = f"unclip_jax[train,emoji] @ {(tmp_path / 'unclip_jax-9.whl').as_uri()}"
    assert "Choose the wheel" in said and asked == [[[*CONSTRAINED, wheel], KEPT]]
    assert "jax 0.10.2 on 1 x gpu: Tesla T4" in said
    (tmp_path / "unclip_jax-9.whl").touch()
    said, asked = first_cell(run, tmp_path)
    assert "Choose" not in said and asked == [[[*CONSTRAINED, wheel], KEPT]]
    assert not list(tmp_path.glob("*constraints*"))


CONSTRAINED = ["--constraint", "unclip_jax_constraints.txt"]


def test_the_first_cell_takes_the_repository_where_there_is_one(run, tmp_path):
    _, asked = first_cell(run, tmp_path, address="https://github.com/some/one")
    package = "unclip_jax[train,emoji] @ git+https://github.com/some/one"
    assert asked == [[[*CONSTRAINED, package], KEPT]]


def test_another_jax_comes_with_the_same_cuda_only_if_colabs_does_not_fit(run, tmp_path):
    (tmp_path / "unclip_jax-9.whl").touch()
    said, asked = first_cell(run, tmp_path, fails=True)
    assert len(asked) == 2 and asked[1][0][1:] == ["jax[cuda12]"] and asked[1][1] == []
    assert "jax 0.10.2, which is here, doesn't go with it" in said


def test_outside_of_colab_the_first_cell_says_what_is_missing(run, tmp_path):
    said, asked = first_cell(run, tmp_path, lacks=("unclip_jax", "google.colab"))
    assert not asked and "put its wheel beside this notebook" in said


def test_what_is_installed_is_left_alone(run, tmp_path):
    said, asked = first_cell(run, tmp_path, lacks=())
    assert not asked and "Tesla T4" in said


@pytest.mark.slow
def test_a_notebook_runs_from_an_empty_folder_in_a_new_venv_with_the_wheel(run, tmp_path):
    run.machine(tmp_path)
    notebook = run.execute_as_in_colab("sample", tmp_path)
    [said] = [cell for cell in notebook.cells if cell.metadata.get("tags") == ["install"]]
    printed = "".join(output.get("text", "") for output in said.outputs)
    assert f"jax {importlib.metadata.version('jax')} on" in printed and "cpu" in printed
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_cell_runs(name, run, tmp_path):
    if name in run.PUBLIC and not run.has_public():
        pytest.skip("PyTorch and diffusers, of which its stand-in for Karlo is made, are missing")
    notebook = run.execute(name, run.smoke_parameters(name, tmp_path))
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    assert run.digest(notebook) == run.digest(code_cells(name)[0]), "what ran is what is saved"
