"""Emoji in several styles, "red apple, noto style".

`emoji_styles` has the art of Noto and Fluent beside Twemoji's, `emoji_art` that of five others as
well, and more words. Once `unclip styles build` has fetched the art, both are data sets, at any
size. Importing this module registers their TFDS builders.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds

from unclip_jax.data.datasets import DataConfig
from unclip_jax.data.emoji import art as emoji_art
from unclip_jax.data.emoji.art import (
    ATTRIBUTION,
    CLDR,
    MORE_ATTRIBUTION,
    MORE_PACKAGES,
    PACKAGES,
    Package,
)
from unclip_jax.data.emoji.builder import Drawing, PictureBuilder, source
from unclip_jax.data.emoji.catalogue import Emoji, catalogue
from unclip_jax.data.emoji.keywords import Keywords, keywords
from unclip_jax.data.records import HELDOUT_FRACTION
from unclip_jax.data.tfds import TfdsSource
from unclip_jax.errors import wrong

STYLES = ("twemoji", *PACKAGES)
MORE_STYLES = tuple(MORE_PACKAGES)
WHOLE = 0.04  # of the concepts of which no pair is held out, all drawings are
PARAPHRASES = "paraphrases"
NO_WORDS = Keywords()

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


def captions_of(emoji: Emoji, style: str, words: Keywords = NO_WORDS) -> tuple[str, ...]:
    """What a drawing of an emoji in a style is called, the canonical caption first.

    The last one names no style, so the drawings of one emoji share it, as they do in life.

    Args:
        emoji: what it shows.
        style: the name of the style.
        words: other words for it.
    """
    name, *aliases = emoji.captions
    captions = (
        f"{name}, {style} style",
        f"{with_article(name)}, {style} style",
        f"{style} emoji of {with_article(name)}",
        *(f"{alias}, {style} style" for alias in (*aliases, *words.trained)),
        *([f"{', '.join(words.listed)}, {style} style"] if words.listed else []),
        name,
    )
    return tuple(dict.fromkeys(captions))


def _chances(name: str) -> tuple[float, float]:
    """Two numbers from 0 to below 1, by the SHA-256 of a name."""
    digest = hashlib.sha256(name.encode()).digest()
    return tuple(int.from_bytes(part, "big") / 2**64 for part in (digest[:8], digest[8:16]))


def withheld_style(
    concept: str,
    drawn: Mapping[str, frozenset[str]],
    styles: Sequence[str] = STYLES,
    salt: str = "style",
) -> str | None:
    """The style in which a concept is kept from training, None for most concepts.

    A style may be withheld only if every emoji of the concept that has it has another one too, so
    that each emoji is seen in some style. About one pair in ten is held out. The SHA-256 of the
    concept decides: no new emoji ever moves an old one.

    Args:
        concept: code points of the neutral form.
        drawn: each emoji of the concept -> the styles that draw it.
        styles: those of which one may be withheld.
        salt: goes into the hash.
    """
    may = [
        style
        for style in styles
        if any(style in own for own in drawn.values())
        and all(own != {style} for own in drawn.values())
    ]
    chance, choice = _chances(f"{salt} of {concept}")
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

    @classmethod
    def packages(cls) -> dict[str, Package]:
        """The packages of each style but Twemoji's."""
        return PACKAGES

    def _drawings(self) -> list[Drawing]:
        """Style by style, each ordered by code points; those with a skin tone move no other."""
        packages = self.packages()
        art = {style: emoji_art.read(p, self._folder()) for style, p in packages.items()}
        drawn: dict[str, dict[str, frozenset[str]]] = collections.defaultdict(dict)
        for emoji in catalogue(skin_tones=True):
            others = {style for style in packages if emoji_art.bare(emoji.codepoints) in art[style]}
            drawn[emoji.concept][emoji.codepoints] = frozenset({"twemoji", *others})
        kept = {concept: self._kept(concept, styles) for concept, styles in drawn.items()}
        words, found = self._words(), []
        every = catalogue(self.builder_config.skin_tones)
        for style, e in itertools.product(("twemoji", *packages), every):
            if style not in drawn[e.concept][e.codepoints]:
                continue
            name, own = f"{style}/{e.codepoints}", words.get(e.codepoints, NO_WORDS)
            theirs = art.get(style, {}).get(emoji_art.bare(e.codepoints))
            drawing = e.art.read_text(encoding="utf-8") if theirs is None else theirs
            split = kept[e.concept].get(style, "train")
            more = {"style": style, "name": name} | self._more(own)
            found.append(Drawing(name, e, captions_of(e, style, own), drawing, split, more))
        return found

    def _folder(self) -> pathlib.Path:
        """Where the art is: in the cache, which is above name, configuration and version."""
        return art_folder(pathlib.Path(self.data_dir).parents[2])

    def _kept(self, concept: str, drawn: Mapping[str, frozenset[str]]) -> dict[str, str]:
        """Styles in which a concept is kept from training -> the split that they are in."""
        withheld = withheld_style(concept, drawn)
        return {withheld: "heldout"} if withheld else {}

    def _words(self) -> dict[str, Keywords]:
        """Other words for each emoji, by code points."""
        return {}

    def _more(self, words: Keywords) -> dict[str, Any]:
        """Features of a drawing that only this data set has."""
        return {}


class EmojiArt(EmojiStyles):
    """Emoji in eight styles, captioned by name, alias or keyword, and style.

    Split `heldout` has the held-out pairs of `emoji_styles`, all of them, and as many of the other
    styles; `concepts` every drawing of some 3 % of the concepts, which training sees in no style.
    One keyword in five, of those in no name, is in no caption, but among the `paraphrases`.
    """

    name, what = "emoji_art", "emoji art"
    RELEASE_NOTES = {"1.0.0": "Eight styles, keywords, held-out concepts."}  # noqa: RUF012
    about = "Emoji in eight styles, {} px on white."
    attribution = MORE_ATTRIBUTION
    splits = ("train", "heldout", "concepts")
    features = {  # noqa: RUF012
        "style": tfds.features.ClassLabel(names=(*STYLES, *MORE_STYLES)),
        "name": tfds.features.Text(doc="style/code points"),
        PARAPHRASES: tfds.features.Sequence(tfds.features.Text(doc="in no caption")),
    }

    @classmethod
    def packages(cls) -> dict[str, Package]:
        """The packages of each style but Twemoji's."""
        return PACKAGES | MORE_PACKAGES

    def _kept(self, concept: str, drawn: Mapping[str, frozenset[str]]) -> dict[str, str]:
        known = {points: styles & {*STYLES} for points, styles in drawn.items()}
        if today := super()._kept(concept, known):  # what is held out of emoji_styles stays so
            whole = False
        else:
            whole = _chances(f"whole {concept}")[0] < WHOLE
        if whole:
            return dict.fromkeys((*STYLES, *MORE_STYLES), "concepts")
        new = withheld_style(concept, drawn, MORE_STYLES, salt="more art")
        return today | ({new: "heldout"} if new else {})

    def _words(self) -> dict[str, Keywords]:
        return keywords(self._folder())

    def _more(self, words: Keywords) -> dict[str, Any]:
        return {PARAPHRASES: list(words.kept_out)}


# What `unclip styles build` fetches and renders: a data set's builder, and packages beside its art.
BUILDERS = {EmojiStyles.name: (EmojiStyles, ()), EmojiArt.name: (EmojiArt, (CLDR,))}


def art_folder(cache_dir: str | os.PathLike) -> pathlib.Path:
    """Where the fetched packages are, inside a cache."""
    return pathlib.Path(cache_dir) / "emoji_art"


def open_source(config: DataConfig, rest: str = "") -> TfdsSource:
    """The emoji in several styles; with labels, a drawing's class is its style.

    Raises:
        UserError: the art isn't fetched, or the name has something unknown behind the colon.
    """
    name = config.name.partition(":")[0]
    if rest not in ("", PARAPHRASES):
        raise wrong("name", config.name, f"{name} or {name}:{PARAPHRASES}")
    key = PARAPHRASES if rest else "captions"
    return source(BUILDERS[name][0], config, "name", "style", caption_key=key)
