"""What every way to draw shares: keys, batches, progress, and one compiled program a stage."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from unclip_jax.common import checks
from unclip_jax.diffusion.progress import Watchable
from unclip_jax.errors import wrong
from unclip_jax.parallel import axes

# Called as progress(stage, done, steps), in order and at last with done = steps. What it raises
# ends the sampling.
Progress = Callable[[str, int, int], None]

# Which batch of how many is drawn, from 1: for whoever is told of progress, and of nothing else.
BATCH: contextvars.ContextVar[tuple[int, int]] = contextvars.ContextVar("batch", default=(1, 1))

# One key per example and purpose: each stage folds its own number into the example's key.
PRIOR, DECODER, UPSAMPLER = 0, 1, 2


@functools.partial(Watchable, static=("stage", "mesh"))
def sample_stage(stage, params, keys, cond, mesh=None, negative=None, *, loop, **settings):
    """One compiled program per stage, batch size, mesh, with and without negative prompts."""
    if negative is not None:
        settings["null"] = stage.null(params, *negative)
    with axes.on(mesh):
        return stage.sample(params, keys, cond, loop=loop, **settings)


def named(progress: Progress | None, stage: str) -> Callable[[int, int], None] | None:
    """Progress of one stage as that of the whole."""
    return progress and functools.partial(progress, stage)


def stage_keys(keys: jax.Array, purpose: int) -> jax.Array:
    """The keys [b] that a stage draws with."""
    return jax.vmap(lambda key: jax.random.fold_in(key, purpose))(keys)


def in_batches(total: int, batch_size: int, make: Callable[[np.ndarray], jax.Array]) -> np.ndarray:
    """`make(rows)` of one batch of row numbers after the other, joined."""
    size = min(checks.count("batch_size", batch_size), total)
    made, before = [], BATCH.get()
    try:
        for rows, _ in batches(total, size):
            BATCH.set((len(made) + 1, -(-total // size)))
            made.append(np.asarray(make(rows)))
    finally:
        BATCH.set(before)
    return np.concatenate(made)[:total]


def batches(total: int, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Row numbers [size] of each batch, and how many of them count.

    The last batch is filled up with its first row, so no second program is compiled for its size.
    """
    for start in range(0, total, size):
        rows = np.arange(start, start + size)
        yield np.where(rows < total, rows, start), min(size, total - start)


def check_prompts(prompts: Sequence[str]) -> None:
    """Raise UserError unless `prompts` is a list of captions with something in each."""
    if isinstance(prompts, str):
        raise wrong("prompts", prompts, "a list", f"write [{prompts!r}]")
    if not prompts:
        raise wrong("prompts", prompts, "at least one caption")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise wrong(f"prompts[{i}]", prompt, "a caption", "write what to draw")
