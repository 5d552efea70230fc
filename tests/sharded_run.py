"""One stage trained and sampled on 8 devices in every way, and on one; tests run it as a script.

python tests/sharded_run.py STAGE[:OPTIMIZER] MESH... > FIGURES.json
"""

from __future__ import annotations

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from tests import tiny
from unclip_jax import stages
from unclip_jax.models.ar_prior import ARPriorConfig
from unclip_jax.models.unet import UNetConfig
from unclip_jax.parallel import axes, sharding
from unclip_jax.parallel.sharding import MeshConfig
from unclip_jax.stages import ar_prior
from unclip_jax.training import optimizers
from unclip_jax.training import step as train_step
from unclip_jax.training.config import TrainConfig

STEPS, BATCH = 5, 16
MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "spatial": MeshConfig(data=2, fsdp=2, spatial=2),
    "tensor": MeshConfig(data=4, tensor=2),
    "all": MeshConfig(data=2, fsdp=2, tensor=2),
}
AR_PRIOR = stages.ARPriorStage(
    model=ARPriorConfig(
        embed_dim=tiny.DIM, width=16, layers=2, heads=2, context_length=tiny.CONTEXT,
        vocab_size=tiny.VOCAB, code_dims=6, buckets=16, dot_buckets=8,
    )
)  # fmt: skip
CLASSIFIER = stages.ClassifierStage(
    model=UNetConfig(
        image_size=16, out_channels=4, channels=16, channel_mults=(1, 2), res_blocks=1,
        attention_sizes=(8,), head_channels=16, groups=8,
    )
)  # fmt: skip
STAGES = {
    "clip": tiny.CLIP,
    "prior": tiny.PRIOR,
    "ar_prior": AR_PRIOR,
    "canvas": tiny.CANVAS,
    "decoder": tiny.DECODER,
    "on_canvas": tiny.ON_CANVAS,
    "upsampler": tiny.UPSAMPLER,
    "classifier": CLASSIFIER,
}


def batches(stage) -> list[dict]:
    """The same batches of noise on every mesh."""
    size = stage.image_size or 16
    found = [tiny.batch(BATCH, size, seed) for seed in range(STEPS)]
    if stage.kind == "classifier":
        found = [b | {"label": jnp.arange(BATCH, dtype=jnp.int32) % 4} for b in found]
    return found


def first_params(stage):
    params = tiny.params(stage)
    if stage.kind == "ar_prior":
        z = np.random.default_rng(0).normal(size=(2, 64, tiny.DIM)).astype(np.float32)
        params = params | {
            "normalisation": ar_prior.fit_quantiser(stage.model, lambda: iter([(z[0], z[1])]))
        }
    return params


def train(stage, mesh, config: TrainConfig):
    """Losses, and the averaged and trained params after `STEPS` steps."""
    optimizer = optimizers.make_optimizer(config)
    state = train_step.sharded_state(first_params(stage), optimizer, config, mesh)
    step = train_step.make_train_step(stage.loss, optimizer, config, mesh)
    losses = []
    for batch in batches(stage):
        state, metrics = step(state, sharding.shard_batch(jax.tree.map(np.asarray, batch), mesh))
        losses.append(float(metrics["loss"]))
    return losses, state


def sample(stage, params, mesh):
    """What the stage makes of a batch of conditions that is split over the mesh."""
    batch = tiny.batch(8, stage.image_size or 16)
    keys = jax.random.split(jax.random.key(1), 8)
    if stage.kind in ("prior", "ar_prior"):
        cond = stage.condition(batch["tokens"], batch["z_t"], None)
    elif stage.kind in ("canvas", "decoder"):
        cond = stage.condition_of(batch)
    else:
        cond = jnp.asarray(tiny.batch(8, stage.low_size)["image"], jnp.float32) / 127.5 - 1.0
    keys, cond = jax.device_put((keys, cond), sharding.batch_sharding(mesh))

    def drawn(params, keys, cond):
        with axes.on(mesh):
            return stage.sample(params, keys, cond)

    return np.asarray(jax.jit(drawn)(params, keys, cond))


def furthest(tree, other) -> float:
    """The greatest difference between two trees, over the greatest value there is."""
    pairs = list(zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True))
    most = max(float(np.max(np.abs(np.asarray(b)), initial=0.0)) for _, b in pairs)
    apart = (np.max(np.abs(np.asarray(a) - np.asarray(b)), initial=0.0) for a, b in pairs)
    return float(max(apart)) / most


def split_parts(state, mesh) -> dict[str, float]:
    """The largest share of a state's floats that any device holds."""
    held = whole = 0
    for leaf in jax.tree.leaves(state):
        whole += leaf.size
        held += leaf.addressable_shards[0].data.size
    return held / whole


def main(name: str, meshes: list[str]) -> None:
    name, _, optimizer = name.partition(":")
    stage = STAGES[name]
    # A rate at which five steps move every param far beyond rounding, and eps so large that
    # Adam's division does not blow the rounding of tiny gradients up.
    config = TrainConfig(
        batch_size=BATCH, learning_rate=1e-3, eps=1e-4, weight_decay=0.01, grad_clip=1.0,
        grad_accum=2 if name in ("prior", "clip") else 1, sam_rho=0.01 if name == "clip" else 0.0,
        optimizer=optimizer or "adamw",
    )  # fmt: skip
    assert jax.device_count() == 8
    alone = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    losses, state = train(stage, alone, config)
    begun = first_params(stage)
    drawn = None if name in ("clip", "classifier") else sample(stage, begun, alone)
    report = {"moved": furthest(state.params["network"], begun["network"]), "meshes": {}}
    for mesh_name in meshes:
        mesh = sharding.make_mesh(MESHES[mesh_name])
        found, on_mesh = train(stage, mesh, config)
        figures = {
            "loss": max(abs(a - b) / abs(b) for a, b in zip(found, losses, strict=True)),
            "params": furthest(on_mesh.params, state.params),
            "ema": furthest(on_mesh.ema_params, state.ema_params),
            "held": split_parts(on_mesh, mesh),
        }
        if drawn is not None:
            where = sharding.tree_shardings(begun, mesh)
            figures["sample"] = furthest(sample(stage, sharding.place(begun, where), mesh), drawn)
        report["meshes"][mesh_name] = figures
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    jax.config.update("jax_numpy_rank_promotion", "raise")
    main(sys.argv[1], sys.argv[2:])
