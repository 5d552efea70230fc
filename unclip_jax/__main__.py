"""One door to every command: `python -m unclip_jax COMMAND`, or `unclip COMMAND` once installed.

`unclip` alone lists the commands, `unclip COMMAND --help` says what one does and takes.
"""

from __future__ import annotations

import importlib
import os
import sys

import unclip_jax
from unclip_jax.common import extras
from unclip_jax.errors import did_you_mean, run_command, wrong

# Command -> the module whose main(argv) it is, and what it does.
COMMANDS = {
    "train": ("unclip_jax.training.command", "train one stage, or go on with its training"),
    "train-all": ("unclip_jax.train_all.command", "train every stage on your own pictures"),
    "sample": ("unclip_jax.pipeline.tasks.command", "draw from captions, and edit pictures"),
    "app": ("unclip_jax.app.command", "the same with a mouse, as a web page"),
    "evaluate": ("unclip_jax.evaluate.command", "measure a model"),
    "doctor": ("unclip_jax.training.doctor.command", "say what is wrong with a run"),
    "save": ("unclip_jax.training.save", "make a model folder of a training checkpoint"),
    "analytic": ("unclip_jax.training.analytic", "estimate a stage's analytic variance"),
    "embed": ("unclip_jax.training.embed", "store CLIP's embeddings of a data set"),
    "styles": ("unclip_jax.data.emoji.command", "fetch the emoji art of several styles"),
    "convert": ("unclip_jax.weights.convert.command", "public weights to model folders and back"),
    "export": ("unclip_jax.weights.export.command", "write for plain JAX, transformers, diffusers"),
    "plan": ("unclip_jax.plan.command", "what a run would cost on a pod that is not there"),
    "class_conditional": (
        "unclip_jax.pipeline.class_conditional",
        "draw from a class-conditional decoder, guided by a classifier",
    ),
}


def usage() -> str:
    """The commands, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(
        ["usage: unclip COMMAND ...", "", *lines, "", "unclip COMMAND --help says more"]
    )


def dispatch(argv: list[str]) -> None:
    """Run the command that the first argument names.

    Raises:
        UserError: there is no such command, or it needs a package that is not installed.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return
    if argv[0] == "--version":
        print(f"unclip_jax {unclip_jax.__version__}")
        return
    command, *rest = argv
    if command not in COMMANDS:
        expected = f"one of {', '.join(COMMANDS)}"
        raise wrong("command", command, expected, did_you_mean(command, COMMANDS))
    # XLA logs as an error that a program took two minutes to compile; errors are raised as well.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with extras.named(f"unclip {command}"):
        importlib.import_module(COMMANDS[command][0]).main(rest)


def main() -> None:
    """The console command `unclip`."""
    run_command(dispatch, sys.argv[1:])


if __name__ == "__main__":
    main()
