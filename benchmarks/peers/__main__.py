"""Speed and memory beside diffusers on PyTorch: the same random weights, in turn, in one run.

    python -m benchmarks.peers                              # every row on the CPU
    python -m benchmarks.peers --rows decoder_forward --batches 1
    python -m benchmarks.peers --sides ours eager --rounds 3    # the whole table in half the time
    python -m benchmarks.peers --device gpu --dtype bfloat16

Networks have Karlo's shape, on a CPU scaled down (`sizes.karlo`), on a GPU as they were published.
Each side runs in a process of its own, and in another for each row of training, so that the peak
there is that row's. It waits while another is measured. Within a round all sides are asked one
after the other, so what else the machine does falls on all of them alike. A ratio is of one round;
the table has the median and the range of rounds. Below 1 ours is faster. Before anything is timed,
all sides must have computed the same.

MFU is ours: the FLOPs of our program, counted before compilation, a second, over what the fastest
of the sides reaches in a product of two large matrices of the same dtype, measured first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import sizes

SIDES = ("ours", "eager", "compiled")
DRAWN = ("prior_sample", "text_to_image")  # from noise of each side's own
ENOUGH_SECONDS = 1.0  # of one measurement
WARM_CALLS = 3  # of a training step: memory that is kept is found in the first ones
GIB = 2**30
PLATFORMS = {"cpu": "cpu", "gpu": "cuda,cpu"}  # of JAX, which takes the first that it finds
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


class Side:
    """A worker process."""

    def __init__(
        self, name: str, folders: list[Path], device: str, dtype: str, training: bool
    ) -> None:
        """Start it; it loads the networks."""
        command = [sys.executable, "-m", "benchmarks.peers.worker", name, *map(str, folders)]
        command += [f"--device={device}", f"--dtype={dtype}"]
        command += ["--training"] if training else []
        environment = os.environ | QUIET | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        # A first call shows what compiling takes, also in a second run of this benchmark.
        environment |= {"JAX_ENABLE_COMPILATION_CACHE": "false"}
        environment |= {"TORCHINDUCTOR_CACHE_DIR": str(folders[0].with_name("inductor"))}
        environment |= {"JAX_PLATFORMS": PLATFORMS[device]}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=None, env=environment, text=True
        )
        self.name = name

    def ask(self, **what: Any) -> dict[str, Any]:
        """A question answered."""
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            sys.exit(f"{self.name}: the process ended; what it said is above")
        return json.loads(answer)

    def close(self) -> None:
        """End it."""
        self._process.stdin.close()
        self._process.wait()


def check_gpu() -> str:
    """What is missing for `--device gpu`, in words; "" where nothing is."""
    import torch

    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device; run it on a machine with one, or with --device cpu"
    environment = os.environ | {"JAX_PLATFORMS": PLATFORMS["gpu"]}
    asked = [sys.executable, "-c", "import jax; assert jax.default_backend() == 'gpu'"]
    if subprocess.run(asked, env=environment, stderr=subprocess.DEVNULL).returncode:
        return "JAX finds no CUDA device, though PyTorch does; pip install --editable '.[gpu]'"
    return ""


def make_weights(folder: Path, device: str) -> list[Path]:
    """Both of Karlo's repositories with random weights, in diffusers' layout."""
    os.environ |= QUIET
    from tests import karlo_folders

    made = karlo_folders.pipelines(sizes.karlo(device), folder / "tokenizer")
    folders = [folder / "text2im", folder / "variations"]
    for pipeline, path in zip(made, folders, strict=True):
        pipeline.save_pretrained(path)
    return folders


def check_same(row: str, first: dict[str, dict[str, Any]], tolerance: float) -> None:
    """Exit unless every side computed what the first did."""
    (name, expected), *others = first.items()
    for other, found in others:
        same_shape = found["shape"] == expected["shape"]
        a, b = np.asarray(expected["output"]), np.asarray(found["output"])
        if not same_shape or (
            row not in DRAWN and np.abs(a - b).max() > tolerance * np.abs(b).max()
        ):
            sys.exit(f"{row}: {name} and {other} computed different things: {a[:4]} and {b[:4]}")


def measure(sides: list[Side], row: str, batch: int, rounds: int, tolerance: float) -> dict:
    """Times, peaks and first calls of one row, by side."""
    first = {side.name: side.ask(row=row, batch=batch) for side in sides}
    check_same(row, first, tolerance)
    calls = {}
    for side in sides:
        warm = side.ask(calls=WARM_CALLS if row in sizes.TRAINING else 1)["seconds"]
        calls[side.name] = max(1, min(50, round(ENOUGH_SECONDS / warm)))
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    peaks = {}
    for turn in range(rounds):
        for side in sides[turn % len(sides) :] + sides[: turn % len(sides)]:
            answer = side.ask(calls=calls[side.name])
            seconds[side.name].append(answer["seconds"])
            peaks[side.name] = answer["peak"]
    return {
        "row": row,
        "batch": batch,
        "first": {name: found["first"] for name, found in first.items()},
        "seconds": seconds,
        "peak": peaks,
        "flops": first["ours"]["flops"] if "ours" in first else 0,
    }


def ceiling_of(found: dict, device: str) -> dict[str, float]:
    """FLOP/s of each side in `sizes.CEILING`."""
    flops = 2 * sizes.MATRIX_SIDE[device] ** 3
    return {name: flops / statistics.median(taken) for name, taken in found["seconds"].items()}


def line(found: dict, ceiling: float) -> str:
    """A row of the table; `ceiling` is in FLOP/s."""
    ours = found["seconds"]["ours"]
    cells = [found["row"], str(found["batch"]), _seconds(statistics.median(ours))]
    rate = found["flops"] / statistics.median(ours)
    cells += [f"{rate / 1e9:,.0f}", f"{rate / ceiling:.0%}"] if rate else ["–", "–"]
    for name in SIDES[1:]:
        if name in found["seconds"]:
            ratios = sorted(a / b for a, b in zip(ours, found["seconds"][name], strict=True))
            middle = statistics.median(ratios)
            cells.append(f"**{middle:.2f}** ({ratios[0]:.2f}–{ratios[-1]:.2f})")
        else:
            cells.append("–")
    cells.append(" / ".join(f"{peak / GIB:.2f}" for peak in found["peak"].values()))
    cells.append(" / ".join(f"{first:.0f}" for first in found["first"].values()))
    return f"| {' | '.join(cells)} |"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def head(sides: list[str]) -> str:
    """The table's head."""
    names = " / ".join(sides)
    titles = ["row", "batch", "ours", "GFLOP/s", "MFU", "ours / eager", "ours / compiled"]
    titles += [f"peak GiB, {names}", f"first call s, {names}"]
    return f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}"


def main(argv: list[str]) -> None:
    """Measure, print the table as it grows, and write it with all figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rows", nargs="+", choices=sizes.ROWS, default=sizes.ROWS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, metavar="DIR", help="write table and figures there")
    args = parser.parse_args(argv)
    if SIDES[0] not in args.sides:
        parser.error(f"--sides: got {' '.join(args.sides)}, expected {SIDES[0]} among them")
    if args.device == "gpu" and (missing := check_gpu()):
        parser.error(f"--device gpu: {missing}")

    dtype = "" if args.dtype == "float32" else args.dtype
    tolerance = 1e-3 if args.dtype == "float32" else 0.1
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {args.device}, {args.dtype}"
    asked = list(itertools.product(args.rows, args.batches))
    together = [pair for pair in asked if pair[0] not in sizes.TRAINING]
    apart = [[pair] for pair in asked if pair[0] in sizes.TRAINING]
    since = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        folders = make_weights(Path(folder), args.device)
        table, found, ceiling = [head(args.sides)], [], None
        for pairs in filter(None, (together, *apart)):
            training = pairs[0][0] in sizes.TRAINING
            sides = [Side(name, folders, args.device, dtype, training) for name in args.sides]
            if ceiling is None:
                found.append(measure(sides, sizes.CEILING, 1, args.rounds, tolerance))
                reached = ceiling_of(found[0], args.device)
                ceiling = max(reached.values())
                said = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in reached.items())
                machine += f"; matrix products at {said} GFLOP/s"
                print(f"{machine}\n\n{table[0]}", flush=True)
            for row, batch in pairs:
                found.append(measure(sides, row, batch, args.rounds, tolerance))
                table.append(line(found[-1], ceiling))
                print(table[-1], flush=True)
            for side in sides:
                side.close()
    machine += f"; {args.rounds} rounds in {(time.monotonic() - since) / 60:.0f} minutes"
    print(f"\n{machine}")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "peers.json").write_text(json.dumps(found, indent=1) + "\n")
        (args.out / "peers.md").write_text("\n\n".join((machine, "\n".join(table))) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
