"""What an evaluation leaves behind: figures.json, plots, grids, and a page that shows them all."""

from __future__ import annotations

import contextlib
import html
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unclip_jax.common.files import replacing, write_text
from unclip_jax.common.grids import captioned_grid, save_png
from unclip_jax.evaluate.measure import Figures, Report
from unclip_jax.metrics.zero_shot import Subsets

JSON, PAGE = "figures.json", "index.html"

_TITLE = "<title>Evaluation</title>"
_IMAGES = ("sweep.png", "subsets.png", "generated.png", "sweep_pictures.png", "classes.png")

_STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; }
td, th { padding: .1em 1em .1em 0; text-align: left; }
td + td { font-variant-numeric: tabular-nums; }
th { padding-top: .8em; }
img { max-width: 100%; display: block; margin: 1em 0; }
"""


def as_json(report: Report) -> str:
    """The machine-readable table; what is undefined is null."""

    def finite(figures: Figures) -> dict[str, float | None]:
        return {name: value if math.isfinite(value) else None for name, value in figures.items()}

    found = {
        "about": report.about,
        "figures": {part: finite(figures) for part, figures in report.figures.items()},
        "sweep": [finite(row) for row in report.sweep],
    }
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"


def as_table(report: Report) -> str:
    """The figures for a terminal, one a line; a dash where one is undefined."""
    scale = "guidance_scale"
    tables = list(report.figures.items())
    tables += [(f"guidance {row[scale]:g}", row) for row in report.sweep]
    rows = [
        (f"{part}/{name}", _number(value))
        for part, figures in tables
        for name, value in figures.items()
        if name != scale
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value:>8}" for name, value in rows)


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "-"


def write(report: Report, folder: Path) -> None:
    """Write everything into `folder`, which is made; what an earlier report left there is gone."""
    images, page = [], folder / PAGE
    if page.is_file() and _TITLE in (before := page.read_text(encoding="utf-8", errors="replace")):
        for name in _IMAGES:
            if f'src="{name}"' in before:
                (folder / name).unlink(missing_ok=True)
    if report.sweep:
        images.append("sweep.png")
        plot_sweep(report.sweep, folder / images[-1])
    if report.subsets is not None and len(report.subsets.accuracy):
        images.append("subsets.png")
        plot_subsets(report.subsets, folder / images[-1])
    about = {"evaluation": json.dumps(report.about)}
    for grid in report.grids:
        pictures, captions = zip(*grid.cells, strict=True)
        images.append(f"{grid.name}.png")
        image = captioned_grid(pictures, captions, columns=grid.columns, title=grid.title)
        save_png(image, folder / images[-1], about)
    write_text(folder / JSON, as_json(report))
    write_text(page, _page(report, images))


def plot_sweep(sweep: list[Figures], path: Path) -> None:
    """Quality against fit to the caption, and precision and recall, along guidance scales."""
    columns = {name: [row[name] for row in sweep] for name in sweep[0]}
    scales, scores, distances = (columns[n] for n in ("guidance_scale", "clip_score", "frechet"))
    with _two_panels(path) as (left, right):
        left.plot(scores, distances, marker="o")
        for scale, x, y in zip(scales, scores, distances, strict=True):
            left.annotate(f"{scale:g}", (x, y), xytext=(5, 5), textcoords="offset points")
        left.set(
            xlabel="CLIP score (higher fits better)", ylabel="Fréchet distance (lower is nearer)"
        )
        for name in ("precision", "recall"):
            right.plot(scales, columns[name], marker="o", label=name)
        right.legend(frameon=False)
        right.set(xlabel="guidance scale", ylabel="fraction")


def plot_subsets(subsets: Subsets, path: Path) -> None:
    """Both scores of generated pictures against the accuracy on real ones, a dot per subset."""
    with _two_panels(path) as panels:
        for axes, name in zip(panels, ("own_class", "direction"), strict=True):
            axes.scatter(getattr(subsets, name), subsets.accuracy, alpha=0.7)
            axes.set(
                xlabel=f"{name} of generated pictures", ylabel="zero-shot accuracy on real ones"
            )


@contextlib.contextmanager
def _two_panels(path: Path) -> Iterator[tuple[Any, Any]]:
    """Two empty panels side by side, to be drawn in; then the figure is a PNG at `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    yield panels
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _page(report: Report, images: list[str]) -> str:
    def rows(pairs: dict[str, Any]) -> str:
        cells = ((html.escape(str(name)), html.escape(str(text))) for name, text in pairs.items())
        return "".join(f"<tr><td>{name}</td><td>{text}</td></tr>\n" for name, text in cells)

    tables = "".join(
        f'<tr><th colspan="2">{html.escape(part)}</th></tr>\n'
        + rows({name: _number(value) for name, value in figures.items()})
        for part, figures in report.figures.items()
    )
    shown = "".join(f'<img src="{name}" alt="{name.removesuffix(".png")}">\n' for name in images)
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n' + _TITLE + "\n"
        f"<style>{_STYLE}</style>\n"
        f"<h1>Evaluation</h1>\n<table>\n{rows(report.about)}</table>\n"
        f"<h2>Figures</h2>\n<table>\n{tables}</table>\n"
        f"<h2>Plots and pictures</h2>\n{shown}</html>\n"
    )
