"""Checks of single values, each in one line where it is called; what is wrong is a `UserError`.

steps = checks.count("train.steps", steps)
eta = checks.number("eta", eta, least=0, most=1)
schedule = checks.choice("schedule", schedule, SCHEDULES)
checks.shape("images", images, (None, 64, 64, 3))

Numbers may be of any type: Python's, NumPy's and JAX's, and arrays without axes.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from unclip_jax.errors import wrong

T = TypeVar("T")


def plain(value: Any) -> Any:
    """A scalar of NumPy or JAX, or an array without axes, as Python's own; else what it is.

    What JAX traces has no value yet and must not come here.
    """
    return value.item() if getattr(value, "shape", None) == () else value


def count(field: str, value: Any, least: int = 1) -> int:
    """The value, if it is an integer of any type and at least `least`.

    Raises:
        UserError: it is not; a bool is no integer here.
    """
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise wrong(field, value, f"an integer, {least} or more")
    return int(value)


def number(
    field: str,
    value: Any,
    least: float | None = None,
    most: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
) -> float:
    """The value, if it is a finite number of any type within the limits.

    Args:
        field: what the user knows the value by.
        value: any.
        least: the smallest that is allowed.
        most: the largest.
        above: allowed is what is larger than this.
        below: allowed is what is smaller.

    Raises:
        UserError: it is not; a bool is no number here.
    """
    value = plain(value)
    limits = (
        (least, operator.ge, "{} or more"),
        (above, operator.gt, "above {}"),
        (most, operator.le, "{} or less"),
        (below, operator.lt, "below {}"),
    )
    given = [(limit, keeps, words) for limit, keeps, words in limits if limit is not None]
    ok = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or not all(keeps(value, limit) for limit, keeps, _ in given):
        words = "".join(", " + words.format(limit) for limit, _, words in given)
        raise wrong(field, value, f"a finite number{words}")
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
