"""What a request leaves behind: files to look at and download, and how to draw them again."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from unclip_jax.app.tasks import Request
from unclip_jax.common.files import replacing
from unclip_jax.pipeline.tasks.outputs import Drawn, write

Shown = tuple[str, str]  # a picture's file, and its caption

_FRAME_MS, _END_MS = 120, 600

# Where `unclip sample`'s flag has another name than what it is stored as.
_FLAGS = {"source": "from"}


@dataclasses.dataclass(frozen=True)
class Result:
    """Files in one folder.

    Attributes:
        drawn: what was drawn.
        settings: with which settings, by name.
        command: `unclip sample`'s command line that draws the same; "" where it has none.
        grid: one PNG with all pictures and their captions, as `unclip sample` writes it.
        pictures: each alone, a PNG with the settings in its metadata.
        walk: those along theta, with captions that say theta alone.
        gif: there and back along theta; None for tasks without.
    """

    drawn: Drawn
    settings: dict[str, object]
    command: str
    grid: str
    pictures: list[Shown]
    walk: list[Shown]
    gif: str | None


def keep(request: Request, drawn: Drawn, folder: Path) -> Result:
    """Write everything into `folder`."""
    stem = f"{request.args.task}-seed{request.args.seed}"
    args = argparse.Namespace(**vars(request.args), out=str(folder / f"{stem}.png"))
    captions = [caption for _, caption in drawn.cells]
    write(args, drawn)
    files = [str(folder / stem / f"{i:04d}.png") for i in range(len(captions))]
    is_same = len(set(captions)) == 1  # then it is the prompt, which stands beside the pictures
    shown = [(file, "" if is_same else text) for file, text in zip(files, captions, strict=True)]
    line = command(request.args) if request.again else ""
    walked, gif = [shown[i] for i in drawn.walk], None
    if drawn.walk:
        gif = str(folder / f"{stem}.gif")
        save_gif([drawn.cells[i][0] for i in drawn.walk], Path(gif), comment=line)
    return Result(
        drawn=drawn,
        settings=_named(request.args),
        command=line,
        grid=args.out,
        pictures=shown,
        walk=[(file, caption.partition(",")[0]) for file, caption in walked],
        gif=gif,
    )


def save_gif(frames: Sequence[np.ndarray], path: Path, comment: str) -> None:
    """An endless GIF there and back again; it rests at both ends.

    Args:
        frames: uint8 [h, w, 3], at least two.
        path: where to.
        comment: what the file says about itself; kept to the 255 bytes that every reader takes.
    """
    images = [Image.fromarray(frame) for frame in [*frames, *frames[-2:0:-1]]]
    times = [_FRAME_MS] * len(images)
    times[0] = times[len(frames) - 1] = _END_MS
    with replacing(path) as temporary:
        images[0].save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=images[1:],
            duration=times,
            loop=0,
            comment=comment.encode()[:255],
        )


def command(args: argparse.Namespace) -> str:
    """The `unclip sample` that `args` could have come from, every flag given once."""
    words = ["unclip", "sample", args.task, *([args.probe] if "probe" in args else [])]
    for name, value in _named(args).items():
        flag = f"--{_FLAGS.get(name, name)}"
        if value is True:
            words.append(flag)
            continue
        for one in value if isinstance(value, list) else [value]:
            one = f"{one:g}" if isinstance(one, float) and float(f"{one:g}") == one else str(one)
            words += [f"{flag}={one}"] if one.startswith("-") else [flag, one]
    return shlex.join(words)


def _named(args: argparse.Namespace) -> dict[str, object]:
    """The settings that are set."""
    unset = lambda value: value is None or value is False or value == ""  # noqa: E731
    return {
        name: value
        for name, value in vars(args).items()
        if name not in ("task", "probe") and not unset(value)
    }
