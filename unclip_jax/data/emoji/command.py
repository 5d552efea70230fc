"""The art of emoji in several styles, fetched and rendered: `unclip styles build`.

    unclip styles build                       # emoji_styles: 4 MB from the npm registry
    unclip styles build --data emoji_art      # eight styles and Unicode's keywords: 30 MB

What is downloaded are releases of packages, named by their SHA-512. After that the data set is one
that `DataConfig(name="emoji_styles")` names, at any size.
"""

from __future__ import annotations

import sys

from unclip_jax.common import command_line
from unclip_jax.data.datasets import DataConfig
from unclip_jax.data.emoji import art
from unclip_jax.data.emoji.builder import EmojiConfig, prepared
from unclip_jax.data.emoji.styles import BUILDERS, art_folder


def main(argv: list[str]) -> None:
    """Fetch, render, and say what there is and whose art it is."""
    parser = command_line.parser("styles", __doc__)
    add = parser.add_argument
    add("command", choices=["build"], metavar="build", help="fetch and render")
    add("--data", choices=list(BUILDERS), default="emoji_styles", help="default emoji_styles")
    add("--cache_dir", default="", help="default $UNCLIP_JAX_CACHE, else ~/.cache/unclip_jax")
    add("--size", type=int, nargs="+", default=[64], metavar="PIXELS", help="default 64")
    add("--skin_tones", action="store_true", help="the variants with a skin tone too")
    args = parser.parse_args(argv)

    for size in args.size:
        EmojiConfig(image_size=size)  # a wrong size is an error now, not after the download
    builder, others = BUILDERS[args.data]
    cache = DataConfig(cache_dir=args.cache_dir).cache
    for package in (*builder.packages().values(), *others):
        print(f"art: {art.fetch(package, art_folder(cache))}", file=sys.stderr)
    for size in args.size:
        splits = prepared(builder, size, args.skin_tones, cache).info.splits
        counts = ", ".join(f"{name} {split.num_examples}" for name, split in splits.items())
        print(f"{size} px: {counts}")
    print(builder.attribution)
