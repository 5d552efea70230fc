"""Inception-v3 as the Fréchet Inception distance uses it: pictures to 2048 features.

The network of Szegedy et al. 2016 (arXiv 1512.00567), with the arithmetic of TensorFlow's graph of
December 2015, from which every published FID comes, and which pytorch-fid reproduces: pictures are
stretched to 299 px without smoothing, averages over 3x3 leave out the padding, and the last block
takes a maximum where others average.

The network is the table `BLOCKS`; its names are those that torchvision gave the layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.models.features.layers import ConvNorm, resize_bilinear

SIZE = 299  # px, of the pictures inside
FEATURES = 2048


class Step(NamedTuple):
    """One convolution: its name, features, kernel, stride, and padding."""

    name: str
    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"


class Branch(NamedTuple):
    """One way through a block.

    Attributes:
        pool: what comes first: "average" or "max" over 3x3, or "halve", a maximum with stride 2.
        steps: convolutions, one after the other.
        fork: convolutions side by side that end it, their results joined.
    """

    pool: str = ""
    steps: tuple[Step, ...] = ()
    fork: tuple[Step, ...] = ()


Block = tuple[Branch, ...]


def _chain(name: str, *steps: tuple, fork: tuple[Step, ...] = ()) -> Branch:
    """Convolutions name_1, name_2 and so on, each given by what a `Step` has after its name."""
    return Branch(
        steps=tuple(Step(f"{name}_{i}", *step) for i, step in enumerate(steps, 1)), fork=fork
    )


def _one(name: str, *step: Any, pool: str = "") -> Branch:
    """A single convolution."""
    return Branch(pool, (Step(name, *step),))


def _a(pooled: int) -> Block:
    """35 x 35: 1x1, 5x5 and twice 3x3; `pooled` features from the average."""
    return (
        _one("branch1x1", 64),
        _chain("branch5x5", (48,), (64, (5, 5))),
        _chain("branch3x3dbl", (64,), (96, (3, 3)), (96, (3, 3))),
        _one("branch_pool", pooled, pool="average"),
    )


def _c(width: int) -> Block:
    """17 x 17: 7x7 and twice 7x7 as rows and columns, `width` features inside."""
    row, column = (1, 7), (7, 1)
    twice = (width,), (width, column), (width, row), (width, column), (192, row)
    return (
        _one("branch1x1", 192),
        _chain("branch7x7", (width,), (width, row), (192, column)),
        _chain("branch7x7dbl", *twice),
        _one("branch_pool", 192, pool="average"),
    )


def _e(pool: str) -> Block:
    """8 x 8: 3x3 and twice 3x3, each ending in a row and a column side by side."""

    def fork(name: str) -> tuple[Step, ...]:
        return Step(f"{name}a", 384, (1, 3)), Step(f"{name}b", 384, (3, 1))

    return (
        _one("branch1x1", 320),
        _chain("branch3x3", (384,), fork=fork("branch3x3_2")),
        _chain("branch3x3dbl", (448,), (384, (3, 3)), fork=fork("branch3x3dbl_3")),
        _one("branch_pool", 192, pool=pool),
    )


_HALVING = ((3, 3), 2, "VALID")

# Before the blocks; a None is a maximum over 3x3 with stride 2.
STEM: tuple[Step | None, ...] = (
    Step("Conv2d_1a_3x3", 32, *_HALVING),
    Step("Conv2d_2a_3x3", 32, (3, 3), 1, "VALID"),
    Step("Conv2d_2b_3x3", 64, (3, 3)),
    None,
    Step("Conv2d_3b_1x1", 80),
    Step("Conv2d_4a_3x3", 192, (3, 3), 1, "VALID"),
    None,
)

BLOCKS: dict[str, Block] = {
    "Mixed_5b": _a(32),
    "Mixed_5c": _a(64),
    "Mixed_5d": _a(64),
    "Mixed_6a": (
        _one("branch3x3", 384, *_HALVING),
        _chain("branch3x3dbl", (64,), (96, (3, 3)), (96, *_HALVING)),
        Branch("halve"),
    ),
    "Mixed_6b": _c(128),
    "Mixed_6c": _c(160),
    "Mixed_6d": _c(160),
    "Mixed_6e": _c(192),
    "Mixed_7a": (
        _chain("branch3x3", (192,), (320, *_HALVING)),
        _chain("branch7x7x3", (192,), (192, (1, 7)), (192, (7, 1)), (192, *_HALVING)),
        Branch("halve"),
    ),
    "Mixed_7b": _e("average"),
    "Mixed_7c": _e("max"),
}


def layers() -> Iterator[tuple[str, ...]]:
    """The path of every convolution in the params."""
    for step in STEM:
        if step is not None:
            yield (step.name,)
    for name, block in BLOCKS.items():
        for branch in block:
            yield from ((name, step.name) for step in branch.steps + branch.fork)


def _pool(x: jax.Array, pool: str) -> jax.Array:
    match pool:
        case "average":
            return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)
        case "max":
            return nn.max_pool(x, (3, 3), padding="SAME")
        case "halve":
            return nn.max_pool(x, (3, 3), (2, 2))
        case _:
            return x


def _convolve(step: Step, x: jax.Array) -> jax.Array:
    return ConvNorm(step.features, step.kernel, step.stride, step.padding, name=step.name)(x)


class Mixed(nn.Module):
    """One block: its branches side by side, their results joined."""

    block: Block

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[b, h, w, c]` to `[b, h', w', c']`."""
        results = []
        for branch in self.block:
            y = _pool(x, branch.pool)
            for step in branch.steps:
                y = _convolve(step, y)
            results += [_convolve(step, y) for step in branch.fork] or [y]
        return jnp.concatenate(results, axis=-1)


class Inception(nn.Module):
    """Inception-v3 up to its last average; the logits are no part of it."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """uint8 `[b, h, w, 3]` of any size to features `[b, 2048]` float32."""
        x = resize_bilinear(images, SIZE) / 127.5 - 1.0
        for step in STEM:
            x = _pool(x, "halve") if step is None else _convolve(step, x)
        for name, block in BLOCKS.items():
            x = Mixed(block, name=name)(x)
        return x.mean(axis=(1, 2))
