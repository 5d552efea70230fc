"""A plan's figures: the programs compiled, whole or by blocks, and what follows from them."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

from unclip_jax.parallel import axes
from unclip_jax.plan import flops
from unclip_jax.plan.blocks import Split, equations
from unclip_jax.plan.chips import Topology
from unclip_jax.plan.kept import compiled
from unclip_jax.plan.measure import QUICK, Measured, Roofline, together
from unclip_jax.plan.programs import Plan, device_bytes
from unclip_jax.training.optimizers import trained

DAY = 86400.0
Say = Callable[[str], None]
Figures = dict[str, Any]


def by_blocks(
    plan: Plan, function: Callable[..., Any], shapes: tuple[Any, ...], rows: int | None = None
) -> tuple[Split, Callable[..., Any]]:
    """A function of (params, ...) by its blocks, and the function with stand-ins for them.

    Args:
        plan: where params lie.
        function: what to trace on the plan's mesh.
        shapes: of its arguments, the params first.
        rows: of its activations; None takes what the blocks' largest results have.
    """
    flat, tree = jax.tree.flatten(shapes)
    structures: list[Any] = []

    def on_leaves(*leaves: Any) -> list[jax.Array]:
        with axes.on(plan.mesh):
            results, structure = jax.tree.flatten(function(*jax.tree.unflatten(tree, leaves)))
        structures.append(structure)
        return results

    traced = jax.make_jaxpr(on_leaves)(*flat)
    places = [x.sharding.spec for x in jax.tree.leaves(shapes[0])]
    specs = (*places, *(None,) * (len(flat) - len(places)))
    split = Split(traced, specs, rows or _largest_rows(traced), plan.mesh)

    def shell(*args: Any) -> Any:
        return jax.tree.unflatten(structures[0], split.shell(*jax.tree.leaves(args)))

    return split, shell


def _largest_rows(traced: core.ClosedJaxpr) -> int:
    """Rows of the largest result of a block: guidance stacks conditions, a prior draws several."""
    results = [v.aval.shape for e in equations(traced.jaxpr) for v in e.outvars]
    return max(results, key=math.prod, default=(1,))[0]


def train_figures(plan: Plan, topology: Topology, *, blocks: bool, say: Say) -> Figures:
    """What a train step needs of each chip, and how long it takes at least.

    Raises:
        TooLarge: it does not fit.
    """
    passes = plan.train.grad_accum * (2 if plan.train.sam_rho else 1)
    params, state = plan.params(), plan.state()
    batch = plan.batch(plan.micro_size)
    total = flops.count(plan.step(), state, plan.batch())
    forward = flops.count(plan.stage.loss, params, batch, jax.random.key(0))
    options = QUICK if plan.mesh.devices.flat[0].platform == "tpu" else {}
    chips, parts = topology.chips, []
    if blocks:
        shapes = (params, batch, jax.random.key(0))
        split, shell = by_blocks(plan, plan.stage.loss, shapes, plan.micro_size)
        whole = compiled(plan.lowered_step(shell), plan.mesh, options)
        say(f"shell: {whole.compile_s:.0f} s")
        parts = _blocks(split, backward=True, options=options, say=say)
    else:
        whole = compiled(plan.lowered_step(), plan.mesh, options)
    moved, collectives = together([(whole, 1), *((m, n * passes) for _, n, m in parts)])
    largest = max((m.temporary for _, _, m in parts), default=0)
    kept = {
        "params": device_bytes(state.params),
        "ema": device_bytes(state.ema_params),
        "optimizer": device_bytes(state.opt_state),
        "gradients": 4 * sum(_elements_held(x) for x in jax.tree.leaves(trained(params))),
    }
    peak = whole.peak + largest
    line = Roofline.of(topology.chip, total / chips, moved, collectives)
    model = 3 * forward * passes
    return {
        "mode": "blocks" if blocks else "whole",
        "batch_size": plan.train.batch_size,
        "grad_accum": plan.train.grad_accum,
        "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(params)),
        "bytes": kept | {"activations": peak - sum(kept.values()), "peak": peak},
        "limit": topology.chip.hbm_bytes,
        "fits": peak <= topology.chip.hbm_bytes,
        "flops": {"step": total, "chip": total / chips, "model": model},
        "moved": moved,
        "collectives": [dataclasses.asdict(c) for c in collectives],
        "intensity": total / chips / moved,
        "roofline": dataclasses.asdict(line) | {"least": line.least, "most": line.most},
        "mfu": {
            name: model / chips / topology.chip.bf16 / seconds
            for name, seconds in (("least", line.least), ("most", line.most))
        },
        "days": {
            "least": plan.train.steps * line.least / DAY,
            "most": plan.train.steps * line.most / DAY,
        },
        "steps": plan.train.steps,
        "parts": [_part(label, count, m) for label, count, m in parts],
        "compile_s": _compile_s(whole, parts),
    }


def sample_figures(plan: Plan, topology: Topology, rows: int, *, blocks: bool, say: Say) -> Figures:
    """What drawing `rows` pictures at once needs of each chip, and how long it takes at least.

    Raises:
        TooLarge: it does not fit.
    """
    sampler, shapes = plan.sampler(), plan.sampler_shapes(rows)
    total = flops.count(sampler, *shapes)
    options = QUICK if plan.mesh.devices.flat[0].platform == "tpu" else {}
    chips, parts = topology.chips, []
    if blocks:
        split, shell = by_blocks(plan, sampler, shapes)
        whole = compiled(jax.jit(shell).lower(*shapes), plan.mesh, options)
        parts = _blocks(split, backward=False, options=options, say=say)
    else:
        whole = compiled(jax.jit(sampler).lower(*shapes), plan.mesh, options)
    moved, collectives = together([(whole, 1), *((m, n) for _, n, m in parts)])
    line = Roofline.of(topology.chip, total / chips, moved, collectives)
    peak = whole.peak + max((m.temporary for _, _, m in parts), default=0)
    return {
        "mode": "blocks" if blocks else "whole",
        "rows": rows,
        "bytes": {"params": device_bytes(shapes[0]), "peak": peak},
        "limit": topology.chip.hbm_bytes,
        "fits": peak <= topology.chip.hbm_bytes,
        "flops": {"all": total, "chip": total / chips},
        "moved": moved,
        "collectives": [dataclasses.asdict(c) for c in collectives],
        "roofline": dataclasses.asdict(line) | {"least": line.least, "most": line.most},
        "compile_s": _compile_s(whole, parts),
    }


def versions() -> dict[str, str]:
    """Of what the figures come from."""
    return {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}


def _blocks(
    split: Split, *, backward: bool, options: dict[str, str], say: Say
) -> list[tuple[str, int, Measured]]:
    """Every distinct block compiled: its label, how often it runs, and what it needs."""
    parts = []
    for i, block in enumerate(split.blocks, 1):
        measured = compiled(split.lowered(block, backward=backward), split.mesh, options)
        parts.append((block.label, block.count, measured))
        say(
            f"block {i} of {len(split.blocks)}: {block.count} x {block.label},"
            f" {measured.compile_s:.0f} s"
        )
    return parts


def _compile_s(whole: Measured, parts: list[tuple[str, int, Measured]]) -> float:
    """Seconds of the compiler for all programs, those that were kept from earlier included."""
    return whole.compile_s + sum(measured.compile_s for _, _, measured in parts)


def _part(label: str, count: int, measured: Measured) -> Figures:
    return {
        "block": label,
        "count": count,
        "temporary": measured.temporary,
        "moved": measured.moved,
        "sent": sum(c.sent for c in measured.collectives),
    }


def _elements_held(x: jax.ShapeDtypeStruct) -> int:
    return math.prod(x.sharding.shard_shape(x.shape))
