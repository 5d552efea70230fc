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
import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from jax.sharding import Mesh

from unclip_jax.common import config as settings
from unclip_jax.common import grids
from unclip_jax.common.files import write_text
from unclip_jax.errors import UserError
from unclip_jax.parallel import distributed, sharding
from unclip_jax.parallel.cpu import devices as cpu_devices
from unclip_jax.training import step as steps
from unclip_jax.training import writers
from unclip_jax.training.changes import Change
from unclip_jax.training.checkpoints import Checkpoints, disk_in_words
from unclip_jax.training.config import TrainConfig
from unclip_jax.training.copies import Copies
from unclip_jax.training.feed import BatchIterator, Feed
from unclip_jax.training.monitor import Monitor
from unclip_jax.training.optimizers import Params, make_optimizer, trained
from unclip_jax.training.preemption import Preemption
from unclip_jax.training.profile import Profiler, Span
from unclip_jax.training.resume import Complete, begin, kept
from unclip_jax.training.step import LossFn, StepFn, TrainState, Window
from unclip_jax.training.workdir import Workdir

Evaluate = Callable[[Params, int], Mapping[str, float]]
Preview = Callable[[Params, int], list[tuple[np.ndarray, str]]]

# How many steps the host may be ahead of the devices. Enough that they never wait for it; few
# enough that queued batches take little memory and a SIGTERM is answered soon.
_IN_FLIGHT = 4

# What a run is told to go on with that stopped at a higher learning rate: a step of Adam's moves
# every weight by about the rate.
HIGHEST_RATE = 1e-3


class NotFinite(UserError):
    """A loss or gradient was not finite.

    Attributes:
        rate: a learning rate to go on with, in the same workdir.
    """

    def __init__(self, message: str, rate: float) -> None:
        """Say what happened."""
        super().__init__(message)
        self.rate = rate


@dataclasses.dataclass(frozen=True)
class _Run:
    """What the loop works with; `_train_steps` is the loop."""

    config: TrainConfig
    place: Workdir
    description: dict[str, Any]
    checkpoints: Checkpoints
    copies: Copies | None
    report: writers.Report
    preemption: Preemption
    feed: Feed
    mesh: Mesh
    monitor: Monitor
    profiler: Profiler
    evaluate: Evaluate | None
    preview: Preview | None
    ends: Callable[[int], bool]
    compiled: bool

    def due(self, every: int, step: int, last: bool) -> bool:
        return every > 0 and (step % every == 0 or last)

    def is_last(self, step: int) -> bool:
        return step == self.config.steps or self.ends(step)

    def log(self, step: int, window: Window, saving: bool) -> None:
        """Write the averages since the last log; stop if a step among them was not finite."""
        self.place.check()
        averages, bad_step = steps.read_window(window)
        if bad_step is not None:
            raise self._not_finite(bad_step)
        self.report.write_scalars(step, averages | self.monitor.read(step, saving))

    def _not_finite(self, step: int) -> NotFinite:
        self.checkpoints.wait()
        good = self.checkpoints.latest()
        where = self.checkpoints.folder
        last = f"the last good checkpoint is step {good} in {where}" if good else "none was saved"
        goes = f"go on from step {good}" if good else "begin anew, as in a new workdir"
        rate = min(self.config.learning_rate / 10, HIGHEST_RATE)
        return NotFinite(
            f"step {step}: the loss or its gradient is not finite, so training stopped ({last});"
            f" check the data; lower train.learning_rate ({self.config.learning_rate:g}) or set"
            f" train.grad_clip ({self.config.grad_clip:g}) to {goes}, such as with"
            f" --config.train.learning_rate={rate:g}",
            rate,
        )

    def show(self, state: TrainState, step: int, last: bool) -> dict[str, float]:
        """Evaluate and draw a preview with the averaged weights, as far as they are due.

        All processes do it together, on weights that stay split as they are. Returns the figures,
        in every process.
        """
        evaluating = self.evaluate is not None and self.due(self.config.eval_every, step, last)
        previewing = self.preview is not None and self.due(self.config.preview_every, step, last)
        if not evaluating and not previewing:
            return {}
        with self.monitor.overhead("evaluate"):
            params = _to_look_at(state.averaged, self.mesh)
            figures: dict[str, float] = {}
            if evaluating:
                figures = {name: float(v) for name, v in self.evaluate(params, step).items()}
                self.report.write_scalars(step, {f"eval/{name}": v for name, v in figures.items()})
            if previewing and (pictures := self.preview(params, step)) and distributed.is_lead():
                self._draw(pictures, step)
            return distributed.gather(figures)[0]

    def save(
        self, step: int, state: TrainState, position: Any, figures: Mapping[str, float]
    ) -> None:
        """Begin to write a checkpoint."""
        with self.monitor.overhead("checkpoint"):
            self.report.flush()
            self.place.check()
            positions = self.feed.positions(position)
            self.checkpoints.save(step, kept(state), positions, self.description, figures)

    def copy(self, step: int, state: TrainState, position: Any) -> None:
        """Begin to write a copy on this host's disk."""
        with self.monitor.overhead("checkpoint"):
            positions = self.feed.positions(position)
            self.copies.save(step, kept(state), positions, self.description)

    def tell_of_compiling(self, step_fn: StepFn, state: TrainState, batch: Any) -> None:
        """Say that the step is compiled next, and about how long that takes."""
        with jax.transfer_guard("disallow"):
            seconds = steps.about_to_compile(step_fn, state, batch)
        about = f"{seconds / 60:.0f} minutes" if seconds > 100 else f"{max(1, round(seconds))} s"
        self.report.progress.line(f"compiling, about {about}, or less if that was done before")

    def stop(self, step: int) -> None:
        """End after a signal, once everything is saved."""
        self.checkpoints.wait()
        self.report.progress.line(
            f"stopped by SIGTERM; step {step} is saved, the same command goes on"
        )
        raise SystemExit(0)

    def _draw(self, pictures: list[tuple[np.ndarray, str]], step: int) -> None:
        images, captions = zip(*pictures, strict=True)
        grid = grids.captioned_grid(images, captions, title=f"step {step}")
        path = self.place.local / "previews" / f"step_{step:08d}.png"
        grids.save_png(grid, path, {"step": str(step)})
        self.report.write_image(step, "preview", np.asarray(grid))


def _to_look_at(params: Params, mesh: Mesh) -> Params:
    """Params where figures are computed: of a CPU's devices on the first, else where they are.

    Figures are of whole batches, which a CPU's devices do not share.
    """
    return params if jax.process_count() > 1 else cpu_devices.for_rows(params, 1, mesh)[0]


def _train_steps(
    run: _Run, loss_fn: LossFn, step_fn: StepFn, state: TrainState, start: int
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
    place = Workdir(workdir)
    described = dict(description) | {"train": settings.to_dict(config)}
    described = json.loads(json.dumps(described, allow_nan=False))
    preemption, feed = Preemption(), Feed(batches, config, mesh)

    with contextlib.ExitStack() as stack:
        stack.enter_context(disk_in_words(place.name))
        stack.enter_context(place.owned())
        stack.enter_context(preemption.in_force())
        checkpoints = stack.enter_context(Checkpoints(place.checkpoints, config))
        copies = Copies(place.run()) if config.local_every else None
        start, state, changes = begin(
            place, checkpoints, copies, feed, described, complete, init_params, config, mesh
        )
        silent = not distributed.is_lead()
        report = writers.Report(place.local, config.steps, start, silent=silent)
        stack.enter_context(contextlib.closing(report))
        monitor = Monitor(place.local, start, began, config, mesh.size, report.progress.line)
        stack.enter_context(monitor)
        profiler = Profiler(profile, place.local / "profile", start)
        stack.enter_context(contextlib.closing(profiler))
        run = _Run(
            config=config,
            place=place,
            description=described,
            checkpoints=checkpoints,
            copies=copies,
            report=report,
            preemption=preemption,
            feed=feed,
            mesh=mesh,
            monitor=monitor,
            profiler=profiler,
            evaluate=evaluate,
            preview=preview,
            ends=ends,
            compiled=step_fn is not None,
        )
        if distributed.is_lead():
            _introduce(run, state.params, start, changes)
        if step_fn is None:
            step_fn = steps.make_train_step(loss_fn, make_optimizer(config), config, mesh)
        state = _train_steps(run, loss_fn, step_fn, state, start)
        checkpoints.wait()
        _finish(run, state, export)
        if copies is not None:
            copies.forget()
    return state


def _finish(run: _Run, state: TrainState, export: Callable[[Params, int], None] | None) -> None:
    """What is done once training is over: export the averaged params, draw the curves."""
    step = int(state.step)
    if export is not None:
        params = _to_look_at(state.averaged, run.mesh)
        if jax.process_count() > 1:
            params = distributed.fetch(params, lead_only=True)
        if distributed.is_lead():
            export(params, step)
    if distributed.is_lead():
        if step < run.config.steps:  # its time was over
            _describe(run, run.description["train"] | {"steps": step})
        writers.plot_metrics(run.place.local)
    distributed.gather(None)  # no process ends before the lead has written everything


def _describe(run: _Run, train: Mapping[str, Any]) -> str:
    """Write description.json, with these settings of the loop; its text."""
    text = json.dumps(run.description | {"train": train}, indent=2, ensure_ascii=False)
    write_text(run.place.local / "description.json", text + "\n")
    return text


def _introduce(run: _Run, params: Params, start: int, changes: list[Change]) -> None:
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
