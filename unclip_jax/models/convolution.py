"""The convolution of U-Nets and, on CPUs, a gradient of its kernel that is summed over strips.

XLA takes the gradient of a kernel as a convolution whose kernel is the whole image, at a third to
three quarters of the speed of its other convolutions on a CPU. Here images are cut into strips of
rows that stay in a core's cache. Only rows are then convolved: of every row, pixels are what a
matrix product sums over, and the columns of the kernel are as many products.
"""

from __future__ import annotations

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Initializer
from jax.sharding import Mesh, PartitionSpec

from unclip_jax.parallel import axes

Pads = tuple[tuple[int, int], tuple[int, int]]  # zeros above and below, left and right

SAME: Pads = ((1, 1), (1, 1))
NONE: Pads = ((0, 0), (0, 0))
LEAST_FLOPS = 2**25  # of a kernel's gradient on one device; less is left to XLA
STRIP_BYTES = 2**20  # of both inputs of a strip, at most: about a core's cache


class Conv(nn.Module):
    """A 3x3 convolution of images that keeps their sides; params are those of `flax.linen.Conv`.

    Attributes:
      features: output channels.
      dtype: compute dtype.
      kernel_init: what the kernel starts as.
    """

    features: int
    dtype: str = "float32"
    kernel_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[b, h, w, c]` to `[b, h, w, features]`."""
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        bias = bias.astype(self.dtype).reshape(1, 1, 1, -1)
        return self.convolve(x.astype(self.dtype), kernel) + bias

    def convolve(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """What is done with the kernel, which is in float32."""
        return convolve(x, kernel.astype(x.dtype))


def convolve(x: jax.Array, kernel: jax.Array, pads: Pads = SAME) -> jax.Array:
    """Convolve images, with zeros around them so that their sides stay.

    On a mesh of CPUs (`axes.on`), the kernel's gradient is `kernel_gradient` where that pays; there
    is then a first derivative in reverse mode, and no other.

    Args:
      x: `[b, h, w, c]`.
      kernel: `[i, j, c, f]` of the same dtype.
      pads: the zeros: along each axis one fewer than the kernel is long.

    Returns:
      `[b, h, w, f]` of the same dtype.
    """
    mesh = axes.current()
    if mesh is not None and strips_pay(mesh, x, kernel):
        return _by_strips(x, kernel, pads, mesh)
    return _convolve(x, kernel, pads)


def _convolve(x: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), pads, dimension_numbers=dims)


# ---------------------------------------------------------------- the kernel's gradient on CPUs


def strips_pay(mesh: Mesh, x: jax.Array, kernel: jax.Array) -> bool:
    """Whether `kernel_gradient` is taken for these arguments of `convolve`.

    On CPUs, in float32, for all but small images. It does not split features over a mesh.
    """
    cpu = mesh.devices.flat[0].platform == "cpu"
    flops = 2 * x.size * math.prod(kernel.shape) // x.shape[-1] // mesh.size
    whole = mesh.shape[axes.TENSOR] == 1
    return cpu and whole and x.dtype == jnp.float32 and flops >= LEAST_FLOPS


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _by_strips(x: jax.Array, kernel: jax.Array, pads: Pads, mesh: Mesh) -> jax.Array:
    return _convolve(x, kernel, pads)


def _forward(x: jax.Array, kernel: jax.Array, pads: Pads, mesh: Mesh) -> tuple[jax.Array, tuple]:
    return _convolve(x, kernel, pads), (x, kernel)


def _backward(pads: Pads, mesh: Mesh, inputs: tuple, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = inputs
    (to_x,) = jax.linear_transpose(lambda x: _convolve(x, kernel, pads), x)(y)
    return to_x, kernel_gradient(x, y, pads, mesh)


_by_strips.defvjp(_forward, _backward)


def kernel_gradient(x: jax.Array, y: jax.Array, pads: Pads, mesh: Mesh) -> jax.Array:
    """The gradient of a convolution's kernel; every device sums over its own rows of its images.

    Args:
      x: the input, `[b, h, w, c]`.
      y: the gradient of the output, `[b, h, w, f]`.
      pads: as `convolve` was given them; no more above or below than a device has rows.
      mesh: splits examples and rows, and no features.

    Returns:
      `[i, j, c, f]`, whole on every device.
    """
    place = axes.fitting(mesh, x.shape, ("batch", "height", None, None))
    examples, height = (_splitting(mesh, names) for names in place[:2])
    tall, wide = (1 + sum(pair) for pair in pads)

    def own(x: jax.Array, y: jax.Array) -> jax.Array:
        # One of both is copied and transposed, the smaller one. Where that is y, these are the same
        # sums for the kernel turned by half a circle, and it is turned back, which counts too.
        turning = tall * wide * x.shape[-1] * y.shape[-1]
        if x.size <= y.size + turning:
            total = _sum_of_strips(_with_edges(x, pads[0], height, mesh), y, pads)
        else:
            turned = (pads[0][::-1], pads[1][::-1])
            total = _sum_of_strips(_with_edges(y, turned[0], height, mesh), x, turned)
            total = total[::-1, ::-1].swapaxes(2, 3)
        return jax.lax.psum(total, examples + height) if examples + height else total

    return jax.shard_map(
        own, mesh=mesh, in_specs=(place, place), out_specs=PartitionSpec(), check_vma=False
    )(x, y)


def _splitting(mesh: Mesh, names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The axes of several devices among the names that a `PartitionSpec` has for an axis."""
    each = (names,) if isinstance(names, str) else names or ()
    return tuple(name for name in each if mesh.shape[name] > 1)


def _with_edges(
    x: jax.Array, edges: tuple[int, int], height: tuple[str, ...], mesh: Mesh
) -> jax.Array:
    """A device's rows of images with as many more above and below: the neighbours', or zeros.

    `height` names the axes of the mesh that split the rows.
    """
    above, below = edges
    if not height:
        return jnp.pad(x, ((0, 0), edges, (0, 0), (0, 0)))
    n, rows = math.prod(mesh.shape[name] for name in height), x.shape[1]
    down, up = [(i, i + 1) for i in range(n - 1)], [(i + 1, i) for i in range(n - 1)]
    first = jax.lax.ppermute(x[:, rows - above :], height, down)  # zeros where none sends
    last = jax.lax.ppermute(x[:, :below], height, up)
    return jnp.concatenate([first, x, last], axis=1)


def _sum_of_strips(x: jax.Array, y: jax.Array, pads: Pads) -> jax.Array:
    """The gradient of a kernel `[i, j, c, f]`, for all rows of x that a row of y sees.

    x is `[b, h + i - 1, w, c]`, with edges, and y `[b, h, w, f]`.
    """
    b, h, w, f = y.shape
    c = x.shape[-1]
    tall, wide = (1 + sum(pair) for pair in pads)
    n, rows = strip_size(b, h, w * (c + f) * y.dtype.itemsize)

    def strip(i: jax.Array) -> jax.Array:
        at = (i // (h // rows) * n, i % (h // rows) * rows, 0, 0)
        xs = jax.lax.dynamic_slice(x, at, (n, rows + tall - 1, w, c))
        ys = jax.lax.dynamic_slice(y, at, (n, rows, w, f))
        xs = jnp.pad(xs, ((0, 0), (0, 0), pads[1], (0, 0))).transpose(1, 3, 0, 2)
        xs = jax.lax.optimization_barrier(xs)  # transposed once, not for each column
        ys = ys.swapaxes(0, 1).reshape(rows, 1, n * w, f)
        columns = [xs[..., j : j + w].reshape(1, -1, c, n * w) for j in range(wide)]
        return jnp.concatenate([_convolve(x, ys, NONE) for x in columns]).swapaxes(0, 1)

    strips = b // n * (h // rows)
    if strips == 1:
        return strip(jnp.zeros((), jnp.int32))
    zeros = jnp.zeros((tall, wide, c, f), y.dtype)
    return jax.lax.fori_loop(0, strips, lambda i, total: total + strip(i), zeros)


def strip_size(b: int, h: int, row_bytes: int) -> tuple[int, int]:
    """How many examples a strip is of, and how many rows of each; they divide b and h.

    One row at least, and as many as `STRIP_BYTES` hold: several examples where these are whole.
    """
    rows = _largest_divisor(h, STRIP_BYTES // row_bytes)
    return _largest_divisor(b, STRIP_BYTES // (row_bytes * h)) if rows == h else 1, rows


def _largest_divisor(of: int, most: int) -> int:
    return max(n for n in range(1, of + 1) if of % n == 0 and (n <= most or n == 1))
