"""How much threads may hold in memory together."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class Budget:
    """At most so much in the hands of all threads together; one thread always may."""

    def __init__(self, most: int):
        """`most` is in whatever `holding` is asked for: bytes, pixels."""
        self._most, self._held, self._changed = most, 0, threading.Condition()

    @contextlib.contextmanager
    def holding(self, amount: int) -> Iterator[None]:
        """Wait until `amount` fits, and hold it."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + amount <= self._most)
            self._held += amount
        try:
            yield
        finally:
            with self._changed:
                self._held -= amount
                self._changed.notify_all()
