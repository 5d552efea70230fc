"""Programs compiled for 8 CPU devices and read by the planner; test_plan.py runs this as a script.

Prints one JSON object.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from tests import tiny
from unclip_jax import stages
from unclip_jax.errors import UserError
from unclip_jax.models import layers
from unclip_jax.parallel import axes, flops, sharding
from unclip_jax.parallel.sharding import MeshConfig
from unclip_jax.plan import analysis, chips, search
from unclip_jax.plan.hlo import Program
from unclip_jax.plan.measure import compiled
from unclip_jax.plan.programs import Plan, device_bytes
from unclip_jax.training.config import TrainConfig
from unclip_jax.training.optimizers import make_optimizer
from unclip_jax.training.step import sharded_state

LAYERS, WIDTH, ROWS = 7, 64, 16
TOKENS = 1024


def placed(mesh, spec, *sides):
    return jax.ShapeDtypeStruct(sides, jnp.float32, sharding=NamedSharding(mesh, spec))


def collectives_in_a_scan(mesh):
    """Seven turns of a product whose contracted axis is split over 8: one all-reduce a turn."""

    split = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    whole = NamedSharding(mesh, PartitionSpec())

    def layers(x, w):
        def turn(x, w):
            x = jax.lax.with_sharding_constraint(x, split)
            return jnp.tanh(jax.lax.with_sharding_constraint(x @ w, whole)), None

        return jax.lax.scan(turn, x, w)[0]

    x = placed(mesh, PartitionSpec(), ROWS, WIDTH)
    w = placed(mesh, PartitionSpec(None, "fsdp", None), LAYERS, WIDTH, WIDTH)
    program = Program(jax.jit(layers).lower(x, w).compile().as_text(), 8)
    return [[c.kind, c.group, c.bytes, c.count] for c in program.collectives()]


def bytes_of_a_scan(mesh):
    """HBM bytes of adding a stack's layers, which is to read every layer and little else."""
    add = lambda x, ws: jax.lax.scan(lambda x, w: (jnp.tanh(x + w), None), x, ws)[0]  # noqa: E731
    whole = PartitionSpec()
    shapes = placed(mesh, whole, 512, 512), placed(mesh, whole, 32, 512, 512)
    return Program(jax.jit(add).lower(*shapes).compile().as_text(), 8).bytes()


def collectives_of_a_table():
    """Of a table's lookup and its gradient: 2 copies of the model, each split over 4 devices."""
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4))
    table = layers.Embed(TOKENS, WIDTH)

    def loss(params, tokens):
        with axes.on(mesh):
            return (table.apply({"params": params}, tokens) ** 2).sum()

    params = {"embedding": placed(mesh, PartitionSpec(None, "fsdp"), TOKENS, WIDTH)}
    rows = sharding.batch_sharding(mesh)
    tokens = jax.ShapeDtypeStruct((ROWS, 4), jnp.int32, sharding=rows)
    where = jax.tree.map(lambda x: x.sharding, params)
    program = jax.jit(jax.grad(loss), out_shardings=where).lower(params, tokens).compile()
    found = Program(program.as_text(), 8).collectives()
    return {
        "temporary": program.memory_analysis().temp_size_in_bytes,
        "collectives": [[c.kind, c.group, c.bytes] for c in found],
    }


def blocks(mesh):
    """A network of two kinds of blocks, whole and by blocks."""

    def loss(params, x):
        def block(x, p):
            return x + jnp.tanh(x @ p["a"]) @ p["b"]

        again = jax.checkpoint(block)
        x, _ = jax.lax.scan(lambda x, p: (again(x, p), None), x, params["deep"])
        x = jax.checkpoint(lambda x, p: jnp.tanh(x @ p))(x, params["wide"])
        return (x**2).sum()

    split = PartitionSpec(None, "fsdp", None)
    deep = {name: placed(mesh, split, LAYERS, WIDTH, WIDTH) for name in "ab"}
    params = {"deep": deep, "wide": placed(mesh, PartitionSpec("fsdp"), WIDTH, 4 * WIDTH)}
    batch = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32, sharding=sharding.batch_sharding(mesh))
    plan = Plan(None, TrainConfig(), mesh)
    found, shell = analysis.by_blocks(plan, loss, (params, batch), ROWS)
    where = jax.tree.map(lambda x: x.sharding, params)

    def gradient(function):
        step = jax.jit(jax.grad(function), out_shardings=where)
        return compiled(step.lower(params, batch), 8, {})

    whole, outside = gradient(loss), gradient(shell)
    parts = [compiled(found.lowered(b, backward=True), 8, {}) for b in found.blocks]
    sent = sum(
        block.count * sum(c.sent for c in part.collectives)
        for block, part in zip(found.blocks, parts, strict=True)
    )
    return {
        "labels": [[b.count, b.label] for b in found.blocks],
        "flops": flops.count(jax.grad(loss), params, batch),
        "block_flops": [flops.of_jaxpr(b.jaxpr) for b in found.blocks],
        "shell_flops": flops.count(jax.grad(shell), params, batch),
        "sent_whole": sum(c.sent for c in whole.collectives),
        "sent_blocks": sent + sum(c.sent for c in outside.collectives),
        "arguments": [whole.arguments, outside.arguments],
        "results": [whole.results, outside.results],
    }


def state_bytes():
    """What the plan says a device holds of a state, and what it does hold."""
    config = {
        "stage": stages.describe(tiny.PRIOR),
        "train": {"batch_size": 16},
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
    }
    plan = Plan.of(config, jax.devices())
    params = plan.stage.init(jax.random.key(0))
    state = sharded_state(params, make_optimizer(plan.train), plan.train, plan.mesh)
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    return {"planned": device_bytes(plan.state()), "held": held}


def fits():
    """What fits on chips of less and less memory: fsdp, microbatches, remat; None for nothing."""
    config = {
        "stage": stages.describe(tiny.PRIOR),
        "train": {"batch_size": 16},
        "mesh": {},
    }
    found = []
    for memory in (2**30, 350_000, 230_000, 10_000):
        chips.CHIPS["v5e"] = dataclasses.replace(chips.CHIPS["v5e"], hbm_bytes=memory)
        try:
            plan, _ = search.search(config, chips.Topology("v5e", (2, 4)), jax.devices())
            remat = search.remat_of(plan.stage)
            found.append([plan.mesh.shape["fsdp"], plan.train.grad_accum, remat])
        except UserError as error:
            found.append(str(error))
    return found


def main():
    assert jax.device_count() == 8
    mesh = sharding.make_mesh(MeshConfig(fsdp=8))
    found = {
        "scan": collectives_in_a_scan(mesh),
        "table": collectives_of_a_table(),
        "bytes": bytes_of_a_scan(mesh),
        "blocks": blocks(mesh),
        "state": state_bytes(),
        "fits": fits(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
