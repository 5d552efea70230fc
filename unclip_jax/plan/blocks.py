"""A big program by its blocks: each distinct one compiled once, and the shell around them.

A block is what `remat` wraps: one `checkpoint` equation of the traced loss. Equal blocks, of equal
shapes and places, are compiled once, forward and backward with their recomputation, and count as
often as they run. The shell is the real train step, or sampler, in which a stand-in takes every
block's place: it does next to nothing, but it keeps the block's input until the backward pass, and
makes gradients of the right shapes. So the shell holds all the memory that lies between blocks.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from unclip_jax.errors import UserError
from unclip_jax.parallel import axes
from unclip_jax.parallel.flops import sub_jaxprs

BLOCKS = ("checkpoint", "remat", "remat2")  # the primitive's names, by version of jax
# What a block's dropout folds into its key differs from block to block, and changes no cost.
_SEEDS = re.compile(r"\b\d+:u32\[\]")

Specs = tuple[PartitionSpec | None, ...]


@dataclasses.dataclass(frozen=True)
class Block:
    """One distinct block.

    Attributes:
        equation: the `checkpoint` equation.
        specs: places of its inputs; None where only the rule for activations tells.
        count: how often it runs in one pass.
    """

    equation: core.JaxprEqn
    specs: Specs
    count: int

    @property
    def jaxpr(self) -> core.Jaxpr:
        """What it computes."""
        return self.equation.params["jaxpr"]

    @property
    def inputs(self) -> list[tuple[Any, PartitionSpec | None]]:
        """The shape and the place of each input."""
        return [(v.aval, s) for v, s in zip(self.equation.invars, self.specs, strict=True)]

    @property
    def label(self) -> str:
        """The shapes of its largest input and of its output, without rows."""
        stream = [a.shape[1:] for a, s in self.inputs if s is None and len(a.shape) >= 3]
        out = self.equation.outvars[0].aval.shape[1:]
        sides = (max(stream, key=math.prod, default=out), out)
        return " -> ".join("x".join(map(str, side)) for side in sides)


class Split:
    """A traced function, its distinct blocks, and the shell."""

    def __init__(self, traced: core.ClosedJaxpr, specs: Specs, rows: int, mesh: Mesh) -> None:
        """Find the blocks.

        Args:
            traced: the function.
            specs: places of its inputs, None for what has rows.
            rows: of activations: what has so many is split over the mesh as a batch is.
            mesh: the mesh.

        Raises:
            UserError: there is no block: nothing is recomputed.
        """
        self.traced, self.rows, self.mesh = traced, rows, mesh
        self._specs: dict[int, Specs] = {}
        found: dict[str, Block] = {}
        for equation, places, times in self._find(traced.jaxpr, specs, 1):
            self._specs[id(equation)] = places
            shapes = [str(v.aval) for v in (*equation.invars, *equation.outvars)]
            code = _SEEDS.sub("", str(equation.params["jaxpr"]))
            key = f"{places}{shapes}{code}"
            count = times + (found[key].count if key in found else 0)
            found[key] = Block(equation, places, count)
        self.blocks = list(found.values())
        if not self.blocks:
            raise UserError(
                "--blocks: the network recomputes nothing, expected config.stage's remat to be"
                " 'full'; set it, or give --whole"
            )

    def _find(
        self, jaxpr: core.Jaxpr, specs: Specs, times: int
    ) -> Iterator[tuple[core.JaxprEqn, Specs, int]]:
        """Every block with its inputs' places, and how often it runs."""
        known = dict(zip(jaxpr.invars, specs, strict=True))
        for equation in jaxpr.eqns:
            places = tuple(
                known.get(v) if isinstance(v, core.Var) else None for v in equation.invars
            )
            if equation.primitive.name in BLOCKS:
                yield equation, places, times
            elif equation.primitive.name == "scan":
                body = equation.params["jaxpr"].jaxpr
                consts, carries = _scan_parts(equation)
                carried = consts + carries
                inner = tuple(
                    p if i < carried or p is None else PartitionSpec(*p[1:])
                    for i, p in enumerate(places)
                )
                yield from self._find(body, inner, times * equation.params["length"])
            else:
                for inner_jaxpr in sub_jaxprs(equation):
                    same = len(inner_jaxpr.invars) == len(places)
                    inner = places if same else (None,) * len(inner_jaxpr.invars)
                    yield from self._find(inner_jaxpr, inner, times)

    def place(self, aval: Any, spec: PartitionSpec | None) -> NamedSharding:
        """Where an input of a block lies."""
        if spec is None and aval.shape and aval.shape[0] == self.rows:
            names = ("batch", "height", None, None) if aval.ndim == 4 else ("batch",)
            spec = axes.fitting(self.mesh, aval.shape[: len(names)], names)
        return NamedSharding(self.mesh, PartitionSpec() if spec is None else spec)

    def lowered(self, block: Block, *, backward: bool) -> jax.stages.Lowered:
        """A block ready to compile: forward, and then, if asked for, the backward pass."""
        whole = core.jaxpr_as_fun(core.ClosedJaxpr(block.jaxpr, ()))

        def placed(aval: Any, spec: PartitionSpec | None) -> jax.ShapeDtypeStruct:
            where = self.place(aval, spec)
            return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=where)

        inputs = [placed(*given) for given in block.inputs]
        if not backward:
            return jax.jit(whole).lower(*inputs)
        moving = [i for i, x in enumerate(inputs) if jnp.issubdtype(x.dtype, jnp.floating)]

        def both(args: Sequence[jax.Array], cotangents: Sequence[jax.Array]) -> Any:
            def apply(*floats: jax.Array) -> Any:
                given = dict(zip(moving, floats, strict=True))
                return whole(*(given.get(i, x) for i, x in enumerate(args)))

            policy = block.equation.params["policy"]
            again = jax.checkpoint(apply, prevent_cse=True, policy=policy)
            out, pull = jax.vjp(again, *(args[i] for i in moving))
            grads = pull(list(cotangents))
            where = [inputs[i].sharding for i in moving]
            return out, jax.lax.with_sharding_constraint(list(grads), where)

        outs = [placed(v.aval, None) for v in block.equation.outvars]
        return jax.jit(both).lower(inputs, outs)

    def shell(self, *args: Any) -> Any:
        """The traced function on flat arguments, with stand-ins for its blocks."""
        return self._replay(self.traced.jaxpr, self.traced.consts, args)

    def _replay(
        self, jaxpr: core.Jaxpr, consts: Sequence[Any], args: Sequence[Any]
    ) -> list[jax.Array]:
        values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

        def read(v: Any) -> Any:
            return v.val if isinstance(v, core.Literal) else values[v]

        for equation in jaxpr.eqns:
            inputs = [read(v) for v in equation.invars]
            if equation.primitive.name in BLOCKS:
                outs = self._stand_in(equation)(*inputs)
            elif not any(_holds_blocks(inner) for inner in sub_jaxprs(equation)):
                outs = _evaluate(equation, inputs)
            elif equation.primitive.name == "scan":
                outs = self._replay_scan(equation, inputs)
            else:
                (inner,) = (p for p in equation.params.values() if isinstance(p, core.ClosedJaxpr))
                outs = self._replay(inner.jaxpr, inner.consts, inputs)
            values.update(zip(equation.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def _replay_scan(self, equation: core.JaxprEqn, inputs: Sequence[Any]) -> list[jax.Array]:
        params, body = equation.params, equation.params["jaxpr"]
        first, carries = _scan_parts(equation)
        second = first + carries

        def turn(carry: Any, xs: Any) -> Any:
            outs = self._replay(body.jaxpr, body.consts, (*inputs[:first], *carry, *xs))
            return tuple(outs[:carries]), tuple(outs[carries:])

        carry, ys = jax.lax.scan(
            turn,
            tuple(inputs[first:second]),
            tuple(inputs[second:]),
            length=params["length"],
            reverse=params["reverse"],
        )
        return [*carry, *ys]

    def _stand_in(self, equation: core.JaxprEqn) -> Callable[..., list[jax.Array]]:
        """What takes a block's place: the same inputs, outputs and gradients, and no work.

        The barriers keep the compiler from merging its results into what uses them.
        """
        specs = self._specs[id(equation)]
        avals = [v.aval for v in equation.outvars]

        def has_rows(x: Any, spec: PartitionSpec | None) -> bool:
            return spec is None and x.ndim > 0 and x.shape[0] == self.rows

        def level(arrays: Sequence[Any], places: Specs) -> jax.Array:
            rows = [x for x, spec in zip(arrays, places, strict=True) if has_rows(x, spec)]
            means = [x.astype(jnp.float32).reshape(self.rows, -1).mean(1) for x in rows]
            return sum(means, jnp.zeros(self.rows))

        def spread(by_row: jax.Array, like: Any, spec: PartitionSpec | None) -> jax.Array:
            if has_rows(like, spec):
                thin = by_row.reshape(-1, *(1,) * (like.ndim - 1))
            else:
                thin = by_row.mean().reshape((1,) * like.ndim)
            full = jnp.broadcast_to(thin, like.shape).astype(like.dtype)
            return jax.lax.with_sharding_constraint(full, self.place(like, spec))

        @jax.custom_vjp
        def block(*floats: Any) -> list[jax.Array]:
            by_row = level(floats, moving_specs)
            outs = [spread(by_row, aval, None) for aval in avals]
            return jax.lax.optimization_barrier(outs)

        def forward(*floats: Any) -> Any:
            return block(*floats), floats

        def backward(floats: Any, cotangents: Any) -> Any:
            by_row = level(floats, moving_specs) + level(cotangents, (None,) * len(avals))
            grads = [spread(by_row, x, s) for x, s in zip(floats, moving_specs, strict=True)]
            return tuple(jax.lax.optimization_barrier(grads))

        block.defvjp(forward, backward)
        moving = [
            i for i, v in enumerate(equation.invars) if jnp.issubdtype(v.aval.dtype, jnp.floating)
        ]
        moving_specs = tuple(specs[i] for i in moving)
        return lambda *args: block(*(args[i] for i in moving))


def _scan_parts(equation: core.JaxprEqn) -> tuple[int, int]:
    """How many constants and carries a scan has, in that order, before what it goes through.

    The names of its parameters differ by version of jax; what is scanned has an axis more outside.
    """
    body = equation.params["jaxpr"].jaxpr

    def same_rank(outside: Sequence[Any], inside: Sequence[Any]) -> int:
        return sum(a.aval.ndim == b.aval.ndim for a, b in zip(outside, inside, strict=True))

    carries = same_rank(equation.outvars, body.outvars)
    return same_rank(equation.invars, body.invars) - carries, carries


def _evaluate(equation: core.JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """The results of one equation. How a primitive is bound differs by version of jax; a jaxpr of
    one equation is evaluated alike in all."""
    given = {v: x for v, x in zip(equation.invars, inputs, strict=True) if isinstance(v, core.Var)}
    alone = core.Jaxpr((), list(given), equation.outvars, [equation], equation.effects)
    return core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*given.values())


def equations(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """The `checkpoint` equations of a jaxpr, at any depth but inside each other."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in BLOCKS:
            yield equation
        else:
            for inner in sub_jaxprs(equation):
                yield from equations(inner)


def _holds_blocks(jaxpr: core.Jaxpr) -> bool:
    return next(equations(jaxpr), None) is not None
