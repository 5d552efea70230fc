"""Write what is trained here in the forms of other programs.

    unclip export program --stage decoder --model runs/emoji --out decoder-program
    unclip export clip --model runs/emoji --out clip-out
    unclip export diffusers --model runs/karlo --out karlo-diffusers

`program` writes a stage's sampler as StableHLO, which plain JAX runs without this package; `clip`
a CLIP as transformers' CLIPModel and CLIPProcessor read it; `diffusers` a Karlo or a Kandinsky,
fine-tuned perhaps, in diffusers' layout. FOLDER may also be the name of a repository on the Hugging
Face hub. See docs/export.md and docs/karlo.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from unclip_jax.common import command_line
from unclip_jax.errors import wrong
from unclip_jax.weights import box, hub
from unclip_jax.weights.export import clip, diffusers, folders, program

KINDS = ("program", "clip", "diffusers")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: it begins with a flag, as it did when programs were all there was.
    """
    if argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        do = "write unclip export program ... for a stage's sampler as StableHLO"
        raise wrong("export", argv[0], ", ".join(KINDS), do)
    parser = command_line.parser("export", __doc__)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    add = kinds.add_parser("program", help="a stage's sampler as StableHLO").add_argument
    add("--model", metavar="DIR", help="folder of a model or a stage, gs:// too (default: the box)")
    add("--out", required=True, metavar="DIR", help="the folder to write; it must not exist")
    add("--stage", required=True, choices=tuple(program.KINDS), help="what to export")
    add("--upsampler", type=int, metavar="N", help="which: the one that makes images of N pixels")
    add("--platforms", default=",".join(program.PLATFORMS), metavar="P,P",
        help=f"what it runs on (default {','.join(program.PLATFORMS)})")  # fmt: skip
    add("--dtype", choices=("float32", "bfloat16"), default="",
        help="of weights and compute (default: compute as the stage's config says, float32"
        " weights)")  # fmt: skip
    add("--steps", metavar="N", help="sampling steps (default: the stage's own)")
    add = kinds.add_parser("clip", help="a CLIP as transformers reads it").add_argument
    add("--model", metavar="DIR", help="folder of a model or a CLIP, gs:// too (default: the box)")
    add("--out", required=True, metavar="DIR", help="the folder to write; it must not exist")
    add = kinds.add_parser("diffusers", help="Karlo or Kandinsky for diffusers").add_argument
    add("--model", required=True, metavar="DIR", help="as `unclip convert` writes it")
    add("--out", required=True, metavar="DIR", help="the folder to write; it must not exist")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Write what the command line names."""
    args = parse(argv)
    out = Path(args.out)
    if args.kind == "diffusers":
        for name in diffusers.write(hub.local_folder(args.model), out):
            print(out / name)
        return
    folders.check_out(out)
    model = box.folder() if args.model is None else hub.folder_of(args.model)
    if args.kind == "clip":
        clip.write(out, folders.find(model, "clip"))
        print(f"{out}: a CLIPModel with its CLIPProcessor")
        return
    platforms = program.check_platforms(args.platforms)
    part = folders.find(model, program.KINDS[args.stage], args.upsampler, args.dtype)
    if args.steps is not None:
        part = part.respaced("--steps", args.steps)
    exported = program.write(out, part, args.stage, platforms)
    size = len(exported.mlir_module_serialized)
    print(f"{out}: the {args.stage} for {args.platforms}, a program of {size / 1e6:.1f} MB")
