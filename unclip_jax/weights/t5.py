"""A frozen T5 as text encoder: captions in, states out (Imagen, arXiv 2205.11487, section 2.1).

    t5 = T5.load("t5-v1_1-small", context_length=64)
    t5.encode(["a red apple"])          # {"text_states": [1, 64, 512], "text_mask": [1, 64]}

Its weights are never trained and never copied into a model folder: whoever samples gives the same
T5 again, which its fingerprint makes sure of.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.common.params import fingerprint as params_fingerprint
from unclip_jax.data.t5_tokenizer import T5Tokenizer, text_mask
from unclip_jax.errors import UserError
from unclip_jax.models.t5 import T5Config, T5Encoder
from unclip_jax.weights.convert.t5 import load_t5

Params = dict[str, Any]


@functools.partial(jax.jit, static_argnames="config")
def _encode(config: T5Config, params: Params, tokens: jax.Array) -> dict[str, jax.Array]:
    """Tokens [b, l] to the states and the mask that a decoder reads."""
    mask = text_mask(tokens)
    states = T5Encoder(config).apply({"params": params}, tokens, mask)
    return {"text_states": states, "text_mask": mask}


@dataclasses.dataclass(frozen=True, eq=False)
class T5:
    """A T5's encoder with its tokenizer. `load` makes it from a folder.

    Attributes:
        config: the network's size and compute dtype.
        params: its weights, matrices in the compute dtype, the rest float32.
        tokenizer: captions to ids.
        fingerprint: of the weights as they are stored; the same for every compute dtype.
    """

    config: T5Config
    params: Params
    tokenizer: T5Tokenizer
    fingerprint: str

    @classmethod
    def load(cls, folder: str | Path, context_length: int, dtype: str = "float32") -> T5:
        """Read a T5 from a local folder in Hugging Face's layout.

        Args:
            folder: holds config.json, the weights (model.safetensors, or another of
                `convert.folders.weights_in`) and tokenizer.json.
            context_length: tokens per caption; Imagen takes 128.
            dtype: compute dtype, "float32" or "bfloat16".

        Raises:
            UserError: something is missing, damaged or no T5's, or the parts do not belong
                together.
        """
        tokenizer = T5Tokenizer(folder, context_length)
        config, stored = load_t5(folder, dtype)
        if tokenizer.vocab_size > config.vocab_size:
            ids, rows = tokenizer.vocab_size, config.vocab_size
            what = f"tokenizer.json has {ids} ids, but the embedding table {rows} rows"
            raise UserError(f"T5 {str(folder)!r}: {what}; give files of the same T5")

        def place(path: tuple[Any, ...], array: np.ndarray) -> jax.Array:
            is_matrix = path[-1].key in ("kernel", "embedding")
            return jnp.asarray(array, dtype if is_matrix else jnp.float32)

        params = jax.tree_util.tree_map_with_path(place, stored)
        return cls(config, params, tokenizer, params_fingerprint(stored))

    @property
    def width(self) -> int:
        """Features of a state: a decoder's `text_width`."""
        return self.config.width

    def states(self, tokens: np.ndarray | jax.Array) -> dict[str, jax.Array]:
        """Ids [b, l] to "text_states" [b, l, d] float32 and "text_mask" [b, l] bool."""
        return _encode(self.config, self.params, jnp.asarray(tokens))

    def encode(self, captions: Sequence[str]) -> dict[str, jax.Array]:
        """Captions to their states, see `states`; those too long are cut with a warning.

        Raises:
            UserError: `captions` is one string, or holds anything but strings.
        """
        return self.states(self.tokenizer.encode(captions))


def load_described(
    folder: str | Path | None, about: Mapping[str, Any] | None, context_length: int
) -> T5 | None:
    """The T5 that a decoder was trained with, as the decoder's description tells.

    Args:
        folder: where it is; None where none is given.
        about: the description's entry "t5"; None where the decoder reads no T5.
        context_length: tokens per caption.

    Raises:
        UserError: none is given where one is needed, one where none is, or another one.
    """
    if about is None:
        if folder is not None:
            raise UserError(f"t5: got {str(folder)!r}, but this decoder reads no T5; leave it out")
        return None
    if folder is None:
        raise UserError(
            f"t5: none given, but this decoder reads the states of the T5 {about['fingerprint']};"
            " give the folder of the one it was trained with"
        )
    t5 = T5.load(folder, context_length, about["dtype"])
    if t5.fingerprint != about["fingerprint"]:
        what = f"is {t5.fingerprint}, but the decoder was trained with {about['fingerprint']}"
        raise UserError(f"t5 {str(folder)!r}: {what}; give that one")
    return t5
