"""Emoji art that is fetched once: Noto and Fluent, from the npm registry.

A style is one release of one package, named by its SHA-512: what arrives is that release or
nothing. Its archive is kept as it came and read in memory; nothing in it is unpacked or run.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import http.client
import io
import json
import os
import pathlib
import tarfile
import urllib.request

from unclip_jax.common.files import replacing
from unclip_jax.data.emoji.catalogue import ATTRIBUTION as TWEMOJI_ATTRIBUTION
from unclip_jax.errors import UserError, one_line

REGISTRY = "https://registry.npmjs.org"
MAX_ARCHIVE = 64 * 2**20  # bytes; the largest of ours has 3 MB
TIMEOUT = 60  # seconds without a byte


@dataclasses.dataclass(frozen=True)
class Package:
    """One release of the icons of one style, as Iconify publishes them.

    Attributes:
        name: of the package, under "@iconify-json".
        version: the release.
        sha512: of the archive, base64 as npm writes it.
        attribution: whose art it is, and its licence.
    """

    name: str
    version: str
    sha512: str
    attribution: str

    @property
    def archive(self) -> str:
        """The archive's file name."""
        return f"{self.name}-{self.version}.tgz"

    @property
    def url(self) -> str:
        """Where the archive comes from."""
        return f"{REGISTRY}/@iconify-json/{self.name}/-/{self.archive}"


# With another release goes another VERSION of the builder.
NOTO = Package(
    "noto",
    "1.2.9",
    "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    "Noto Emoji, copyright Google Inc, licensed under the Apache License 2.0 "
    "(https://github.com/googlefonts/noto-emoji/blob/main/svg/LICENSE).",
)
FLUENT = Package(
    "fluent-emoji-flat",
    "1.2.6",
    "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
    "Fluent Emoji (flat), copyright Microsoft Corporation, MIT licence "
    "(https://github.com/microsoft/fluentui-emoji/blob/main/LICENSE).",
)
PACKAGES = {"noto": NOTO, "fluent": FLUENT}
ATTRIBUTION = " ".join(
    ["Emoji art:", TWEMOJI_ATTRIBUTION.removeprefix("Emoji graphics: ")]
    + [package.attribution for package in PACKAGES.values()]
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


def read(package: Package, folder: str | os.PathLike) -> dict[str, str]:
    """Every drawing of a fetched package: code points without variation selectors -> an SVG.

    Raises:
        UserError: it hasn't been fetched, or isn't that release.
    """
    path = pathlib.Path(folder) / package.archive
    if not path.exists():
        raise UserError(
            f"cache_dir: {path}: not there; fetch the emoji art with unclip styles build"
        )
    with tarfile.open(fileobj=io.BytesIO(_checked(package, path)), mode="r:gz") as archive:
        icons = json.load(archive.extractfile("package/icons.json"))
        names = json.load(archive.extractfile("package/chars.json"))
    return {bare(codepoints): _svg(icons, name) for codepoints, name in names.items()}


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


def _checked(package: Package, path: pathlib.Path) -> bytes:
    """The bytes of a kept archive."""
    data = path.read_bytes()
    if not _is_release(package, data):
        raise UserError(
            f"{path}: not release {package.version} of {package.name} (its SHA-512 differs); "
            "delete it and run unclip styles build"
        )
    return data


def _is_release(package: Package, data: bytes) -> bool:
    return base64.b64encode(hashlib.sha512(data).digest()).decode() == package.sha512
