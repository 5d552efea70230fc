"""Whether a long run stays as it began: memory, speed, compilations, log and disk.

    python -m benchmarks.long_run --out runs/long [--steps 20000]

Trains CLIP on emoji as train.py does, with its data, evaluations and checkpoints, but with a
network so small that most of the time goes into what surrounds it. Once a second it notes what the
process and JAX's arrays hold. It writes long_run.png and long_run.json, and ends with an error if
anything grew, slowed down or was compiled after the first evaluation.

What it measured is in docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np

from configs.emoji import clip
from unclip_jax.parallel.cpu import memory as host_memory
from unclip_jax.training import loop, prepare

MIB = 2**20
COMPILED = "/jax/core/compile/backend_compile_duration"
NETWORK = {
    "image_size": 32, "patch": 16, "vision_width": 32, "vision_layers": 1, "vision_heads": 2,
    "text_width": 32, "text_layers": 1, "text_heads": 2, "embed_dim": 32,
}  # fmt: skip


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
                    "computed": time.process_time(),
                    "step": self.step,
                    "resident": resident(),
                    "arrays": sum(array.nbytes for array in jax.live_arrays()),
                    "log": size(self.workdir / "metrics.jsonl"),
                    "workdir": sum(map(size, files(self.workdir))),
                    # Not gc.get_objects(): what it shows may still be under construction.
                    "objects": sys.getallocatedblocks(),
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


def files(folder: Path) -> list[Path]:
    """Every file below a folder; folders that go meanwhile are passed over."""
    return [Path(where) / name for where, _, names in os.walk(folder) for name in names]


def train(steps: int, watch: Watch) -> None:
    """The whole of train.py's work, for so many steps."""
    config = clip.get_config("smoke")
    config.stage.model.update(NETWORK)
    config.train.update(steps=steps, log_every=100, checkpoint_every=steps // 10)
    config.train.update(eval_every=steps // 10, preview_every=steps // 10)
    run = prepare.prepare(config)
    batches = run.batches()

    class Counted:
        """The batches, which say at which step the run is."""

        def __next__(self):
            watch.step += 1
            return next(batches)

        def __getattr__(self, name: str):
            return getattr(batches, name)

    loop.train(
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


def quarters(notes: list[dict]) -> list[list[dict]]:
    """The notes of each quarter of the steps, from the first log line on, without the last step.

    After that one the curves are drawn, which is no part of what goes on and on.
    """
    last = notes[-1]["step"]
    going = [note for note in notes if note["log"] and note["step"] < last]
    return [[note for note in going if note["step"] * 4 // last == i] for i in range(4)]


def per_step(notes: list[dict], clock: str) -> float:
    """Seconds a step by a clock: of the wall, or of this process's share of the cores."""
    first, last = notes[0], notes[-1]
    return (last[clock] - first[clock]) / (last["step"] - first["step"])


def growth(notes: list[dict], name: str) -> float:
    """By how much a figure rises over the second half of the run, by its straight line."""
    at, values = ([note[key] for note in notes] for key in ("step", name))
    return float(np.polyfit(at, values, 1)[0] * (at[-1] - at[0]))


def report(notes: list[dict], compiled: list[tuple[int, float]]) -> None:
    """Print what there was by quarters."""
    parts = quarters(notes)
    for name in ("resident", "arrays", "workdir", "log"):
        print(f"{name}, MiB:", *(f"{max(n[name] for n in part) / MIB:.2f}" for part in parts))
    print("Python's memory blocks:", *(part[-1]["objects"] for part in parts))
    print("steps per second:", *(f"{1 / per_step(part, 'seconds'):.1f}" for part in parts))
    print("computed a step, ms:", *(f"{1e3 * per_step(part, 'computed'):.1f}" for part in parts))
    print(f"programs compiled: {len(compiled)}, the last at step {compiled[-1][0]}")


def problems(notes: list[dict], compiled: list[tuple[int, float]], steps: int) -> list[str]:
    """What did not stay as it was, in words."""
    parts, found = quarters(notes), []
    # Checkpoints leave some of TensorStore's memory behind: docs/performance.md.
    for name, most in (("resident", 16 * MIB), ("arrays", MIB), ("objects", 20_000)):
        rise = growth(parts[2] + parts[3], name)
        if rise > most:
            found.append(f"{name} rises by {rise:,.0f} over the second half")
    late = [step for step, _ in compiled if step > steps // 10 + 200]
    if late:
        found.append(f"{len(late)} programs are compiled after the first evaluation, at {late[:5]}")
    first, last = per_step(parts[0], "computed"), per_step(parts[3], "computed")
    if last > 1.2 * first:
        found.append(f"a step takes {1e3 * first:.1f} ms of computing first, {1e3 * last:.1f} last")
    return found


def plot(notes: list[dict], path: Path) -> None:
    """Memory and disk over the steps."""
    at = [note["step"] for note in notes]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    for axis, title, names in (
        (axes[0], "memory, MiB", ("resident", "arrays")),
        (axes[1], "workdir, MiB", ("workdir", "log")),
        (axes[2], "Python's memory blocks", ("objects",)),
    ):
        for name in names:
            scale = 1 if name == "objects" else MIB
            axis.plot(at, [note[name] / scale for note in notes], label=name)
        axis.set(title=title, xlabel="step", ylim=(0, None))
        axis.locator_params(axis="x", nbins=4)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main(argv: list[str]) -> None:
    """Train, look, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20_000)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True)
    host_memory.keep_freed()  # as train.py does
    with Watch(args.out / "run") as watch:
        train(args.steps, watch)
    (args.out / "long_run.json").write_text(json.dumps([watch.notes, watch.compiled]))
    plot(watch.notes, args.out / "long_run.png")
    report(watch.notes, watch.compiled)
    found = problems(watch.notes, watch.compiled, args.steps)
    sys.exit("; ".join(found) if found else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
