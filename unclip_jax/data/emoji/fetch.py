"""Fetch the emoji art of several styles and render it:

    python -m unclip_jax styles build

downloads 4 MB from the npm registry, two releases named by their SHA-512, and renders them. After
that `DataConfig(name="emoji_styles")` is a data set, at any size.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

from unclip_jax.common.files import default_cache_dir
from unclip_jax.data.emoji import art, styles
from unclip_jax.data.emoji.builder import EmojiConfig
from unclip_jax.errors import run_command


def main(argv: list[str]) -> None:
    """Fetch, render, and say what there is and whose art it is."""
    parser = argparse.ArgumentParser(prog="python -m unclip_jax styles", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("command", choices=["build"])
    add("--cache_dir", default="", help="default $UNCLIP_JAX_CACHE, else ~/.cache/unclip_jax")
    add("--size", type=int, nargs="+", default=[64], metavar="PIXELS", help="default 64")
    add("--skin_tones", action="store_true", help="the variants with a skin tone too")
    args = parser.parse_args(argv)

    for size in args.size:
        EmojiConfig(image_size=size)  # a wrong size is an error now, not after the download
    cache = pathlib.Path(args.cache_dir) if args.cache_dir else default_cache_dir()
    for package in styles.PACKAGES.values():
        print(f"art: {art.fetch(package, styles.art_folder(cache))}", file=sys.stderr)
    for size in args.size:
        splits = styles.prepare(size, args.skin_tones, cache).info.splits
        counts = ", ".join(f"{name} {split.num_examples}" for name, split in splits.items())
        print(f"{size} px: {counts}")
    print(styles.ATTRIBUTION)


if __name__ == "__main__":
    run_command(main)
