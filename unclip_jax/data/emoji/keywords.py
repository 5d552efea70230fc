"""What else emoji are called: Unicode's CLDR has some six English keywords for each.

"automobile" is called "car", "driving", "vehicle". Those become captions, but for one in five of
those that are no word of any name: no caption has them. By them one measures whether a model
understands other words than it was taught.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable
from typing import NamedTuple

from unclip_jax.data.emoji.art import CLDR, bare, member
from unclip_jax.data.emoji.catalogue import Emoji, catalogue, without_tones

KEPT_OUT = 0.2  # of the keywords that are in no name
MOST_CONCEPTS = 3  # "face" has 160: it describes none of them
TOGETHER = 36  # letters, at most, of the keywords in the caption that lists them
_ANNOTATIONS = "package/annotations/en/annotations.json"


class Keywords(NamedTuple):
    """The keywords of one emoji.

    Attributes:
        trained: in captions of training, each in a caption of its own.
        listed: in one caption together, which no other emoji has; empty where there is none.
        kept_out: in none.
    """

    trained: tuple[str, ...] = ()
    listed: tuple[str, ...] = ()
    kept_out: tuple[str, ...] = ()


def _stem(word: str) -> str:
    """What a word and its plural share."""
    return word.casefold().removesuffix("s")


def is_kept_out(keyword: str) -> bool:
    """Whether no caption has this keyword, unless names do. Its SHA-256 alone decides."""
    digest = hashlib.sha256(f"keyword {_stem(keyword)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < KEPT_OUT * 2**64


@functools.cache
def _in_names() -> frozenset[str]:
    """The stem of every word of every name, and of those that captions have beside."""
    names = (caption for emoji in catalogue(skin_tones=True) for caption in emoji.captions)
    words = {_stem(word) for name in names for word in re.findall(r"[^\W_]+", name)}
    return frozenset(words | {"emoji", "style"})


def read(folder: str | os.PathLike) -> dict[str, tuple[str, ...]]:
    """CLDR's English keywords: code points without variation selectors -> keywords.

    Raises:
        UserError: the package hasn't been fetched into `folder`, or isn't that release.
    """
    found = json.loads(member(CLDR, folder, _ANNOTATIONS))["annotations"]["annotations"]
    return {
        bare("-".join(f"{ord(character):x}" for character in text)): tuple(entry["default"])
        for text, entry in found.items()
        if "default" in entry
    }


def keywords(folder: str | os.PathLike) -> dict[str, Keywords]:
    """The keywords of every emoji, by its code points; those of all skin tones have the same.

    A keyword that is a name of any emoji is none, nor is one with fewer than two letters.
    """
    neutral, every = read(folder), catalogue(skin_tones=True)
    names = {caption.casefold() for emoji in catalogue() for caption in emoji.captions}

    def own(emoji: Emoji) -> list[str]:
        found = neutral.get(bare(without_tones(emoji.codepoints)), ())
        return [
            keyword
            for keyword in dict.fromkeys(found)
            if keyword.casefold() not in names and sum(map(str.isalpha, keyword)) >= 2
        ]

    def taught(keyword: str) -> bool:
        words = re.findall(r"[^\W_]+", keyword)
        return not is_kept_out(keyword) or any(_stem(word) in _in_names() for word in words)

    concepts = collections.defaultdict(set)
    for emoji in every:
        for keyword in own(emoji):
            concepts[keyword.casefold()].add(emoji.concept)
    found, lists = {}, collections.defaultdict(set)
    for emoji in every:
        few = [k for k in own(emoji) if len(concepts[k.casefold()]) <= MOST_CONCEPTS]
        listed = _short(k for k in own(emoji) if taught(k))
        lists[listed].add(emoji.concept)
        found[emoji.codepoints] = Keywords(
            trained=tuple(k for k in few if taught(k)),
            listed=listed,
            kept_out=tuple(k for k in few if not taught(k)),
        )
    lone = {words for words, owners in lists.items() if len(words) < 2 or len(owners) > 1}
    return {
        points: words._replace(listed=()) if words.listed in lone else words
        for points, words in found.items()
    }


def _short(keywords: Iterable[str]) -> tuple[str, ...]:
    """The first of them, as many as there is room for in a caption."""
    found = tuple(keywords)
    while len(", ".join(found)) > TOGETHER:
        found = found[:-1]
    return found
