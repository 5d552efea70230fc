"""How the tests compile: without most optimisations (conftest.py), but for what runs long."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def optimised() -> Iterator[None]:
    """Compile as users do: where much is computed, or the last digits of many steps compared."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
