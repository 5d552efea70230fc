"""Which image of a folder a table means."""

from __future__ import annotations

import os
from collections.abc import Sequence

from unclip_jax.data import tables
from unclip_jax.data.listing import Listing, stem
from unclip_jax.errors import UserError


class Matcher:
    """Which image a table's row means: the path from the table, from the top, or a path's end."""

    def __init__(self, listing: Listing, names: Sequence[str], folder: str):
        """Match with the images `names` of a listing what a table in its `folder` says."""
        self._names, self._folder = names, folder
        self._root = "/" if listing.is_remote else os.path.abspath(os.path.expanduser(listing.name))
        self._known = frozenset(names)
        inside = f"{folder}/" if folder else ""
        # A table of a folder without images, such as COCO's annotations/, tells of all folders.
        self._inside = inside if any(name.startswith(inside) for name in names) else ""
        self._by_end: dict[str, list[str]] = {}  # last part of a path -> images, made when needed
        self.asked = 0

    def is_image(self, file: str) -> bool:
        """Whether a text names an image of the folder."""
        file = file.strip()
        return bool(file) and len(file) < 4096 and bool(self._among(file))

    def match(self, row: tables.Row) -> str | None:
        """The image of a row; None if there is none.

        Raises:
            UserError: the path leads out of the folder, or ends several images'.
        """
        self.asked += 1
        target = os.path.normpath(os.path.join(self._root, self._folder, row.file))
        if os.path.commonpath([self._root, target]) != self._root:
            raise UserError(
                f"{row.where}: file {row.file!r}: leads out of the folder; name one inside it"
            )
        found = self._among(row.file)
        if len(found) > 1:
            raise UserError(
                f"{row.where}: file {row.file!r}: may be {found[0]} or {found[1]}; write the path"
                " from the folder"
            )
        return found[0] if found else None

    def _among(self, file: str) -> list[str]:
        if os.path.isabs(file):
            file = os.path.relpath(file, self._root)
        for folder in dict.fromkeys((self._folder, "")):
            name = os.path.normpath(os.path.join(folder, file)).lstrip("/")
            if name in self._known:
                return [name]
        if not self._by_end:
            for name in self._names:
                self._by_end.setdefault(name.rsplit("/", 1)[-1], []).append(name)
        name = os.path.normpath(file)
        ends = self._by_end.get(name.rsplit("/", 1)[-1], [])
        return [n for n in ends if n.endswith(f"/{name}") and n.startswith(self._inside)]

    def advice(self, missed: Sequence[str]) -> str:
        """Why none of a table's names is an image, as far as one can tell."""
        ways = {
            "with the path from the folder": str,
            "with / for \\": lambda text: text.replace("\\", "/"),
            "in another case": str.lower,
            "with a suffix": lambda text: stem(text) if "." in text[-5:] else text,
        }
        ways["with / for \\, another case and a suffix"] = lambda text: stem(
            text.replace("\\", "/").lower()
        )
        text = f"such as {missed[0]!r}, where the images are such as {self._names[0]!r}"
        for said, way in ways.items():
            ends = {way(name).rsplit("/", 1)[-1] for name in self._names}
            if count := sum(way(name).rsplit("/", 1)[-1] in ends for name in missed):
                return f"{text}: written {said}, {count} of them would match"
        return f"{text}: none of them is there"
