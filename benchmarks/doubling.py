"""What is saved by never making the doubled image that a convolution reads.

    python -m benchmarks.doubling [--batch 1 4]           times, on this machine
    python -m benchmarks.doubling --topology v5e:2x2      compiled for a TPU; none is needed

Doubling by nearest neighbours and a 3x3 convolution, against `resample.convolve_doubled`, forward
and for both gradients. Times are the least of `--rounds` calls taken in turn, so run it on a
machine that does nothing else. For a TPU the bytes between memory and core are read from the
compiled program as the planner does, of one chip, in bfloat16. docs/performance.md has what came
out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.models.resample import convolve_doubled, double
from unclip_jax.parallel import flops
from unclip_jax.plan.chips import Topology
from unclip_jax.plan.measure import compiled

# Side before doubling, and channels: the benchmark's networks (benchmarks/peers/sizes.py), and the
# paper's decoder and first upsampler.
SMALL = ((128, 64), (64, 96), (32, 128), (16, 192), (8, 256))
PAPER = ((32, 1024), (8, 2048), (128, 384))


def doubled_first(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """As it is usually done."""
    dims = ("NHWC", "HWIO", "NHWC")
    kernel = kernel.astype(x.dtype)
    return jax.lax.conv_general_dilated(double(x), kernel, (1, 1), "SAME", dimension_numbers=dims)


def passes() -> Iterator[tuple[str, str, Callable]]:
    """Pass, way, and the function of image, kernel and the result's gradient."""
    for way, function in (("doubled first", doubled_first), ("folded", convolve_doubled)):
        yield "forward", way, lambda x, k, pull, f=function: f(x, k)
        yield "gradients", way, lambda x, k, pull, f=function: jax.vjp(f, x, k)[1](pull)


def shapes(batch: int, side: int, channels: int, dtype: str) -> list[jax.ShapeDtypeStruct]:
    """Image, kernel and the result's gradient."""
    image = (batch, side, side, channels), (batch, 2 * side, 2 * side, channels)
    kernel = jax.ShapeDtypeStruct((3, 3, channels, channels), jnp.float32)
    x, pull = (jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in image)
    return [x, kernel, pull]


def time_all(batches: list[int], rounds: int) -> None:
    """Print a line for every shape and pass: both times, and their ratio."""
    print("| image | batch | pass | doubled first, ms | folded, ms | ratio |")
    print("|---|---|---|---|---|---|")
    rng = np.random.default_rng(0)
    for batch in batches:
        for side, channels in SMALL:
            given = [
                jnp.asarray(rng.standard_normal(s.shape, np.float32))
                for s in shapes(batch, side, channels, "float32")
            ]
            least = {}
            programs = {(p, way): jax.jit(f).lower(*given).compile() for p, way, f in passes()}
            for _ in range(rounds + 1):  # the first is not counted
                for key, program in programs.items():
                    start = time.perf_counter()
                    jax.block_until_ready(program(*given))
                    least.setdefault(key, []).append(time.perf_counter() - start)
            for name in ("forward", "gradients"):
                first, folded = (min(least[name, way][1:]) for way in ("doubled first", "folded"))
                print(
                    f"| {side}x{side}x{channels} | {batch} | {name} | {first * 1e3:.1f} |"
                    f" {folded * 1e3:.1f} | {folded / first:.2f} |",
                    flush=True,
                )


def compile_all(topology: str, batch: int) -> None:
    """Print a line for every shape, pass and way, as compiled for one chip."""
    where = jax.sharding.SingleDeviceSharding(Topology.parse(topology).devices()[0])
    jax.config.update("jax_platforms", "cpu")
    print("| image | pass | way | temporary, MiB | moved, MiB | GFLOP |")
    print("|---|---|---|---|---|---|")
    for side, channels in PAPER:
        given = [
            jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where)
            for s in shapes(batch, side, channels, "bfloat16")
        ]
        for name, way, function in passes():
            needs = compiled(jax.jit(function).lower(*given), 1, {})
            print(
                f"| {side}x{side}x{channels} | {name} | {way} | {needs.temporary / 2**20:,.0f} |"
                f" {needs.moved / 2**20:,.0f} | {flops.count(function, *given) / 1e9:,.0f} |",
                flush=True,
            )


def main() -> None:
    """Time here, or compile for a TPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 4], help="images at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--topology", help="compile for this TPU instead, with the first batch")
    args = parser.parse_args()
    if args.topology:
        compile_all(args.topology, args.batch[0])
    else:
        time_all(args.batch, args.rounds)


if __name__ == "__main__":
    main()
