"""What fused attention brings on a TPU, by the compiled programs; no TPU is needed.

    python -m benchmarks.attention [--topology v5e:2x2] [--batch 8] [--sides 32]

One attention block of the paper's decoder (configs/paper/decoder.py) is compiled by libtpu for one
chip, forward alone and forward with backward, once with the reference and once with the kernel,
whether its size would be given to the kernel or not. Prints a table: temporary memory, as the
compiler reports it; the bytes between memory and core, read from the compiled program as the
planner does, and FLOPs, both of which the compiler does not know of a kernel. docs/performance.md
has what came out.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from configs.paper import decoder
from unclip_jax import stages
from unclip_jax.models import attention, fused_attention
from unclip_jax.models.decoder import DecoderConfig
from unclip_jax.models.unet import AttentionBlock
from unclip_jax.parallel import axes, flops, sharding
from unclip_jax.plan.chips import Topology
from unclip_jax.plan.measure import compiled

MIB = 2**20


def blocks(model: DecoderConfig) -> Iterator[tuple[int, int]]:
    """Side and channels of the decoder's attention blocks, largest first."""
    unet = model.unet
    for level, mult in enumerate(unet.channel_mults):
        if unet.attends(unet.feature_size(level)):
            yield unet.feature_size(level), unet.channels * mult


def traced(
    model: DecoderConfig, side: int, channels: int, batch: int, device: jax.Device, backward: bool
) -> jax.stages.Traced:
    """The program of one block on one chip; its loss is the sum of its squared results."""
    unet, tokens = model.unet, model.text.context_length + model.clip_tokens
    mesh = sharding.make_mesh(sharding.MeshConfig(), [device])
    where = sharding.replicated(mesh)
    block = AttentionBlock(unet)

    def shape(*sides: int, dtype: jnp.dtype = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, *sides), dtype, sharding=where)

    inputs = (
        shape(side, side, channels),
        shape(tokens, unet.context_dim, dtype=jnp.dtype(unet.dtype)),
        shape(tokens, dtype=jnp.bool_),
    )
    params = jax.eval_shape(block.init, jax.random.key(0), *inputs)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), params)

    def loss(params, x, context, mask):
        with axes.on(mesh):
            return (block.apply(params, x, context, mask).astype(jnp.float32) ** 2).sum()

    function = jax.grad(loss, (0, 1, 2)) if backward else loss
    return jax.jit(function).trace(params, *inputs)


def more_flops(model: DecoderConfig, side: int, channels: int, batch: int, backward: bool) -> int:
    """FLOPs that the kernel has more than the reference: of padding, and of scores made again."""
    queries, keys = side**2, side**2 + model.text.context_length + model.clip_tokens
    product = 2 * batch * channels  # of each query and key, over all heads
    padded = math.prod(
        math.ceil(n / fused_attention.block_length(n)) * fused_attention.block_length(n)
        for n in (queries, keys)
    )
    of_kernel, of_reference = (7, 6) if backward else (2, 2)
    return product * (of_kernel * padded - of_reference * queries * keys)


def main() -> None:
    """Compile all, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--batch", type=int, default=8, help="examples on the chip")
    parser.add_argument("--sides", type=int, nargs="*", help="feature sides; all by default")
    args = parser.parse_args()
    device = Topology.parse(args.topology).devices()[0]
    jax.config.update("jax_platforms", "cpu")
    model = stages.build(decoder.get_config()["stage"]).model
    fused_attention.LEAST = 1
    print("| block | pass | attention | temporary, MiB | moved, MiB | GFLOP |")
    print("|---|---|---|---|---|---|")
    for side, channels in blocks(model):
        if side not in (args.sides or [side]):
            continue
        for backward in (False, True):
            setting = model, side, channels, args.batch
            both = "forward and backward" if backward else "forward"
            for name in ("reference", "kernel"):
                chosen = "reference" if name == "reference" else "auto"
                with attention.implementation(chosen):
                    program = traced(*setting, device, backward)
                    needs = compiled(program.lower(), 1, {})
                if name == "reference":
                    count = flops.of_jaxpr(program.jaxpr.jaxpr)
                else:
                    count += more_flops(*setting, backward)
                figures = needs.temporary / MIB, needs.moved / MIB, count / 1e9
                print(
                    f"| {side}x{side}x{channels} | {both} | {name} |",
                    *(f"{figure:,.0f} |" for figure in figures),
                    flush=True,
                )


if __name__ == "__main__":
    main()
