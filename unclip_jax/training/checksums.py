"""Checksums of all files of a checkpoint, as the first versions kept them in a file beside them.

`checksums.json` maps the path of every other file in the folder to its size and SHA-256, and
carries a digest of that table, so a changed byte anywhere, in the table too, is found.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

CHECKSUMS_FILE = "checksums.json"


def problem(folder: Path, share: int = 0, shares: int = 1) -> str:
    """What differs from `checksums.json`, in words; "" if nothing does.

    Of the files, the part `share` of `shares` is read: several processes may divide them.
    """
    try:
        content = json.loads((folder / CHECKSUMS_FILE).read_text(encoding="utf-8"))
        table, intact = content["files"], content["digest"] == _digest(content["files"])
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        return f"{CHECKSUMS_FILE} is damaged"
    there = {path.relative_to(folder).as_posix() for path in _files(folder)}
    odd = sorted(there ^ set(table))
    if odd:
        return f"{odd[0]} is {'missing' if odd[0] in table else 'new'}"
    for name in sorted(table)[share::shares]:
        size, digest = table[name]
        path = folder / name
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, expected {size}"
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                return f"{name} has changed since it was written (its SHA-256 differs)"
    return ""


def exist(folder: Path) -> bool:
    """Whether the folder has checksums; one from before there were any has none."""
    return (folder / CHECKSUMS_FILE).is_file()


def _files(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in found if path != folder / CHECKSUMS_FILE)


def _digest(table: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()
