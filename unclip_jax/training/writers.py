"""What a run tells: a line on the terminal, `metrics.jsonl`, TensorBoard, and curves.

The writers have the interface of `clu.metric_writers.MetricWriter` (which imports TensorFlow, so
ours stand in for it): `write_scalars`, `write_images`, `write_texts`, `flush`, `close`.
"""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm

from unclip_jax.common.files import replacing
from unclip_jax.errors import UserError

METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"


class MetricWriter:
    """Takes what is measured at a step; a writer ignores the kinds its format cannot hold."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write numbers measured at `step`."""

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Write uint8 pictures [h, w, 3]."""

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Write pieces of text."""

    def flush(self) -> None:
        """Hand everything to the operating system."""

    def close(self) -> None:
        """Flush, and accept no more."""
        self.flush()


class MultiWriter(MetricWriter):
    """Passes everything on to several writers."""

    def __init__(self, writers: Sequence[MetricWriter]) -> None:
        """Pass on to `writers`, in this order."""
        self._writers = tuple(writers)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """See `MetricWriter`."""
        for writer in self._writers:
            writer.write_scalars(step, scalars)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """See `MetricWriter`."""
        for writer in self._writers:
            writer.write_images(step, images)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """See `MetricWriter`."""
        for writer in self._writers:
            writer.write_texts(step, texts)

    def flush(self) -> None:
        """See `MetricWriter`."""
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        """See `MetricWriter`."""
        for writer in self._writers:
            writer.close()


class TensorBoardWriter(MetricWriter):
    """Scalars, images and texts as TensorBoard event files."""

    def __init__(self, folder: Path, start: int) -> None:
        """Write into `folder`; TensorBoard forgets what an earlier run wrote after step `start`."""
        from tensorboardX import SummaryWriter

        # The suffix keeps the files of two runs apart that begin within one second.
        self._writer = SummaryWriter(
            str(folder), purge_step=start + 1, filename_suffix=f".from_{start}"
        )

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """See `MetricWriter`."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """See `MetricWriter`."""
        for name, image in images.items():
            self._writer.add_image(name, image, step, dataformats="HWC")

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """See `MetricWriter`."""
        for name, text in texts.items():
            self._writer.add_text(name, text, step)

    def flush(self) -> None:
        """See `MetricWriter`."""
        self._writer.flush()

    def close(self) -> None:
        """See `MetricWriter`."""
        self._writer.close()


class JsonLinesWriter(MetricWriter):
    """Scalars as one JSON object a line: {"step": 100, "train/loss": 0.5, ...}."""

    def __init__(self, path: Path, start: int) -> None:
        """Append to `path`, after dropping what an earlier run wrote after step `start`."""
        kept = [record for record in read_metrics(path) if record["step"] <= start]
        with replacing(path) as temporary:
            temporary.write_text("".join(map(_json_line, kept)), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write a line, at once; what is not finite becomes null."""
        self._file.write(_json_line({"step": step} | dict(scalars)))
        self._file.flush()

    def close(self) -> None:
        """See `MetricWriter`."""
        self._file.close()


def _json_line(record: Mapping[str, float]) -> str:
    values = {name: value if math.isfinite(value) else None for name, value in record.items()}
    return json.dumps(values) + "\n"


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The records of a metrics.jsonl, null as NaN; none if there is no such file.

    A last line that a killed run left unfinished is dropped.

    Raises:
        UserError: a line elsewhere that is not a JSON object with a step.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
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


class Progress(MetricWriter):
    """Where the run stands: one live line on a terminal, plain lines in a log."""

    def __init__(
        self,
        *,
        steps: int,
        start: int,
        batch_size: int,
        stream: TextIO | None = None,
        silent: bool = False,
    ):
        """Show steps `start` to `steps` on `stream` (standard output by default), or nothing."""
        if silent:
            stream = io.StringIO()
        self._stream = sys.stdout if stream is None else stream
        self._steps, self._batch_size = steps, batch_size
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=steps, initial=start, file=self._stream, unit="step", dynamic_ncols=True
            )

    def update(self) -> None:
        """One more step is done."""
        if self._bar is not None:
            self._bar.update()

    def line(self, text: str) -> None:
        """Print a line (above the live one)."""
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
            words.append(f"{name.removeprefix('train/')} {_number(value)}")
        speed = scalars.get("train/steps_per_second")
        if speed:
            words.append(f"time left {_duration((self._steps - step) / speed)}")
        self.line("  ".join(words))

    def flush(self) -> None:
        """See `MetricWriter`."""
        self._stream.flush()

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


def curve(
    xs: Sequence[float],
    series: Mapping[str, Sequence[float]],
    title: str,
    path: str | Path,
    *,
    x_label: str = "step",
) -> None:
    """Plot each series [len(xs)] over xs into a PNG; NaNs leave gaps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, values in series.items():
        axes.plot(xs, values, label=name, marker="." if len(xs) < 30 else None)
    _finish(axes, title, x_label)
    if series:
        axes.legend(frameon=False)
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def plot_metrics(workdir: Path) -> None:
    """Plot every metric of `workdir`/metrics.jsonl over the steps, a panel each, to curves.png.

    Training and held-out values of the same metric share a panel.
    """
    from matplotlib.figure import Figure

    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for record in read_metrics(workdir / METRICS_FILE):
        for name, value in record.items():
            if name == "step":
                continue
            group, _, metric = name.rpartition("/")
            xs, ys = panels.setdefault(metric, {}).setdefault(group, ([], []))
            xs.append(record["step"])
            ys.append(value)
    if not panels:
        return
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.8 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (metric, groups) in zip(grid, panels.items(), strict=False):
        for group, (xs, ys) in groups.items():
            axes.plot(xs, ys, label=group, marker="." if len(xs) < 30 else None)
        _finish(axes, metric, "step")
        if len(groups) > 1:
            axes.legend(frameon=False)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    with replacing(workdir / CURVES_FILE) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _finish(axes: Any, title: str, x_label: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
