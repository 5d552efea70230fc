"""Frozen text encoders, and batches that carry the states of their captions.

A prior or a decoder may read another network's states of the caption rather than its tokens: CLIP's
in Karlo, T5's in Imagen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.data import batches
from unclip_jax.data.batches import Batches
from unclip_jax.data.datasets import DataConfig
from unclip_jax.data.records import Source
from unclip_jax.data.t5_tokenizer import T5Tokenizer
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.parts import Part
from unclip_jax.pipeline import encode_text_states
from unclip_jax.stages import ClipStage
from unclip_jax.stages.conditioning import text_mask


class TextEncoder(Protocol):
    """A frozen network that reads captions."""

    @property
    def tokenizer(self) -> Tokenizer | T5Tokenizer:
        """Captions to the ids [b, l] that it reads."""

    def states(self, tokens: np.ndarray | jax.Array) -> dict[str, jax.Array]:
        """Ids [b, l] to "text_states" [b, l, d] float32 and "text_mask" [b, l] bool."""


@dataclasses.dataclass(frozen=True, eq=False)
class ClipText:
    """The text tower of a CLIP. `of` takes it out of the whole, so that the rest can be freed."""

    stage: ClipStage
    params: dict[str, Any]

    @classmethod
    def of(cls, clip: Part) -> ClipText:
        """The text tower of `clip`."""
        model = dataclasses.replace(clip.stage.model, towers="text")
        network = clip.params["network"]
        tower = {name: network[name] for name in ("text", "text_projection")}
        return cls(dataclasses.replace(clip.stage, model=model), {"network": tower})

    @property
    def tokenizer(self) -> Tokenizer:
        """CLIP's own."""
        return Tokenizer(*self.stage.context)

    def states(self, tokens: np.ndarray | jax.Array) -> dict[str, jax.Array]:
        """See `TextEncoder`: the outputs of the final LayerNorm."""
        return self._encode(tokens)[1]

    def empty_caption(self) -> dict[str, jax.Array]:
        """What `conditioning.empty_caption` keeps the place of: the states and z_t of ""."""
        z_t, found = self._encode(self.tokenizer.encode([""]))
        return {"text_states": found["text_states"][0], "z_t": z_t[0]}

    def _encode(self, tokens: np.ndarray | jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        tokens = jnp.asarray(tokens)
        z_t, states = encode_text_states(self.stage, self.params, tokens)
        mask = text_mask(tokens, self.stage.context[1])
        return z_t, {"text_states": states, "text_mask": mask}


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
        """The position after the last batch returned."""
        return self._batches.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue where `get_state` was called."""
        self._batches.set_state(state)


def stream(
    source: Source, data: DataConfig, encoder: TextEncoder | None, **settings: Any
) -> Batches | BatchesWithStates:
    """`batches.batches` with these settings; with an encoder, in its ids and with its states."""
    if encoder is None:
        return batches.batches(source, data, **settings)
    found = batches.batches(source, data, tokenizer=encoder.tokenizer, **settings)
    return BatchesWithStates(found, encoder)
