"""Train one stage: `python train.py --help`; the same as `unclip train`."""

import sys

from unclip_jax.__main__ import dispatch
from unclip_jax.errors import run_command

if __name__ == "__main__":
    run_command(dispatch, ["train", *sys.argv[1:]])
