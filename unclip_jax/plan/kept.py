"""What compiled programs need, kept in the cache folder: a plan that was stopped goes on.

A U-Net has some thirty distinct blocks, each of which the TPU's compiler may search for minutes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from pathlib import Path

import jax
from jax.sharding import Mesh

from unclip_jax.common.files import check_place, default_cache_dir, write_text
from unclip_jax.parallel import sharding
from unclip_jax.plan import collectives, cuda, hlo, measure
from unclip_jax.plan.collectives import Collective
from unclip_jax.plan.measure import Measured

COMPILERS = ("jax", "jaxlib", "libtpu", *cuda.PLUGINS)


def compiled(
    lowered: jax.stages.Lowered, mesh: Mesh, options: dict[str, str], folder: Path | None = None
) -> Measured:
    """What a program needs of each chip, as kept or, the first time, compiled.

    Args:
        lowered: the program.
        mesh: of the chips it is for.
        options: of the compiler.
        folder: where figures are kept; None takes `default_cache_dir() / "plans"`.

    Raises:
        TooLarge: it does not fit. Nothing is kept of that.
        UserError: nothing can be written there.
    """
    folder = default_cache_dir() / "plans" if folder is None else folder
    file = folder / f"{digest(lowered, mesh, options)}.json"
    if (found := _read(file)) is not None:
        return found
    check_place("UNCLIP_JAX_CACHE", file)
    slices = len(sharding.by_slice(list(mesh.devices.flat)))
    measured = measure.compiled(lowered, mesh.size // slices, options)
    write_text(file, json.dumps(dataclasses.asdict(measured)) + "\n")
    return measured


def digest(lowered: jax.stages.Lowered, mesh: Mesh, options: dict[str, str]) -> str:
    """SHA-256 of all that the figures depend on: the program, its chips, compiler and reader."""
    chips = [(d.device_kind, d.id) for d in mesh.devices.flat]
    releases = [
        (name, found.version)
        for name in COMPILERS
        for found in importlib.metadata.distributions(name=name)
    ]
    modules = (hlo, collectives, measure)
    readers = [Path(module.__file__).read_text(encoding="utf-8") for module in modules]
    around = repr((chips, dict(mesh.shape), sorted(options.items()), releases, readers))
    return hashlib.sha256(f"{around}\n{lowered.as_text()}".encode()).hexdigest()


def _read(file: Path) -> Measured | None:
    """The figures in a file; None where there is none. What cannot be read is measured again."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        found["collectives"] = tuple(Collective(**c) for c in found["collectives"])
        found["products"] = {kind: tuple(two) for kind, two in found["products"].items()}
        return Measured(**found)
    except (OSError, ValueError, TypeError, KeyError):
        return None
