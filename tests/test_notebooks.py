"""The notebooks in colab/: what is saved in them, and that every cell runs."""

import base64
import importlib.util
import io
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
def test_a_notebook_is_small_and_opens_in_colab(name):
    path = ROOT / "colab" / f"{name}.ipynb"
    assert path.stat().st_size < MOST_BYTES
    notebook, cells = code_cells(name)
    assert notebook.metadata.kernelspec.name == "python3"
    tags = [cell.metadata.get("tags") for cell in cells]
    assert tags[:2] == [["install"], ["parameters"]]
    first = code_cells(NAMES[0])[1][0].source
    assert cells[0].source == first, "the install cell is the same in every notebook"
    assert notebook.cells[0].source.startswith("# ")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_cell_runs(name, run, tmp_path):
    if name == "finetune_karlo" and not run.has_karlo():
        pytest.skip("PyTorch and diffusers, of which its stand-in for Karlo is made, are missing")
    notebook = run.execute(name, run.smoke_parameters(name, tmp_path))
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    assert run.digest(notebook) == run.digest(code_cells(name)[0]), "what ran is what is saved"
