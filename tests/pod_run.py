"""One process of a run of several, with real batches and the real loop; tests run it as a script.

    python tests/pod_run.py WORKDIR SETTINGS [COORDINATOR PROCESSES PROCESS]

SETTINGS is JSON: "mesh" (fields of MeshConfig), "slow" (seconds that every batch takes), "bad"
(the pictures that cannot be read), "pause" (seconds that an evaluation takes), "place" (the run's
workdir, where it is not WORKDIR), "cache" (whether WORKDIR keeps compiled programs), and fields of
TrainConfig. Every process appends {"step", "index", "of"} to WORKDIR/seen-PROCESS.jsonl for every
batch it takes, "of" so many processes, and the lead saves the final state.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tests import object_store, toy_run
from unclip_jax.data import batches
from unclip_jax.data.datasets import DataConfig
from unclip_jax.errors import run_command
from unclip_jax.parallel import compile_cache, distributed, sharding
from unclip_jax.training import loop, writers

PICTURES, SIDE = 50, 4


class Pictures:
    """A source of `PICTURES` tiny pictures of noise; some cannot be read."""

    name, fingerprint, classes, skipped = "pictures", "0123456789abcdef", (), {}
    image_count = PICTURES

    def __init__(self, bad=()):
        self._bad = frozenset(bad)

    def __len__(self):
        return PICTURES

    def image_of(self, index):
        return index

    def __getitem__(self, index):
        if index in self._bad:
            raise batches.BadRecord(f"picture {index}")
        rng = np.random.default_rng(index)
        image = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        return {"image": image, "caption": f"picture {index}", "index": index, "name": str(index)}


class Watched:
    """Batches that note, in a file, which examples every step took."""

    def __init__(self, inner, path: Path, slow: float):
        self._inner, self._path, self._slow = inner, path, slow
        self._step = 0

    def __next__(self):
        batch = next(self._inner)
        self._step += 1
        time.sleep(self._slow)
        with self._path.open("a") as file:
            record = {"step": self._step, "index": batch["index"].tolist()}
            file.write(json.dumps(record | {"of": jax.process_count()}) + "\n")
        return {"image": batch["image"], "index": batch["index"]}

    def get_state(self):
        return {"step": self._step, "inner": self._inner.get_state()}

    def set_state(self, states):
        self._step = states[0]["step"]
        self._inner.set_state([state["inner"] for state in states])


def init_params():
    rng = np.random.default_rng(0)
    width = SIDE * SIDE * 3
    kernels = {
        "up": rng.normal(size=(width, 32)) * width**-0.5,
        "down": rng.normal(size=(32, width)) * 32**-0.5,
    }
    return {"network": {n: {"kernel": jnp.asarray(k, jnp.float32)} for n, k in kernels.items()}}


def loss_fn(params, batch, key):
    """What is left of a picture that noise disturbed; every row has noise of its own."""
    x = batch["image"].reshape(len(batch["image"]), -1).astype(jnp.float32) / 127.5 - 1.0
    noisy = x + 0.3 * jax.random.normal(key, x.shape)
    hidden = jax.nn.gelu(noisy @ params["network"]["up"]["kernel"])
    error = hidden @ params["network"]["down"]["kernel"] - x
    return jnp.mean(error**2), {}


def tally(found, event):
    for name in found:
        found[name] += event == f"/jax/compilation_cache/{name}"


def main(arguments: list[str]) -> None:
    object_store.use()
    workdir, settings, *processes = arguments
    if processes:
        address, count, index = processes
        writers.summary_writer()  # the lead's: gloo waits no more than 30 s for it
        distributed.initialize("auto", address, int(count), int(index))
    settings = json.loads(settings)
    found = {"compile_requests_use_cache": 0, "cache_hits": 0}
    if settings.pop("cache", False):
        jax.monitoring.register_event_listener(lambda event, **_: tally(found, event))
        jax.config.update("jax_compilation_cache_dir", None)  # whatever the tests' own is
        compile_cache.use(shared=workdir)
        own = jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((3, 3)))  # on this process's device alone
        own.block_until_ready()
    mesh = sharding.make_mesh(sharding.MeshConfig(**settings.pop("mesh", {})))
    place = settings.pop("place", workdir)
    slow, bad = settings.pop("slow", 0.0), settings.pop("bad", ())
    pause = settings.pop("pause", 0.0)
    config = loop.TrainConfig(**{"learning_rate": 0.01, "ema_decay": 0.9} | settings)
    share = sharding.data_shard(mesh)
    stream = batches.batches(
        Pictures(bad),
        DataConfig(image_size=SIDE, cache_bytes=0),
        seed=config.seed,
        batch_size=config.batch_size // share.count,
        process_index=share.index,
        process_count=share.count,
    )
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)

    def evaluate(params, step):
        time.sleep(pause)
        kernel = params["network"]["up"]["kernel"]
        return {"size": float(jnp.sqrt(jnp.sum(kernel**2)))}

    def export(params, step):
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
        np.savez(folder / "exported.npz", *leaves)

    state = loop.train(
        loss_fn=loss_fn,
        init_params=init_params,
        batches=Watched(stream, folder / f"seen-{jax.process_index()}.jsonl", slow),
        config=config,
        workdir=place,
        description={"stage": {"kind": "pod"}},
        mesh=mesh,
        evaluate=evaluate,
        export=export,
    )
    whole = state if jax.process_count() == 1 else distributed.fetch(state)
    (folder / f"compiled-{jax.process_index()}.json").write_text(json.dumps(found))
    if distributed.is_lead():
        np.savez(folder / "final.npz", *(np.asarray(leaf) for leaf in jax.tree.leaves(whole)))


if __name__ == "__main__":
    toy_run.no_curves()
    run_command(main, sys.argv[1:])
