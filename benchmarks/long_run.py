"""Whether a long run stays as it began: memory, speed, compilations, log and disk.

    python benchmarks/long_run.py --out runs/long [--steps 20000]

Trains a tiny stage (--config, by default configs/emoji/clip.py:smoke) as train.py does, with its
data, evaluations, previews and checkpoints, and notes once a second what the process and JAX's
arrays hold. It writes long_run.png and long_run.json, and ends with an error if anything grew,
slowed down or was compiled after the first evaluation.

What it measured is in docs/performance.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import runpy
import sys
import threading
import time
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np

from unclip_jax import runs, training

MIB = 2**20
COMPILED = "/jax/core/compile/backend_compile_duration"


class Watch:
    """What the process holds, noted once a second in a thread."""

    def __init__(self, workdir: Path) -> None:
        """Watch this process and the workdir."""
        self.workdir, self.step, self.notes = workdir, 0, []
        self.compiled: list[tuple[int, float]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def __enter__(self) -> Watch:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self._over.set()
        self._thread.join()

    def _on_event(self, event: str, seconds: float, **_: object) -> None:
        if event == COMPILED:
            self.compiled.append((self.step, seconds))

    def _watch(self) -> None:
        while not self._over.wait(1.0):
            self.notes.append(
                {
                    "seconds": time.monotonic(),
                    "step": self.step,
                    "resident": resident(),
                    "arrays": sum(array.nbytes for array in jax.live_arrays()),
                    "log": size(self.workdir / "metrics.jsonl"),
                    "workdir": sum(size(path) for path in self.workdir.rglob("*")),
                    "files": sum(1 for _ in self.workdir.rglob("*")),
                    "objects": len(gc.get_objects()),
                }
            )


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def size(path: Path) -> int:
    """Bytes of a file; 0 where it has just gone."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0


def train(config_file: str, steps: int, watch: Watch) -> None:
    """The whole of train.py's work, for so many steps."""
    path, _, variant = config_file.partition(":")
    config = runpy.run_path(path)["get_config"](variant)
    config.train.update(steps=steps, log_every=100, checkpoint_every=steps // 10)
    config.train.update(eval_every=steps // 10, preview_every=steps // 10)
    run = runs.prepare(config)
    batches = run.batches()

    class Counted:
        """The batches, which say at which step the run is."""

        def __next__(self):
            watch.step += 1
            return next(batches)

        def __getattr__(self, name: str):
            return getattr(batches, name)

    training.train(
        loss_fn=run.loss,
        init_params=run.init_params,
        batches=Counted(),
        config=run.train,
        workdir=watch.workdir,
        description=run.description,
        mesh=run.mesh,
        evaluate=run.evaluate,
        preview=run.preview,
    )


def growth(steps: np.ndarray, values: np.ndarray) -> float:
    """By how much values rise over the second half of the run, by its straight line."""
    late = steps > steps[-1] / 2
    slope = np.polyfit(steps[late], values[late], 1)[0]
    return float(slope * (steps[-1] - steps[late][0]))


def problems(notes: list[dict], speeds: np.ndarray, compiled: list, steps: int) -> list[str]:
    """What did not stay as it was, in words."""
    at = np.array([note["step"] for note in notes], np.float64)
    series = {name: np.array([note[name] for note in notes], np.float64) for name in notes[0]}
    found = []
    for name, most in (("resident", 16 * MIB), ("arrays", MIB), ("objects", 20_000)):
        rise = growth(at, series[name])
        if rise > most:
            found.append(f"{name} rises by {rise:,.0f} over the second half")
    late = [step for step, _ in compiled if step > steps // 10 + 200]
    if late:
        found.append(f"{len(late)} programs are compiled after the first evaluation, at {late[:5]}")
    quarters = [np.median(quarter) for quarter in np.array_split(speeds, 4)]
    if quarters[-1] < 0.8 * max(quarters):
        found.append(f"steps per second fall, by quarters: {np.round(quarters, 1)}")
    return found


def plot(notes: list[dict], path: Path) -> None:
    """Memory and disk over the steps."""
    at = [note["step"] for note in notes]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    for axis, title, names in (
        (axes[0], "memory, MiB", ("resident", "arrays")),
        (axes[1], "workdir, MiB", ("workdir", "log")),
        (axes[2], "Python objects", ("objects",)),
    ):
        for name in names:
            scale = 1 if name == "objects" else MIB
            axis.plot(at, [note[name] / scale for note in notes], label=name)
        axis.set(title=title, xlabel="step", ylim=(0, None))
        axis.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main(argv: list[str]) -> None:
    """Train, look, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--config", default="configs/emoji/clip.py:smoke")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True)
    with Watch(args.out / "run") as watch:
        train(args.config, args.steps, watch)
    lines = (args.out / "run" / "metrics.jsonl").read_text().splitlines()
    speeds = [json.loads(line).get("train/steps_per_second") for line in lines]
    speeds = np.array([speed for speed in speeds if speed])
    plot(watch.notes, args.out / "long_run.png")
    (args.out / "long_run.json").write_text(json.dumps(watch.notes))
    half, end = watch.notes[len(watch.notes) // 2], watch.notes[-1]
    for name in ("resident", "arrays", "log", "workdir"):
        print(f"{name:10} half way {half[name] / MIB:9.2f} MiB, end {end[name] / MIB:9.2f} MiB")
    print(f"programs compiled: {len(watch.compiled)}, the last at step {watch.compiled[-1][0]}")
    quarters = [np.median(quarter) for quarter in np.array_split(speeds, 4)]
    print("steps per second, by quarters:", *(f"{quarter:.1f}" for quarter in quarters))
    found = problems(watch.notes, speeds, watch.compiled, args.steps)
    sys.exit("; ".join(found) if found else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
