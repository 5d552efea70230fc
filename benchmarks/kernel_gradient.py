"""What the gradient of a convolution's kernel costs on one core, as XLA has it and by strips.

    python -m benchmarks.kernel_gradient [--rounds 9]

At the shapes that a core meets in the benchmark's networks (benchmarks/peers/sizes.py), in float32,
with freed memory kept as train.py keeps it. Both are called in turn; the table has medians, and the
forward pass's speed beside theirs. Run it on a machine that does nothing else. docs/performance.md
has what came out.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before JAX counts the cores

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.models.convolution import SAME, Pads, convolve, kernel_gradient
from unclip_jax.parallel import sharding
from unclip_jax.parallel.cpu import memory as host_memory

DOUBLING: Pads = ((1, 0), (0, 1))  # one of the four 2x2 kernels of a doubled image
# Images, height, width, channels, features.
SHAPES = (
    (1, 128, 256, 64, 64, SAME), (1, 128, 256, 96, 32, SAME), (1, 128, 256, 32, 32, SAME),
    (1, 64, 128, 160, 64, SAME), (1, 64, 128, 64, 64, SAME), (1, 64, 128, 64, 64, DOUBLING),
    (2, 64, 64, 64, 64, SAME), (2, 32, 32, 128, 128, SAME), (2, 32, 32, 128, 128, DOUBLING),
    (2, 16, 16, 192, 192, SAME), (2, 8, 8, 256, 256, SAME), (1, 128, 256, 32, 3, SAME),
)  # fmt: skip


def by_xla(x: jax.Array, y: jax.Array, pads: Pads) -> jax.Array:
    """As automatic differentiation has it."""
    shape = (1 + sum(pads[0]), 1 + sum(pads[1]), x.shape[-1], y.shape[-1])
    return jax.linear_transpose(lambda kernel: convolve(x, kernel, pads), jnp.zeros(shape))(y)[0]


def main() -> None:
    """Print a line for every shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    host_memory.keep_freed()
    mesh, rng = sharding.make_mesh(devices=jax.devices()[:1]), np.random.default_rng(0)
    print(
        "| image | kernel | forward, GFLOP/s | XLA, ms | GFLOP/s | strips, ms | GFLOP/s | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for b, h, w, c, f, pads in SHAPES:
        draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))  # noqa: E731
        x, y = draw(b, h, w, c), draw(b, h, w, f)
        kernel = draw(1 + sum(pads[0]), 1 + sum(pads[1]), c, f)
        programs = [
            jax.jit(lambda x, y, k, pads=pads: convolve(x, k, pads)),
            jax.jit(lambda x, y, k, pads=pads: by_xla(x, y, pads)),
            jax.jit(lambda x, y, k, pads=pads: kernel_gradient(x, y, pads, mesh)),
        ]
        seconds = np.zeros((rounds + 3, 3))
        for row in seconds:
            for i, program in enumerate(programs):
                start = time.perf_counter()
                jax.block_until_ready(program(x, y, kernel))
                row[i] = time.perf_counter() - start
        seconds = seconds[3:]  # compilation, and memory that is new
        flops = 2 * kernel.size * b * h * w
        forward, xla, strips = (statistics.median(column) for column in seconds.T)
        print(
            f"| {b}x{h}x{w}x{c} | {kernel.shape[0]}x{kernel.shape[1]}x{c}x{f} |"
            f" {flops / forward / 1e9:.0f} | {xla * 1e3:.1f} | {flops / xla / 1e9:.0f} |"
            f" {strips * 1e3:.1f} | {flops / strips / 1e9:.0f} |"
            f" {statistics.median(seconds[:, 2] / seconds[:, 1]):.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
