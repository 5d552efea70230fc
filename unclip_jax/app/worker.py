"""One queue in front of the device: jobs run one after the other, whole or until cancelled.

A sampler that is watched reports its progress between stretches of a quarter of a second or one
step, whichever is longer, and what the report raises ends it (see `diffusion.progress`). So a job
that runs is cancelled: nothing more is computed for it, and the device goes to the next.
"""

from __future__ import annotations

import collections
import logging
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from unclip_jax.errors import UserError, one_line
from unclip_jax.pipeline.drawing import Progress
from unclip_jax.weights.known import Unfamiliar

Task = Callable[[Progress], Any]

_PACKAGE = Path(__file__).parents[1]
_log = logging.getLogger(__name__)


class Cancelled(Exception):
    """Raised by a job's `progress` to end what it runs."""


class Job:
    """A task in the queue, or out of it again.

    Attributes:
        owner: whose it is; an owner has at most one at a time.
        task: what to do, called as task(progress).
        stages: what has been sampled, {stage: (step, steps)}, in the order of beginning.
        hint: HTML that the page shows while it is drawn, and after; "" for none.
        draft: a stage and its pictures so far, uint8 [b, s, s, 3]; None before there are any.
        notes: warnings of this package meanwhile, such as of a caption that was cut.
        result: what the task returned; None until it has, and when it failed.
        error: in words, what went wrong, or that it was cancelled; "" when nothing did.
        cancelled: whether it was asked to end.
        over: set when nothing more happens.
    """

    def __init__(self, owner: str, task: Task, hint: str = "") -> None:
        """Wait for a worker."""
        self.owner, self.task, self.hint = owner, task, hint
        self.stages: dict[str, tuple[int, int]] = {}
        self.draft: tuple[str, np.ndarray] | None = None
        self.notes: list[str] = []
        self.result: Any = None
        self.error = ""
        self.cancelled = False
        self.over = threading.Event()

    def progress(self, stage: str, step: int, steps: int) -> None:
        """What the task reports to.

        Raises:
            Cancelled: the job is.
        """
        if self.cancelled:
            raise Cancelled(f"{stage}: cancelled at step {step} of {steps}")
        self.stages[stage] = (step, steps)

    def look(self, stage: str, made: Any) -> None:
        """Keep what a sampler has so far, if these are pictures; `progress` comes after it."""
        if getattr(made, "ndim", 0) == 4 and made.shape[-1] == 3:
            self.stages.setdefault(stage, (0, 1))
            self.draft = stage, np.rint((np.clip(made, -1, 1) + 1) * 127.5).astype(np.uint8)


class Watch:
    """What a task reports to: called with how far it is, and shown what there is so far."""

    def __init__(self, job: Job) -> None:
        """Report to a job."""
        self._job, self.look = job, job.look

    def __call__(self, stage: str, step: int, steps: int) -> None:
        """See `Job.progress`."""
        self._job.progress(stage, step, steps)


class Worker:
    """Runs jobs in their order, in a thread of its own."""

    def __init__(self, waiting: int) -> None:
        """Let at most `waiting` jobs wait while one runs."""
        self.limit = waiting
        self._queue: collections.deque[Job] = collections.deque()
        self._running: Job | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="device", daemon=True)
        self._thread.start()

    def submit(self, owner: str, task: Task, *, hint: str = "") -> Job:
        """Put a task at the end of the queue.

        Raises:
            UserError: the queue is full, or the owner has a job in it already.
        """
        with self._changed:
            if any(job.owner == owner for job in self._jobs()):
                raise UserError(
                    "your last pictures are not finished; wait for them, or press Cancel"
                )
            if len(self._jobs()) > self.limit:  # one of them runs, or is about to
                raise UserError(
                    f"the queue is full: {self.limit} others are waiting; try again in a minute"
                )
            job = Job(owner, task, hint)
            self._queue.append(job)
            self._changed.notify_all()
        return job

    def ahead(self, job: Job) -> int:
        """How many jobs come before this one; 0 when it runs or is over."""
        with self._changed:
            jobs = self._jobs()
            return jobs.index(job) if job in jobs else 0

    def cancel(self, owner: str) -> bool:
        """End the owner's job; False where there is none."""
        with self._changed:
            jobs = [job for job in self._jobs() if job.owner == owner]
            for job in jobs:
                self.cancel_job(job)
        return bool(jobs)

    def cancel_job(self, job: Job) -> None:
        """End this job, if it runs at its next report; nothing happens where it is over."""
        with self._changed:
            if job.over.is_set():
                return
            job.cancelled = True
            if job in self._queue:
                self._queue.remove(job)
                job.error = "cancelled before it began"
                job.over.set()

    def close(self) -> None:
        """Cancel everything, and return when the device is idle."""
        with self._changed:
            self._closed = True
            for job in self._jobs():
                self.cancel_job(job)
            self._changed.notify_all()
        self._thread.join()

    def _jobs(self) -> list[Job]:
        return [self._running] * (self._running is not None) + list(self._queue)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                job = self._running = self._queue.popleft()
            error = _run(job)
            with self._changed:
                self._running = None
                job.error = error
                job.over.set()


def _run(job: Job) -> str:
    """What went wrong, in words; "" and a result when nothing did."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            warnings.simplefilter("ignore", Unfamiliar)  # which the page says by itself
            result = job.task(Watch(job))
    except Exception as error:
        if isinstance(error, Cancelled):
            return "cancelled"
        if isinstance(error, UserError):
            return one_line(error, 10_000)
        _log.exception("a job failed")
        if "RESOURCE_EXHAUSTED" in str(error) or isinstance(error, MemoryError):
            return "out of memory; ask for fewer pictures"
        return f"the program failed ({type(error).__name__}); the server's log says more"
    if job.cancelled:  # after its last report
        return "cancelled"
    job.result = result
    ours = [warning for warning in caught if Path(warning.filename).is_relative_to(_PACKAGE)]
    job.notes = list(dict.fromkeys(" ".join(str(warning.message).split()) for warning in ours))
    return ""
