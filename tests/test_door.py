"""The public face, the one door with its --help, configs by name, extras, and the wheel."""

import ast
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import unclip_jax
from unclip_jax.__main__ import COMMANDS, dispatch
from unclip_jax.common import command_line, extras
from unclip_jax.errors import UserError

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu"}

# What a command's --help must name besides itself.
FLAGS = {
    "train": (
        "--config",
        "--workdir",
        "--distributed",
        "--process_id",
        "emoji/clip",
        "paper/prior",
    ),
    "train-all": ("--data", "--out", "--size", "tiny", "--minutes"),
    "sample": ("text2im", "variations", "interpolate", "textdiff", "inpaint", "upscale", "probe"),
    "app": ("--model", "--host", "--port", "--share"),
    "evaluate": ("--model", "--data", "--features", "--sweep", "--out"),
    "doctor": ("--workdir", "--clip", "--json"),
    "save": ("--workdir", "--step", "--out"),
    "analytic": ("--stage", "--data"),
    "embed": ("--clip", "--data", "--out"),
    "styles": ("build", "--size", "--cache_dir"),
    "convert": ("karlo", "clip"),
    "export": ("program", "clip", "diffusers"),
    "plan": ("--config", "--topology", "--mesh", "--fit", "--table", "paper/prior"),
    "class_conditional": ("--decoder", "--classifier", "--label"),
}


def python(*arguments, cwd=ROOT, path="", check=True):
    """Standard output of a python process of its own."""
    environment = ENVIRONMENT | ({"PYTHONPATH": str(path)} if path else {})
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True,
        text=True, timeout=600,
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stderr
    return done.stdout if check else done


def test_the_public_face_is_light_and_lazy():
    code = """
import sys, unclip_jax
assert not {"jax", "numpy", "flax"} & set(sys.modules)
assert {"UnCLIP", "samplers", "guidance", "losses", "schedules", "diffusion", "stages", "models",
        "UserError", "__version__"} <= set(dir(unclip_jax))
from unclip_jax import samplers
from unclip_jax.diffusion import samplers as room
assert samplers is room is unclip_jax.samplers and "flax" not in sys.modules
try:
    unclip_jax.sampler
except AttributeError as error:
    assert "no attribute 'sampler'" in str(error)
"""
    python("-c", code)
    assert unclip_jax.__version__ and PROJECT["dynamic"] == ["version"]
    for name in unclip_jax.__all__:
        assert getattr(unclip_jax, name) is not None


def test_drawing_imports_neither_transformers_nor_what_training_needs():
    late = ("transformers", "matplotlib", *extras.EXTRAS["emoji"])
    late += tuple(name for name in extras.EXTRAS["train"] if name not in ("orbax", "fsspec"))
    code = f"""
import sys
import unclip_jax.pipeline.unclip, unclip_jax.pipeline.tasks.run, unclip_jax.app.tasks
import unclip_jax.weights.export.program, unclip_jax.pipeline.class_conditional
found = {late!r}
assert not set(found) & set(sys.modules), set(found) & set(sys.modules)
"""
    python("-c", code)


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_a_command_is_and_takes(command, flag, capsys):
    with pytest.raises(SystemExit) as ended:
        dispatch([command, flag])
    shown = capsys.readouterr().out
    assert not ended.value.code
    assert shown.startswith(f"usage: unclip {command} ")
    assert f"unclip {command}" in shown.partition("\n\n")[2], "an example"
    assert not [name for name in FLAGS[command] if name not in shown]


def test_the_door_lists_its_commands(capsys):
    assert set(FLAGS) == set(COMMANDS)
    for argv in ([], ["-h"], ["--help"], ["help"]):
        dispatch(argv)
        shown = capsys.readouterr().out
        assert all(f"  {name} " in shown for name in COMMANDS)
    dispatch(["--version"])
    assert unclip_jax.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(("typed", "meant"), [("trian", "train"), ("samples", "sample")])
def test_a_command_that_is_not_there_is_guessed(typed, meant):
    with pytest.raises(UserError, match=rf"command: got '{typed}'.*did you mean {meant}\?"):
        dispatch([typed])


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("sample 'a red apple'", "draw it: .* sample text2im --prompt 'a red apple'"),
        ("sample", "TASK; such as .* sample text2im --prompt 'a red apple'"),
        ("sample text2img --num 2", r"got 'text2img', .*did you mean text2im\?"),
        ("sample probe pac", r"got 'pac', .*did you mean pca\?"),
        ("sample text2im --promt x", r"'--promt': no such flag; did you mean --prompt\?"),
        ("sample text2im --promt=x", r"'--promt=x': no such flag; did you mean --prompt\?"),
        ("sample text2im 'a red apple'", "a caption is --prompt 'a red apple'"),
        ("sample text2im --prompt x --guidance_scale x", "scale: got 'x', expected a finite numb"),
        ("sample text2im --prompt x --dtype f16", "--dtype: got 'f16', expected one of float32, b"),
        ("sample text2im --zzz", "'--zzz': no such flag; unclip sample text2im --help says"),
        ("doctor --workdr x --workdir y", r"did you mean --workdir\?"),
        ("evaluate --dat", "ambiguous|expected one argument"),
        ("doctor", "--workdir; such as unclip doctor --workdir runs/emoji/prior$"),
        ("styles", "required: build; such as unclip styles build$"),
        ("class_conditional", r"--classifier runs/adm/classifier --upsampler .* --out food\.png$"),
        ("train-all my_pictures", "such as unclip train-all --data my_pictures --out runs/mine"),
    ],
)
def test_what_is_typed_wrong_is_told_in_a_line_with_what_was_meant(typed, said, capsys):
    with pytest.raises(SystemExit) as ended:
        dispatch(shlex.split(typed))
    told = capsys.readouterr().err
    assert ended.value.code == 2 and len(told.splitlines()) == 1, told
    assert re.search(said, told) and " _" not in told, told


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("train emoji/clip", r"did you mean --config=emoji/clip\?"),
        ("train --config=emoji/clip --workdr=x", "Did you mean: workdir"),
        (
            "train --config=emoji/clip --workdir=x --config.train.stps=1",
            "no field 'stps'; Did you ",
        ),
    ],
)
def test_a_flag_or_field_of_a_config_that_is_not_there_is_guessed(typed, said):
    with pytest.raises(UserError, match=said):
        dispatch(shlex.split(typed))


def test_xla_s_own_log_is_off_in_commands_unless_it_is_asked_for(monkeypatch):
    for given, expected in ((None, "3"), ("1", "1")):
        monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
        if given:
            monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", given)
        with pytest.raises(UserError, match="no such folder"):
            dispatch(["doctor", "--workdir", "nowhere"])
        assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == expected


def test_evaluate_alone_says_what_there_is_to_measure(capsys):
    with pytest.raises(SystemExit):
        dispatch(["evaluate"])
    assert "unclip evaluate --data emoji` measures the box model" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("script", "command"), [("train.py", "train"), ("sample.py", "sample"), ("", "train")]
)
def test_every_door_is_the_same_and_help_waits_for_no_jax(script, command):
    words = [script] if script else ["-m", "unclip_jax", command]
    assert python("-X", "importtime", *words, "--help", check=False).stderr.count(" jax\n") == 0
    assert python(*words, "-h").startswith(f"usage: unclip {command} ")


# ----------------------------------------------------------------------------------- configs


def test_train_says_what_a_configs_fields_are(capsys):
    with pytest.raises(SystemExit):
        dispatch(["train", "--config=emoji/clip:smoke", "--config.train.steps=7", "--help"])
    shown = capsys.readouterr().out
    assert "configs/emoji/clip.py:smoke" in shown
    assert "config.heldout_split  the data set's split" in shown, "what fields mean"
    assert "  --config.train.steps=7\n" in shown and "--config.stage.model.embed_dim=128" in shown


@pytest.mark.parametrize(
    "name", ["emoji/clip", "emoji/clip.py", "configs/emoji/clip", "configs/emoji/clip.py"]
)
def test_configs_are_found_by_name_in_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = command_line.find(f"{name}:smoke")
    assert path.endswith("clip.py:smoke") and os.path.isabs(path)
    assert Path(path.removesuffix(":smoke")).samefile(ROOT / "configs" / "emoji" / "clip.py")
    (tmp_path / "configs" / "emoji").mkdir(parents=True)
    own = tmp_path / "configs" / "emoji" / "clip.py"
    own.touch()
    assert command_line.find("configs/emoji/clip") == "configs/emoji/clip.py", "a file comes first"
    assert command_line.find(f"{own}:big") == f"{own}:big"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("emoji/clop", "did you mean emoji/clip?"),
        ("configs/paper/pryor.py:smoke", "did you mean paper/prior?"),
        ("imagen", "did you mean emoji/imagen?"),
        ("base", "there are box/canvas, "),
    ],
)
def test_a_config_that_is_not_there_is_guessed(typed, said):
    with pytest.raises(UserError) as error:
        command_line.find(typed)
    assert said in str(error.value) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------ extras


def declared(requirements) -> set[str]:
    return {re.match(r"[\w-]+", line)[0].lower().replace("_", "-") for line in requirements}


def imported() -> set[str]:
    """What the package imports from elsewhere, at the top of a file or inside a function."""
    found = set()
    for path in (ROOT / "unclip_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"unclip_jax"}


def test_what_is_imported_is_in_the_core_or_in_the_table_of_extras():
    brought = {"jaxlib": "jax", "starlette": "gradio", "etils": "tensorflow_datasets"}
    distributions = importlib.metadata.packages_distributions()
    core = declared(PROJECT["dependencies"])
    late = {package for packages in extras.EXTRAS.values() for package in packages}
    welcome = {"pillow_heif", "zstandard"}  # read with where they happen to be installed
    for package in imported() - late - welcome:
        assert package in extras.CORE or package in brought, f"{package}: not in extras.CORE"
        known = {name.lower().replace("_", "-") for name in distributions.get(package, ())}
        assert known & core or brought.get(package) in core | late, f"{package}: in no layer"
    for extra, packages in extras.EXTRAS.items():
        names = {n.lower().replace("_", "-") for p in packages for n in distributions.get(p, ())}
        assert names <= declared(PROJECT["optional-dependencies"][extra]) | core, extra


LACKING = """
import sys
from unclip_jax.__main__ import dispatch
from unclip_jax.common.extras import EXTRAS
from unclip_jax.errors import run_command

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
run_command(dispatch, sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("hidden", "argv", "said"),
    [
        (
            "clu grain",
            "train --config=emoji/clip:smoke --workdir={new}",
            r"unclip train: needs \w+",
        ),
        ("grain", "sample probe pca --image {picture} --data {pictures}", "needs grain"),
        ("gradio", "app", "unclip app: needs gradio"),
        ("resvg_py", "styles build --cache_dir {new}", "needs"),
    ],
)
def test_a_package_that_lacks_is_told_in_a_line_with_its_extra(hidden, argv, said, tmp_path):
    from PIL import Image

    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    (tmp_path / "red.txt").write_text("a red square")
    words = [
        word.format(new=tmp_path / "new", picture=tmp_path / "red.png", pictures=tmp_path)
        for word in argv.split()
    ]
    code = LACKING.format(hidden=hidden.split())
    done = python("-c", code, *words, check=False)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    assert re.search(said, lines[0])
    extra = next(extra for extra, names in extras.EXTRAS.items() if hidden.split()[0] in names)
    assert re.search(rf'pip install -e ".*\[[\w,]*{extra}\]"', lines[0]), lines[0]


@pytest.mark.parametrize(
    ("came", "command"),
    [
        (None, 'pip install "clu==0.0.12" "grain>=0.2"'),
        ({"url": "file:///d/w.whl"}, 'pip install "unclip_jax[train] @ file:///d/w.whl"'),
        (
            {"url": "https://h/r", "vcs_info": {"vcs": "git", "commit_id": "12ab"}},
            'pip install "unclip_jax[train] @ git+https://h/r@12ab"',
        ),
    ],
)
def test_an_extra_is_installed_from_where_the_package_came(came, command, monkeypatch, tmp_path):
    class Distribution:
        requires = ('jax>=0.10', 'clu==0.0.12; extra == "train"', 'emoji; extra == "emoji"',
                    "grain>=0.2; extra == 'train'")  # fmt: skip

        def read_text(self, name):
            return came and json.dumps(came)

    assert extras.how("train") == f'pip install -e "{ROOT}[train]"', "a checkout"
    monkeypatch.setattr(extras, "__file__", str(tmp_path / "unclip_jax" / "common" / "extras.py"))
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution())
    assert extras.how("train") == command


@pytest.mark.parametrize(
    "line",
    ["sample.py text2im --prompt x", "train.py --config=emoji/clip --workdir=w", "demo.py",
     "-m unclip_jax app", "-m unclip_jax evaluate --model m"],
)  # fmt: skip
def test_without_any_package_a_command_says_what_to_install(line, tmp_path):
    words = [str(ROOT / word) if word.endswith(".py") else word for word in line.split()]
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-S", *words]  # -S: no packages but Python's own
    found = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert found.returncode == 1 and len(found.stderr.splitlines()) == 1, found.stderr
    assert f'pip install -e "{ROOT}' in found.stderr


# ------------------------------------------------------------------------------------- wheel


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The wheel, built from a copy of the sources, as a folder."""
    here = tmp_path_factory.mktemp("wheel")
    skip = shutil.ignore_patterns("__pycache__")
    (here / "source").mkdir()
    for name in ("unclip_jax", "configs", "tests"):
        shutil.copytree(ROOT / name, here / "source" / name, symlinks=True, ignore=skip)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, here / "source")
    python(
        "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
        "--wheel-dir", here, here / "source",
    )  # fmt: skip
    (wheel,) = here.glob("unclip_jax-*.whl")
    assert wheel.stat().st_size < 60e6
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(here / "unpacked")
    return here / "unpacked"


def test_the_wheel_holds_configs_weights_vocabulary_and_licences(unpacked):
    found = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*")}
    package = ROOT / "unclip_jax"
    expected = [*package.rglob("*.py"), *(package / "weights" / "box").rglob("*.*")]
    expected += [*(package / "common" / "fonts").iterdir(), *package.glob("data/bpe_*")]
    assert not {path.relative_to(ROOT).as_posix() for path in expected} - found
    configs = {f"unclip_jax/{p.relative_to(ROOT)}" for p in (ROOT / "configs").rglob("*.[ps][yh]")}
    assert len(configs) > 20 and not configs - found
    info = next(name for name in found if name.endswith(".dist-info"))
    licences = {name for name in found if name.startswith(f"{info}/licenses/")}
    for name in ("LICENSE", "bpe_simple_vocab_16e6.LICENSE", "LICENSE_DEJAVU"):
        assert any(licence.endswith(f"/{name}") for licence in licences), name
    assert {name.partition("/")[0] for name in found} == {"unclip_jax", info}
    metadata = (unpacked / info / "METADATA").read_text(encoding="utf-8")
    assert f"\nVersion: {unclip_jax.__version__}\n" in metadata
    assert "unclip = unclip_jax.__main__:main" in (unpacked / info / "entry_points.txt").read_text()


def test_the_wheels_commands_run_in_an_empty_folder(unpacked, tmp_path):
    def unclip(*words):
        return python("-m", "unclip_jax", *words, cwd=tmp_path, path=unpacked)

    assert unclip("--help").startswith("usage: unclip COMMAND")
    assert "paper/upsampler_1024" in unclip("train", "--help")
    shown = unclip("train", "--config=emoji/decoder:smoke", "--help")
    assert "configs/emoji/decoder.py:smoke" in shown and "--config.train.steps=4" in shown
    own = tmp_path / "own.py"
    own.write_text(
        "from unclip_jax.configs.emoji import clip\n\n"
        "def get_config(variant='smoke'):\n    return clip.get_config(variant)\n"
    )
    assert "--config.stage.kind=clip" in unclip("train", "--config=own.py", "--help")
    code = "import unclip_jax, unclip_jax.configs.base as b; print(unclip_jax.__file__, b.__file__)"
    assert python("-c", code, cwd=tmp_path, path=unpacked).count(str(unpacked)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["own.py"]
