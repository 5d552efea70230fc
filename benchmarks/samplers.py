"""What a sampler costs beside its network, and beside k-diffusion's with the same network.

    python benchmarks/samplers.py [--rounds 5]
    pip install k-diffusion --no-deps torchdiffeq torchsde    # for the second half, with torch

For a perceptron of three sizes it times 20 steps of each solver on Karras's sigmas, all jitted,

- ours: `unclip_jax.diffusion.sample`;
- bare: a `lax.scan` that asks the network as often, and adds its output to x;
- k-diffusion: its sampler in a Python loop, as it is used, around the network under torch.compile
  (without a C++ compiler: the network as it is, which the first line says).

Sides take turns, and what is printed of each is its fastest round: microseconds a step, what ours
takes beyond the bare scan, and k-diffusion's time over ours. Both samplers' pictures agree, or it
stops. It also counts what compiles on a second call with other keys, states and params: nothing.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.diffusion import Diffusion, Sampling, sample

STEPS = 20
SIZES = {"tiny": (16, 64, 64), "small": (64, 512, 1024), "middle": (64, 3072, 2048)}  # b, d, width
METHODS = {"euler": "sample_euler", "heun": "sample_heun", "dpm++": "sample_dpmpp_2m"}
CALLS = {"euler": STEPS, "heun": 2 * STEPS - 1, "dpm++": STEPS}
AGREE = 1e-3  # largest difference over largest value, float32
DIFFUSION = Diffusion(schedule="edm", prediction="x_0")

Params = list[np.ndarray]


def random_params(d: int, width: int) -> Params:
    """Weights of a perceptron d -> width -> d, and of sigma's part."""
    rng = np.random.default_rng(0)
    shapes = ((d, width), (1, width), (width, d))
    return [(rng.standard_normal(s) / s[0] ** 0.5 * 0.5).astype(np.float32) for s in shapes]


def network(params: Any, x: jax.Array, sigma: jax.Array) -> jax.Array:
    """EDM's c_skip and c_out for data of deviation one half, around the perceptron."""
    a, b, c = params
    sigma = sigma[:, None]
    total = jnp.sqrt(sigma**2 + 0.25)
    h = jnp.tanh((x / total) @ a + jnp.log(sigma) / 4 @ b)
    return x * 0.25 / total**2 + h @ c * sigma * 0.5 / total


@functools.partial(jax.jit, static_argnames="method")
def ours(params: Any, x: jax.Array, key: jax.Array, method: str) -> jax.Array:
    """Our sampler."""
    sampling = Sampling(method=method, spacing=f"karras:{STEPS}")
    return sample(lambda x, t: network(params, x, t), x, key, DIFFUSION, sampling)


@functools.partial(jax.jit, static_argnames="calls")
def bare(params: Any, x: jax.Array, sigmas: jax.Array, calls: int) -> jax.Array:
    """The network so many times, with an addition each."""

    def step(x: jax.Array, sigma: jax.Array) -> tuple[jax.Array, None]:
        return x + 1e-3 * network(params, x, jnp.broadcast_to(sigma, x.shape[:1])), None

    return jax.lax.scan(step, x, jnp.resize(sigmas, (calls,)))[0]


def k_diffusion() -> Any:
    """k-diffusion's module of samplers alone; None where it is missing.

    What the package imports besides, for training, stays unimported.
    """
    spec = importlib.util.find_spec("k_diffusion") if importlib.util.find_spec("torch") else None
    if spec is None:
        return None
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations)
    utils = types.ModuleType("k_diffusion.utils")
    utils.append_dims = lambda x, rank: x[(...,) + (None,) * (rank - x.ndim)]
    sys.modules |= {"k_diffusion": package, "k_diffusion.utils": utils}
    package.utils = utils
    return importlib.import_module("k_diffusion.sampling")


def torch_network(params: Params) -> tuple[Callable[..., Any], str]:
    """The same network in torch, compiled if it can be, and how."""
    import torch

    a, b, c = (torch.from_numpy(p) for p in params)

    def plain(x: Any, sigma: Any) -> Any:
        sigma = sigma[:, None]
        total = torch.sqrt(sigma**2 + 0.25)
        h = torch.tanh((x / total) @ a + torch.log(sigma) / 4 @ b)
        return x * 0.25 / total**2 + h @ c * sigma * 0.5 / total

    compiled = torch.compile(plain)
    try:
        compiled(torch.zeros(4, a.shape[0]), torch.ones(4))
    except Exception as error:  # whatever the compiler lacks here
        return plain, f"eager: torch.compile fails with {type(error).__name__}"
    return compiled, "torch.compile"


def fastest(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of each side's fastest round; the sides take turns."""
    best = dict.fromkeys(sides, float("inf"))
    for run in sides.values():
        run()
    for _ in range(rounds):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def compare(size: str, method: str, theirs: Any, rounds: int) -> None:
    """Time one solver around the network of one size, and print a line."""
    b, d, width = SIZES[size]
    params = random_params(d, width)
    sigmas = np.asarray(DIFFUSION.process(f"karras:{STEPS}").sigma, np.float32)[::-1].copy()
    x = np.random.default_rng(1).standard_normal((b, d)).astype(np.float32)
    held, x_T, levels = jax.tree.map(jnp.asarray, (params, x, sigmas))

    def one() -> np.ndarray:
        return np.asarray(ours(held, x_T, jax.random.key(0), method))

    def scan() -> np.ndarray:
        return np.asarray(bare(held, x_T, levels, CALLS[method]))

    sides, how = {"ours": one, "bare": scan}, ""
    if theirs:
        import torch

        net, how = torch_network(params)
        steps = torch.from_numpy(np.append(sigmas, np.float32(0)))
        sampler = getattr(theirs, METHODS[method])

        def other() -> np.ndarray:
            with torch.no_grad():
                return sampler(net, torch.from_numpy(sigmas[0] * x), steps, disable=True).numpy()

        off = np.abs(one() - other()).max() / np.abs(other()).max()
        if off > AGREE:
            sys.exit(f"{size} {method}: ours and k-diffusion's differ by {off:.1e}")
        sides["theirs"] = other
    us = {side: 1e6 * seconds / STEPS for side, seconds in fastest(sides, rounds).items()}
    ratio = f"{us['theirs'] / us['ours']:.2f} ({how})" if theirs else "-"
    beyond = us["ours"] - us["bare"]
    print(
        f"{size:7} {method:6} {us['ours']:10.1f} {us['bare']:10.1f} {beyond:10.1f}  {ratio}",
        flush=True,
    )


def main() -> None:
    """Print one line for each size and solver."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    theirs = k_diffusion()
    print(f"{jax.devices()}; k-diffusion {'is here' if theirs else 'is missing'}; us a step")
    print("size    solver       ours       bare     beyond  k-diffusion/ours")
    for size in SIZES:
        for method in METHODS:
            compare(size, method, theirs, rounds)
    b, d, width = SIZES["tiny"]
    compiled = ours._cache_size()
    others = [jnp.asarray(2 * value) for value in random_params(d, width)]
    ours(others, jnp.ones((b, d)), jax.random.key(9), "euler")
    print("compiled by one more call with other values:", ours._cache_size() - compiled)


if __name__ == "__main__":
    main()
