"""Kandinsky 2.2 at full size with random weights: one of its networks, one step on this device.

    python benchmarks/kandinsky.py prior|clip_text|clip_image
    python benchmarks/kandinsky.py unet|encode|decode [--height 512] [--width 512] [--bands 1]

Weights and computing are in bfloat16, of one example: one denoising step of the prior or U-Net
without guidance, one pass of a tower of CLIP or of either half of MoVQ. It prints seconds on the
clock and of all cores, and the peak of its process's memory. What it measured is in
docs/kandinsky.md.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.models import Clip, Decoder, MoVQ, Prior, presets

# All weights repeat these.
BLOCK = (0.02 * np.random.default_rng(0).standard_normal(2**20)).astype(jnp.bfloat16)


class Case(NamedTuple):
    """A network, what it takes, the method that is stepped, and what its params are made by."""

    network: nn.Module
    inputs: tuple[Any, ...]
    method: str | None = None
    first: tuple[Any, ...] | None = None  # inputs of __call__, where `method` makes half of them


def normal(*shape: int) -> jax.Array:
    """Noise of a shape."""
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape, np.float32))


def prior(args: argparse.Namespace) -> Case:
    """z_i at one timestep, of a caption of 77 tokens."""
    c = replace(presets.KANDINSKY_PRIOR, dtype="bfloat16")
    z, t, words = normal(1, c.embed_dim), jnp.array([500]), normal(1, 77, c.text_width)
    return Case(Prior(c), (z, t, z, words, jnp.ones((1, 77), bool)))


def unet(args: argparse.Namespace) -> Case:
    """Latents at one timestep."""
    c = presets.KANDINSKY_DECODER
    c = replace(c, unet=replace(c.unet, dtype="bfloat16"))
    cond = {"z_i": normal(1, c.embed_dim), "z_i_mask": jnp.ones(1, bool)}
    x_t = normal(1, args.height // 8, args.width // 8, c.x_channels)
    return Case(Decoder(c), (x_t, jnp.array([500]), cond))


def movq(args: argparse.Namespace) -> Case:
    """A picture to latents, or latents to a picture."""
    network = MoVQ(replace(presets.KANDINSKY_MOVQ, dtype="bfloat16"), args.bands)
    picture = normal(1, args.height, args.width, 3)
    latents = normal(1, args.height // 8, args.width // 8, 4)
    inputs = (picture if args.network == "encode" else latents,)
    return Case(network, inputs, args.network, (normal(1, 64, 64, 3),))


def clip(args: argparse.Namespace) -> Case:
    """One picture, or one caption."""
    tower = args.network.removeprefix("clip_")
    c = replace(presets.CLIP_VIT_BIGG14, towers=tower, dtype="bfloat16")
    picture = normal(1, c.image_size, c.image_size, 3)
    inputs = (picture,) if tower == "image" else (jnp.ones((1, 77), jnp.int32),)
    return Case(Clip(c), inputs, f"encode_{tower}")


CASES: dict[str, Callable[[argparse.Namespace], Case]] = {
    "prior": prior, "unet": unet, "encode": movq, "decode": movq,
    "clip_text": clip, "clip_image": clip,
}  # fmt: skip


@contextmanager
def timed(what: str):
    """Print how long it took, on the clock and of all cores, and the process's peak so far."""
    clock, cores = time.perf_counter(), time.process_time()
    yield
    clock, cores = time.perf_counter() - clock, time.process_time() - cores
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{what:<16}{clock:8.1f} s {cores:8.1f} s of CPU   peak {peak:6.2f} GiB", flush=True)


def step(case: Case) -> None:
    """Make random params, compile, and step twice: the second finds all pages in memory."""
    network, inputs, method, first = case
    call = None if first else method
    shapes = jax.eval_shape(
        lambda key: network.init(key, *(first or inputs), method=call)["params"], jax.random.key(0)
    )
    with timed("weights"):
        params = jax.tree.map(lambda s: jnp.asarray(np.resize(BLOCK, s.shape)), shapes)
    count = sum(x.size for x in jax.tree.leaves(params))
    apply = jax.jit(lambda p, a: network.apply({"params": p}, *a, method=method))
    with timed("compile"):
        program = apply.lower(params, inputs).compile()
    memory = program.memory_analysis()
    for again in ("step", "step again"):
        with timed(again):
            out = jax.block_until_ready(program(params, inputs))
    finite = all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(out))
    print(
        f"{count / 1e6:.0f} M parameters; of the program: arguments"
        f" {memory.argument_size_in_bytes / 2**30:.2f} GiB, besides"
        f" {memory.temp_size_in_bytes / 2**30:.2f} GiB; finite: {finite}"
    )


def main() -> None:
    """Step the network that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", choices=CASES)
    parser.add_argument("--height", type=int, default=512)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--bands", type=int, default=1)
    args = parser.parse_args()
    step(CASES[args.network](args))


if __name__ == "__main__":
    main()
