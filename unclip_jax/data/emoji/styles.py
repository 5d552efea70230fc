"""Emoji in several styles, "red apple, noto style": the art of Noto and Fluent beside Twemoji's.

    unclip styles build

downloads 4 MB from the npm registry, two releases named by their SHA-512, and renders them. After
that `DataConfig(name="emoji_styles")` is a data set, at any size. Importing this module registers
its TFDS builder as `emoji_styles`.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import os
import pathlib
import sys

import tensorflow_datasets as tfds

from unclip_jax.common import command_line
from unclip_jax.data.datasets import DataConfig
from unclip_jax.data.emoji import art as emoji_art
from unclip_jax.data.emoji.art import ATTRIBUTION, PACKAGES
from unclip_jax.data.emoji.builder import Drawing, EmojiConfig, PictureBuilder, prepared, source
from unclip_jax.data.emoji.catalogue import Emoji, catalogue
from unclip_jax.data.records import HELDOUT_FRACTION
from unclip_jax.data.tfds import TfdsSource

STYLES = ("twemoji", *PACKAGES)

_NO_ARTICLE = frozenset({"men", "women", "people"})  # first words
_NOT_SPOKEN_AS_VOWELS = ("uni", "one", "eu")  # "a unicorn", "a one-piece swimsuit"


def with_article(name: str) -> str:
    """A name as it stands in a sentence: "a red apple", "an anchor", "grapes", "ON! arrow"."""
    words = name.split()
    plural = words[-1].endswith("s") and not words[-1].endswith(("ss", "us", "is"))
    counted = words[0] in _NO_ARTICLE or not words[0][0].islower()
    if plural or counted:
        return name
    vowel = name[0] in "aeiou" and not name.startswith(_NOT_SPOKEN_AS_VOWELS)
    return f"{'an' if vowel else 'a'} {name}"


def captions_of(emoji: Emoji, style: str) -> tuple[str, ...]:
    """What a drawing of an emoji in a style is called, the canonical caption first.

    The last one names no style, so the drawings of one emoji share it, as they do in life.
    """
    name, *aliases = emoji.captions
    captions = (
        f"{name}, {style} style",
        f"{with_article(name)}, {style} style",
        f"{style} emoji of {with_article(name)}",
        *(f"{alias}, {style} style" for alias in aliases),
        name,
    )
    return tuple(dict.fromkeys(captions))


def withheld_style(concept: str, drawn: dict[str, frozenset[str]]) -> str | None:
    """The style in which a concept is kept from training, None for most concepts.

    A style may be withheld only if every emoji of the concept that has it has another one too, so
    that each emoji is seen in some style. About one pair in ten is held out. The SHA-256 of the
    concept decides: no new emoji ever moves an old one.

    Args:
        concept: code points of the neutral form.
        drawn: each emoji of the concept -> the styles that draw it.
    """
    may = [
        style
        for style in STYLES
        if any(style in styles for styles in drawn.values())
        and all(styles != {style} for styles in drawn.values())
    ]
    digest = hashlib.sha256(f"style of {concept}".encode()).digest()
    chance, choice = (int.from_bytes(part, "big") / 2**64 for part in (digest[:8], digest[8:16]))
    # One of the styles is withheld, so of k styles a concept gives 1 / k of its pairs.
    return may[int(choice * len(may))] if chance < HELDOUT_FRACTION * len(may) else None


class EmojiStyles(PictureBuilder):
    """Emoji in the styles of Twemoji, Noto and Fluent, captioned by name and style.

    Splits `train` and `heldout` (about 10 %) part pairs of concept and style: a held-out concept
    is seen in training in its other styles.
    """

    name, what = "emoji_styles", "emoji styles"
    RELEASE_NOTES = {"1.0.0": "Three styles, splits by concept and style."}  # noqa: RUF012
    about = "Emoji in several styles, {} px on white."
    homepage, attribution = "https://iconify.design", ATTRIBUTION
    features = {  # noqa: RUF012
        "style": tfds.features.ClassLabel(names=STYLES),
        "name": tfds.features.Text(doc="style/code points"),
    }

    def _drawings(self) -> list[Drawing]:
        """Style by style, each ordered by code points; those with a skin tone move no other."""
        cache = pathlib.Path(self.data_dir).parents[2]  # above name, configuration and version
        svg = {style: emoji_art.read(p, art_folder(cache)) for style, p in PACKAGES.items()}
        drawn: dict[str, dict[str, frozenset[str]]] = collections.defaultdict(dict)
        for emoji in catalogue(skin_tones=True):
            others = {style for style in PACKAGES if emoji_art.bare(emoji.codepoints) in svg[style]}
            drawn[emoji.concept][emoji.codepoints] = frozenset({"twemoji", *others})
        withheld = {concept: withheld_style(concept, styles) for concept, styles in drawn.items()}
        found = []
        for style, e in itertools.product(STYLES, catalogue(self.builder_config.skin_tones)):
            if style not in drawn[e.concept][e.codepoints]:
                continue
            name = f"{style}/{e.codepoints}"
            theirs = svg.get(style, {}).get(emoji_art.bare(e.codepoints))
            drawing = e.art.read_text(encoding="utf-8") if theirs is None else theirs
            heldout = withheld[e.concept] == style
            more = {"style": style, "name": name}
            found.append(Drawing(name, e, captions_of(e, style), drawing, heldout, more))
        return found


def art_folder(cache_dir: str | os.PathLike) -> pathlib.Path:
    """Where the fetched packages are, inside a cache."""
    return pathlib.Path(cache_dir) / "emoji_art"


def open_source(config: DataConfig, rest: str = "") -> TfdsSource:
    """The emoji in several styles; with labels, a drawing's class is its style."""
    return source(EmojiStyles, config, "name", "style")


def main(argv: list[str]) -> None:
    """Fetch, render, and say what there is and whose art it is."""
    parser = command_line.parser("styles", __doc__)
    add = parser.add_argument
    add("command", choices=["build"])
    add("--cache_dir", default="", help="default $UNCLIP_JAX_CACHE, else ~/.cache/unclip_jax")
    add("--size", type=int, nargs="+", default=[64], metavar="PIXELS", help="default 64")
    add("--skin_tones", action="store_true", help="the variants with a skin tone too")
    args = parser.parse_args(argv)

    for size in args.size:
        EmojiConfig(image_size=size)  # a wrong size is an error now, not after the download
    cache = DataConfig(cache_dir=args.cache_dir).cache
    for package in PACKAGES.values():
        print(f"art: {emoji_art.fetch(package, art_folder(cache))}", file=sys.stderr)
    for size in args.size:
        splits = prepared(EmojiStyles, size, args.skin_tones, cache).info.splits
        counts = ", ".join(f"{name} {split.num_examples}" for name, split in splits.items())
        print(f"{size} px: {counts}")
    print(ATTRIBUTION)
