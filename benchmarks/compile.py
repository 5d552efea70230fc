"""How long a training step takes to compile, by the depth of its Transformer.

    python benchmarks/compile.py

Blocks are scanned, so the program is the same size at every depth and its compile time should be,
too. Depths are compiled in turn, several times over, and compared within a round: what else the
machine does falls on all of them alike.

Measured on 2 CPU cores, jax 0.10.2, the prior's step at width 256, 5 rounds:

| layers | seconds (median) | over the first (median, least to most) |
|---|---|---|
| 6 | 3.1 | 1.00 (1.00 to 1.00) |
| 12 | 2.9 | 0.98 (0.92 to 1.01) |
| 24 | 2.9 | 0.97 (0.89 to 1.07) |
"""

from __future__ import annotations

import statistics
import time

import jax
import jax.numpy as jnp

from unclip_jax import stages
from unclip_jax.models.prior import PriorConfig
from unclip_jax.parallel import sharding
from unclip_jax.training import optimizers
from unclip_jax.training import step as train_step
from unclip_jax.training.config import TrainConfig

DEPTHS, ROUNDS = (6, 12, 24), 5
E, LENGTH, BATCH = 64, 32, 8


def seconds(layers: int) -> float:
    """To compile the whole training step of a prior of so many blocks."""
    model = PriorConfig(
        embed_dim=E, width=256, layers=layers, heads=8, context_length=LENGTH, vocab_size=512,
        text_width=0, remat="full",
    )  # fmt: skip
    stage, config, mesh = stages.PriorStage(model=model), TrainConfig(), sharding.make_mesh()
    optimizer = optimizers.make_optimizer(config)
    params = jax.eval_shape(stage.init, jax.random.key(0))
    state = jax.eval_shape(lambda p: train_step.init_state(p, optimizer), params)
    batch = {
        "tokens": jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32),
        "z_i": jax.ShapeDtypeStruct((BATCH, E), jnp.float32),
        "z_t": jax.ShapeDtypeStruct((BATCH, E), jnp.float32),
    }
    step = train_step.make_train_step(stage.loss, optimizer, config, mesh)
    lowered = step.lower(state, batch)
    start = time.perf_counter()
    lowered.compile()
    return time.perf_counter() - start


def main() -> None:
    """Print a table."""
    jax.config.update("jax_enable_compilation_cache", False)
    rounds = [[seconds(depth) for depth in DEPTHS] for _ in range(ROUNDS)]
    print("| layers | seconds (median) | over the first (median, least to most) |\n|---|---|---|")
    for i, depth in enumerate(DEPTHS):
        ratios = [times[i] / times[0] for times in rounds]
        middle = statistics.median(times[i] for times in rounds)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {depth} | {middle:.1f} | {spread} |")


if __name__ == "__main__":
    main()
