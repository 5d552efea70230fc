"""DALL·E 2 (unCLIP, arXiv 2204.06125) in JAX and Flax, from training on pods to one jitted sampler.

`unclip_jax.UnCLIP` is a whole model. `samplers`, `guidance`, `losses` and `schedules` are diffusion
mathematics for any network; `diffusion`, `models` and `stages` are the rooms they stand in. Each is
imported when it is first asked for, so `import unclip_jax` itself costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> the module it is, or the module it is an attribute of.
_MODULES = {
    "diffusion": "unclip_jax.diffusion",
    "guidance": "unclip_jax.diffusion.guidance",
    "losses": "unclip_jax.diffusion.losses",
    "models": "unclip_jax.models",
    "samplers": "unclip_jax.diffusion.samplers",
    "schedules": "unclip_jax.diffusion.schedules",
    "stages": "unclip_jax.stages",
}
_ATTRIBUTES = {"UnCLIP": "unclip_jax.pipeline.unclip", "UserError": "unclip_jax.errors"}

__all__ = ["__version__", *_MODULES, *_ATTRIBUTES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = importlib.import_module(_MODULES[name])
    elif name in _ATTRIBUTES:
        value = getattr(importlib.import_module(_ATTRIBUTES[name]), name)
    else:
        raise AttributeError(f"module 'unclip_jax' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
