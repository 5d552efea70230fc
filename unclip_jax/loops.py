"""Loops that a host can watch.

A sampler is one loop. Run whole, it is one compiled program that nobody sees into. Watched, it is
a program that does any number of the loop's steps, called again and again: between the calls the
host reports how far it got, and may stop. Nothing in either program calls the host, so both are
kept in JAX's compilation cache, and neither is compiled again for another length of stretches.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

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
    """The function got to its loop; `carry` is what the loop starts from."""

    def __init__(self, carry: Any, steps: int) -> None:
        super().__init__()
        self.carry, self.steps = carry, steps


class Watchable:
    """A compiled function that runs one loop, whole or watched.

    Called like the function, without `loop` and with a further argument `progress`: None runs the
    loop whole. An exception that progress raises ends the loop and comes through.
    """

    def __init__(self, function: Callable[..., Any], static: Iterable[str] = ()) -> None:
        """`function` takes its `Loop` as the keyword `loop` and calls it once.

        Args:
            function: as `jax.jit` takes it. What comes before and after its loop is computed
                again in every stretch, so it should be little beside the loop.
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
        carry, steps = self._start(**given)
        done, stretch, steps = 0, 1, int(steps)
        while done < steps:
            last = min(done + stretch, steps)
            began = time.monotonic()
            result, carry = jax.block_until_ready(
                self._stretch(**given, carry=carry, first=jnp.int32(done), last=jnp.int32(last))
            )
            each = (time.monotonic() - began) / (last - done)
            # The first stretch compiles; later ones are as long as the one before tells.
            stretch, done = (max(1, int(SECONDS / max(each, 1e-6))) if done else 1), last
            progress(done, steps)
        return result

    def programs(self) -> int:
        """How many programs have been compiled."""
        return sum(f._cache_size() for f in (self._whole, self._start, self._stretch))

    def _to_the_loop(self, **given: Any) -> tuple[Any, jax.Array]:
        """What the loop starts from, and how many steps it has."""

        def reach(step: Step, carry: Any, steps: int) -> Any:
            # A weak type would be strong after the first stretch, and another program.
            raise _Reached(jax.tree.map(lambda x: jnp.asarray(x, x.dtype), carry), steps)

        try:
            self._function(**given, loop=reach)
        except _Reached as reached:
            return reached.carry, jnp.int32(reached.steps)
        raise TypeError(f"{self._function.__qualname__} never called its loop")

    def _some_steps(self, carry: Any, first: jax.Array, last: jax.Array, **given: Any) -> Any:
        """The function with only steps first to last - 1 of its loop: its result, the carry."""
        reached = carry

        def some(step: Step, carry: Any, steps: int) -> Any:
            nonlocal reached
            reached = jax.lax.fori_loop(first, last, step, reached)
            return reached

        return self._function(**given, loop=some), reached
