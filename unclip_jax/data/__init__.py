"""Data sets, the tokenizer, batches, and stored embeddings."""

from __future__ import annotations

import importlib
from typing import Any

# What is imported from the room itself, when it is first asked for -> its module.
_PUBLIC = {
    "DataConfig": "datasets",
    "EmbeddingStore": "embeddings.store",
    "Tokenizer": "tokenizer",
    "load": "datasets",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
