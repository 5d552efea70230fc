"""What the loop works with: a run in its workdir, what it logs, shows and saves."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from unclip_jax.common import grids
from unclip_jax.errors import UserError
from unclip_jax.parallel import distributed
from unclip_jax.parallel.cpu import devices as cpu_devices
from unclip_jax.training import step as steps
from unclip_jax.training import writers
from unclip_jax.training.checkpoints import Checkpoints, disk_in_words
from unclip_jax.training.config import TrainConfig
from unclip_jax.training.copies import Copies
from unclip_jax.training.feed import Feed
from unclip_jax.training.monitor import Monitor
from unclip_jax.training.optimizers import Params
from unclip_jax.training.preemption import Preemption
from unclip_jax.training.profile import Profiler, Span
from unclip_jax.training.resume import Begun, kept
from unclip_jax.training.step import StepFn, TrainState, Window
from unclip_jax.training.workdir import Workdir, sent

Evaluate = Callable[[Params, int], Mapping[str, float]]
Preview = Callable[[Params, int], list[tuple[np.ndarray, str]]]

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
class OpenRun:
    """What the loop works with; `loop` is the loop."""

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
        """Whether something that is done every so many steps is, after this one."""
        return every > 0 and (step % every == 0 or last)

    def is_last(self, step: int) -> bool:
        """Whether the run ends with this step."""
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
            params = to_look_at(state.averaged, self.mesh)
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
            sent(self.place)  # the metrics up to a checkpoint are there before it is
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
        self.report.progress.line(compiling(seconds))

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


def compiling(seconds: float) -> str:
    """What is said before a program is compiled that takes about so long."""
    about = f"{seconds / 60:.0f} minutes" if seconds > 100 else f"{max(1, round(seconds))} s"
    return f"compiling, about {about}, or less if that was done before"


def to_look_at(params: Params, mesh: Mesh) -> Params:
    """Params where figures are computed: of a CPU's devices on the first, else where they are.

    Figures are of whole batches, which a CPU's devices do not share.
    """
    return params if jax.process_count() > 1 else cpu_devices.for_rows(params, 1, mesh)[0]


def open_run(
    stack: contextlib.ExitStack,
    place: Workdir,
    began: float,
    profile: Span | None,
    begins: Callable[[Workdir, Checkpoints, Copies | None], Begun],
    given: dict[str, Any],
) -> tuple[OpenRun, Begun]:
    """A run in its workdir, which is its own as long as `stack` is open, and where it begins."""
    config = given["config"]
    preemption = Preemption()
    stack.enter_context(disk_in_words(place.name))
    stack.enter_context(place.owned())
    stack.enter_context(preemption.in_force())
    checkpoints = stack.enter_context(Checkpoints(place.checkpoints, config))
    copies = Copies(place.run()) if config.local_every else None
    begun = begins(place, checkpoints, copies)
    silent = not distributed.is_lead()
    report = writers.Report(place.local, config.steps, begun.step, silent=silent)
    stack.enter_context(contextlib.closing(report))
    say, devices = report.progress.line, given["mesh"].size
    monitor = Monitor(place.local, begun.step, began, config, devices, say)
    stack.enter_context(monitor)
    profiler = Profiler(profile, place.local / "profile", begun.step)
    stack.enter_context(contextlib.closing(profiler))
    run = OpenRun(
        place=place,
        checkpoints=checkpoints,
        copies=copies,
        report=report,
        preemption=preemption,
        monitor=monitor,
        profiler=profiler,
        **given,
    )
    return run, begun
