"""Measure a trained model: `unclip evaluate --model runs/emoji --out report`.

Prints a table and, with --out, writes figures.json, plots, grids of pictures and index.html, which
shows them all. Measured are:

clip      retrieval among held-out pairs, and the rank of their image embeddings
prior     cosines of sampled image embeddings with the true ones, and with other pictures' ones
decoder   how many pictures generated for captions of --split have their own caption as the nearest
pictures  Fréchet distance, CMMD, CLIP score, precision and recall of generated pictures, and, as
          real_..., of as many real ones
classes   with --class_pictures, zero-shot accuracy and what generated pictures say about it

`unclip evaluate --data emoji` measures the box model, the one that comes with the package.
docs/evaluation.md has the formulas, and what the figures do not mean.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from unclip_jax.common import command_line
from unclip_jax.common.files import check_folder
from unclip_jax.data.datasets import DataConfig
from unclip_jax.errors import wrong
from unclip_jax.evaluate.measure import Settings, evaluate
from unclip_jax.evaluate.page import PAGE, as_table, write
from unclip_jax.parallel import compile_cache, distributed, shares
from unclip_jax.parallel.cpu import devices as cpu_devices
from unclip_jax.parallel.cpu import memory as host_memory
from unclip_jax.pipeline.unclip import UnCLIP
from unclip_jax.weights.trained import load_part

_KEYS = ("image_key", "caption_key", "label_key")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = command_line.parser("evaluate", __doc__)
    add, usual = parser.add_argument, Settings()
    add("--model", metavar="DIR", help="a model folder, gs:// too (default: the box)")
    add("--clip", metavar="DIR", help="stage folder of a CLIP to measure by (default the model's)")
    add("--t5", metavar="DIR", help="T5 of a decoder that reads T5's states")
    add("--dtype", default="", help="float32 or bfloat16: keep the weights and compute in it")
    add("--data", default="emoji", help="emoji, a folder, tfds:NAME, ... (default emoji)")
    add("--split", default="train", help="split that captions to draw come from (default train)")
    add("--heldout_split", default="heldout", help="split no stage was trained on")
    for key in _KEYS:
        add(f"--{key}", help="as in the config of the data")
    add("--num", type=int, default=usual.num, help=f"captions to draw (default {usual.num})")
    add(
        "--features",
        default=usual.features,
        help="network of the Fréchet distance, precision and recall: own-clip (default),"
        " efficientnet-lite0 or -lite2, perhaps with :PIXELS, or inception:PATH with pytorch-fid's"
        " weights",
    )
    add("--guidance_scale", type=float, help="the decoder's (default the model's own)")
    add("--sweep", default="", metavar="1,2,3", help="other guidance scales to draw at")
    add("--upsample", action="store_true", help="measure upsampled pictures, not the decoder's")
    add("--class_pictures", type=int, default=0, help="pictures to draw of each class (default 0)")
    add("--template", default="{}", help='caption of a class, as "a photo of a {}"')
    add("--seed", type=int, default=usual.seed)
    size = f"pictures computed together (default {usual.batch_size})"
    add("--batch_size", type=int, default=usual.batch_size, help=size)
    command_line.add_hosts(parser)
    add("--out", metavar="DIR", help="also write figures.json, plots, grids and a page here")
    return parser.parse_args(argv)


def scales(text: str) -> tuple[float, ...]:
    """Guidance scales from a list with commas; UserError for anything else."""
    try:
        return tuple(float(word) for word in text.split(",") if text)
    except ValueError:
        raise wrong("--sweep", text, "numbers, as in 1,2,3") from None


def main(argv: list[str]) -> None:
    """Measure, print, write. Without any argument, say what there is to measure."""
    args = parse(argv or ["--help"])
    shares.join(args)
    fields = {field.name for field in dataclasses.fields(Settings)} - {"sweep"}
    settings = Settings(**{name: getattr(args, name) for name in fields}, sweep=scales(args.sweep))
    keys = {key: getattr(args, key) for key in _KEYS if getattr(args, key) is not None}
    data = DataConfig(name=args.data, split=args.split, **keys)
    if args.out:
        check_folder("--out", Path(args.out))

    cpu_devices.use()
    compile_cache.use()
    host_memory.keep_freed()
    model = UnCLIP.load(args.model, args.dtype, args.t5, mesh="all")
    judge = load_part(args.clip, "clip") if args.clip else None
    keep = Path(args.keep) if args.keep else None
    report = evaluate(model, data, args.heldout_split, settings, judge, keep)
    if not distributed.is_lead():
        return
    report.about["model"] = "the box model" if args.model is None else args.model
    print(as_table(report))
    if args.out:
        write(report, Path(args.out))
        print(f"written to {Path(args.out) / PAGE}")
