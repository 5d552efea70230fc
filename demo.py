"""What unCLIP can do, in a minute: `python demo.py` draws with the box model, offline.

It runs the commands that are listed below and writes their pictures, and one page
that shows them with the commands that made them, into a folder.
"""

from __future__ import annotations

import argparse
import html
import shlex
from pathlib import Path
from typing import NamedTuple

from unclip_jax.common import extras
from unclip_jax.errors import run_command

PAGE = "index.html"


class Show(NamedTuple):
    """One picture of the page: how `unclip sample` makes it, and what there is to see."""

    name: str
    title: str
    text: str
    flags: tuple[str, ...]


# Emoji that the demo edits, by their names. They are drawn from Twemoji, which is installed.
INPUTS = {
    "apple": "red apple", "heart": "blue heart", "face": "winking face",
    "purple": "purple heart",
}  # fmt: skip

CAPTIONS = (
    "crying face, noto style", "red apple, fluent style", "watermelon, twemoji style",
    "France, twemoji style",
)  # fmt: skip

# Every show draws as many pictures as there are captions, all with guidance, and edits two pictures
# or none, so that one compiled program of the upsampler, one of the decoder for captions and one
# for edits, and one of the inversion serve them all.
SHOWS = (
    Show(
        "text2im",
        "From a caption to a picture",
        "The prior turns the caption's CLIP embedding into that of a picture, the decoder draws a"
        " picture of 64 px from it, the upsampler makes it 256 px. Captions may name a style.",
        (
            "text2im",
            *(f"--prompt={caption}" for caption in CAPTIONS),
            "--num=1",
        ),
    ),
    Show(
        "variations",
        "Variations of pictures",
        "Pictures that share CLIP's embedding of the first in their row: what CLIP sees stays, the"
        " rest is drawn anew.",
        ("variations", "--image={face}", "--image={heart}", "--num=2", "--guidance_scale=2",
         "--steps=25"),
    ),
    Show(
        "interpolation",
        "From one picture to another",
        "Both pictures' embeddings lie on a sphere; the way between them is decoded step by step,"
        " and so are their noises.",
        ("interpolate", "--image={apple}", "--image={heart}", "--frames=4", "--rows=0",
         "--guidance_scale=2", "--steps=25"),
    ),
    Show(
        "text_diff",
        "Turned by words",
        "The pictures' embeddings turn from one caption's towards another's.",
        ("textdiff", "--image={heart}", "--image={purple}", "--from=blue heart", "--to=red heart",
         "--frames=2", "--theta_max=0.5", "--guidance_scale=2", "--steps=25"),
    ),
)  # fmt: skip

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em;
       color: #222; background: #fff; }
h2 { margin-top: 2.2em; }
img { max-width: 100%; display: block; margin: 1em 0; border: 1px solid #ddd; }
pre { background: #f4f4f4; padding: .7em 1em; overflow-x: auto; font-size: 13px; }
small { color: #666; }
"""


def draw_inputs(folder: Path) -> dict[str, Path]:
    """The emoji of `INPUTS` as PNG files of 256 px, by their keys."""
    from unclip_jax.data.emoji.catalogue import catalogue, rasterise

    art = {emoji.captions[0]: emoji.art for emoji in catalogue()}
    folder.mkdir(parents=True, exist_ok=True)
    files = {key: folder / f"{key}.png" for key in INPUTS}
    for key, path in files.items():
        path.write_bytes(rasterise(art[INPUTS[key]].read_text(encoding="utf-8"), 256))
    return files


def page(commands: dict[str, list[str]], attribution: str) -> str:
    """The HTML page: every show, and its command by its name."""
    sections = "".join(
        f"<h2>{html.escape(show.title)}</h2>\n<p>{html.escape(show.text)}</p>\n"
        f'<img src="{show.name}.png" alt="{html.escape(show.title)}">\n'
        f"<pre>unclip sample {html.escape(shlex.join(commands[show.name]))}</pre>\n"
        for show in SHOWS
    )
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>unclip_jax</title>\n<style>{STYLE}</style>\n<h1>unclip_jax</h1>\n"
        "<p>Drawn by the model that comes with the package: 29 million parameters, trained on"
        " emoji in eight styles. Every picture can be made again with the command under it.</p>\n"
        f"{sections}<p><small>{html.escape(attribution)}</small></p>\n</html>\n"
    )


@extras.named("demo.py")
def main(argv: list[str]) -> None:
    """Draw every show, then write the page."""
    parser = argparse.ArgumentParser(prog="demo.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", default="runs/demo", metavar="DIR", help="default runs/demo")
    parser.add_argument("--model", metavar="DIR", help="a model folder (default: the box model)")
    args = parser.parse_args(argv)

    from unclip_jax.common.files import write_text
    from unclip_jax.data.emoji.art import MORE_ATTRIBUTION
    from unclip_jax.pipeline.tasks import command
    from unclip_jax.pipeline.tasks.outputs import check_out
    from unclip_jax.pipeline.tasks.run import run
    from unclip_jax.weights import hub

    out = Path(args.out)
    if args.model is not None:
        hub.local_folder(args.model)
    check_out(str(out / "text2im.png"))
    inputs = draw_inputs(out / "inputs")
    model = [] if args.model is None else [f"--model={args.model}"]
    commands = {}
    for show in SHOWS:
        flags = [flag.format(**inputs) for flag in show.flags]
        commands[show.name] = [*flags, *model, f"--out={out / show.name}.png"]
        print(f"== {show.title}", flush=True)
        run(command.parse(commands[show.name]))
    write_text(out / PAGE, page(commands, MORE_ATTRIBUTION))
    print(f"Open {(out / PAGE).absolute()} in a browser.")


if __name__ == "__main__":
    run_command(main)
