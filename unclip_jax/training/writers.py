"""What a run tells: a line on the terminal, `metrics.jsonl`, TensorBoard, and curves."""

from __future__ import annotations

import io
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np
from tqdm import tqdm

from unclip_jax.common.files import replacing, write_text
from unclip_jax.errors import UserError
from unclip_jax.training.changes import Change

METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"
CHANGES_FILE = "changes.jsonl"
SILENT_FOR = 30.0  # seconds without a line, where lines go into a log
SHOWN = ("run/mfu",)  # on the terminal, of what a run says of its own speed


def by_the_clock(name: str) -> bool:
    """Whether a metric tells of the machine, and so is another in every life of a run."""
    return name.startswith("run/") or name.endswith("_per_second")


class Report:
    """The terminal, the metrics file and TensorBoard as one; `silent`, none of them."""

    def __init__(self, workdir: Path, steps: int, start: int, *, silent: bool = False) -> None:
        """Tell of steps `start` to `steps`. What an earlier run told of later steps is dropped."""
        self.progress = Progress(steps, start, io.StringIO() if silent else None)
        self._silent = silent
        if not silent:
            self._lines = JsonLinesWriter(workdir / METRICS_FILE, start)
            # The suffix keeps the files of two runs apart that begin within one second.
            self._board = summary_writer()(
                str(workdir / "tensorboard"), purge_step=start + 1, filename_suffix=f".from_{start}"
            )

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write numbers measured at `step`."""
        if not self._silent:
            self.progress.write_scalars(step, scalars)
            self._lines.write_scalars(step, scalars)
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Write a uint8 picture [h, w, 3]."""
        if not self._silent:
            self._board.add_image(name, image, step, dataformats="HWC")

    def write_text(self, step: int, name: str, text: str) -> None:
        """Write Markdown."""
        if not self._silent:
            self._board.add_text(name, text, step)

    def flush(self) -> None:
        """Hand everything to the operating system."""
        if not self._silent:
            self._board.flush()

    def close(self) -> None:
        """Flush, and accept no more."""
        self.progress.close()
        if not self._silent:
            self._lines.close()
            self._board.close()


def summary_writer() -> type:
    """tensorboardX's, without PyTorch, which it would import wherever that is: for seconds."""
    if hide := "torch" not in sys.modules:
        sys.modules["torch"] = None
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hide:
            del sys.modules["torch"]
    return SummaryWriter


class JsonLinesWriter:
    """Scalars as one JSON object a line: {"step": 100, "train/loss": 0.5, ...}."""

    def __init__(self, path: Path, start: int) -> None:
        """Append to `path`, after dropping what an earlier run wrote after step `start`."""
        kept = [record for record in read_metrics(path) if record["step"] <= start]
        write_text(path, "".join(map(_json_line, kept)))
        self._file = path.open("a", encoding="utf-8")
        self.close = self._file.close

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write a line, at once; what is not finite becomes null."""
        self._file.write(_json_line({"step": step} | dict(scalars)))
        self._file.flush()


def _json_line(record: Mapping[str, float]) -> str:
    values = {name: value if math.isfinite(value) else None for name, value in record.items()}
    return json.dumps(values) + "\n"


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The records of a metrics.jsonl, null as NaN; none if there is no such file.

    A last line that a killed run left unfinished is dropped; any other damaged one is a UserError.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().decode("utf-8", "replace").splitlines(keepends=True)
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            step = record["step"]
        except (json.JSONDecodeError, TypeError, KeyError):
            if number == len(lines) and not line.endswith("\n"):
                break
            raise UserError(
                f"{path}, line {number}: damaged ({line.strip()[:60]!r}); delete that line"
            ) from None
        values = {name: math.nan if value is None else value for name, value in record.items()}
        records.append(values | {"step": step})
    return records


def write_changes(workdir: Path, step: int, changes: Sequence[Change]) -> None:
    """Add to `workdir`/changes.jsonl which settings are others from `step` on.

    What it said of that step or later ones is dropped: it led to no checkpoint.
    """
    path = workdir / CHANGES_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    kept = [record for record in map(json.loads, lines) if record["step"] < step]
    kept += [{"step": step} | change._asdict() for change in changes]
    if kept or lines:
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))


class Progress:
    """Where the run stands: one live line on a terminal, plain lines in a log."""

    def __init__(self, steps: int, start: int, stream: TextIO | None = None) -> None:
        """Show steps `start` to `steps` on `stream`, by default standard output."""
        self._stream = sys.stdout if stream is None else stream
        self._steps, self._bar = steps, None
        self._step, self._told = start, time.monotonic()
        if self._stream.isatty():
            self._bar = tqdm(
                total=steps, initial=start, file=self._stream, unit="step", dynamic_ncols=True
            )

    def update(self) -> None:
        """One more step is done. A log that has been silent for a while says which."""
        self._step += 1
        if self._bar is not None:
            self._bar.update()
        elif time.monotonic() - self._told > SILENT_FOR:
            self.line(f"step {self._step}/{self._steps}")

    def line(self, text: str) -> None:
        """Print a line (above the live one)."""
        self._told = time.monotonic()
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Training metrics go to the live line, if there is one; everything else is a line."""
        if self._bar is not None and "train/loss" in scalars:
            speed = scalars.get("train/examples_per_second")
            shown = f"loss {scalars['train/loss']:.4g}"
            self._bar.set_postfix_str(shown + (f", {_number(speed)} examples/s" if speed else ""))
            return
        words = [f"step {step}/{self._steps}"]
        for name, value in scalars.items():
            if name.startswith("run/") and name not in SHOWN:
                continue
            words.append(f"{name.removeprefix('train/').removeprefix('run/')} {_number(value)}")
        speed = scalars.get("train/steps_per_second")
        if speed:
            words.append(f"time left {_duration((self._steps - step) / speed)}")
        self.line("  ".join(words))

    def close(self) -> None:
        """Leave the live line as it stands."""
        if self._bar is not None:
            self._bar.close()


def _number(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def plot_metrics(workdir: Path) -> None:
    """Plot every metric of `workdir`/metrics.jsonl over the steps, a panel each, to curves.png.

    Training and held-out values of the same metric share a panel. What was measured once, or was
    always the same, is no curve, and is left out.
    """
    from matplotlib.figure import Figure

    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for record in read_metrics(workdir / METRICS_FILE):
        for name, value in record.items():
            if name == "step" or name.startswith("run/"):
                continue
            group, _, metric = name.rpartition("/")
            xs, ys = panels.setdefault(metric, {}).setdefault(group, ([], []))
            xs.append(record["step"])
            ys.append(value)
    panels = {
        metric: groups
        for metric, groups in panels.items()
        if any(len(set(xs)) > 1 for xs, _ in groups.values())
        and len({y for _, ys in groups.values() for y in ys}) > 1
    }
    if not panels:
        return
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.8 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (metric, groups) in zip(grid, panels.items(), strict=False):
        for group, (xs, ys) in groups.items():
            axes.plot(xs, ys, label=group, marker="." if len(xs) < 30 else None)
        axes.set(title=metric, xlabel="step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(groups) > 1:
            axes.legend(frameon=False)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    with replacing(workdir / CURVES_FILE) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
