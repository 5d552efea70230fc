"""Packages that not everyone has: they come with an extra, and are imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType

from unclip_jax.errors import UserError


def load(module: str, extra: str, what: str) -> ModuleType:
    """Import a module that `pip install 'unclip_jax[extra]'` brings.

        grain = extras.load("grain", "train", "batches of a data set")

    Args:
        module: its full name; `a.b` gives `a.b`.
        extra: one of those in pyproject.toml.
        what: needs it, for the message.

    Raises:
        UserError: it cannot be imported; the line names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{what}: needs {module} ({reason}); pip install 'unclip_jax[{extra}]'"
        ) from error
