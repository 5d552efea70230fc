"""Faults in what the networks do: the newest checkpoint, looked at on a few training examples.

Each example is noised once at every of several timesteps, and the network's squared error is
measured under its own condition and under another example's. What the own condition saves is what
the network makes of it; its mean over the examples has a standard error, so "nothing" can be told
from "little".
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax import stages
from unclip_jax.common import config as settings
from unclip_jax.data import datasets
from unclip_jax.data.batches import batches
from unclip_jax.data.records import fingerprints
from unclip_jax.diffusion import gaussian
from unclip_jax.errors import UserError
from unclip_jax.metrics.retrieval import digests
from unclip_jax.stages import normalisation
from unclip_jax.stages.clip import encode_image, encode_text
from unclip_jax.stages.conditioning import Field
from unclip_jax.stages.guided import GuidedDiffusion
from unclip_jax.training import inputs
from unclip_jax.training.doctor.findings import TENTH, Finding, error, note
from unclip_jax.training.doctor.settings import STD_BAND
from unclip_jax.training.doctor.workdir import Workdir
from unclip_jax.training.saved import Saved, damage, in_float32
from unclip_jax.weights import trained

Params = dict[str, Any]
Arrays = dict[str, jax.Array]

EXAMPLES, PICTURES = 64, 32  # of embeddings, and where pictures are trained on
ROUNDS = 4  # how many timesteps each example is seen at
SURE = 3.0  # standard errors

# Relative differences that float32 makes by itself, with a margin.
IDENTICAL = 1e-4


def examine(run: Workdir, clip: Path | None) -> Iterator[Finding]:
    """Findings in the newest checkpoint; `clip` is the folder of the run's CLIP, if it is there."""
    if not run.checkpoints or damage(run.checkpoints[-1]):
        return
    if "lora" in run.description:
        yield note(
            "weights_not_seen",
            "the run trains adapters, and its checkpoints hold nothing else",
            "unclip save makes a model folder, and unclip evaluate measures it",
        )
        return
    last, averaged = read_weights(run)
    try:
        batch = read_batch(run, clip)
    except (UserError, OSError) as problem:
        yield note(
            "data_not_seen",
            f"no training example could be read here: {problem}",
            "run the doctor where the data are"
            + (", with --clip=DIR" if "clip_fingerprint" in run.description else ""),
        )
        batch = None
    told = bool(run.stage.obeys and run.stage.conditions)
    if told:
        cond = synthetic(run.stage) if batch is None else run.stage.data(averaged, batch)[1]
        yield from guidance(run, averaged, cond)
    if batch is not None:
        yield from embeddings(averaged, batch)
        yield from average(run, last, averaged, batch)
        if told:
            yield from worth(run, averaged, batch)


def read_weights(run: Workdir) -> tuple[Params, Params]:
    """The params of the newest checkpoint: those last trained, and their average."""
    parts = ("params", "ema_params")
    with Saved(run.path) as saved:
        step = int(run.checkpoints[-1].name)
        state = saved.state(step, lambda tree: {name: tree[name] for name in parts})
    return state["params"], state["params"] | in_float32(state["ema_params"])


def read_batch(run: Workdir, clip: Path | None) -> Arrays:
    """Up to EXAMPLES or PICTURES training examples, with all that the stage reads.

    UserError if the data are not here or are others by now, or the CLIP is not known.
    """
    stage = run.stage
    data = settings.build(datasets.DataConfig, run.description["data"], "description.json: data")
    data = dataclasses.replace(data, augment=0.0, cache_bytes=0)
    needs_images = "image" in stage.reads
    data = inputs.data_for(stage, data)
    source = datasets.load(data, needs_images=needs_images)
    if run.description["data_fingerprint"] not in fingerprints(source):
        raise UserError(
            f"data {data.name!r}: they have changed since (fingerprint {source.fingerprint}, was"
            f" {run.description['data_fingerprint']})"
        )
    if "t5" in run.description:
        raise UserError("the stage reads the states of a T5, which the workdir does not name")
    part = None
    if "z_i" in stage.reads:
        if clip is None:
            raise UserError(
                f"CLIP {run.description['clip_fingerprint']}, which made the embeddings, is not"
                " among the folders beside the workdir"
            )
        part = trained.load_part(clip, kind="clip")
    encoder = inputs.text_encoder(stage, part, "", "float32")
    wanted = PICTURES if needs_images else EXAMPLES
    size = {"seed": 0, "batch_size": min(wanted, len(source))}
    batch = dict(next(batches(source, data, encoder=encoder, **size)))
    if part is not None and "z_i" not in batch:
        seen = inputs.seen_by(part.stage, data)
        own = trained.tokenizer(part)
        pairs = next(batches(datasets.load(seen), seen, encoder=own, **size))
        batch["z_i"] = encode_image(part.stage, part.params, pairs["image"])
        batch["z_t"] = encode_text(part.stage, part.params, pairs["tokens"])
    return {name: jnp.asarray(array) for name, array in batch.items()}


def synthetic(stage: GuidedDiffusion) -> Arrays:
    """Random conditions, where there are no data to take them from."""

    def draw(key: jax.Array, field: Field) -> jax.Array:
        shape = (8, *field.shape)
        if field.below:
            return jax.random.randint(key, shape, 0, field.below)
        if field.dtype == "bool":
            return jnp.ones(shape, bool)
        drawn = jax.random.normal(key, shape)
        return normalisation.unit(drawn) if len(field.shape) == 1 else drawn

    keys = jax.random.split(jax.random.key(0), max(1, len(stage.conditions)))
    pairs = zip(keys, stage.conditions.items(), strict=False)
    found = {name: draw(key, field) for key, (name, field) in pairs}
    return stage.condition_of(found, found.get("text_mask"))


@functools.partial(jax.jit, static_argnames="stage")
def predict(
    stage: GuidedDiffusion,
    params: Params,
    cond: Arrays,
    x_t: jax.Array,
    t: jax.Array,
) -> jax.Array:
    """What the network says of x_t at t under a condition, without its variance channels."""
    output = stage.denoiser(params, cond)(x_t, t)
    return gaussian.split_variance(stage.diffusion, output, x_t)[0]


def guidance(run: Workdir, params: Params, cond: Arrays) -> Iterator[Finding]:
    """Whether a condition changes what is predicted, without which guidance leads nowhere."""
    stage = run.stage
    n = len(jax.tree.leaves(cond)[0])
    x_t = jax.random.normal(jax.random.key(1), (n, *stage.x_shape))
    t = jnp.full(n, stage.diffusion.steps - 1)
    own = np.asarray(predict(stage, params, cond, x_t, t))
    null = np.asarray(predict(stage, params, stage.null(params, cond), x_t, t))
    size = float(np.sqrt(np.mean(own**2)))
    apart = float(np.sqrt(np.mean((own - null) ** 2)))
    if apart <= IDENTICAL * size or size == 0.0:
        yield error(
            "guidance_dead",
            f"with and without their conditions, predictions at the noisiest step differ by"
            f" {apart:.2g}, and are {size:.2g} large: guidance has nothing to amplify",
            "train longer; if it stays so, check stage.caption_drop and stage.z_i_drop, and that"
            " captions and embeddings differ between examples",
        )


def embeddings(params: Params, batch: Arrays) -> Iterator[Finding]:
    """The normalisation in the checkpoint against the embeddings it is for."""
    stats = params.get("normalisation", {})
    if "std" not in stats or "z_i" not in batch:
        return
    z = np.asarray(normalisation.normalise(stats, batch["z_i"]), np.float64)
    std = float(np.sqrt(np.mean(z**2)))
    if not STD_BAND[0] <= std <= STD_BAND[1]:
        yield error(
            "embedding_std",
            f"the checkpoint's normalisation gives the embeddings of {len(z)} training pictures a"
            f" root mean square of {std:.3g} per dimension, expected about 1",
            "the normalisation is of another CLIP or of other data; train in a new workdir with"
            " --config.normalisation=whiten",
        )


@functools.partial(jax.jit, static_argnames="stage")
def loss(stage: stages.Stage, params: Params, batch: Arrays, key: jax.Array) -> jax.Array:
    """The stage's loss of a batch."""
    return stage.loss(params, batch, key)[0]


def average(run: Workdir, last: Params, averaged: Params, batch: Arrays) -> Iterator[Finding]:
    """The averaged weights' loss against that of the last ones, on the same examples and noise."""
    keys = [jax.random.key(i) for i in range(ROUNDS)]
    own, mean = (
        np.array([float(loss(run.stage, params, batch, key)) for key in keys])
        for params in (last, averaged)
    )
    behind = mean - own
    sure = behind.mean() > SURE * behind.std(ddof=1) / np.sqrt(len(keys))
    if sure and behind.mean() > TENTH * abs(own.mean()):
        yield error(
            "average_behind",
            f"on the same {len(jax.tree.leaves(batch)[0])} examples the averaged weights have a"
            f" loss of {mean.mean():.4g} and the last ones {own.mean():.4g}; the averaged ones are"
            " evaluated and exported",
            f"train on: the average follows; or in a new workdir lower train.ema_decay"
            f" ({run.train.ema_decay:g})",
        )


def _another(cond: Arrays) -> np.ndarray:
    """For each of n conditions the number of another one, if there is one that differs."""
    rows = list(zip(*(digests(np.asarray(x)) for x in jax.tree.leaves(cond)), strict=True))
    n = len(rows)
    before = ([j % n for j in range(i - 1, i - n, -1)] for i in range(n))
    return np.array(
        [next((j for j in js if rows[j] != rows[i]), js[0]) for i, js in enumerate(before)]
    )


def worth(run: Workdir, params: Params, batch: Arrays) -> Iterator[Finding]:
    """What the own condition saves of the squared error, against another example's."""
    stage = run.stage
    x_0, cond = stage.data(params, batch)
    n = len(x_0)
    if n < 2:
        return
    other = jax.tree.map(lambda x: x[_another(cond)], cond)
    saved = np.zeros(n)
    for i in range(ROUNDS):
        # The noisier half: there the condition says what x_t does not.
        steps = stage.diffusion.steps
        t = steps - 1 - (jnp.arange(n) * ROUNDS + i) * steps // (2 * n * ROUNDS)
        noise = jax.random.normal(jax.random.key(i), x_0.shape)
        process = stage.diffusion.process()
        x_t = gaussian.q_sample(process, x_0, t, noise)
        target = gaussian.target(stage.diffusion, process, x_0, t, noise)
        wrong = (np.asarray(predict(stage, params, c, x_t, t)) - target for c in (cond, other))
        errors = [np.mean(w**2, axis=tuple(range(1, x_0.ndim))) for w in wrong]
        saved += (errors[1] - errors[0]) / ROUNDS
    spread = saved.std(ddof=1) / np.sqrt(n)
    if saved.mean() < SURE * spread or saved.mean() <= 0:
        yield error(
            f"{stage.kind}_ignores_{stage.obeys}",
            f"on {n} training examples the squared error with their own {stage.obeys} is smaller by"
            f" {saved.mean():.2g} ± {spread:.2g} than with those of others: no difference is seen",
            "train longer; if it stays so, check that captions belong to their pictures, that"
            " config.clip is the CLIP meant, and that conditions are not dropped too often",
        )
