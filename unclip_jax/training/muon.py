"""Muon (Jordan et al. 2024): a matrix steps along the polar factor of its averaged gradient."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from unclip_jax.parallel.axes import STACKED

Params = dict[str, Any]


class MatrixAxes(NamedTuple):
    """Which axes of a kernel are a matrix's rows and columns; the others count matrices."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


# The kernels that are matrices between features, by the last names on their path and their rank.
# In a scanned stack the layer axis comes before them all. The three of "qkv" are three matrices.
MATRICES: dict[tuple[str, int], MatrixAxes] = {
    ("qkv/kernel", 4): MatrixAxes((0,), (2, 3)),
    ("context_kv/kernel", 4): MatrixAxes((0,), (2, 3)),
    ("key_value/kernel", 4): MatrixAxes((0,), (2, 3)),
    ("query/kernel", 3): MatrixAxes((0,), (1, 2)),
    ("out/kernel", 3): MatrixAxes((0, 1), (2,)),
    ("conv_1/kernel", 4): MatrixAxes((0, 1, 2), (3,)),
    ("conv_2/kernel", 4): MatrixAxes((0, 1, 2), (3,)),
    ("kernel", 2): MatrixAxes((0,), (1,)),
}

# The quintic a x + b x^3 + c x^5 that, applied to a singular value five times, brings it near 1
# from anywhere in (0.002, 1] (Jordan et al. 2024), and how many of the five go by one Gram matrix.
QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = (3, 2)

# The root mean square of a step before the learning rate: what AdamW's usually have.
STEP_RMS = 0.2


def matrix_axes(params: Params) -> Params:
    """For each param its axes as a matrix, see `MATRICES`; None for what is no matrix.

    Tables of embeddings, biases, norms and adapters are none, nor are the convolutions that pixels
    enter or leave by, whose input or output axes are no features.
    """

    def axes(path: tuple[Any, ...], leaf: Any) -> MatrixAxes | None:
        names = [key.key for key in path]
        layers = int(STACKED in names)
        for name in ("/".join(names[-2:]), names[-1]):
            found = MATRICES.get((name, leaf.ndim - layers))
            if found is not None:
                return MatrixAxes(*(tuple(a + layers for a in part) for part in found))
        return None

    return jax.tree_util.tree_map_with_path(axes, params)


def scale_by_muon(momentum: float) -> optax.GradientTransformation:
    """Steps along the polar factors of gradients averaged with Nesterov's momentum.

    Their size is that of Liu et al. 2025 (arXiv 2502.16982): a root mean square of about 0.2 for
    a matrix of any shape, so that one learning rate serves these steps and Adam's.
    """

    def step(update: jax.Array, axes: MatrixAxes) -> jax.Array:
        matrices, back = _as_matrices(update, axes)
        rms = STEP_RMS * math.sqrt(max(matrices.shape[-2:]))
        return back(polar_factor(matrices) * rms)

    return optax.chain(
        optax.trace(momentum, nesterov=True, accumulator_dtype=jnp.float32),
        optax.stateless(lambda updates, _: jax.tree.map(step, updates, matrix_axes(updates))),
    )


def polar_factor(matrices: jax.Array) -> jax.Array:
    """[..., m, n] to about U V^T of each matrix's U S V^T: singular values between 0.6 and 1.25.

    A Newton-Schulz step takes X to X q(X^T X), with q a polynomial. All these factors commute, so
    steps are taken on the smaller of the Gram matrices alone, [n, n] for m >= n, and their product
    multiplies X once: for the kernel of a 3 x 3 convolution that is half of the work. A small
    singular value s drowns in a Gram matrix, where its rounding against s^2 grows 12 times with
    each step, and five steps on one lose two digits more than steps on X do; so the last two
    begin from X again. Squaring needs float32's precision on every platform.
    """
    tall = matrices.shape[-2] >= matrices.shape[-1]
    x = matrices if tall else jnp.swapaxes(matrices, -1, -2)
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-8)
    for steps in ITERATIONS:
        x = _newton_schulz(x, steps)
    return x if tall else jnp.swapaxes(x, -1, -2)


def _newton_schulz(x: jax.Array, steps: int) -> jax.Array:
    """So many steps of [..., m, n], m >= n, by the Gram matrix of where it stands."""
    a, b, c = QUINTIC
    gram = _dot(jnp.swapaxes(x, -1, -2), x)
    identity = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
    product = identity
    for i in range(steps):
        q = a * identity + b * gram + c * _dot(gram, gram)
        product = _dot(product, q) if i else q
        if i < steps - 1:
            gram = _dot(_dot(gram, q), q)
    return _dot(x, product)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _as_matrices(kernel: jax.Array, axes: MatrixAxes) -> tuple[jax.Array, Any]:
    """A kernel as [matrices, inputs, outputs], and the way back."""
    rest = tuple(a for a in range(kernel.ndim) if a not in axes.inputs + axes.outputs)
    order = rest + axes.inputs + axes.outputs
    moved = kernel.transpose(order)
    size = lambda part: math.prod(kernel.shape[a] for a in part)  # noqa: E731
    matrices = moved.reshape(size(rest), size(axes.inputs), size(axes.outputs))

    def back(x: jax.Array) -> jax.Array:
        return x.reshape(moved.shape).transpose([order.index(a) for a in range(kernel.ndim)])

    return matrices, back
