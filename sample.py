"""Draw from a model, and edit pictures: `python sample.py --help`; the same as `unclip sample`."""

import sys

from unclip_jax.errors import run_command
from unclip_jax.pipeline.tasks.command import main

if __name__ == "__main__":
    run_command(main, sys.argv[1:])
