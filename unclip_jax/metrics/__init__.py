"""Figures: what a trained stage or a whole model is worth, as plain numbers from plain arrays.

A figure of pictures is a module here that defines one of

    judge(drawn: Vectors) -> dict[str, float]                    of pictures and their captions
    compare(drawn: Vectors, real: Vectors) -> dict[str, float]   beside real pictures

`python -m unclip_jax evaluate` finds it by that name, and no list names it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable


def found(name: str) -> list[Callable[..., dict[str, float]]]:
    """The functions of this name in the modules here, in the order of the modules' names."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{module}") for module in names]
    return [getattr(module, name) for module in modules if hasattr(module, name)]
