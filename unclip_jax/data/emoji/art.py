"""Emoji art that is fetched once, from the npm registry.

A style is one release of one package, named by its SHA-512: what arrives is that release or
nothing. Its archive is kept as it came and read in memory; nothing in it is unpacked or run.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import http.client
import io
import json
import os
import pathlib
import tarfile
import urllib.request
from collections.abc import Iterator

from unclip_jax.common.files import replacing
from unclip_jax.data.emoji import names
from unclip_jax.data.emoji.catalogue import ATTRIBUTION as TWEMOJI_ATTRIBUTION
from unclip_jax.data.emoji.catalogue import is_flag_of_a_place
from unclip_jax.errors import UserError, one_line

REGISTRY = "https://registry.npmjs.org"
MAX_ARCHIVE = 64 * 2**20  # bytes; the largest of ours has 16 MB
TIMEOUT = 60  # seconds without a byte
_ICONS = "package/icons.json"


@dataclasses.dataclass(frozen=True)
class Package:
    """One release of a package: the art of one style, or something about emoji.

    Attributes:
        name: of the package, with its scope.
        version: the release.
        sha512: of the archive, base64 as npm writes it.
        attribution: whose work it is, and its licence.
        misnamed: its icons that show nothing, or another emoji than the one they are called by;
            all were looked at.
    """

    name: str
    version: str
    sha512: str
    attribution: str
    misnamed: frozenset[str] = frozenset()

    @property
    def archive(self) -> str:
        """The archive's file name."""
        return f"{self.name.rpartition('/')[2]}-{self.version}.tgz"

    @property
    def url(self) -> str:
        """Where the archive comes from."""
        return f"{REGISTRY}/{self.name}/-/{self.archive}"


# With another release goes another VERSION of the builder.
NOTO = Package(
    "@iconify-json/noto",
    "1.2.9",
    "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    "Noto Emoji, copyright Google Inc, licensed under the Apache License 2.0 "
    "(https://github.com/googlefonts/noto-emoji/blob/main/svg/LICENSE).",
)
FLUENT = Package(
    "@iconify-json/fluent-emoji-flat",
    "1.2.6",
    "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
    "Fluent Emoji (flat), copyright Microsoft Corporation, MIT licence "
    "(https://github.com/microsoft/fluentui-emoji/blob/main/LICENSE).",
)
PACKAGES = {"noto": NOTO, "fluent": FLUENT}
MORE_PACKAGES = {
    "3d": Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
        "Fluent Emoji (3D), copyright Microsoft Corporation, MIT licence "
        "(https://github.com/microsoft/fluentui-emoji/blob/main/LICENSE), packed by LobeHub.",
    ),
    "emojione": Package(
        "@iconify-json/emojione",
        "1.2.3",
        "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
        "EmojiOne 2 (Emoji Two), copyright EmojiOne and contributors, licensed under CC-BY 4.0 "
        "(https://github.com/EmojiTwo/emojitwo).",
    ),
    "blob": Package(
        "@iconify-json/noto-v1",
        "1.2.5",
        "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
        "Noto Emoji 1 (blobs), copyright Google Inc, licensed under the Apache License 2.0 "
        "(https://github.com/googlefonts/noto-emoji/blob/main/svg/LICENSE).",
        frozenset({"asterisk"}),
    ),
    "firefox": Package(
        "@iconify-json/fxemoji",
        "1.2.2",
        "UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
        "FxEmojis, copyright Mozilla Foundation, licensed under the Apache License 2.0 "
        "(https://mozilla.github.io/fxemoji/LICENSE.md).",
        frozenset(
            {"bow", "cat", "couple", "dog", "fog", "keyboard", "kissing", "mouse", "pig", "pout"}
            | {"tiger", "tramcar", "up", "wave", "window"}
        ),
    ),
    "streamline": Package(
        "@iconify-json/streamline-emojis",
        "1.2.4",
        "iNr9T9XuZVTyQPJO8ZlLxBzPkpi7qMl+z1l0C31vpEMqhPMelth3n7CeWQYtixdetDPdI81yeG4ROqjWpYJE6A==",
        "Streamline Emojis, copyright Streamline (Webalys), licensed under CC-BY 4.0 "
        "(https://github.com/webalys-hq/streamline-vectors).",
        frozenset({"turkey"}),
    ),
}
CLDR = Package(
    "cldr-annotations-full",
    "48.2.0",
    "DV7A+rEcgUSNTRsVGNGqBZRmAkGfwhGHO5Q1dRwzBoBnVrHWp804JP7/QJdEc66iHmx3+zLWVIMCFLm0lW7PUQ==",
    "Keywords: Unicode CLDR, copyright Unicode, Inc, Unicode License v3 "
    "(https://www.unicode.org/license.txt).",
)
ATTRIBUTION = " ".join(
    ["Emoji art:", TWEMOJI_ATTRIBUTION.removeprefix("Emoji graphics: ")]
    + [package.attribution for package in PACKAGES.values()]
)
MORE_ATTRIBUTION = " ".join(
    [ATTRIBUTION, *(package.attribution for package in (*MORE_PACKAGES.values(), CLDR))]
)


def bare(codepoints: str) -> str:
    """Hexadecimal code points without variation selectors, on which art packages disagree."""
    return "-".join(point for point in codepoints.split("-") if point != "fe0f")


def fetch(package: Package, folder: str | os.PathLike) -> pathlib.Path:
    """The archive of a package in `folder`, downloaded unless it is there.

    Raises:
        UserError: it can't be downloaded or kept, or what came or is there is another file.
    """
    path = pathlib.Path(folder) / package.archive
    if path.exists():
        _checked(package, path)
        return path
    by_hand = f"or put that file there by hand as {path}"
    try:
        with urllib.request.urlopen(package.url, timeout=TIMEOUT) as answer:
            data = answer.read(MAX_ARCHIVE + 1)
    except (OSError, http.client.HTTPException) as error:
        why = one_line(getattr(error, "reason", None) or error)
        raise UserError(
            f"{package.url}: can't be downloaded ({why}); check the network, {by_hand}"
        ) from error
    if not _is_release(package, data):
        raise UserError(
            f"{package.url}: got {len(data)} bytes with another SHA-512 than release "
            f"{package.version} has; a proxy may have changed it: try again, {by_hand}"
        )
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise UserError(
            f"cache_dir: {folder}: the emoji art can't be kept there ({one_line(error)}); give "
            "another cache_dir or set UNCLIP_JAX_CACHE"
        ) from error
    return path


def member(package: Package, folder: str | os.PathLike, name: str) -> bytes:
    """One file of a fetched package.

    Raises:
        UserError: it hasn't been fetched, or isn't that release.
    """
    with _opened(package, folder) as archive:
        return archive.extractfile(name).read()


def read(package: Package, folder: str | os.PathLike) -> dict[str, str | bytes]:
    """Every drawing of a fetched package: code points without variation selectors -> an SVG.

    Where the package holds pictures, named by code points, it is the file of a picture, and flags
    of countries are left out: Fluent has none, and whose are in the package it does not say. Where
    icons are named in words, those that are the name of an emoji are taken.

    Raises:
        UserError: it hasn't been fetched, or isn't that release.
    """
    with _opened(package, folder) as archive:
        if _ICONS not in archive.getnames():
            files = {pathlib.PurePosixPath(file.name): file for file in archive}
            return {
                bare(path.stem): archive.extractfile(file).read()
                for path, file in files.items()
                if path.suffix == ".webp" and not is_flag_of_a_place(path.stem)
            }
        icons = json.load(archive.extractfile(_ICONS))
        named = json.load(archive.extractfile("package/chars.json"))
    if not named:
        usable = icons["icons"].keys() - package.misnamed
        aliases = {alias: entry["parent"] for alias, entry in icons.get("aliases", {}).items()}
        named = names.match(usable, aliases)
    return {bare(codepoints): _svg(icons, name) for codepoints, name in named.items()}


@contextlib.contextmanager
def _opened(package: Package, folder: str | os.PathLike) -> Iterator[tarfile.TarFile]:
    """The archive of a fetched package, in memory."""
    path = pathlib.Path(folder) / package.archive
    if not path.exists():
        raise UserError(
            f"cache_dir: {path}: not there; fetch the emoji art with {_command(package)}"
        )
    with tarfile.open(fileobj=io.BytesIO(_checked(package, path)), mode="r:gz") as archive:
        yield archive


def _svg(icons: dict, name: str) -> str:
    """An icon of Iconify's JSON as a document; what it leaves out, the whole set says."""
    icon = icons["icons"][name]
    corner, size = (
        [icon.get(field, icons.get(field, default)) for field in fields]
        for fields, default in ((("left", "top"), 0), (("width", "height"), 16))
    )
    box = " ".join(str(number) for number in (*corner, *size))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}">{icon["body"]}</svg>'
    )


def _command(package: Package) -> str:
    """What fetches it."""
    more = package in (*MORE_PACKAGES.values(), CLDR)
    return "unclip styles build" + (" --data emoji_art" if more else "")


def _checked(package: Package, path: pathlib.Path) -> bytes:
    """The bytes of a kept archive."""
    data = path.read_bytes()
    if not _is_release(package, data):
        raise UserError(
            f"{path}: not release {package.version} of {package.name} (its SHA-512 differs); "
            f"delete it and run {_command(package)}"
        )
    return data


def _is_release(package: Package, data: bytes) -> bool:
    return base64.b64encode(hashlib.sha512(data).digest()).decode() == package.sha512
