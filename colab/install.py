# Installs unclip_jax where it is missing, beside the jax that is here with its CUDA or TPU, which
# stays: from the clone around this notebook, a wheel in this folder, REPOSITORY, or a wheel that
# you upload (in a clone, `pip wheel --no-deps .` makes it).
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = ""
EXTRAS = ""
NEEDS = []  # what EXTRAS bring


def pip(*wanted):
    """Install, quietly; whether that went well."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", *wanted]
    return subprocess.run(command).returncode == 0


def found(package):
    """Whether a package is installed."""
    return importlib.util.find_spec(package) is not None


above = (Path.cwd(), *Path.cwd().parents)
CLONE = next((p for p in above if (p / "unclip_jax/pipeline/unclip.py").is_file()), None)
if CLONE:
    os.chdir(CLONE)
if not all(map(found, ("unclip_jax", "flax", *NEEDS))):
    wheels = sorted(Path.cwd().glob("unclip_jax-*.whl"))
    if not (CLONE or wheels or REPOSITORY):
        if not found("google.colab"):
            raise SystemExit("unclip_jax is not here: put its wheel beside this notebook")
        from google.colab import files

        print("Choose the wheel, unclip_jax-VERSION-py3-none-any.whl:")
        wheels = [Path(name).resolve() for name in files.upload()]
    place = CLONE or (wheels[-1] if wheels else None)
    where = place.as_uri() if place else f"git+{REPOSITORY}"
    package = f"unclip_jax{f'[{EXTRAS}]' if EXTRAS else ''} @ {where}"
    here = {d.name: d.version for d in importlib.metadata.distributions()}
    kept = {n: v for n, v in here.items() if n.startswith("jax") or n == "libtpu"}
    constraints = Path("unclip_jax_constraints.txt")
    constraints.write_text("".join(f"{n}=={v}\n" for n, v in kept.items()))
    if not pip("--constraint", str(constraints), package):
        kinds = {
            "jax-cuda13-plugin": "[cuda13]",
            "jax-cuda12-plugin": "[cuda12]",
            "libtpu": "[tpu]",
        }
        kind = next((extra for plugin, extra in kinds.items() if plugin in kept), "")
        print(f"jax {kept.get('jax')}, which is here, doesn't go with it; installing another")
        assert pip(package, f"jax{kind}"), "pip failed: its words are above"
    constraints.unlink()
    importlib.invalidate_caches()
    numpy = sys.modules.get("numpy")
    if numpy and numpy.__version__ != importlib.metadata.version("numpy"):
        raise SystemExit("NumPy was replaced: Runtime, Restart session, then run this cell again")

# Commands and this notebook share an accelerator, so none takes all of its memory beforehand.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
asking = """
import json, jax
first, *others = jax.devices()
print(json.dumps([first.platform, first.device_kind, 1 + len(others), jax.__version__]))
"""
asked = subprocess.run([sys.executable, "-c", asking], capture_output=True, text=True)
assert asked.returncode == 0, asked.stderr
DEVICE, kind, count, version = json.loads(asked.stdout.splitlines()[-1])
print(f"jax {version} on {count} x {DEVICE}: {kind}")
if DEVICE == "cpu" and shutil.which("nvidia-smi"):
    print('There is an NVIDIA GPU that this jax does not see: pip install "jax[cuda12]"')
elif DEVICE == "cpu" and found("google.colab"):
    print("For an accelerator: Runtime, Change runtime type, T4 GPU or v5e-1 TPU")
