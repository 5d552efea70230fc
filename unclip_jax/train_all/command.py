"""Train a model on your own pictures: CLIP, prior, decoder and upsampler, one after the other.

    unclip train-all --data my_pictures --out runs/mine --minutes 60

looks at the pictures and their captions, times a few steps on this machine, says what it will do,
and does it. Stop it whenever you like: the same command goes on. At the end runs/mine/index.html
shows what the model draws, and runs/mine is a model:

    unclip sample text2im --model runs/mine --prompt "a red apple"

The same command with more --minutes trains on. See docs/tutorials/train_on_your_folder.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from unclip_jax.common import checks, command_line
from unclip_jax.common.files import check_folder

SIZES = ("tiny", "small", "base")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = command_line.parser("train-all", __doc__)
    parser.about = lambda word: f"a folder of pictures is --data {word}"
    add = parser.add_argument
    named = "pictures with captions: a folder, or emoji, tfds:NAME, ... as for unclip train"
    add("--data", required=True, metavar="FOLDER", help=named)
    add("--out", required=True, metavar="DIR", help="where the model, its runs and the page go")
    sized = (
        "of the networks; tiny draws 128 px, the others 256 px (default: base on a GPU or TPU; on a"
        " CPU small, or tiny for less than 30 minutes)"
    )
    add("--size", choices=SIZES, help=sized)
    add("--minutes", type=float, default=60.0, help="for everything, about (default 60)")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Check what was asked for, then do it."""
    args = parse(argv)
    checks.number("--minutes", args.minutes, above=0)
    out = Path(args.out).expanduser()
    check_folder("--out", out)
    print(f"train-all: looking at {args.data}", flush=True)

    from unclip_jax.parallel import compile_cache  # imports JAX: wrong usage is told before
    from unclip_jax.parallel.cpu import devices as cpu_devices
    from unclip_jax.parallel.cpu import memory as host_memory
    from unclip_jax.train_all import run

    cpu_devices.use()
    compile_cache.use()
    host_memory.keep_freed()
    run.run(args.data, out, args.size, args.minutes)
