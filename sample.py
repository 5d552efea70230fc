"""Draw from a model, and edit pictures: `python sample.py --help`; the same as `unclip sample`."""

import sys

from unclip_jax.__main__ import dispatch
from unclip_jax.errors import run_command

if __name__ == "__main__":
    run_command(dispatch, ["sample", *sys.argv[1:]])
