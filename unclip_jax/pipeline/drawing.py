"""What every way to draw shares: keys, batches, progress, and one compiled program a stage."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.common import checks
from unclip_jax.common.files import replacing
from unclip_jax.diffusion import states
from unclip_jax.diffusion.progress import Watchable
from unclip_jax.errors import wrong
from unclip_jax.parallel import axes, shares

# Called as progress(stage, done, steps), in order and at last with done = steps. What it raises
# ends the sampling.
Progress = Callable[[str, int, int], None]

# Which batch of how many is drawn, from 1: for whoever is told of progress, and of nothing else.
BATCH: contextvars.ContextVar[tuple[int, int]] = contextvars.ContextVar("batch", default=(1, 1))

# One key per example and purpose: each stage folds its own number into the example's key.
PRIOR, DECODER, UPSAMPLER = 0, 1, 2
NEGATIVE = 2**20  # folded in before the prior draws of a negative prompt; no upsampler's


@functools.partial(Watchable, static=("stage", "mesh"))
def sample_stage(stage, params, keys, cond, mesh=None, negative=None, *, loop, **settings):
    """One compiled program per stage, batch size, mesh, with and without negative prompts."""
    if negative is not None:
        settings["null"] = stage.null(params, *negative)
    # What an autoencoder makes of latents takes long, and would be computed after every stretch.
    sample = stage.sample if stage.autoencoder is None else stage.draw
    with axes.on(mesh):
        return sample(params, keys, cond, loop=loop, **settings)


@functools.partial(jax.jit, static_argnames=("stage", "mesh"))
def x_0_of(stage, params, images, mesh=None):
    """The latents of pictures: one compiled program per stage, shape and mesh."""
    with axes.on(mesh):
        return stage.x_0_of(params, images)


@functools.partial(jax.jit, static_argnames=("stage", "mesh"))
def images_of(stage, params, x_0, mesh=None):
    """The pictures of latents, likewise."""
    with axes.on(mesh):
        return stage.images_of(params, x_0)


def named(progress: Progress | None, stage: str) -> Callable[[int, int], None] | None:
    """Progress of one stage as that of the whole; `look`, where it has one, likewise."""
    report = progress and functools.partial(progress, stage)
    if look := getattr(progress, "look", None):
        report.look = functools.partial(look, stage)
    return report


def stage_keys(keys: jax.Array, purpose: int) -> jax.Array:
    """The keys [b] that a stage draws with."""
    return jax.vmap(lambda key: jax.random.fold_in(key, purpose))(keys)


def numbered(
    key: jax.Array | Sequence[jax.Array],
    rows: int,
    num: int | Sequence[int] = 1,
    first: int | Sequence[int] = 0,
) -> tuple[jax.Array, np.ndarray, np.ndarray]:
    """The samples that are asked for of each of `rows` prompts, those of one after another's.

    Args:
        key: one for all prompts, or one for each. Sample i of a prompt draws from fold_in(key, i).
        rows: how many prompts there are.
        num: samples of a prompt: one number for all, or one for each, of which some may be 0.
        first: the number i of a prompt's first sample, likewise.

    Returns:
        For n samples their typed keys [n], whose prompt's each is [n], and its number i [n].

    Raises:
        UserError: no samples at all, or not as many numbers or keys as prompts.
    """
    nums, firsts = _for_each("num", num, rows, 1), _for_each("first", first, rows, 0)
    if not sum(nums):
        raise wrong("num", num, "at least one sample in all")
    keys = states.typed(jnp.stack(key) if isinstance(key, list | tuple) else key)
    if keys.shape not in ((), (rows,)):
        raise wrong("key's shape", keys.shape, f"one key for all, or one for each of {rows}")
    numbers = np.concatenate([np.arange(i, i + n) for i, n in zip(firsts, nums, strict=True)])
    if numbers.max() >= 2**31:
        raise wrong("first", first, "numbers of samples below 2^31")
    whose = np.repeat(np.arange(rows), nums)
    keys = jnp.broadcast_to(keys, (rows,))[whose]
    return jax.vmap(jax.random.fold_in)(keys, jnp.asarray(numbers, jnp.int32)), whose, numbers


def _for_each(field: str, value: int | Sequence[int], rows: int, least: int) -> list[int]:
    """A whole number for each row, of one for all, at least `least`, or one for each, 0 or more."""
    if np.ndim(value) == 0:
        return [checks.count(field, value, least)] * rows
    if len(value) != rows:
        raise wrong(f"how many values of {field}", len(value), f"one for all or {rows}, one each")
    return [checks.count(f"{field}[{i}]", one, 0) for i, one in enumerate(value)]


def in_batches(total: int, batch_size: int, make: Callable[[np.ndarray], jax.Array]) -> np.ndarray:
    """`make(rows)` of one batch of row numbers after the other, joined.

    Where there are several processes each makes its own batches, and all get the whole. Batches
    that `keeping` has are not made again.
    """
    size = min(checks.count("batch_size", batch_size), total)
    made, before, kept = [], BATCH.get(), KEPT.get() or Kept()
    call = kept.call()
    mine = list(shares.own(batches(total, size)))
    try:
        for rows, _ in mine:
            BATCH.set((len(made) + 1, len(mine)))
            found = kept.read(call, rows[0])
            if found is None:
                found = (np.asarray(make(rows)),)
                kept.write(call, rows[0], found)
            made += found
    finally:
        BATCH.set(before)
    return shares.joined(made)[:total]


class Kept:
    """What was drawn, batch by batch, in a folder: a run that is killed goes on from it."""

    def __init__(self, folder: Path | None = None, what: Any = None) -> None:
        """Keep batches of which `what`, JSON-able, says all; none without a folder."""
        name = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()
        self._folder, self._calls = folder and folder / name[:16], 0

    def call(self) -> int:
        """The number of a set of batches; the same sets must come in the same order each time."""
        self._calls += 1
        return self._calls

    def _path(self, call: int, first: int) -> Path:
        return self._folder / f"{call:04d}-{first:08d}.npz"

    def read(self, call: int, first: int) -> tuple[np.ndarray, ...] | None:
        """The arrays of the batch that begins with row `first`, if it was kept."""
        if self._folder is not None:
            lost = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
            with contextlib.suppress(*lost), self._path(call, first).open("rb") as file:
                found = np.load(file)
                return tuple(found[f"arr_{i}"] for i in range(len(found.files)))
        return None

    def write(self, call: int, first: int, arrays: tuple[np.ndarray, ...]) -> None:
        """Keep the arrays of a batch."""
        if self._folder is not None:
            with replacing(self._path(call, first)) as path, path.open("wb") as file:
                np.savez(file, *arrays)

    def forget(self) -> None:
        """Remove what was kept."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


KEPT: contextvars.ContextVar[Kept | None] = contextvars.ContextVar("kept", default=None)


@contextlib.contextmanager
def keeping(kept: Kept) -> Iterator[None]:
    """While this is in force, every batch is kept, and those that are there are not drawn."""
    token = KEPT.set(kept)
    try:
        yield
    finally:
        KEPT.reset(token)


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
