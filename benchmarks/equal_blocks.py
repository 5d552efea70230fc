"""Whether scanning a U-Net's equal residual blocks would make it cheaper to compile for a TPU.

    python -m benchmarks.equal_blocks --topology v5e:2x2       no TPU is needed

So many equal residual blocks one after another, forward and backward with their recomputation, in
bfloat16 on one chip: unrolled, as `models/unet.py` has them, and scanned over their parameters,
which are stacked as the step begins, so that checkpoints stay as they are. docs/pods.md has what
came out.
"""

from __future__ import annotations

import argparse
import time

import jax
import jax.numpy as jnp

from unclip_jax.models.layers import remat
from unclip_jax.models.unet import ResBlock, UNetConfig
from unclip_jax.plan.chips import Topology
from unclip_jax.plan.measure import QUICK, compiled


def chain(block: ResBlock, scanned: bool):
    """The blocks' loss, of a list of params, an image and an embedding."""

    def loss(params: list, x: jax.Array, emb: jax.Array) -> jax.Array:
        def apply(x: jax.Array, own: dict) -> tuple[jax.Array, None]:
            return block.apply({"params": own}, x, emb), None

        if scanned:
            x, _ = jax.lax.scan(apply, x, jax.tree.map(lambda *p: jnp.stack(p), *params))
        else:
            for own in params:
                x, _ = apply(x, own)
        return x.astype(jnp.float32).sum()

    return jax.grad(loss, argnums=(0, 1, 2))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2, help="images on a chip")
    parser.add_argument("--blocks", type=int, nargs="*", default=[1, 2, 3])
    args = parser.parse_args()
    where = jax.sharding.SingleDeviceSharding(Topology.parse(args.topology).devices()[0])
    jax.config.update("jax_platforms", "cpu")

    def place(tree):
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), tree)

    config = UNetConfig(channels=args.channels, attention_sizes=(), dtype="bfloat16")
    block = remat(ResBlock, "full")(config, args.channels)
    x = jax.ShapeDtypeStruct((args.batch, args.side, args.side, args.channels), jnp.bfloat16)
    emb = jax.ShapeDtypeStruct((args.batch, 4 * args.channels), jnp.bfloat16)
    params = jax.eval_shape(block.init, jax.random.key(0), x, emb)["params"]
    print("| blocks | way | compiles in, s | temporary, MiB | moved, MiB |\n|---|---|---|---|---|")
    for count in args.blocks:
        for way in ("unrolled", "scanned"):
            step = jax.jit(chain(block, scanned=way == "scanned"))
            lowered = step.lower(*place(([params] * count, x, emb)))
            start = time.perf_counter()
            needs = compiled(lowered, 1, QUICK)
            print(
                f"| {count} | {way} | {time.perf_counter() - start:.0f} |"
                f" {needs.temporary / 2**20:,.0f} | {needs.moved / 2**20:,.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
