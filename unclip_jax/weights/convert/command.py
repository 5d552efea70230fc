"""Convert public weights to model folders of ours.

    unclip convert karlo FOLDER [FOLDER ...] --out runs/karlo
    unclip convert kandinsky PRIOR DECODER --out runs/kandinsky
    unclip convert clip FOLDER_OR_FILE --out runs/clip

`karlo` reads Karlo-v1-alpha in diffusers' layout (the text-to-image repository, the one for image
variations, or both) or in the original one; `kandinsky` Kandinsky 2.2, of the prior's repository
and a decoder's; `clip` reads CLIP from Hugging Face, OpenCLIP or OpenAI. FOLDER may also be the
name of a repository on the Hugging Face hub. `unclip export diffusers` is the way back.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from unclip_jax.common import command_line
from unclip_jax.common.params import flatten
from unclip_jax.errors import wrong
from unclip_jax.weights import folder as model_folder
from unclip_jax.weights import hub
from unclip_jax.weights.convert import clip, kandinsky, karlo
from unclip_jax.weights.trained import Part

DTYPES = ("float32", "bfloat16", "float16")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: it asks for what is now `unclip export diffusers`.
    """
    if argv[:1] == ["diffusers"]:
        do = "write unclip export diffusers --model DIR --out DIR"
        raise wrong("convert", "diffusers", "karlo, kandinsky or clip", do)
    parser = command_line.parser("convert", __doc__)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    help_dtype = "of the weights written (default: as they are in the files)"
    for kind, name in (("karlo", "Karlo-v1-alpha"), ("kandinsky", "Kandinsky 2.2")):
        add = kinds.add_parser(kind, help=f"{name} to a model folder").add_argument
        add("sources", nargs="+", metavar="FOLDER", help="folders or hub names, taken together")
        add("--out", required=True, metavar="DIR", help="the model folder to write")
        add("--dtype", choices=DTYPES, default="", help=help_dtype)
    add = kinds.add_parser("clip", help="a CLIP to a stage folder").add_argument
    add("source", metavar="SOURCE", help="a folder, a hub name, or OpenAI's file")
    add("--out", required=True, metavar="DIR", help="the stage folder to write")
    add("--dtype", choices=DTYPES, default="", help=help_dtype)
    add("--arch", choices=clip.ARCHS, default="", metavar="NAME",
        help="of a file that does not say what it is: " + ", ".join(clip.ARCHS))  # fmt: skip
    return parser.parse_args(argv)


def save(folder: Path, part: Part, dtype: str) -> None:
    """Write one part, and say so."""
    model_folder.save_stage(
        folder, params=part.params, description=part.description, dtype=dtype or _stored(part)
    )
    tqdm.write(f"{folder}: {part.stage.kind} of {_count(part):,} parameters")
    for what in part.description.get("assumed", ()):
        source = part.description["converted_from"]
        tqdm.write(f"{folder}: {source} does not say {what}; taken to be as OpenAI's")


def _stored(part: Part) -> str:
    """The dtype that a part's weights have."""
    leaf = next(iter(flatten(part.params["network"]).values()))
    return leaf.dtype.name


def _count(part: Part) -> int:
    networks = {k: v for k, v in part.params.items() if k.endswith("network")}
    return sum(leaf.size for leaf in flatten(networks).values())


def main(argv: list[str]) -> None:
    """Convert what the command line names."""
    args = parse(argv)
    out = Path(args.out)
    if args.kind != "clip":
        folders = [hub.local_folder(source) for source in args.sources]
        read = {"karlo": karlo.read, "kandinsky": kandinsky.read}[args.kind]
        for name, part in read(folders, args.dtype):
            save(out / name, part, args.dtype)
    else:
        part = clip.load(hub.local_folder(args.source), dtype=args.dtype, arch=args.arch)
        save(out, part, args.dtype)
