"""How far each sampler ends from the truth in n steps, where the truth is known.

    python benchmarks/samplers.py

About two minutes on two CPU cores. It rewrites docs/images/sampler_error.png and the table in
docs/samplers.md.

The data is a mixture of three Gaussians on the line, whose optimal network is known in closed form:
what is measured is the sampler alone, with no training in it. Two errors are plotted against the
number of steps:

* **Wasserstein-1 distance** between 2^17 samples and the mixture: the mean distance between the
  k-th smallest sample and the mixture's k-th quantile. x_T holds the quantiles of N(0, 1), so
  that deterministic methods have no sampling error; 2^17 independent draws of the truth itself
  are about 0.003 away (dotted), and stochastic methods may be, too, for want of samples.
* **Slack of the bound** on -log p(x_0), in bits per dimension: by how much `vlb_bits_per_dim`
  exceeds the mixture's entropy. It is what Analytic-DPM (arXiv 2201.06503) minimises, and exists
  for the stochastic methods only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import pyplot as plt
from scipy import stats

from unclip_jax.diffusion import (
    Denoise,
    Diffusion,
    Process,
    Sampling,
    analytic,
    sample,
    vlb_bits_per_dim,
)
from unclip_jax.diffusion.gaussian import at

DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- benchmarks/samplers.py writes this table -->\n", "<!-- end of the table -->\n"

WEIGHTS, MEANS, STDS = np.array([0.3, 0.5, 0.2]), np.array([-1.4, 0.3, 1.5]), np.full(3, 0.15)
STEPS = (5, 8, 12, 16, 25, 50, 100, 250)
NUM, ROWS = 2**17, 64  # samples, in rows with a key each
DIFFUSION = Diffusion(steps=1000, schedule="cosine", prediction="x_0", likelihood="gaussian")
EXACT = Diffusion(
    steps=1000, prediction="x_0", variance="learned_range", loss="hybrid", likelihood="gaussian"
)


class Method(NamedTuple):
    """A line of the plot: `variance` names what a stochastic method adds in each step."""

    sampling: str
    variance: str
    style: str


class Figures(NamedTuple):
    """What is measured, by method and number of steps; `floor` is the distance of exact draws."""

    distance: dict[str, list[float]]
    slack: dict[str, list[float]]
    floor: float


METHODS = {
    "DDPM, fixed small": Method("ddpm", "fixed_small", "C0o-"),
    "DDPM, fixed large": Method("ddpm", "fixed_large", "C9v-"),
    "analytic": Method("analytic", "analytic", "C3s-"),
    "DDPM, exact variance": Method("ddpm", "exact", "C1^--"),
    "DDIM": Method("ddim", "", "C2D-"),
    "DPM-Solver++(2M)": Method("dpm++", "", "C4P-"),
}


def posterior(x_t: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of x_0 given x_t `[b, n]`: each component's, weighted by its share."""
    alpha_bar = at(DIFFUSION.process().alpha_bar, t, x_t)[None]
    alpha = jnp.sqrt(alpha_bar)
    means, stds, weights = (jnp.float32(v).reshape(-1, 1, 1) for v in (MEANS, STDS, WEIGHTS))
    variance = alpha_bar * stds**2 + 1 - alpha_bar
    gap = x_t[None] - alpha * means
    share = jax.nn.softmax(jnp.log(weights) - 0.5 * (gap**2 / variance + jnp.log(variance)), axis=0)
    guess = means + alpha * stds**2 / variance * gap
    mean = jnp.sum(share * guess, axis=0)
    spread = stds**2 * (1 - alpha_bar) / variance + (guess - mean[None]) ** 2
    return mean, jnp.sum(share * spread, axis=0)


def denoise(x_t: jax.Array, t: jax.Array) -> jax.Array:
    """The optimal network: E[x_0 | x_t]."""
    return posterior(x_t, t)[0]


def with_variance(
    process: Process, variance: Callable[[jax.Array, jax.Array], jax.Array]
) -> Denoise:
    """The optimal network in the words of a learned variance, equation (4) of `diffusion`.

    `variance(i, var)` is that of p(x_{t-1} | x_t) at step i, where Var(x_0 | x_t) is `var`.
    """
    small, large = process.posterior_log_variance, process.log_betas

    def output(x_t: jax.Array, t: jax.Array) -> jax.Array:
        i = jnp.searchsorted(jnp.asarray(process.timesteps), t)
        mean, var = posterior(x_t, t)
        low, high = at(small, i, x_t), at(large, i, x_t)
        fraction = (2 * jnp.log(variance(i, var)) - low - high) / (high - low)
        return jnp.concatenate([mean, jnp.broadcast_to(fraction, x_t.shape)], axis=-1)

    return output


def exact(process: Process) -> Denoise:
    """With the best variance at every x_t, which a learned one could at most reach."""

    def variance(i: jax.Array, var: jax.Array) -> jax.Array:
        gain = at(process.posterior_mean_x_0, i, var) ** 2
        return at(process.posterior_variance, i, var) + gain * var

    return with_variance(process, variance)


def model(variance: str, spacing: str, statistic: jax.Array) -> tuple[Diffusion, Denoise]:
    """The diffusion and the network whose reverse steps have the named variance."""
    process = DIFFUSION.process(spacing)
    if variance == "exact":
        return EXACT, exact(process)
    if variance == "analytic":
        table = analytic.variance(process, statistic[process.timesteps])
        return EXACT, with_variance(process, lambda i, var: at(table, i, var))
    fixed = variance or "fixed_small"
    return Diffusion(prediction="x_0", variance=fixed, likelihood="gaussian"), denoise


def data(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws of the mixture."""
    which, noise = jax.random.split(key)
    k = jax.random.choice(which, len(WEIGHTS), shape, p=jnp.asarray(WEIGHTS))
    return jnp.float32(MEANS)[k] + jnp.float32(STDS)[k] * jax.random.normal(noise, shape)


def quantiles(num: int) -> np.ndarray:
    """The mixture's quantiles at (k + 1/2) / num, rising, float64 `[num]`."""
    x = np.linspace(-4, 4, 200_001)
    cdf = np.sum(WEIGHTS * stats.norm.cdf((x[:, None] - MEANS) / STDS), axis=1)
    return np.interp((np.arange(num) + 0.5) / num, cdf, x)


def entropy() -> float:
    """Of the mixture, in bits."""
    x = np.linspace(-4, 4, 200_001)
    density = np.sum(WEIGHTS * stats.norm.pdf(x[:, None], MEANS, STDS), axis=1)
    return -float(np.sum(density * np.log2(np.maximum(density, 1e-300))) * (x[1] - x[0]))


def measure_statistic(key: jax.Array, rows: int = 4) -> jax.Array:
    """The analytic statistic, estimated as for any network: from data, without its formula."""
    residuals, t = analytic.init(DIFFUSION), jnp.arange(DIFFUSION.steps)
    update = jax.jit(lambda r, x_0, noise: analytic.update(r, DIFFUSION, denoise, x_0, t, noise))
    for row in jax.random.split(key, rows):
        shape = (DIFFUSION.steps, 4096)
        residuals = update(residuals, data(row, shape), jax.random.normal(row, shape))
    return jnp.asarray(analytic.statistic(residuals))


@functools.partial(jax.jit, static_argnames=("method", "steps"))
def draw(method: Method, steps: int, x_T: jax.Array, statistic: jax.Array) -> jax.Array:
    """Samples `[n]`, sorted, from noise x_T `[rows, n / rows]`."""
    diffusion, network = model(method.variance, str(steps), statistic)
    sampling = Sampling(method.sampling, str(steps))
    keys = jax.random.split(jax.random.key(1), ROWS)
    x_0 = sample(network, x_T, keys, diffusion, sampling, analytic=statistic)
    return jnp.sort(x_0.reshape(-1))


@functools.partial(jax.jit, static_argnames=("variance", "steps"))
def bound(variance: str, steps: int, x_0: jax.Array, statistic: jax.Array) -> jax.Array:
    """The bound of data x_0 `[rows, n / rows]`, in bits per dimension."""
    diffusion, network = model(variance, str(steps), statistic)
    keys = jax.random.split(jax.random.key(2), ROWS)
    return vlb_bits_per_dim(diffusion, network, x_0, keys, str(steps))["total"].mean()


def measure() -> Figures:
    """Both errors of every method at every number of steps."""
    truth = quantiles(NUM)
    statistic = measure_statistic(jax.random.key(0))
    shuffled = np.random.default_rng(0).permutation(NUM)
    x_T = jnp.float32(stats.norm.ppf((shuffled + 0.5) / NUM)).reshape(ROWS, -1)
    x_0 = jax.random.permutation(jax.random.key(3), jnp.float32(truth)).reshape(ROWS, -1)
    drawn = [np.sort(data(jax.random.key(i), (NUM,))) for i in range(8)]
    return Figures(
        distance={
            name: [float(np.abs(draw(m, n, x_T, statistic) - truth).mean()) for n in STEPS]
            for name, m in METHODS.items()
        },
        slack={
            name: [float(bound(m.variance, n, x_0, statistic)) - entropy() for n in STEPS]
            for name, m in METHODS.items()
            if m.variance
        },
        floor=float(np.mean([np.abs(x - truth).mean() for x in drawn])),
    )


def plot(figures: Figures, path: Path) -> None:
    """Both errors against steps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for axes, errors in ((left, figures.distance), (right, figures.slack)):
        for name, values in errors.items():
            axes.loglog(STEPS, values, METHODS[name].style, label=name, markersize=5)
        axes.set_xticks(STEPS, map(str, STEPS))
        axes.minorticks_off()
        axes.set_xlabel("steps")
        axes.grid(alpha=0.3)
    left.axhline(figures.floor, color="k", linestyle=":", label="independent draws of the truth")
    left.set(ylim=(1e-4, 0.5), ylabel="Wasserstein-1 distance to the mixture")
    right.set(ylim=(1e-2, 4), ylabel="bound on -log p less the entropy, bits/dim")
    right.set_title("fixed small lies above: see the table", fontsize=9)
    left.legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def table(figures: Figures) -> str:
    """Both errors as a Markdown table."""

    def rows(errors: dict[str, list[float]], digits: int) -> list[str]:
        return [
            f"| {name} | {' | '.join(f'{max(v, 0.0):.{digits}f}' for v in values)} |"
            for name, values in errors.items()
        ]

    head = [f"| steps | {' | '.join(map(str, STEPS))} |", "|---" * (1 + len(STEPS)) + "|"]
    blank = " |" * len(STEPS)
    lines = [
        *head,
        f"| **Wasserstein-1** |{blank}",
        *rows(figures.distance, 4),
        f"| **slack of the bound** |{blank}",
        *rows(figures.slack, 2),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, plot, and put the table in its place."""
    figures = measure()
    plot(figures, DOCS / "images" / "sampler_error.png")
    page = DOCS / "samplers.md"
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(before + BEGIN + table(figures) + END + after, encoding="utf-8")
    print(table(figures), f"independent draws of the truth: {figures.floor:.4f}", sep="")


if __name__ == "__main__":
    main()
