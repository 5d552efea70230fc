"""The web page: `unclip app [--model runs/emoji]`, then open the address it prints.

Text to image, variations, interpolation, text diffs and probes, each with the settings and the
command that draws the same. docs/app.md says more.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading

from unclip_jax.common import command_line
from unclip_jax.errors import UserError


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = command_line.parser("app", __doc__)
    command_line.add_model(parser)
    command_line.add_lora(parser)
    add = parser.add_argument
    add("--batch_size", type=int, default=4, help="pictures computed together (default 4)")
    add("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    add("--port", type=int, help="default: 7860, or the next free one")
    add(
        "--share",
        action="store_true",
        help="also through gradio's public tunnel: anyone with the link can draw",
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Load the model and serve the page until interrupted."""
    args = parse(argv)
    if args.port is not None and not 1 <= args.port <= 65535:
        raise UserError(f"--port: got {args.port}, expected 1 to 65535")

    from unclip_jax.app.serve import serving
    from unclip_jax.app.tasks import Served
    from unclip_jax.common import checks
    from unclip_jax.parallel import compile_cache
    from unclip_jax.parallel.cpu import devices as cpu_devices
    from unclip_jax.pipeline.tasks.inputs import load

    checks.count("--batch_size", args.batch_size)
    cpu_devices.use()
    compile_cache.use()
    lora = {"lora": args.lora, "lora_weight": args.lora_weight}
    served = Served(load(args), args.model, args.dtype, args.t5, args.batch_size, **lora)
    with serving(served, host=args.host, port=args.port, share=args.share) as address:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the files go, too
        print(f"open {address}  (Ctrl-C ends it)", flush=True)
        threading.Event().wait()
