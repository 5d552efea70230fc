"""Loops that a host can watch.

A sampler is one loop. Run whole, it is one compiled program that nobody sees into. Watched, it is
two: one that gets to the loop, and one that does any number of its steps, called again and again.
Between the calls the host reports how far it got, and may stop. Nothing in any program calls the
host, so all are kept in JAX's compilation cache, and none is compiled again for another length of
stretches.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

Step = Callable[[jax.Array, Any], Any]
"""`step(n, carry) -> carry`, n an int32 scalar that counts from 0."""

Loop = Callable[[Step, Any, int], Any]
"""`loop(step, carry, steps) -> carry` after all steps."""

Progress = Callable[[int, int], None]
"""`progress(done, steps)`, called on the host in order, at last with done = steps."""

SECONDS = 0.25  # about what a stretch takes, unless one step takes longer


def whole(step: Step, carry: Any, steps: int) -> Any:
    """The `Loop` that does every step at once."""
    return jax.lax.fori_loop(0, steps, step, carry)


class _Reached(Exception):
    """The function got to its loop, which starts from `carry` and reads `beside`."""

    def __init__(self, carry: Any, beside: list[jax.Array], steps: int) -> None:
        super().__init__()
        self.carry, self.beside, self.steps = carry, beside, steps


class _Traced:
    """A step as a program of its own: of n, the carry and the arrays it reads from outside."""

    def __init__(self, step: Step, carry: Any, given: Any) -> None:
        self._structure = jax.tree.structure(carry)
        self._closed = jax.make_jaxpr(step)(jnp.int32(0), carry)
        known = {id(leaf) for leaf in jax.tree.leaves(given)}
        self._computed = [
            isinstance(x, jax.core.Tracer) and id(x) not in known for x in self._closed.consts
        ]

    @property
    def beside(self) -> list[jax.Array]:
        """The arrays that were computed before the loop: neither given nor known beforehand."""
        return [x for x, mine in zip(self._closed.consts, self._computed, strict=True) if mine]

    def reading(self, beside: list[jax.Array]) -> Step:
        """The step with these arrays in place of `self.beside`."""
        new = iter(beside)
        consts = [
            next(new) if mine else x
            for x, mine in zip(self._closed.consts, self._computed, strict=True)
        ]
        run = core.jaxpr_as_fun(core.ClosedJaxpr(self._closed.jaxpr, consts))
        return lambda n, carry: jax.tree.unflatten(self._structure, run(n, *jax.tree.leaves(carry)))


class Watchable:
    """A compiled function that runs one loop, whole or watched.

    Called like the function, without `loop` and with a further argument `progress`: None runs the
    loop whole. An exception that progress raises ends the loop and comes through.
    """

    def __init__(self, function: Callable[..., Any], static: Iterable[str] = ()) -> None:
        """`function` takes its `Loop` as the keyword `loop` and calls it once.

        Args:
            function: as `jax.jit` takes it. What comes after its loop is computed again in every
                stretch, so it should be little beside the loop.
            static: the names of its static arguments.
        """
        self._function, self._signature = function, inspect.signature(function)
        kinds = {p.kind: name for name, p in self._signature.parameters.items()}
        self._others = kinds.get(inspect.Parameter.VAR_KEYWORD, "")
        compiled = functools.partial(jax.jit, static_argnames=tuple(static))
        self._whole = compiled(functools.partial(function, loop=whole))
        self._start, self._stretch = compiled(self._to_the_loop), compiled(self._some_steps)
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, progress: Progress | None = None, **kwargs: Any) -> Any:
        """What the function returns."""
        given = self._signature.bind_partial(*args, **kwargs).arguments
        given |= given.pop(self._others, {})
        if progress is None:
            return self._whole(**given)
        carry, beside, steps = self._start(**given)
        done, stretch, steps = 0, 1, int(steps)
        while done < steps:
            last = min(done + stretch, steps)
            began = time.monotonic()
            ends = {"first": jnp.int32(done), "last": jnp.int32(last)}
            result, carry = jax.block_until_ready(
                self._stretch(**given, carry=carry, beside=beside, **ends)
            )
            each = (time.monotonic() - began) / (last - done)
            # The first stretch compiles; later ones are as long as the one before tells.
            stretch, done = (max(1, int(SECONDS / max(each, 1e-6))) if done else 1), last
            progress(done, steps)
        return result

    def programs(self) -> int:
        """How many programs have been compiled."""
        return sum(f._cache_size() for f in (self._whole, self._start, self._stretch))

    def _to_the_loop(self, **given: Any) -> tuple[Any, list[jax.Array], jax.Array]:
        """What the loop starts from, what it reads besides, and how many steps it has."""

        def reach(step: Step, carry: Any, steps: int) -> Any:
            # A weak type would be strong after the first stretch, and another program.
            carry = jax.tree.map(lambda x: jnp.asarray(x, x.dtype), carry)
            raise _Reached(carry, _Traced(step, carry, given).beside, steps)

        try:
            self._function(**given, loop=reach)
        except _Reached as reached:
            return reached.carry, reached.beside, jnp.int32(reached.steps)
        raise TypeError(f"{self._function.__qualname__} never called its loop")

    def _some_steps(
        self, carry: Any, beside: Any, first: jax.Array, last: jax.Array, **given: Any
    ) -> Any:
        """The function with only steps first to last - 1 of its loop: its result, the carry.

        What it computes before the loop, no step reads: the compiler leaves it out.
        """
        reached = carry

        def some(step: Step, carry: Any, steps: int) -> Any:
            nonlocal reached
            step = _Traced(step, reached, given).reading(beside)
            reached = jax.lax.fori_loop(first, last, step, reached)
            return reached

        return self._function(**given, loop=some), reached
