"""`--profile=START:STOP`: what devices and hosts do in some steps, for TensorBoard's profiler."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import jax

from unclip_jax.errors import wrong
from unclip_jax.training.config import TrainConfig


class Span(NamedTuple):
    """Steps to trace, the first and the last of them."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> Span | None:
        """What --profile says; None for nothing. UserError for anything but START:STOP."""
        if not text:
            return None
        found = re.fullmatch(r"(\d+):(\d+)", text)
        if found is None or not 0 < int(found[1]) <= int(found[2]):
            raise wrong("--profile", text, "START:STOP, the first and the last step, as in 100:105")
        return cls(int(found[1]), int(found[2]))

    def check(self, config: TrainConfig) -> None:
        """Raise UserError where the run ends before."""
        if self.last > config.steps:
            text, most = f"{self.first}:{self.last}", f"steps up to train.steps ({config.steps})"
            raise wrong("--profile", text, most)


class Profiler:
    """Traces some steps of a run, in each of its processes, into a folder."""

    def __init__(self, span: Span | None, folder: Path, start: int) -> None:
        """Trace `span`; of a run that goes on from step `start`, what is left of it."""
        self._folder, self._running = folder, False
        self._span = span if span is not None and start < span.last else None

    def before(self, step: int) -> None:
        """Call it before each step."""
        if self._span is not None and not self._running and step >= self._span.first:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, result: jax.Array) -> str:
        """Call it after each step, with a result of it. A line to say, once all is written."""
        if not self._running or (self._span is not None and step < self._span.last):
            return ""
        result.block_until_ready()
        span = self._span
        self.close()
        return f"profile of steps {span.first} to {span.last}: tensorboard --logdir {self._folder}"

    def close(self) -> None:
        """End a trace that still runs."""
        if self._running:
            jax.profiler.stop_trace()
        self._running, self._span = False, None
