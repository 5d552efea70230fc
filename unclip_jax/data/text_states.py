"""Frozen text encoders, and batches that carry the states of their captions.

A prior or a decoder may read another network's states of the caption rather than its tokens: CLIP's
in Karlo, T5's in Imagen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from unclip_jax.data import batches
from unclip_jax.data.batches import Batches
from unclip_jax.data.datasets import DataConfig
from unclip_jax.data.records import Source
from unclip_jax.data.tokenizer import Encoder


class TextEncoder(Protocol):
    """A frozen network that reads captions."""

    @property
    def tokenizer(self) -> Encoder:
        """Captions to the ids [b, l] that it reads."""

    def states(self, tokens: np.ndarray | jax.Array) -> dict[str, jax.Array]:
        """Ids [b, l] to "text_states" [b, l, d] float32 and "text_mask" [b, l] bool."""


class BatchesWithStates:
    """Batches with the states of their captions, computed by a frozen encoder.

    The states are computed as each batch is read, and stay on the device: nothing is stored, so a
    data set may be of any size.
    """

    def __init__(self, batches: Batches, encoder: TextEncoder) -> None:
        """Join batches, made with `encoder.tokenizer`, to the encoder."""
        self._batches, self._encoder = batches, encoder

    def __iter__(self) -> BatchesWithStates:
        """The iterator itself."""
        return self

    def __next__(self) -> Mapping[str, np.ndarray | jax.Array]:
        """The next batch with "text_states" and "text_mask"."""
        batch = next(self._batches)
        return batch | self._encoder.states(batch["tokens"])

    def get_state(self) -> dict[str, Any]:
        """This process's place after the last batch returned."""
        return self._batches.get_state()

    def set_state(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Continue where all processes called `get_state`, as `Batches.set_state`."""
        self._batches.set_state(states)


def stream(
    source: Source, data: DataConfig, encoder: TextEncoder | None, **settings: Any
) -> Batches | BatchesWithStates:
    """`batches.batches` with these settings; with an encoder, in its ids and with its states."""
    if encoder is None:
        return batches.batches(source, data, **settings)
    found = batches.batches(source, data, tokenizer=encoder.tokenizer, **settings)
    return BatchesWithStates(found, encoder)
