"""A plan's figures: the programs compiled, whole or by blocks, and what follows from them."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend import core

from unclip_jax.parallel import axes, flops
from unclip_jax.plan import cuda
from unclip_jax.plan.blocks import Split, equations
from unclip_jax.plan.chips import Topology
from unclip_jax.plan.hlo import all_products
from unclip_jax.plan.kept import COMPILERS, compiled
from unclip_jax.plan.measure import QUICK, Measured, Roofline, together
from unclip_jax.plan.programs import Plan, device_bytes
from unclip_jax.stages.base import JointLoss
from unclip_jax.training import lora
from unclip_jax.training.optimizers import trained
from unclip_jax.training.step import LossFn

DAY = 86400.0
Say = Callable[[str], None]
Figures = dict[str, Any]
OPTIONS = {"tpu": QUICK, "gpu": cuda.OPTIONS}  # of the compilers, by platform


class Part(NamedTuple):
    """A distinct block: its label, how often it runs in a pass, in how many, and what it needs."""

    label: str
    count: int
    passes: int
    measured: Measured


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
    """What a train step needs of each chip, and of a TPU how long it takes at least.

    Raises:
        TooLarge: it does not fit.
    """
    train, loss = plan.train, plan.loss
    gradients = 2 if train.sam_rho else 1
    passes = train.grad_accum * gradients
    params, state, key = plan.params(), plan.state(), jax.random.key(0)
    micro = plan.batch(plan.micro_size)
    total = flops.count(plan.step(), state, plan.batch())
    joint = isinstance(loss, JointLoss) and train.grad_accum > 1
    batch, often = (plan.batch(), gradients) if joint else (micro, passes)
    moved = trained(params)
    times = lora.passes(params)
    model = often * flops.of_training(loss, params, batch, key, trained=moved, times=times)

    def in_blocks() -> tuple[Split, LossFn]:
        if not joint:
            return by_blocks(plan, loss, (params, micro, key), plan.micro_size)
        split, rows = by_blocks(plan, loss.rows, (params, micro), plan.micro_size)
        return split, JointLoss(rows, loss.together)

    shell = in_blocks if blocks else None
    # A joint loss computes every microbatch once more, forward, to know what to compare.
    runs = [(True, passes), *([(False, passes)] if joint else [])]
    whole, parts = _programs(plan, shell, plan.lowered_step, runs, say)
    figures, peak = _figures(topology, total, whole, parts)
    kept = {
        "params": device_bytes(state.params),
        "ema": device_bytes(state.ema_params),
        "optimizer": device_bytes(state.opt_state),
        "gradients": 4 * sum(_elements_held(x) for x in jax.tree.leaves(moved)),
    }
    return figures | {
        "batch_size": train.batch_size,
        "grad_accum": train.grad_accum,
        "parameters": _elements(params),
        "trained": _elements(moved),
        "bytes": kept | {"activations": peak - sum(kept.values()), "peak": peak},
        "flops": {"step": total, "chip": total / topology.device_count, "model": model},
        "steps": train.steps,
        **_times(topology, figures, total, model, train.steps),
        "parts": [_part(p) for p in parts],
    }


def _times(topology: Topology, figures: Figures, total: int, model: int, steps: int) -> Figures:
    """How well a step uses its chips, and how long all take; nothing where there are no rates."""
    if (line := figures.get("roofline")) is None:
        return {}
    seconds = {name: line[name] for name in ("least", "most")}
    ideal = model / topology.device_count / topology.chip.bf16
    return {
        "intensity": total / topology.device_count / figures["moved"],
        "mfu": {name: ideal / time for name, time in seconds.items()},
        "days": {name: steps * time / DAY for name, time in seconds.items()},
    }


def sample_figures(plan: Plan, topology: Topology, rows: int, *, blocks: bool, say: Say) -> Figures:
    """What drawing `rows` pictures at once needs of each chip, and how long it takes at least.

    Raises:
        TooLarge: it does not fit.
    """
    sampler, shapes = plan.sampler(), plan.sampler_shapes(rows)
    total = flops.count(sampler, *shapes)
    shell = functools.partial(by_blocks, plan, sampler, shapes) if blocks else None

    def lower(function: Callable[..., Any] = sampler) -> jax.stages.Lowered:
        return jax.jit(function).lower(*shapes)

    whole, parts = _programs(plan, shell, lower, [(False, 1)], say)
    figures, peak = _figures(topology, total, whole, parts)
    return figures | {
        "rows": rows,
        "bytes": {"params": device_bytes(shapes[0]), "peak": peak},
        "flops": {"all": total, "chip": total / topology.device_count},
    }


def _programs(
    plan: Plan,
    shell: Callable[[], tuple[Split, Callable[..., Any]]] | None,
    lower: Callable[..., jax.stages.Lowered],
    runs: list[tuple[bool, int]],
    say: Say,
) -> tuple[Measured, list[Part]]:
    """The whole program compiled, or, with `shell`, that and every distinct block.

    `runs` says how a block runs, with its backward pass or without, and in how many passes.
    """
    options = OPTIONS.get(plan.mesh.devices.flat[0].platform, {})
    if shell is None:
        return compiled(lower(), plan.mesh, options), []
    split, function = shell()
    whole = compiled(lower(function), plan.mesh, options)
    say(f"shell: {whole.compile_s:.0f} s")
    parts = []
    for i, (block, (backward, passes)) in enumerate(itertools.product(split.blocks, runs), 1):
        measured = compiled(split.lowered(block, backward=backward), split.mesh, options)
        label = block.label if backward or len(runs) == 1 else f"{block.label}, forward"
        parts.append(Part(label, block.count, passes, measured))
        name = f"block {i} of {len(split.blocks) * len(runs)}: {block.count} x {label}"
        say(f"{name}, {measured.compile_s:.0f} s")
    return whole, parts


def _figures(
    topology: Topology, total: int, whole: Measured, parts: list[Part]
) -> tuple[Figures, int]:
    """What training and sampling are both asked for, and the peak of a chip's memory."""
    moved, collectives = together([(whole, 1), *((p.measured, p.count * p.passes) for p in parts)])
    peak = whole.peak + max((p.measured.temporary for p in parts), default=0)
    programs = (whole, *(p.measured for p in parts))
    figures: Figures = {
        "mode": "blocks" if parts else "whole",
        "limit": topology.chip.hbm_bytes,
        "fits": peak <= topology.chip.hbm_bytes,
        "moved": moved,
        "collectives": [dataclasses.asdict(c) for c in collectives],
        "donated": whole.donated,
        "products": all_products(i for m in programs for i in m.products.items()),
        # Of the compiler for all programs, those that were kept from earlier included.
        "compile_s": whole.compile_s + sum(p.measured.compile_s for p in parts),
    }
    if not topology.chip.gpu:
        each = total / topology.device_count
        line = Roofline.of(topology.chip, each, moved, collectives)
        bounds = {"least": line.least, "most": line.most}
        figures["roofline"] = dataclasses.asdict(line) | bounds
    return figures, peak


def versions() -> dict[str, str]:
    """Of what the figures come from, as far as it is installed."""
    return {
        name: found.version
        for name in COMPILERS
        for found in importlib.metadata.distributions(name=name)
    }


def _part(part: Part) -> Figures:
    return {
        "block": part.label,
        "count": part.count,
        "temporary": part.measured.temporary,
        "moved": part.measured.moved,
        "sent": sum(c.sent for c in part.measured.collectives),
    }


def _elements(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def _elements_held(x: jax.ShapeDtypeStruct) -> int:
    return math.prod(x.sharding.shard_shape(x.shape))
