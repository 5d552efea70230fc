"""What SECURITY.md says of the package's code: it runs nothing that it is given."""

import ast
import inspect
from pathlib import Path

import pytest

from unclip_jax.app import command as app
from unclip_jax.app import serve

PACKAGE = Path(__file__).parent.parent / "unclip_jax"

# Modules that execute what they read, or start a shell.
NEVER_IMPORTED = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "pty"}
# Functions of any module that do so, by the end of their dotted name.
NEVER_CALLED = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput",
    "subprocess.getstatusoutput", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.load",
    "pandas.read_pickle", "pd.read_pickle", "runpy.run_path", "tempfile.mktemp",
}  # fmt: skip
# Keyword arguments that ask for it, and the values at which they do not.
NEVER_GIVEN = {"shell": {False}, "allow_pickle": {False}, "trust_remote_code": {False}}


def dotted(node):
    """The name of what is called: "np.load" of np.load(...), "" of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


def dangers(source):
    """What a file does that the package must not, as (line, name)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            names = []
        for name in names:
            if name.split(".")[0] in NEVER_IMPORTED or name in NEVER_CALLED:
                yield node.lineno, name
        if isinstance(node, ast.Call):
            if dotted(node.func) in NEVER_CALLED:
                yield node.lineno, dotted(node.func)
            for keyword in node.keywords:
                safe = NEVER_GIVEN.get(keyword.arg)
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if safe is not None and value not in safe:
                    yield node.lineno, keyword.arg


def test_nothing_in_the_package_executes_what_it_is_given():
    paths = sorted(PACKAGE.rglob("*.py"))
    assert len(paths) > 100
    found = [
        f"{path.relative_to(PACKAGE.parent)}:{line}: {name}"
        for path in paths
        for line, name in dangers(path.read_text(encoding="utf-8"))
    ]
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "from os import system",
        "import torch\ntorch.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=given)",
        "subprocess.run(command, shell=True)",
        "def f(x):\n    return eval(x)",
        "exec(compile(text, '', 'exec'))",
        "yaml.load(file)",
        "os.system('ls')",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_the_search_finds(source):
    assert list(dangers(source))


@pytest.mark.parametrize(
    "source",
    [
        "np.load(path)",
        "np.load(path, allow_pickle=False)",
        "subprocess.run(['ls'], shell=False)",
        "re.compile('x')",
        "jax.jit(f).lower(x).compile()",
        "yaml.safe_load(file)",
        "# eval(x)",
        "text = 'exec(x)'",
    ],
)
def test_the_search_lets_pass(source):
    assert not list(dangers(source))


def test_the_page_listens_for_this_machine_alone_unless_told_otherwise():
    arguments = app.parse([])
    assert arguments.host == "127.0.0.1" and not arguments.share
    given = inspect.signature(serve.serving).parameters
    assert given["host"].default == "127.0.0.1" and given["share"].default is False
