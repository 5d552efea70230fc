"""One training loop for every stage: it imports no model and is handed a loss.

    train(loss_fn=..., init_params=..., batches=..., config=..., workdir=..., description=...)

Step n + 1 is a function of the state after step n, the next batch and `fold_in(key(seed), n)`, and
of nothing else; a checkpoint holds that state and the position in the data. So running the same
command again goes on from the last checkpoint, bit for bit as if nothing had happened.
See docs/training.md.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from clu import parameter_overview
from jax.sharding import Mesh

from unclip_jax.common import config as settings
from unclip_jax.common.files import write_text
from unclip_jax.parallel import distributed, sharding
from unclip_jax.training import step as steps
from unclip_jax.training import writers
from unclip_jax.training.changes import Change
from unclip_jax.training.config import TrainConfig
from unclip_jax.training.feed import BatchIterator, Feed
from unclip_jax.training.optimizers import Params, make_optimizer, trained
from unclip_jax.training.profile import Span
from unclip_jax.training.resume import Complete, begin
from unclip_jax.training.run import Evaluate, OpenRun, Preview, open_run, to_look_at
from unclip_jax.training.step import LossFn, StepFn, TrainState, Window
from unclip_jax.training.workdir import Workdir

# How many steps the host may be ahead of the devices. Enough that they never wait for it; few
# enough that queued batches take little memory and a SIGTERM is answered soon.
_IN_FLIGHT = 4


def _train_steps(
    run: OpenRun, loss_fn: LossFn, step_fn: StepFn, state: TrainState, start: int
) -> TrainState:
    """Steps start + 1 to config.steps.

    At a step, in this order: log, evaluate and preview, save. What a log line averages begins
    after the last log or checkpoint. Hence a run that goes on from a checkpoint writes the lines
    that the uninterrupted run writes.
    """
    config, feed, monitor = run.config, run.feed, run.monitor
    window: Window | None = None
    in_flight: collections.deque[jax.Array] = collections.deque()
    batch, position = None, None
    if start < config.steps:
        with monitor.input():
            batch, position = feed.take(start + 1)
        monitor.count_flops(loss_fn, state.params, batch)
        if not run.compiled:
            run.tell_of_compiling(step_fn, state, batch)
    began = time.monotonic()
    for step in range(start + 1, config.steps + 1):
        run.profiler.before(step)
        with monitor.step(step) as result, jax.transfer_guard("disallow"):
            # All that a step reads is on the devices already.
            state, metrics = step_fn(state, batch)
            opened = steps.open_window(metrics)
            window = opened if window is None else steps.merge_windows(window, opened)
            result.append(metrics["loss"])
        if step == start + 1 and not run.compiled:
            metrics["loss"].block_until_ready()
            run.report.progress.line(f"the first step took {time.monotonic() - began:.0f} s")
        here = position
        if step < config.steps:
            # The devices compute this step while the host reads and sends the next batch.
            with monitor.input():
                batch, position = feed.take(step + 1)
        in_flight.append(metrics["loss"])
        if len(in_flight) > _IN_FLIGHT:
            in_flight.popleft().block_until_ready()
        if said := run.profiler.after(step, metrics["loss"]):
            run.report.progress.line(said)
        run.report.progress.update()

        stopping, last = run.preemption.stops_after(step), run.is_last(step)
        saving = stopping or last or run.due(config.checkpoint_every, step, last)
        comparing = bool(config.best) and run.due(config.eval_every, step, last)
        if saving or comparing or run.due(config.log_every, step, last):
            run.log(step, window, saving)
            window = None
        figures = run.show(state, step, last)
        if saving or (comparing and run.checkpoints.is_best(figures)):
            run.save(step, state, here, figures)
        elif run.copies is not None and run.due(config.local_every, step, last):
            run.copy(step, state, here)
        if stopping and not last:
            run.stop(step)
        if last:
            break
        if window is None or step <= start + 2:  # the first two steps compile
            monitor.restart(step)
    return state


def train(
    *,
    loss_fn: LossFn,
    init_params: Callable[[], Params],
    batches: BatchIterator,
    config: TrainConfig,
    workdir: str | Path,
    description: Mapping[str, Any],
    complete: Complete = dict,
    mesh: Mesh | None = None,
    evaluate: Evaluate | None = None,
    preview: Preview | None = None,
    export: Callable[[Params, int], None] | None = None,
    profile: Span | None = None,
    step_fn: StepFn | None = None,
    ends: Callable[[int], bool] = lambda step: False,
) -> TrainState:
    """Train from the beginning, or from the last checkpoint in `workdir`, to `config.steps`.

    Args:
        loss_fn: (params, batch, key) -> (mean loss over the batch, dict of scalar metrics); it is
            traced.
        init_params: makes the nested dict of initial params; its "network" is trained, all else
            in it stays as it is. Networks among that (other names that end in "network") are not
            in the checkpoints: it must make them the same again, which `description` makes sure
            of. A run that goes on calls it for those and for shapes alone, not at all if it has
            `shapes()` and no such networks.
        batches: the data; an interrupted run restores its position.
        config: settings of the loop.
        workdir: a folder of this run alone, created if missing; or gs://BUCKET/FOLDER.
        description: JSON-able; a run resumes only under the same description (and the same
            `config`, but for `changes.CHANGEABLE`).
        complete: adds to a checkpoint's description the fields that it was written too early for.
        mesh: of all devices, by default along "data"; a run may resume on another mesh.
        evaluate: (averaged params, step) -> figures on held-out data.
        preview: (averaged params, step) -> uint8 images [h, w, 3] with captions.
        export: (averaged params, step), called once training is over.
        profile: steps to trace, into `workdir`/profile.
        step_fn: a step that is compiled already, as `make_train_step` makes it of the same loss,
            settings and mesh.
        ends: asked of each step whether it is the last one, to be evaluated, shown and saved as
            that of `config.steps` is: of the same in every process.

    With several processes every one of them calls this, and `evaluate` and `preview` are called in
    all of them, with params that span them; they must compute the same everywhere. `export` is
    called in the lead process, with NumPy arrays. It alone writes, but for checkpoints, of which
    every process writes its part: `workdir` must be the same place for all.

    Returns:
        The state after the last step, on the mesh.

    Raises:
        UserError: a workdir in use or of another run, a damaged checkpoint, data that ends or does
            not fit; `NotFinite` for a loss or gradient that is not finite.
        SystemExit: with status 0, after SIGTERM, once everything is saved.
    """
    distributed.check_initialized()
    began = time.perf_counter()
    mesh = sharding.make_mesh() if mesh is None else mesh
    sharding.check_batch_size(config.batch_size, mesh, config.grad_accum)
    if profile is not None:
        profile.check(config)
    described = dict(description) | {"train": settings.to_dict(config)}
    described = json.loads(json.dumps(described, allow_nan=False))
    feed = Feed(batches, config, mesh)

    with contextlib.ExitStack() as stack:
        begins = functools.partial(begin, feed, described, complete, init_params, config, mesh)
        given = {"description": described, "config": config, "feed": feed, "mesh": mesh}
        given |= {"evaluate": evaluate, "preview": preview, "ends": ends}
        given["compiled"] = step_fn is not None
        run, begun = open_run(stack, Workdir(workdir), began, profile, begins, given)
        start, state, changes = begun
        if distributed.is_lead():
            _introduce(run, state.params, start, changes)
        if step_fn is None:
            step_fn = steps.make_train_step(loss_fn, make_optimizer(config), config, mesh)
        state = _train_steps(run, loss_fn, step_fn, state, start)
        run.checkpoints.wait()
        _finish(run, state, export)
    return state


def _finish(run: OpenRun, state: TrainState, export: Callable[[Params, int], None] | None) -> None:
    """What is done once training is over: export the averaged params, draw the curves."""
    step = int(state.step)
    if export is not None:
        params = to_look_at(state.averaged, run.mesh)
        if jax.process_count() > 1:
            params = distributed.fetch(params, lead_only=True)
        if distributed.is_lead():
            export(params, step)
    if distributed.is_lead():
        if step < run.config.steps:  # its time was over
            _describe(run, run.description["train"] | {"steps": step})
        writers.plot_metrics(run.place.local)
    if run.copies is not None:
        run.copies.forget()
    distributed.gather(None)  # no process ends before the lead has written everything


def _describe(run: OpenRun, train: Mapping[str, Any]) -> str:
    """Write description.json, with these settings of the loop; its text."""
    text = json.dumps(run.description | {"train": train}, indent=2, ensure_ascii=False)
    write_text(run.place.local / "description.json", text + "\n")
    return text


def _introduce(run: OpenRun, params: Params, start: int, changes: list[Change]) -> None:
    """Write what the run is: description.json, parameters.txt, changes.jsonl, a line or two."""
    text = _describe(run, run.description["train"])
    table = parameter_overview.get_parameter_overview(params, include_stats=False)
    write_text(run.place.local / "parameters.txt", table + "\n")
    # TensorBoard renders Markdown, in which four spaces begin code.
    run.report.write_text(start, "description", "    " + text.replace("\n", "\n    "))

    count, moved = (
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(part))
        for part in (params, trained(params))
    )
    where = sharding.describe(run.mesh)
    run.report.progress.line(
        f"{count:,} parameters, {moved:,} of them trained, on {where['devices']} x {where['kind']}"
        f" ({where['mesh']})"
    )
    if start:
        run.report.progress.line(f"resumed from step {start} of {run.config.steps}")
    for change in changes:
        run.report.progress.line(f"from step {start} on: {change}")
    writers.write_changes(run.place.local, start, changes)
