"""Progress bars: on a terminal a line that moves, in a log a line now and then."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0  # where they go into a log


class _Log:
    """Standard error for lines: what a bar does to overwrite its line is left out."""

    def write(self, text: str) -> None:
        """Write a line, if there is anything in it."""
        if line := text.strip():
            sys.stderr.write(line + "\n")

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


def bar(seconds: float = SECONDS_BETWEEN_LINES, **settings: Any) -> tqdm:
    """A bar of tqdm on standard error; `settings` are tqdm's.

    Where that is no terminal, a line comes at the beginning, each so many `seconds`, and, of a bar
    that is left, at the end.
    """
    if not sys.stderr.isatty():
        settings |= {"file": _Log(), "mininterval": seconds}
    return tqdm(**settings)
