"""DALL·E 2 (unCLIP, arXiv 2204.06125) in JAX and Flax, from training on pods to one jitted sampler.

`unclip_jax.UnCLIP` is a whole model. `samplers`, `guidance`, `losses` and `schedules` are diffusion
mathematics for any network; `diffusion`, `models` and `stages` are the rooms they stand in. Each is
imported when it is first asked for, so `import unclip_jax` itself costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what editors and type checkers see
    from unclip_jax import diffusion, models, stages
    from unclip_jax.diffusion import guidance, losses, samplers, schedules
    from unclip_jax.errors import UserError
    from unclip_jax.pipeline.unclip import UnCLIP

__version__ = "0.1.0"

# Public name -> the module it is, or is an attribute of.
_HOMES = {
    "UnCLIP": "pipeline.unclip",
    "UserError": "errors",
    "diffusion": "diffusion",
    "guidance": "diffusion.guidance",
    "losses": "diffusion.losses",
    "models": "models",
    "samplers": "diffusion.samplers",
    "schedules": "diffusion.schedules",
    "stages": "stages",
}
__all__ = [
    "UnCLIP",
    "UserError",
    "__version__",
    "diffusion",
    "guidance",
    "losses",
    "models",
    "samplers",
    "schedules",
    "stages",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'unclip_jax' has no attribute {name!r}")
    module = importlib.import_module(f"unclip_jax.{_HOMES[name]}")
    is_module = _HOMES[name].rpartition(".")[2] == name
    globals()[name] = value = module if is_module else getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
