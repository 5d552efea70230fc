"""The model that comes with this package: emoji in eight styles.

`UnCLIP.load()` and every command without `--model` use it; MODEL_CARD.md says what it is.
"""

from __future__ import annotations

from pathlib import Path

from unclip_jax.errors import UserError


def folder() -> Path:
    """The folder of its stages, clip, prior, decoder and upsampler.

    Raises:
        UserError: this installation has no weights.
    """
    path = Path(__file__).parent / "model"
    if not (path / "clip").is_dir():
        do = "install the package whole, or name a model folder"
        raise UserError(f"the box model: no weights in {path}; {do}")
    return path
