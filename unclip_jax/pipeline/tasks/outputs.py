"""What every task leaves behind: a labelled grid, single pictures, and bars while it works."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from unclip_jax.common import bars
from unclip_jax.common.command_line import HOST_FLAGS
from unclip_jax.common.files import check_place
from unclip_jax.common.grids import captioned_grid, save_png
from unclip_jax.data.images import Size, square
from unclip_jax.errors import UserError
from unclip_jax.pipeline.drawing import BATCH
from unclip_jax.pipeline.unclip import UnCLIP

Images = Sequence[np.ndarray]  # uint8 [h, w, 3]
Picture = tuple[np.ndarray, str]  # uint8 [h, w, 3] and its caption

# What of the command line is not a setting of the pictures.
_NOT_SETTINGS = ("task", "probe", "prompt", "prompts", "out", *HOST_FLAGS)
IN_GRID = 400  # pictures at most, whose grid is a file that programs open


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What a task came to.

    Attributes:
        cells: pictures with captions, as the grid shows them, row by row.
        columns: of the grid.
        title: above the grid.
        each: metadata of each picture; by default its caption, as "label".
        walk: which of the cells lie along theta.
        chances: CLIP's probabilities of labels, {label: one for each of `seen`}.
        seen: what was judged.
    """

    cells: list[Picture]
    columns: int
    title: str | None = None
    each: Sequence[Mapping[str, str]] | None = None
    walk: range = range(0)
    chances: Mapping[str, list[float]] = dataclasses.field(default_factory=dict)
    seen: Sequence[str] = ()


def check_out(out: str, given: Sequence[str] = ()) -> None:
    """Raise UserError unless a grid can be written to `out`, and single pictures beside it.

    The grid and the single pictures of an earlier run are replaced, all of them; what `unclip
    sample` did not make, and the `given` files, which this run reads, are not.
    """
    path, folder = Path(out), Path(out).with_suffix("")
    if path.suffix.lower() != ".png":
        raise UserError(f"--out {out!r}: expected a name that ends in .png")
    check_place("--out", path)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {out!r}: {folder} is a file, expected a folder; give another name")
    if folder.is_dir():
        check_place("--out", folder / "single.png")
    replaced = _numbered(folder) + [path] * path.exists()
    if foreign := [str(one) for one in replaced if not _is_ours(one)]:
        raise UserError(
            f"--out {out!r}: {foreign[0]} is there, which unclip sample did not make; give another"
            " name, or move it"
        )
    kept = {one.resolve() for one in (path, *replaced)}
    names = (name for name in given if "\0" not in name)  # which no file has
    if lost := [name for name in names if Path(name).resolve() in kept]:
        raise UserError(f"--out {out!r}: would replace {lost[0]}, which is read; give another name")


def _numbered(folder: Path) -> list[Path]:
    """The files in a folder that are called as single pictures are."""
    named = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in named if re.fullmatch(r"\d{4,}\.png", path.name))


def _is_ours(path: Path) -> bool:
    """Whether `write` made a file, by what it says of itself."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return {"task", "settings"} <= set(image.info)
    except (OSError, SyntaxError, ValueError):
        return False


class StageBars:
    """One progress bar on stderr for each stage's sampling; use as a context manager."""

    def __init__(self) -> None:
        """No bar yet."""
        self._bars: dict[str, tqdm] = {}
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return time.monotonic() - self._began

    def __enter__(self) -> StageBars:
        """Return self."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close what is left open."""
        for bar in self._bars.values():
            bar.close()

    def update(self, stage: str, step: int, steps: int) -> None:
        """Sampling of `stage` has done `step` of `steps`; another batch starts a bar anew."""
        bar = self._bars.get(stage)
        if bar is None or step < bar.n:
            if bar is not None:
                bar.close()
            batch, batches = BATCH.get()
            named = f"{stage:<14}" + (f" batch {batch} of {batches}" if batches > 1 else "")
            bar = self._bars[stage] = bars.bar(total=steps, desc=named, unit="step")
        bar.update(step - bar.n)
        if step == steps:
            bar.close()


def task_name(args: argparse.Namespace) -> str:
    """The task as the command line has it."""
    return " ".join([args.task, *filter(None, [getattr(args, "probe", None)])])


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a command line says of pictures, but for the prompts."""
    given = {name: value for name, value in vars(args).items() if name not in _NOT_SETTINGS}
    set_ones = {name: value for name, value in given.items() if value is not None}
    return {"model": "the box model"} | set_ones


def write(args: argparse.Namespace, drawn: Drawn, seconds: float | None = None) -> None:
    """The grid `args.out`, and every picture alone in the folder of the same name.

    The settings go into the metadata of all; the grid's says the captions, too. It shows the first
    `IN_GRID`. Pictures that an earlier run left in the folder are removed. A line says where they
    are and how many `seconds` they took; the page, which gives none, needs no line.
    """
    common = {"task": task_name(args), "settings": json.dumps(settings_of(args))}
    prompts = getattr(args, "prompt", None)
    prompts = [prompts] if isinstance(prompts, str) and prompts else prompts
    about = {"prompt": json.dumps(prompts)} if prompts else {}
    images, captions = zip(*drawn.cells[:IN_GRID], strict=True)
    grid = captioned_grid(images, captions, columns=drawn.columns, title=drawn.title)
    out = Path(args.out)
    for path in filter(_is_ours, _numbered(out.with_suffix(""))):
        path.unlink()
    save_png(grid, out, common | about)
    for i, (image, caption) in enumerate(drawn.cells):
        metadata = {"label": caption} if drawn.each is None else drawn.each[i]
        path = out.with_suffix("") / f"{i:04d}.png"
        save_png(Image.fromarray(image), path, common | dict(metadata))
    if seconds is None:
        return
    took = f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    print(f"{out}: {len(drawn.cells)} pictures in {took}; each alone in {out.with_suffix('')}/")


def sources(args: argparse.Namespace, images: Images, size: Size) -> list[Picture]:
    """The given pictures, their centres, as the grid shows them."""
    return [
        (square(image, size), Path(path).name)
        for image, path in zip(images, args.image, strict=True)
    ]


def grid_size(args: argparse.Namespace, model: UnCLIP) -> tuple[int, int]:
    """Height and width of the pictures that a task makes."""
    return model.decoder.stage.picture_size if args.no_upsample else model.picture_size


def shares(labels: Sequence[str], probabilities: np.ndarray) -> str:
    """The two most probable labels: "82% apple, 11% pear"."""
    order = np.argsort(-probabilities, kind="stable")[:2]
    return ", ".join(f"{100 * probabilities[i]:.0f}% {labels[i]}" for i in order)
