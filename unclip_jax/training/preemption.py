"""Stopping in order when the machine is taken away: SIGTERM, with a little time left to save."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import jax

from unclip_jax.parallel import distributed


class Preemption:
    """Whether SIGTERM has come; while in force, the process lives on to save."""

    _requested = False

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """Catch the signal, which Python lets only the main thread do; elsewhere nothing changes.

        Where there are several processes JAX catches it, and tells the others.
        """
        several = jax.process_count() > 1
        if several or threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.signal(signal.SIGTERM, self._request)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

    def stops_after(self, step: int) -> bool:
        """Whether to stop after `step`, the same in every process; ask once for every step."""
        return distributed.stop_requested(step) if jax.process_count() > 1 else self._requested
