"""Train one stage: `python train.py --help`; the same as `unclip train`."""

import sys

from unclip_jax.errors import run_command
from unclip_jax.training.command import main

if __name__ == "__main__":
    run_command(main, sys.argv[1:])
