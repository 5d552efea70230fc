"""Commands that read a config file: absl flags whose mistakes are told in a line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from unclip_jax.errors import UserError


def parse(values: flags.FlagValues, argv: Sequence[str], command: str) -> None:
    """Read a command line into flags, one of which is --config.

    Args:
        values: the flags.
        argv: the command line without the command.
        command: how the command is called, for messages.

    Raises:
        UserError: a flag or config field that does not exist, a value of the wrong type, or a
            config file that cannot be loaded.
    """
    with _telling(argv):
        rest = values([command, *argv])
        if rest[1:]:
            raise UserError(f"argument {rest[1]!r}: not understood; flags are --name=value")


def check(values: flags.FlagValues, argv: Sequence[str], command: str, *required: str) -> None:
    """Raise UserError unless the `required` flags are given and --config holds a config."""
    with _telling(argv):
        for name in required:
            if values[name].value is None:
                raise UserError(f"--{name}: missing; see {command} --help")
        config = values["config"].value
        if not isinstance(config, ml_collections.ConfigDict):
            name = config_flags.get_config_filename(values["config"])
            raise UserError(f"--config={name}: cannot be loaded: {_why(config)}")


@contextlib.contextmanager
def _telling(argv: Sequence[str]) -> Iterator[None]:
    """Whatever goes wrong, in a line. A config file is Python, and may raise anything."""
    try:
        yield
    except UserError:
        raise
    except flags.Error as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        # A config that raises comes with its whole traceback: the last line says what it is.
        text = f"--config: {lines[-1]}" if "Traceback" in str(error) else " ".join(lines)
        raise UserError(f"{text}; see the config file for its fields") from error
    except (AttributeError, ValueError, TypeError, OSError) as error:
        raise UserError(f"--config: {error}") from error
    except Exception as error:
        given = next((word for word in argv if word.startswith("--config=")), "--config")
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{given}: cannot be loaded: {reason}; correct the file") from error


def _why(broken: Any) -> str:
    """What went wrong in a config file: ml_collections tells when a field is asked for."""
    try:
        broken.stage  # noqa: B018
    except Exception as error:
        return " ".join(str(error).split())
    return "it is no ConfigDict; get_config must return one"
