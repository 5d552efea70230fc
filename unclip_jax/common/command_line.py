"""What commands share: how they are parsed, and configs that are given by a name or as a file.

A config comes by absl flags, so that any field is one: --config.train.steps=100. What is wrong on a
command line is told in a line.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from unclip_jax.common import extras
from unclip_jax.errors import UserError, did_you_mean, one_line, wrong

if TYPE_CHECKING:  # what --help of a command without a config does not wait for
    from absl import flags

CONFIGS = Path(__file__).parents[1] / "configs"

_ARGV: list[str] = []  # the command line at hand, where --config looks for fields

_HELP = {"-h", "--h", "-help", "--help", "-helpfull", "--helpfull"}


class Parser(argparse.ArgumentParser):
    """One that says of a wrong word which is near to it, or what to type, and all in a line.

    Attributes:
        example: a whole command line, for whom a word lacks; "" for none.
        about: what to do with a word that no flag takes, of that word; "" where nobody knows.
    """

    example: str = ""
    about: Callable[[str], str] = staticmethod(lambda word: "")

    def parse_known_args(self, args=None, namespace=None):
        """Read the words; all must be known."""
        found, left = super().parse_known_args(args, namespace)
        if left:
            word = next((word for word in left if word.startswith("-")), left[0])
            if word.startswith("-"):
                what = "no such flag"
                do = did_you_mean(word.partition("=")[0], self._option_string_actions)
            else:
                what, do = "no flag takes it", self.about(word)
            self.error("; ".join(filter(None, (f"{word!r}: {what}", do))))
        return found, left

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            expected = f"one of {', '.join(map(str, action.choices))}"
            # Subcommands alone have a dict of choices.
            about = self.about(value) if isinstance(action.choices, dict) else ""
            do = did_you_mean(str(value), action.choices) or about
            name = "/".join(action.option_strings) or action.metavar or action.dest
            self.error(str(wrong(name, value, expected, do)))

    def error(self, message: str) -> NoReturn:
        """Say in a line what is wrong, and exit with status 2."""
        lacks = self.example and "required" in message
        more = f"such as {self.example}" if lacks else f"{self.prog} --help says what there is"
        self.exit(2, f"error: {one_line(UserError(message), None)}; {more}\n")


def parser(command: str, about: str | None) -> Parser:
    """An empty parser of `unclip COMMAND`, whose help keeps the lines of `about`.

    Its `example` is the first one there.
    """
    made = Parser(
        prog=f"unclip {command}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    lines = re.sub(r" *\\\n *", " ", about or "").splitlines()
    examples = (line.partition("  #")[0].strip() for line in lines if line.startswith("    "))
    made.example = next((line for line in examples if line.startswith(made.prog + " ")), "")
    return made


class OneOrMore(argparse.Action):
    """A flag that takes one value, kept as it is, or several, kept as a list; None without it."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Set it."""
        held = getattr(namespace, self.dest)
        values = [*(held if isinstance(held, list) else [held] if held else []), *values]
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


def add_model(to: argparse.ArgumentParser) -> None:
    """Add the flags that name a model, for `UnCLIP.load`."""
    named = "model folder, gs:// too; Karlo or Kandinsky, folders or hub names (default: the box)"
    add = to.add_argument
    add("--model", nargs="+", action=OneOrMore, metavar="DIR", help=named)
    add("--dtype", choices=("float32", "bfloat16"), default="", help="of weights and compute")
    add("--t5", metavar="DIR", help="the T5 that the decoder was trained with, if with any")


def add_hosts(to: argparse.ArgumentParser) -> None:
    """Add the flags by which the processes of several hosts share the work, and what they keep."""
    add = to.add_argument
    joined = "whether the processes of several hosts draw together (default auto)"
    add("--distributed", choices=("auto", "on", "off"), default="auto", help=joined)
    add("--coordinator_address", metavar="HOST:PORT", help="of process 0")
    add("--num_processes", type=int, metavar="N", help="how many draw together")
    add("--process_id", type=int, metavar="I", help="which of them this is, from 0")
    kept = "keep each batch here until all are drawn: the same command again goes on from them"
    add("--keep", metavar="DIR", help=kept)


# What those flags set, which changes no picture.
HOST_FLAGS = ("distributed", "coordinator_address", "num_processes", "process_id", "keep")


def add_lora(to: argparse.ArgumentParser) -> None:
    """Add the flags that name adapters, for `UnCLIP.with_lora`."""
    many = {"nargs": "+", "action": "extend"}
    help = "adapters that training or unclip save wrote; several act at once"
    to.add_argument("--lora", metavar="FILE", help=help, **many)
    help = "how much each --lora changes (default: 1, as trained)"
    to.add_argument("--lora_weight", type=float, metavar="W", help=help, **many)


def configs() -> dict[str, Path]:
    """The configs that come with the package: {"emoji/clip": its file, ...}."""
    files = [file for file in sorted(CONFIGS.glob("*/*.py")) if file.stem != "base"]
    return {f"{file.parent.name}/{file.stem}": file for file in files}


def find(config: str) -> str:
    """The file that --config names, with its variant: `emoji/clip:smoke` to `/.../clip.py:smoke`.

    Args:
        config: a file, or one of `configs`; .py may be left out, and "configs/" may stand first.

    Raises:
        UserError: it is neither.
    """
    given, colon, variant = config.partition(":")
    for path in (given, f"{given}.py"):
        if os.path.isfile(path):
            return path + colon + variant
    known = configs()
    name = given.removesuffix(".py").removeprefix("configs/")
    if name not in known:
        within = [other for other in known if name in other]
        do = did_you_mean(name, within[:1] or known) or f"there are {', '.join(known)}"
        raise wrong("--config", given, "a config file, or the name of one in the package", do)
    return f"{known[name]}{colon}{variant}"


def name_of(values: flags.FlagValues) -> str:
    """How figures name the config of a command line: configs/paper/prior.py, or its own path."""
    path, colon, variant = values["config"].config_filename.partition(":")
    with contextlib.suppress(ValueError):
        path = f"configs/{Path(path).relative_to(CONFIGS).as_posix()}"
    return path + colon + variant


def define_config(values: flags.FlagValues) -> flags.FlagHolder:
    """The flag --config, and with it --config.FIELD for every field."""
    from ml_collections import config_flags

    return config_flags.DEFINE_config_file(
        "config",
        None,
        "A config of the package, such as emoji/clip, or a file.",
        flag_values=values,
        sys_argv=_ARGV,
    )


def parse(values: flags.FlagValues, argv: Sequence[str], command: str, about: str | None) -> None:
    """Read a command line into flags, one of which is --config; --help prints and exits.

    Args:
        values: the flags.
        argv: the command line without the command.
        command: its name: `unclip COMMAND`.
        about: what it is, for --help.

    Raises:
        UserError: a flag or config field that does not exist, a value of the wrong type, or a
            config file that cannot be loaded.
    """
    given = [word for word in argv if word not in _HELP]
    for i, word in enumerate(given):
        flag, equals, config = word.partition("=")
        if flag in ("-config", "--config") and equals:
            given[i] = f"{flag}={find(config)}"
        elif i and given[i - 1] in ("-config", "--config"):
            given[i] = find(word)
    _ARGV[:] = [command, *given]
    with _telling(given):
        rest = values([command, *given])
        if rest[1:]:
            do = "flags are --name=value"
            if rest[1].partition(":")[0] in configs():
                do = f"did you mean --config={rest[1]}?"
            raise UserError(f"argument {rest[1]!r}: not understood; {do}")
    if len(given) < len(argv):
        print(_help(values, command, about))
        sys.exit(0)


def with_field(argv: Sequence[str], name: str, value: str) -> list[str]:
    """A command line with a flag set to another value."""
    kept, words = [], iter(argv)
    for word in words:
        flag, equals, _ = word.partition("=")
        if flag.lstrip("-") != name:
            kept.append(word)
        elif not equals:
            next(words, None)
    return [*kept, f"--{name}={value}"]


def called(command: str, argv: Sequence[str]) -> str:
    """`unclip COMMAND ARGV` as a line for the shell, by the door that this process came through."""
    door, python = Path(sys.argv[0]), shutil.which("python")
    if not python or not os.path.samefile(python, sys.executable):
        python = sys.executable
    else:
        python = "python"
    if door.name == f"{command}.py":
        words = [python, sys.argv[0]]
    elif door.name == "unclip":
        words = [sys.argv[0] if os.sep in sys.argv[0] and not shutil.which("unclip") else "unclip"]
        words.append(command)
    else:
        words = [python, "-m", "unclip_jax", command]
    return shlex.join([*words, *argv])


def check(values: flags.FlagValues, argv: Sequence[str], command: str, *required: str) -> None:
    """Raise UserError unless the `required` flags are given and --config holds a config."""
    with _telling(argv):
        for name in required:
            if values[name].value is None:
                such = ", such as --config=emoji/clip" if name == "config" else ""
                raise UserError(f"--{name}: missing{such}; see unclip {command} --help")
        _config(values)


def _config(values: flags.FlagValues) -> Any:
    import ml_collections

    config = values["config"].value
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"--config={name_of(values)}: cannot be loaded: {_why(config)}")
    return config


@contextlib.contextmanager
def _telling(argv: Sequence[str]) -> Iterator[None]:
    """Whatever goes wrong, in a line. A config file is Python, and may raise anything."""
    from absl import flags

    try:
        yield
    except UserError:
        raise
    except flags.Error as error:
        # A config that raises comes with its whole traceback: the last line says what it is.
        last = str(error).strip().splitlines()[-1]
        text = f"--config: {last}" if "Traceback" in str(error) else one_line(error, 10_000)
        where = "the config file for its fields" if "config" in text else "--help for what there is"
        raise UserError(f"{text}; see {where}") from error
    except (AttributeError, ValueError, TypeError, OSError) as error:
        inner = error.args[0] if error.args else error  # of a field that is not there, a KeyError
        said = inner.args[0] if isinstance(inner, KeyError) and inner.args else error
        what = f"no field {said}".replace("\n", "; ") if said is not error else str(error)
        raise UserError(f"--config: {one_line(UserError(what), 10_000)}") from error
    except Exception as error:
        given = next((word for word in argv if word.startswith("--config=")), "--config")
        if isinstance(error, ModuleNotFoundError) and extras.lacking(error, given):
            raise  # told by the door, which knows the command
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{given}: cannot be loaded: {reason}; correct the file") from error


def _why(broken: Any) -> str:
    """What went wrong in a config file: ml_collections tells when a field is asked for."""
    try:
        broken.stage  # noqa: B018
    except Exception as error:
        return one_line(error, 10_000)
    return "it is no ConfigDict; get_config must return one"


# ---------------------------------------------------------------------------------- --help


def _help(values: flags.FlagValues, command: str, about: str | None) -> str:
    """What the command is and its flags; then the configs there are, or the fields of the given."""
    lines = [f"usage: unclip {command} --config=CONFIG --FLAG=VALUE ...", "", (about or "").strip()]
    lines += ["", "flags:"]
    for name in values:
        flag = values[name]
        takes = "" if flag.boolean else "=" + "|".join(getattr(flag.parser, "enum_values", ["..."]))
        default = "" if flag.default in (None, False) else f" (default {flag.default})"
        lines.append(
            f"  --{name}{takes}\n      {flag.help.partition('>: ')[2] or flag.help}{default}"
        )
    if values["config"].value is None:
        listed = configs()
        width = max(map(len, listed), default=0)
        lines += [
            "",
            "configs in the package, to be given as --config=NAME or --config=NAME:smoke:",
        ]
        lines += [f"  {name:{width}}  {_first_line(file)}" for name, file in listed.items()]
        lines += ["", f"unclip {command} --config=NAME --help says what its fields are."]
        lines += [f"A config of your own is a file like those in {CONFIGS.resolve()}."]
    else:
        lines += [
            "",
            f"{name_of(values)}, whose fields are flags. {_about(CONFIGS / 'base.py')}",
            "",
        ]
        lines += [
            f"  --config.{path}={value}" for path, value in _leaves(_config(values).to_dict())
        ]
    return "\n".join(lines)


def _about(file: Path) -> str:
    """The docstring of a config file, which is not run."""
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""


def _first_line(file: Path) -> str:
    return _about(file).partition("\n")[0]


def _leaves(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, part in tree.items():
        if isinstance(part, dict) and part:
            yield from _leaves(part, f"{path}{name}.")
        else:
            yield path + name, part
