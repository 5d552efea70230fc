"""Checks of single values, each in one line where it is called; what is wrong is a `UserError`.

steps = checks.count("train.steps", steps)
eta = checks.number("eta", eta, least=0, most=1)
schedule = checks.choice("schedule", schedule, SCHEDULES)
checks.shape("images", images, (None, 64, 64, 3))
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from unclip_jax.errors import wrong

T = TypeVar("T")


def count(field: str, value: Any, least: int = 1) -> int:
    """The value, if it is an integer of any type and at least `least`.

    Raises:
        UserError: it is not; a bool is no integer here.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise wrong(field, value, f"an integer, {least} or more")
    return int(value)


def number(field: str, value: Any, least: float | None = None, most: float | None = None) -> float:
    """The value, if it is a finite number of any type between `least` and `most`, both allowed.

    Raises:
        UserError: it is not; a bool is no number here.
    """
    ok = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or (least is not None and value < least) or (most is not None and value > most):
        low = "" if least is None else f", {least} or more"
        high = "" if most is None else f", {most} or less"
        raise wrong(field, value, f"a finite number{low}{high}")
    return float(value)


def choice(field: str, value: T, choices: Iterable[T]) -> T:
    """The value, if it is one of `choices`.

    Raises:
        UserError: it is not.
    """
    choices = tuple(choices)
    if value not in choices:
        raise wrong(field, value, f"one of {', '.join(map(str, choices))}")
    return value


def shape(field: str, array: Any, expected: Sequence[int | None]) -> None:
    """Return if `array` has the `expected` shape; None stands for any size.

    Raises:
        UserError: it has another.
    """
    found = tuple(array.shape)
    if len(found) != len(expected) or any(
        e not in (None, s) for s, e in zip(found, expected, strict=True)
    ):
        wanted = ", ".join("any" if e is None else str(e) for e in expected)
        raise wrong(f"{field}'s shape", found, f"[{wanted}]")
