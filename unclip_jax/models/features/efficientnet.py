"""EfficientNet-Lite0 and -Lite2: small feature networks whose weights are pip packages.

EfficientNet (Tan & Le 2019, arXiv 1905.11946) without squeeze-and-excitation and with ReLU6, as
TensorFlow's "lite" family has it: 3.4 and 4.8 M weights without the logits' 1.3, 75.1 and 77.6 % of
ImageNet by its authors' count.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax

from unclip_jax.models.features.layers import ConvNorm, resize_bilinear

FEATURES = 1280
_STEM = 32
_MEAN, _SPAN = 127.0, 128.0  # what the lite family takes pixels less, and by


class Row(NamedTuple):
    """Blocks in a row; the first of them has the stride."""

    repeats: int
    kernel: int
    stride: int
    expand: int
    features: int


LITE0 = (
    Row(1, 3, 1, 1, 16),
    Row(2, 3, 2, 6, 24),
    Row(2, 5, 2, 6, 40),
    Row(3, 3, 2, 6, 80),
    Row(3, 5, 1, 6, 112),
    Row(4, 5, 2, 6, 192),
    Row(1, 3, 1, 6, 320),
)
# A tenth wider, in whole eights, and a fifth deeper, but for the first and last rows.
LITE2 = (
    Row(1, 3, 1, 1, 16),
    Row(3, 3, 2, 6, 24),
    Row(3, 5, 2, 6, 48),
    Row(4, 3, 2, 6, 88),
    Row(4, 5, 1, 6, 120),
    Row(5, 5, 2, 6, 208),
    Row(1, 3, 1, 6, 352),
)


def blocks(rows: tuple[Row, ...]) -> Iterator[Row]:
    """Every block by itself, a `Row` of one."""
    for row in rows:
        for i in range(row.repeats):
            yield row._replace(repeats=1, stride=row.stride if i == 0 else 1)


class InvertedResidual(nn.Module):
    """Widen, convolve each feature by itself, narrow; added to the input where it has the shape."""

    row: Row

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[b, h, w, c]` to `[b, h / stride, w / stride, features]`."""
        row, wide = self.row, x.shape[-1] * self.row.expand
        norm = partial(ConvNorm, wide, activation=nn.relu6)
        h = x if row.expand == 1 else norm(name="expand")(x)
        h = norm((row.kernel, row.kernel), row.stride, depthwise=True, name="depthwise")(h)
        h = ConvNorm(row.features, activation=None, name="project")(h)
        return x + h if h.shape == x.shape else h


class EfficientNetLite0(nn.Module):
    """The network up to its last average; the logits are no part of it.

    Attributes:
        size: side, in pixels, to which it scales pictures, by default as in training. Features of
            another size are other features.
        rows: its blocks.
    """

    size: int = 224
    rows: tuple[Row, ...] = LITE0

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """uint8 `[b, h, w, 3]` of any size to features `[b, 1280]` float32."""
        x = (resize_bilinear(images, self.size) - _MEAN) / _SPAN
        x = ConvNorm(_STEM, (3, 3), 2, activation=nn.relu6, name="stem")(x)
        for i, row in enumerate(blocks(self.rows)):
            x = InvertedResidual(row, name=f"block_{i}")(x)
        x = ConvNorm(FEATURES, activation=nn.relu6, name="head")(x)
        return x.mean(axis=(1, 2))


class EfficientNetLite2(EfficientNetLite0):
    """The same, wider and deeper."""

    size: int = 260
    rows: tuple[Row, ...] = LITE2
