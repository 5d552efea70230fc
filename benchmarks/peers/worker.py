"""One side in a process of its own, asked through its standard input: a JSON line in, one out.

{"row": "decoder_forward", "batch": 4}   prepares a row; {"first": seconds, "output": [...]}
{"calls": 3}                             times it;       {"seconds": per call, "peak": bytes}
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.peers import sizes


def peak(device: str, side: str) -> int:
    """The most memory held since `forget_peak`, on the device, or in this process."""
    if device == "gpu" and side == "ours":
        import jax

        return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
    if device == "gpu":
        import torch

        return torch.cuda.max_memory_allocated()
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except OSError:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak() -> None:
    """Start measuring the process's peak anew, where Linux can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def main() -> None:
    """Answer until the input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=("ours", "eager", "compiled"))
    parser.add_argument("folders", nargs=2, type=Path)
    parser.add_argument("--device", choices=("cpu", "gpu"), required=True)
    parser.add_argument("--dtype", default="")
    parser.add_argument("--training", action="store_true", help="the rows are of training")
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    if args.side == "ours":
        from benchmarks.peers.ours import Ours

        engine = Ours(args.folders, args.dtype, training=args.training)
    else:
        from benchmarks.peers.theirs import Theirs

        device = "cuda" if args.device == "gpu" else "cpu"
        engine = Theirs(args.folders, args.dtype, device, args.side == "compiled")
    scale, work = sizes.karlo(args.device), None
    for line in sys.stdin:
        asked = json.loads(line)
        if "row" in asked:
            given = sizes.inputs(scale, asked["batch"])
            work = engine.work(asked["row"], given)
            forget_peak()
            since = time.perf_counter()
            output = work()
            first = time.perf_counter() - since
            values = np.asarray(output if isinstance(output, np.ndarray) else _array(output))
            some = values.reshape(-1)[:: max(1, values.size // 64)].astype(np.float64)
            answer = {
                "first": first,
                "shape": list(values.shape),
                "output": some.tolist(),
                "flops": getattr(engine, "flops", 0),
            }
        else:
            since = time.perf_counter()
            for _ in range(asked["calls"]):
                work()
            seconds = (time.perf_counter() - since) / asked["calls"]
            answer = {"seconds": seconds, "peak": peak(args.device, args.side)}
        print(json.dumps(answer), file=answers, flush=True)


def _array(output: object) -> np.ndarray:
    if hasattr(output, "detach"):
        return output.detach().float().cpu().numpy()
    return np.asarray(output, np.float32)


if __name__ == "__main__":
    main()
