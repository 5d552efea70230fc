"""A fault found in a run: how bad it is, what shows it, and what to do."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")

# By how much a figure may be worse than it should before the doctor speaks.
TENTH = 0.1


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing to know about a run.

    Attributes:
        severity: "error": the run does not do what it is for; "warning": it does so worse than it
            could; "note": worth knowing, nothing is wrong.
        name: which finding this is; does not change between versions.
        evidence: what shows it, with the figures.
        advice: what to do.
    """

    severity: Severity
    name: str
    evidence: str
    advice: str


error, warning, note = (functools.partial(Finding, severity) for severity in SEVERITIES)
