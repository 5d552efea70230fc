"""Sample from a trained model, and edit pictures with it.

    unclip sample text2im --prompt "red apple, noto style" --out apple.png

draws with the box model and writes apple.png, a grid with the captions under the pictures and the
settings in its metadata, and every picture alone in the folder apple/. So does every other task:

    unclip sample variations --model runs/emoji --image apple.png

`unclip sample --help` lists them, docs/manipulations.md shows what they make.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import shlex

from unclip_jax.common import command_line


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; `--help` of each task says the rest."""
    parser = command_line.parser("sample", __doc__)
    parser.example = _drawing("a red apple")
    parser.about = lambda word: f"to draw it: {_drawing(word)}"
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    _text2im(tasks)
    _from_pictures(tasks)
    _edits(tasks)
    probes = tasks.add_parser("probe", help="what CLIP and the prior know")
    _probes(probes.add_subparsers(dest="probe", required=True, metavar="PROBE"))
    return parser.parse_args(argv)


def _drawing(caption: str) -> str:
    """The command line that draws a caption."""
    return command_line.called("sample", ["text2im", "--prompt", caption])


class _OneOrMore(argparse.Action):
    """Whole numbers: one alone, or a list of several."""

    def __call__(self, parser, namespace, values, option_string=None):
        """Set it."""
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


def _add_whole(add, flag: str, default: int, help: str) -> None:
    help = f"{help} (default {default}); or one number for each caption"
    add(flag, type=int, nargs="+", action=_OneOrMore, default=default, metavar="N", help=help)


def _task(tasks, name: str, help: str) -> command_line.Parser:
    """A task with the flags that all have."""
    task = tasks.add_parser(name, help=help, description=help)
    command_line.add_model(task)
    command_line.add_hosts(task)
    command_line.add_lora(task)
    add = task.add_argument
    grid = "the grid; single pictures go beside it (default out.png)"
    add("--out", default="out.png", metavar="PNG", help=grid)
    if name == "text2im":
        _add_whole(add, "--seed", 0, "same seed, same pictures")
    else:
        add("--seed", type=int, default=0, help="same seed, same pictures (default 0)")
    add("--batch_size", type=int, default=16, help="pictures computed together (default 16)")
    add("--upsampler_steps", metavar="N", help="every upsampler's (default: the model's own)")
    px = "of the pictures, in px, where the model draws any size (default: the model's own)"
    add("--height", type=int, help=px)
    add("--width", type=int, help="likewise")
    add("--hint", metavar="FILE", help="the depth map, where the decoder follows one")
    return task


def _text2im(tasks) -> None:
    task = _task(tasks, "text2im", "pictures for captions")
    task.about = lambda word: f"a caption is --prompt {shlex.quote(word)}"
    add = task.add_argument
    _add_prompts(add)
    _add_whole(add, "--num", 4, "pictures per caption")
    _add_whole(add, "--first", 0, "number of the first of them: draws those and no others")
    _add_negative(add)
    _add_guidance(add)
    add("--prior_guidance_scale", type=_finite, help="the prior's (default: the model's own)")
    _add_steps(add)


def _from_pictures(tasks) -> None:
    add = _task(tasks, "img2img", "pictures drawn anew from under some noise").add_argument
    _add_images(add)
    _add_walk(add, guidance="the model's own")
    add("--prompt", default="", metavar="TEXT", help="what to draw (default: what CLIP sees)")
    add("--strength", type=_finite, default=0.6, help="how far from the picture, 0-1 (default 0.6)")
    add("--invert", action="store_true", help="start from the noise that inversion finds")
    add("--num", type=int, default=4, help="pictures of each (default 4)")

    add = _task(tasks, "mix", "one picture of several pictures and captions").add_argument
    _add_images(add, required=False)
    _add_prompts(add)
    help = "one for each picture, then for each caption (default: equal ones)"
    add("--weight", type=_finite, nargs="+", action="extend", metavar="W", help=help)
    help = "their mean on the sphere, or their sum, as Kandinsky's (default sphere)"
    add("--how", choices=("sphere", "sum"), default="sphere", help=help)
    add("--num", type=int, default=4, help="pictures (default 4)")
    _add_negative(add)
    _add_guidance(add)
    _add_steps(add)


def _edits(tasks) -> None:
    task = _task(tasks, "reconstruct", "pictures encoded as (z_i, x_T) and decoded again")
    _add_images(task.add_argument)
    _add_walk(task.add_argument, steps=None, guidance="none")
    task.add_argument(
        "--steps", type=int, nargs="+", default=[25, 50, 100], help="one column for each number"
    )

    task = _task(tasks, "variations", "pictures that share a picture's CLIP embedding")
    _add_images(task.add_argument)
    _add_walk(task.add_argument, eta=1.0, guidance="none")
    task.add_argument("--num", type=int, default=4, help="variations per picture (default 4)")

    task = _task(tasks, "interpolate", "from one picture to another; give two")
    _add_images(task.add_argument)
    _add_walk(task.add_argument, guidance="none")
    task.add_argument("--frames", type=int, default=7, help="steps on the way (default 7)")
    task.add_argument(
        "--rows", type=int, default=1, help="more rows, each with one random x_T (default 1)"
    )

    task = _task(tasks, "textdiff", "pictures turned from one caption towards another")
    _add_images(task.add_argument)
    _add_walk(task.add_argument, guidance="none")
    task.add_argument(
        "--from", dest="source", default="", metavar="TEXT", help="what they show (default: none)"
    )
    task.add_argument("--to", required=True, metavar="TEXT", help="what they shall show")
    task.add_argument(
        "--theta_max", type=_finite, default=0.5, help="how far to turn, 0 to 1 (default 0.5)"
    )
    task.add_argument("--frames", type=int, default=6, help="steps on the way (default 6)")

    task = _task(tasks, "inpaint", "paint a part of a picture anew")
    _add_images(task.add_argument)
    task.add_argument(
        "--mask", required=True, metavar="FILE", help="white where to paint, or transparent there"
    )
    _add_walk(task.add_argument, eta=1.0, guidance="the model's own")
    task.add_argument("--prompt", default="", metavar="TEXT", help="what to paint")
    task.add_argument("--num", type=int, default=4, help="pictures (default 4)")

    task = _task(tasks, "upscale", "pictures through the upsamplers alone")
    _add_images(task.add_argument)
    task.add_argument("--num", type=int, default=1, help="pictures of each (default 1)")


def _probes(probes) -> None:
    task = _task(probes, "pca", "what the first principal components of CLIP's embeddings hold")
    _add_images(task.add_argument)
    _add_walk(task.add_argument, guidance="the model's own")
    task.add_argument("--dims", type=int, nargs="+", help="numbers of components")
    task.add_argument(
        "--data", default="emoji", help="what they are fitted on: emoji, a folder or tfds:NAME"
    )
    task.add_argument("--split", default="train", help="its split (default train)")

    task = _task(probes, "prior", "captions without embedding, with z_t, and with the prior's z_i")
    _add_prompts(task.add_argument)
    _add_walk(task.add_argument, guidance="the model's own")

    task = _task(probes, "typographic", "whether a word on a picture changes what CLIP sees")
    _add_images(task.add_argument)
    _add_walk(task.add_argument, guidance="the model's own")
    task.add_argument("--word", required=True, metavar="TEXT", help="what to write on the picture")
    task.add_argument(
        "--label", action="append", required=True, metavar="TEXT", help="a caption to choose from"
    )
    task.add_argument("--num", type=int, default=3, help="pictures decoded of each (default 3)")

    task = _task(probes, "binding", "whether an attribute stays with its object")
    _add_images(task.add_argument, required=False)
    _add_prompts(task.add_argument)
    _add_walk(task.add_argument, guidance="the model's own")
    task.add_argument("--num", type=int, default=3, help="pictures decoded of each (default 3)")


def _finite(text: str) -> float:
    """A number that is neither infinite nor nan, which would only make black pictures."""
    with contextlib.suppress(ValueError):
        if math.isfinite(value := float(text)):
            return value
    raise argparse.ArgumentTypeError(f"got {text!r}, expected a finite number")


def _add_prompts(add) -> None:
    add("--prompt", action="append", default=[], metavar="TEXT", help="a caption; may be repeated")
    add("--prompts", metavar="FILE", help="a text file with one caption per line")


def _add_guidance(add) -> None:
    add("--guidance_scale", type=_finite, help="the decoder's; 1 = none (default: the model's own)")


def _add_steps(add) -> None:
    """Of the model's own samplers."""
    add("--prior_steps", metavar="N", help="the prior's sampling steps (default: the model's own)")
    add("--decoder_steps", metavar="N", help="the decoder's (default: the model's own)")
    add("--no_upsample", action="store_true", help="stop at the decoder's size")


def _add_negative(add) -> None:
    add("--negative", default="", metavar="TEXT", help="what guidance leads away from")


def _add_images(add, required: bool = True) -> None:
    add(
        "--image",
        nargs="+",
        action="extend",
        default=[],
        required=required,
        metavar="FILE",
        help="image files, of any size and mode; the centre square is used",
    )


def _add_walk(add, *, guidance: str, steps: int | None = 50, eta: float = 0.0) -> None:
    """The flags of `manipulate.Walk`; a task that takes several numbers of steps adds its own."""
    if steps:
        add("--steps", type=int, default=steps, help=f"of the decoder's DDIM (default {steps})")
    add("--eta", type=_finite, default=eta, help=f"the decoder's noise, 0 to 1 (default {eta})")
    _add_negative(add)
    add("--guidance_scale", type=_finite, help=f"the decoder's (default: {guidance})")
    add("--no_upsample", action="store_true", help="stop at the decoder's size")


def main(argv: list[str]) -> None:
    """Run one task."""
    args = parse(argv)

    from unclip_jax.pipeline.tasks.run import run  # imports JAX: wrong usage is told before

    run(args)
