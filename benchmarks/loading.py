"""How long a model folder takes to load, beside reading its file and hashing it.

    python -m benchmarks.loading [--gib 2] [--rounds 5] [--folder DIR]

Writes a decoder's folder of about so many GiB of random weights, then takes in turn, each in a
process of its own: reading the file, its SHA-256, and `load_stage` onto the default device. Once
with the file's pages dropped from the system's cache ("disk"), where the system drops them when
asked, and once with them in it ("cache"). What it printed is in docs/performance.md.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from unclip_jax.weights import folder as model_folder

KINDS = ("read", "sha256", "load_stage")
BLOCK = 2**24
LAYER = 64 * 2**20  # bytes of one kernel


def write(folder: Path, gib: float) -> None:
    """A model folder of kernels of 64 MiB, as a large network's are."""
    rng = np.random.default_rng(0)
    kernels = {
        f"layer_{i}": {"kernel": rng.standard_normal((4096, LAYER // 4096 // 4), np.float32)}
        for i in range(max(1, round(gib * 2**30 / LAYER)))
    }
    model_folder.save_stage(folder, params={"network": kernels}, description={"stage": {}})


def seconds_of(kind: str, folder: Path) -> float:
    """One measurement, in this process."""
    path = folder / model_folder.PARAMS_FILE
    if kind == "load_stage":
        import jax

        jax.devices()
        since = time.perf_counter()
        jax.block_until_ready(model_folder.load_stage(folder)[0])
        return time.perf_counter() - since
    digest, block = hashlib.sha256(), bytearray(BLOCK)
    since = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            if kind == "sha256":
                digest.update(memoryview(block)[:count])
    return time.perf_counter() - since


def drop(path: Path) -> None:
    """Ask the system to forget a file's pages."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(kind: str, folder: Path) -> float:
    """One measurement in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.loading", "--one", kind, "--folder", str(folder)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(argv: list[str]) -> None:
    """Print the table, or one measurement."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loading", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--gib", type=float, default=2.0, help="of weights")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; else temporary files")
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(seconds_of(args.one, args.folder))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        model = Path(folder) / "model"
        write(model, args.gib)
        path = model / model_folder.PARAMS_FILE
        size = path.stat().st_size / 2**30
        print(f"{size:.2f} GiB\n\n| from | {' | '.join(f'{k}, s' for k in KINDS)} | GiB/s |")
        print("|---|---|---|---|---|")
        for place in ("disk", "cache"):
            taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
            for _ in range(args.rounds):
                for kind in KINDS:
                    if place == "disk":
                        drop(path)
                    taken[kind].append(measured(kind, model))
            medians = [statistics.median(taken[kind]) for kind in KINDS]
            cells = [f"{m:.2f}" for m in medians] + [f"{size / medians[-1]:.1f}"]
            print(f"| {place} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
