"""Loops that a host can watch.

A sampler is one loop. Run whole, it is one compiled program that nobody sees into. Watched, it is
two: one that computes what the loop starts from and reads, and one that does any number of its
steps, called again and again. Between the calls the host reports how far it got, and may stop.
Nothing in any program calls the host, so all are kept in JAX's compilation cache, and none is
compiled again for stretches of another length.

Both programs are the sampler itself, traced with another `Loop`. What comes before the loop and is
worth computing once, such as the encoding of a condition, it says by `loop.once`:

    def walk(params, cond, x_T, *, loop=whole):
        encoded = loop.once(encode, params, cond)
        return loop(lambda n, x: x - denoise(params, x, n, encoded), x_T, 10)
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

Progress = Callable[[int, int], None]
"""`progress(done, steps)`, called on the host in order, at last with done = steps."""

SECONDS = 0.25  # about what a stretch takes, unless one step takes longer


class Loop:
    """The loop of a sampler: this one does every step at once."""

    def __call__(self, step: Step, carry: Any, steps: int) -> Any:
        """The carry after all steps."""
        return jax.lax.fori_loop(0, steps, step, carry)

    def once(self, compute: Callable[..., Any], *args: Any) -> Any:
        """`compute(*args)`, a pytree of arrays that steps read; however watched, computed once."""
        return compute(*args)


whole = Loop()


class _Begin(Loop):
    """Does no step, and keeps where the loop starts and what is computed once."""

    def __init__(self) -> None:
        self.computed: list[Any] = []
        self.carry, self.steps = None, None

    def __call__(self, step: Step, carry: Any, steps: int) -> Any:
        # A weak type would be strong after the first stretch, and another program.
        self.carry, self.steps = jax.tree.map(lambda x: jnp.asarray(x, x.dtype), carry), steps
        return carry

    def once(self, compute: Callable[..., Any], *args: Any) -> Any:
        self.computed.append(compute(*args))
        return self.computed[-1]


class _Stretch(Loop):
    """Does the steps first to last - 1 from a carry, and reads what was computed once."""

    def __init__(self, computed: list[Any], carry: Any, first: jax.Array, last: jax.Array) -> None:
        self._computed, self.carry, self._ends = iter(computed), carry, (first, last)

    def __call__(self, step: Step, carry: Any, steps: int) -> Any:
        self.carry = jax.lax.fori_loop(*self._ends, step, self.carry)
        return self.carry

    def once(self, compute: Callable[..., Any], *args: Any) -> Any:
        return next(self._computed)


class Watchable:
    """A compiled function that runs one loop, whole or watched.

    Called like the function, without `loop` and with a further argument `progress`: None runs the
    loop whole. An exception that progress raises ends the loop and comes through.
    """

    def __init__(self, function: Callable[..., Any], static: Iterable[str] = ()) -> None:
        """`function` takes its `Loop` as the keyword `loop` and calls it once.

        Args:
            function: as `jax.jit` takes it. What comes before its loop is computed again in every
                stretch where steps read it and `loop.once` does not hold it, and so is what comes
                after; both should be little.
            static: the names of its static arguments.
        """
        self._function, self._signature = function, inspect.signature(function)
        compiled = functools.partial(jax.jit, static_argnames=tuple(static))
        self._whole = compiled(functools.partial(function, loop=whole))
        self._begin, self._stretch = compiled(self._to_the_loop), compiled(self._some_steps)
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, progress: Progress | None = None, **kwargs: Any) -> Any:
        """What the function returns.

        A progress with an attribute `look` is shown what the function would return after the
        steps that are done: `progress.look(result)`, before each report.
        """
        look = getattr(progress, "look", None)
        given = self._signature.bind_partial(*args).arguments | kwargs
        if progress is None:
            return self._whole(**given)
        computed, carry, steps = self._begin(**given)
        done, stretch, steps = 0, 1, int(steps)
        while done < steps:
            last = min(done + stretch, steps)
            began = time.monotonic()
            result, carry = jax.block_until_ready(
                self._stretch(computed, carry, jnp.int32(done), jnp.int32(last), **given)
            )
            each = (time.monotonic() - began) / (last - done)
            # The first stretch compiles; later ones are as long as the one before tells.
            stretch, done = (max(1, int(SECONDS / max(each, 1e-6))) if done else 1), last
            if look is not None:
                look(result)
            progress(done, steps)
        return result

    def programs(self) -> int:
        """How many programs have been compiled."""
        return sum(f._cache_size() for f in (self._whole, self._begin, self._stretch))

    def _to_the_loop(self, **given: Any) -> tuple[list[Any], Any, jax.Array]:
        """What is computed once, what the loop starts from, and how many steps it has."""
        loop = _Begin()
        self._function(**given, loop=loop)
        if loop.steps is None:
            raise TypeError(f"{self._function.__qualname__} never called its loop")
        return loop.computed, loop.carry, jnp.int32(loop.steps)

    def _some_steps(
        self, computed: list[Any], carry: Any, first: jax.Array, last: jax.Array, /, **given: Any
    ) -> Any:
        """The function with only some steps of its loop: its result, and the carry."""
        loop = _Stretch(computed, carry, first, last)
        return self._function(**given, loop=loop), loop.carry
