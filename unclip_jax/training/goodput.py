"""Where the time of a run goes, over all its lives: `WORKDIR/goodput.json`.

A run that is killed repeats the steps since its last checkpoint. The time that they had taken was
lost: it is taken off what was productive when the run goes on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from unclip_jax.common.files import write_text

GOODPUT_FILE = "goodput.json"
PRODUCTIVE, LOST = "productive", "lost"
OVERHEADS = ("input", "compile", "checkpoint", "evaluate")
_KEPT = 64  # checkpoints of which the productive time is known


class Goodput:
    """Seconds of a run by what they were spent on.

    Attributes:
        seconds: "productive", each of `OVERHEADS`, and "lost".
    """

    def __init__(self, workdir: Path, start: int, *, reads: bool = True) -> None:
        """Go on from what `workdir` says, at the checkpoint of step `start`; 0 is the beginning."""
        self._path = workdir / GOODPUT_FILE
        self.seconds = dict.fromkeys((PRODUCTIVE, *OVERHEADS, LOST), 0.0)
        self._at: dict[int, float] = {}
        if reads and self._path.is_file():
            self._read(start)

    def _read(self, start: int) -> None:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            seconds = {name: float(found["seconds"][name]) for name in self.seconds}
            at = {int(step): float(value) for step, value in found["productive_at"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            return  # it says nothing that a run depends on
        kept = at.get(start, 0.0 if start == 0 else seconds[PRODUCTIVE])
        seconds[LOST] += max(0.0, seconds[PRODUCTIVE] - kept)
        self.seconds = seconds | {PRODUCTIVE: min(kept, seconds[PRODUCTIVE])}
        self._at = {step: value for step, value in at.items() if step <= start}

    def add(self, step: int, wall: float, overheads: Mapping[str, float], saved: bool) -> None:
        """Count `wall` seconds up to `step`, which may be `saved`; what is no overhead is work."""
        spent = {name: min(overheads.get(name, 0.0), wall) for name in OVERHEADS}
        for name, value in spent.items():
            self.seconds[name] += value
        self.seconds[PRODUCTIVE] += max(0.0, wall - sum(spent.values()))
        if saved:
            self._at[step] = self.seconds[PRODUCTIVE]
            self._at = dict(sorted(self._at.items())[-_KEPT:])

    def shares(self) -> dict[str, float]:
        """Each part of all the time; "goodput" is the productive one."""
        total = sum(self.seconds.values())
        if not total:
            return {}
        parts = {name: value / total for name, value in self.seconds.items()}
        return {"goodput": parts.pop(PRODUCTIVE)} | parts

    def write(self) -> None:
        """Keep it for the next life of the run."""
        at = {str(step): round(value, 3) for step, value in self._at.items()}
        seconds = {name: round(value, 3) for name, value in self.seconds.items()}
        write_text(self._path, json.dumps({"seconds": seconds, "productive_at": at}) + "\n")
