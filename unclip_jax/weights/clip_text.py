"""CLIP's text tower as a frozen encoder of captions, for networks that read its states (Karlo)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.data.tokenizer import Encoder
from unclip_jax.stages import ClipStage
from unclip_jax.stages.conditioning import text_mask
from unclip_jax.weights import trained
from unclip_jax.weights.trained import Part


@functools.partial(jax.jit, static_argnames="stage")
def _encode(stage: ClipStage, params: dict[str, Any], tokens: jax.Array):
    """Compiled `ClipStage.encode_text`: tokens [b, l] -> z_t [b, e] and states [b, l, d]."""
    return stage.encode_text(params, tokens)


@dataclasses.dataclass(frozen=True, eq=False)
class ClipText:
    """The text tower of a CLIP. `of` takes it out of the whole, so that the rest can be freed."""

    stage: ClipStage
    params: dict[str, Any]
    tokenizer: Encoder

    @classmethod
    def of(cls, clip: Part) -> ClipText:
        """The text tower of `clip`."""
        model = dataclasses.replace(clip.stage.model, towers="text")
        network = clip.params["network"]
        tower = {name: network[name] for name in ("text", "text_projection")}
        stage = dataclasses.replace(clip.stage, model=model)
        return cls(stage, {"network": tower}, trained.tokenizer(clip))

    def encode(self, tokens: np.ndarray | jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Ids [b, l] to z_t [b, e], and to what `states` gives."""
        tokens = jnp.asarray(tokens)
        z_t, states = _encode(self.stage, self.params, tokens)
        mask = text_mask(tokens, self.stage.model.end + 1)
        return z_t, {"text_states": states, "text_mask": mask}

    def states(self, tokens: np.ndarray | jax.Array) -> dict[str, jax.Array]:
        """Ids [b, l] to "text_states" [b, l, d], the final LayerNorm's outputs, and "text_mask"."""
        return self.encode(tokens)[1]

    def empty_caption(self) -> dict[str, jax.Array]:
        """What `conditioning.empty_caption` keeps the place of: the states and z_t of ""."""
        z_t, found = self.encode(self.tokenizer.encode([""]))
        return {"text_states": found["text_states"][0], "z_t": z_t[0]}
