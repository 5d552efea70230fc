"""A model on every device that there is, as the commands draw with it."""

from __future__ import annotations

from pathlib import Path

import jax

from unclip_jax.parallel import sharding
from unclip_jax.parallel.cpu import devices as cpu_devices
from unclip_jax.pipeline.unclip import UnCLIP


def load(model: str | Path | None = None, dtype: str = "", t5: str | Path | None = None) -> UnCLIP:
    """`UnCLIP.load` onto all devices; of a CPU's, onto as many as its weights fit in memory for.

    Raises:
        UserError: as for `UnCLIP.load`.
    """
    if jax.devices()[0].platform != "cpu":
        mesh = sharding.make_mesh()
        return UnCLIP.load(model, dtype, t5, mesh if mesh.size > 1 else None)
    loaded = UnCLIP.load(model, dtype, t5)
    mesh = cpu_devices.make_mesh(held_bytes=lambda: loaded.nbytes)
    return loaded.on(mesh) if mesh.size > 1 else loaded
