"""The face of a room: names that are imported from its modules when they are first asked for.

    __all__, __getattr__, __dir__ = lazy.face(__name__, {"config": "TrainConfig", "loop": "train"})

So whoever imports one light module of a room does not import all of it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

Face = tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]


def face(package: str, names: Mapping[str, str]) -> Face:
    """`__all__`, `__getattr__` and `__dir__` of a package.

    Args:
        package: its name.
        names: by module of the package, the names that are taken from it, apart by spaces.
    """
    homes = {name: module for module, held in names.items() for name in held.split()}

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return sorted(homes), get, lambda: sorted(homes)
