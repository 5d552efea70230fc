"""How fast each solver converges on each grid, where the exact flow is known.

    python benchmarks/solvers.py

Some minutes on two CPU cores. It rewrites docs/images/solver_error.png and the table of
docs/samplers.md.

The data is a mixture of two Gaussians on the line, whose optimal network is known in closed form;
on the line the flow keeps the cumulative probability, which gives its end exactly. All is float64,
with float timesteps of the cosine schedule. What is drawn is the root mean square distance of 41
points to where the flow ends, against the calls of the network.
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import pyplot as plt
from scipy import optimize, stats

from unclip_jax.diffusion import Diffusion, Sampling, sample

DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = (
    "<!-- benchmarks/solvers.py writes this table -->\n",
    "<!-- end of solvers' table -->\n",
)
WEIGHTS, MEANS, STDS = np.array([0.3, 0.7]), np.array([-1.0, 0.8]), np.array([0.4, 0.5])
DIFFUSION = Diffusion(schedule="cosine", prediction="x_0", continuous=True)
WHOLE = Diffusion(schedule="cosine", prediction="x_0")
CALLS = (4, 6, 8, 12, 16, 24, 40, 80, 160, 320, 640)
TWICE = ("heun", "dpm2")
METHODS = ("ddim", "dpm++", "unipc2", "unipc3", "lms", "heun", "dpm2")
GRIDS = {
    "even, whole timesteps": (WHOLE, "{}"),
    "logsnr": (DIFFUSION, "logsnr:{}"),
    "karras": (DIFFUSION, "karras:{}"),
}


def denoise(diffusion: Diffusion, x: jax.Array, t: jax.Array) -> jax.Array:
    """The optimal network: E[x_0 | x_t]."""
    alpha, sigma = diffusion.levels(t, x)
    shares, guesses = [], []
    for weight, mean, std in zip(WEIGHTS, MEANS, STDS, strict=True):
        variance, gap = alpha**2 * std**2 + sigma**2, x - alpha * mean
        shares.append(np.log(weight) - 0.5 * (gap**2 / variance + jnp.log(variance)))
        guesses.append(mean + alpha * std**2 / variance * gap)
    return jnp.sum(jax.nn.softmax(jnp.stack(shares), axis=0) * jnp.stack(guesses), axis=0)


def truth(x_T: np.ndarray) -> np.ndarray:
    """Where the flow takes x_T, from cumulative probabilities."""
    process = DIFFUSION.process(dtype=np.float64)

    def below(x: float, i: int | None) -> float:
        alpha, sigma = (1.0, 0.0) if i is None else (process.alpha[i], process.sigma[i])
        deviations = np.hypot(alpha * STDS, sigma)
        return float(np.sum(WEIGHTS * stats.norm.cdf((x - alpha * MEANS) / deviations)))

    def follow(x: float) -> float:
        reached = below(x, -1)
        return optimize.brentq(lambda y: below(y, None) - reached, -9, 9, xtol=1e-14)

    return np.vectorize(follow)(x_T)


def error(
    diffusion: Diffusion, method: str, spacing: str, x_T: np.ndarray, end: np.ndarray
) -> float:
    """Root mean square distance to the flow's end."""
    network = functools.partial(denoise, diffusion)
    keys = jax.random.split(jax.random.key(0), 1)
    walk = jax.jit(lambda x: sample(network, x, keys, diffusion, Sampling(method, spacing)))
    return float(np.sqrt(np.mean((np.asarray(walk(jnp.asarray(x_T)[None]))[0] - end) ** 2)))


def measure() -> dict[str, dict[str, list[float]]]:
    """Errors by grid, method and number of calls."""
    x_T = np.linspace(-2, 2, 41)
    end, found = truth(x_T), {}
    for grid, (diffusion, rule) in GRIDS.items():
        found[grid] = {}
        for method in METHODS:
            steps = [(n + 1) // 2 if method in TWICE else n for n in CALLS]
            found[grid][method] = [
                error(diffusion, method, rule.format(n), x_T, end) for n in steps
            ]
            print(grid, method, *(f"{value:.1e}" for value in found[grid][method]), flush=True)
    return found


def plot(found: dict[str, dict[str, list[float]]], path: Path) -> None:
    """A picture for each grid."""
    figure, axes = plt.subplots(1, len(found), figsize=(14, 4.6), sharey=True, layout="constrained")
    for axis, (grid, errors) in zip(axes, found.items(), strict=True):
        for method, values in errors.items():
            axis.loglog(CALLS, values, "o-", label=method, markersize=4)
        axis.set(title=grid, xlabel="calls of the network", ylim=(1e-8, 3))
        axis.set_xticks(CALLS, map(str, CALLS), fontsize=7)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("root mean square error")
    axes[-1].legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def table(found: dict[str, dict[str, list[float]]]) -> str:
    """The errors as a Markdown table."""
    lines = [f"| calls | {' | '.join(map(str, CALLS))} |", "|---" * (1 + len(CALLS)) + "|"]
    for grid, errors in found.items():
        lines.append(f"| **{grid}** |" + " |" * len(CALLS))
        lines += [
            f"| {name} | {' | '.join(f'{value:.1e}' for value in values)} |"
            for name, values in errors.items()
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, draw, and put the table in its place."""
    with jax.enable_x64(True):
        found = measure()
    plot(found, DOCS / "images" / "solver_error.png")
    page = DOCS / "samplers.md"
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    page.write_text(before + BEGIN + table(found) + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
