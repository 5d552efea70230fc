"""Errors meant for the person at the keyboard, and the one place that prints them."""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
import warnings
from collections.abc import Callable, Iterable


class UserError(Exception):
    """Something the user gave is wrong.

    The message is one line that names the field, the value, what was expected
    and what to do about it. Commands print it without a traceback.
    """


def wrong(field: str, got: object, expected: str, do: str = "") -> UserError:
    """The error for a value that is not what a field takes; to be raised by the caller.

        raise wrong("train.steps", 0, "1 or more", "set --config.train.steps")

    Args:
        field: what the user knows the value by: a flag, a config field, a file.
        got: the value.
        expected: what would have been right.
        do: what to do about it, where that does not follow.
    """
    if getattr(got, "shape", None) == ():  # a number of NumPy's or JAX's, unless it is traced
        with contextlib.suppress(Exception):
            got = got.item()
    return UserError(f"{field}: got {got!r}, expected {expected}" + (f"; {do}" if do else ""))


def one_line(error: BaseException, most: int | None = 200) -> str:
    """What an error says, on one line of at most `most` characters; its type if it says nothing."""
    return (" ".join(str(error).split()) or type(error).__name__)[:most]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question that names the nearest of `known`; "" where none is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]}?" if close else ""


def run_command(main: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
    """Run a command's `main`; a `UserError` becomes one line on stderr and exit status 1.

    A warning becomes one line, too.
    """
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"error: {one_line(error, None)}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # whoever read stdout has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
