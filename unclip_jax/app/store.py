"""The page's files, uploads and pictures, in one folder that never grows beyond a bound."""

from __future__ import annotations

import secrets
import shutil
import time
from pathlib import Path


class Store:
    """A folder of folders: gradio's, one for each upload, and ours, one for each result."""

    def __init__(self, root: Path, *, seconds: float = 3600.0, size: int = 2**30) -> None:
        """Keep what lies in `root` for so many seconds and up to so many bytes."""
        self.root, self._seconds, self._size = root, seconds, size

    def new(self) -> Path:
        """A new folder, with a name that nobody can guess, after `tidy`."""
        self.tidy()
        folder = self.root / f"result-{secrets.token_hex(16)}"
        folder.mkdir()
        return folder

    def tidy(self) -> None:
        """Delete what is too old, and then the oldest until the rest is small enough."""
        now, kept = time.time(), 0
        for made, size, path in sorted(map(_measure, self.root.iterdir()), reverse=True):
            kept += size
            if now - made > self._seconds or kept > self._size:
                shutil.rmtree(path, ignore_errors=True)


def _measure(path: Path) -> tuple[float, int, Path]:
    """When something was made, its bytes, and itself; nothing of what vanishes meanwhile."""
    try:
        return (
            path.stat().st_mtime,
            sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
            path,
        )
    except FileNotFoundError:
        return 0.0, 0, path
