"""Meshes and programs for TPU slices that are not there; test_slices.py runs this as a script.

    python -m tests.slices_run meshes
    python -m tests.slices_run programs TOPOLOGY=FSDP ...

Prints one JSON object.
"""

import json
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from unclip_jax.errors import UserError
from unclip_jax.parallel import sharding
from unclip_jax.parallel.sharding import MeshConfig
from unclip_jax.plan import kept
from unclip_jax.plan.chips import Topology
from unclip_jax.plan.measure import QUICK

TOPOLOGIES = ("2xv5e:4x4", "4xv5e:4x4", "2xv5p:2x2x2", "4xv6e:2x4", "2xtpu7x:2x2x1", "v6e:4x4")
MESHES = {
    "data": MeshConfig(),
    "fsdp": MeshConfig(fsdp=4),
    "three": MeshConfig(fsdp=2, tensor=2),
    "spatial": MeshConfig(spatial=2),
    "slice": MeshConfig(fsdp=8),
    "too wide": MeshConfig(data=1, fsdp=-1),
}
# Rows of one device. Where all rows of a group are fewer than a matrix has, the partitioner gathers
# them, and leaves the matrix in its parts; a real step has more.
WIDTH, HIDDEN, ROWS = 256, 1024, 64


def meshes() -> dict:
    """By topology and mesh: its shape, and the slices of each row of data; or what is wrong."""
    found: dict = {}
    for name in TOPOLOGIES:
        devices = Topology.parse(name).devices()
        for key, config in MESHES.items():
            try:
                mesh = sharding.make_mesh(config, devices)
            except UserError as error:
                found[f"{name} {key}"] = str(error)
                continue
            rows = [sorted({getattr(d, "slice_index", 0) for d in r.flat}) for r in mesh.devices]
            found[f"{name} {key}"] = [list(mesh.devices.shape), rows]
    return found


def program(name: str, fsdp: int) -> list:
    """The collectives of a perceptron's train step, its params split over `fsdp` devices."""
    topology = Topology.parse(name)
    mesh = sharding.make_mesh(MeshConfig(fsdp=fsdp), topology.devices())
    rows = sharding.batch_sharding(mesh)
    up = NamedSharding(mesh, PartitionSpec(("fsdp",), None))
    down = NamedSharding(mesh, PartitionSpec(None, ("fsdp",)))

    def step(params, x):
        def loss(params, x):
            a, b = (p.astype(jnp.bfloat16) for p in params)
            y = jax.lax.with_sharding_constraint(jnp.tanh(x @ a), rows)
            return ((y @ b).astype(jnp.float32) ** 2).sum()

        grads = jax.lax.with_sharding_constraint(jax.grad(loss)(params, x), (up, down))
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    params = (
        jax.ShapeDtypeStruct((WIDTH, HIDDEN), jnp.float32, sharding=up),
        jax.ShapeDtypeStruct((HIDDEN, WIDTH), jnp.float32, sharding=down),
    )
    x = jax.ShapeDtypeStruct((ROWS * mesh.size, WIDTH), jnp.bfloat16, sharding=rows)
    lowered = jax.jit(step, donate_argnums=0).lower(params, x)
    measured = kept.compiled(lowered, mesh, QUICK)
    return [[c.kind, c.group, c.bytes, c.count, c.sent] for c in measured.collectives]


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    if sys.argv[1] == "meshes":
        found = meshes()
    else:
        asked = (name.split("=") for name in sys.argv[2:])
        found = {f"{name}={fsdp}": program(name, int(fsdp)) for name, fsdp in asked}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
