"""Conditions: what they are in a batch, and how training drops them for classifier-free guidance.

A condition is a dict of arrays with one row per example, so that guidance can stack the
condition on its null along the batch axis. Dropping never changes a shape: a dropped caption has
a mask that is False everywhere, a dropped embedding a mask bit or zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unclip_jax.common import checks
from unclip_jax.diffusion import gaussian
from unclip_jax.diffusion.gaussian import Diffusion

Condition = dict[str, jax.Array]
Params = dict[str, Any]


class Field(NamedTuple):
    """One entry of a batch.

    Attributes:
        shape: of one example.
        dtype: by name.
        meaning: in words.
        below: what integers are below; 0 for other dtypes.
    """

    shape: tuple[int, ...]
    dtype: str
    meaning: str
    below: int = 0


def image_field(size: int) -> dict[str, Field]:
    """Square pictures."""
    return {"image": Field((size, size, 3), "uint8", "RGB", 256)}


def z_i_field(embed_dim: int) -> dict[str, Field]:
    """CLIP's embeddings of pictures."""
    meaning = "CLIP's image embedding, in CLIP's coordinates"
    return {"z_i": Field((embed_dim,), "float32", meaning)}


def z_t_field(embed_dim: int) -> dict[str, Field]:
    """CLIP's embeddings of captions."""
    return {"z_t": Field((embed_dim,), "float32", "CLIP's embedding of the caption")}


def tokens_field(length: int, vocab_size: int) -> dict[str, Field]:
    """Captions as tokens."""
    start, end = vocab_size - 2, vocab_size - 1
    meaning = f"ids of the caption: {start} starts it, {end} ends it, 0 after"
    return {"tokens": Field((length,), "int32", meaning, vocab_size)}


def caption_fields(length: int, vocab_size: int, states_width: int = 0) -> dict[str, Field]:
    """Captions as tokens or, so wide, as another network's states of them; and their mask."""
    text = tokens_field(length, vocab_size)
    if states_width:
        meaning = "the states of the caption's tokens in the text encoder it was trained with"
        text = {"text_states": Field((length, states_width), "float32", meaning)}
    mask = "True through the caption's first end-of-text token; False everywhere for no caption"
    return text | {"text_mask": Field((length,), "bool", mask)}


def blank(fields: Mapping[str, Field]) -> Condition:
    """One row of zeros, for a network's `init`; masks are True."""
    return {name: jnp.full((1, *f.shape), f.dtype == "bool", f.dtype) for name, f in fields.items()}


def text_mask(tokens: jax.Array, vocab_size: int) -> jax.Array:
    """True through the first end-of-text token (id vocab_size - 1): [b, l] int32 -> [b, l] bool."""
    is_end = (tokens == vocab_size - 1).astype(jnp.int32)
    return jnp.cumsum(is_end, axis=1) - is_end == 0


def keep(key: jax.Array, batch: int, drop: float) -> jax.Array:
    """One bit per example [b], False with probability `drop`."""
    return jax.random.bernoulli(key, 1.0 - drop, (batch,))


def empty_caption(length: int, width: int, embed_dim: int) -> dict[str, jax.Array]:
    """The place of the empty caption's encoding in a stage's params, zero until it is known.

    CLIP's states `text_states` [length, width], of which the first two, start and end, are
    attended to, and `z_t` [embed_dim].
    """
    return {"text_states": jnp.zeros((length, width)), "z_t": jnp.zeros(embed_dim)}


def drop_caption(
    cond: Condition, kept: jax.Array, empty: dict[str, jax.Array] | None = None
) -> Condition:
    """The condition with some captions dropped.

    Args:
        cond: with "text_mask" [b, l], and perhaps "z_t" [b, e].
        kept: False where the caption is dropped [b].
        empty: what to put in its place (see `empty_caption`); with None, no token is attended to
            and z_t is zero.
    """
    kept = kept[:, None]
    if empty is None:
        z_t = {"z_t": jnp.where(kept, cond["z_t"], 0.0)} if "z_t" in cond else {}
        return cond | {"text_mask": cond["text_mask"] & kept} | z_t
    started = jnp.arange(cond["text_mask"].shape[1]) < 2
    return cond | {
        "text_states": jnp.where(kept[:, :, None], cond["text_states"], empty["text_states"][None]),
        "text_mask": jnp.where(kept, cond["text_mask"], started[None]),
        "z_t": jnp.where(kept, cond["z_t"], empty["z_t"][None]),
    }


def random_timesteps(key: jax.Array, batch: int, diffusion: Diffusion) -> jax.Array:
    """Timesteps [b] int32 in 0..steps-1 to train on: uniform, or moved by `timestep_shift`."""
    shift = diffusion.timestep_shift
    if shift == 1.0:
        return jax.random.randint(key, (batch,), 0, diffusion.steps)
    part = jax.random.uniform(key, (batch,))
    part = shift * part / (1.0 + (shift - 1.0) * part)
    return jnp.minimum((diffusion.steps * part).astype(jnp.int32), diffusion.steps - 1)


def initial_noise(
    keys: jax.Array, shape: tuple[int, ...], noise: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Each example's x_T [b, *shape], and what is left for the sampler's steps.

    Args:
        keys: one typed key per example [b].
        shape: of one example.
        noise: float [b, steps, *shape] to use instead: x_T, then what each step but the last adds.

    Returns:
        x_T, and the `keys` [b] and `noise` [b, steps - 1, *shape] that `samplers.sample` takes, one
        of which is None.

    Raises:
        UserError: noise of another shape.
    """
    if noise is not None:
        checks.shape("noise", noise, (keys.shape[0], None, *shape))
        return noise[:, 0], None, noise[:, 1:]
    pairs = jax.vmap(jax.random.split)(keys)
    return gaussian.normal(pairs[:, 0], shape), pairs[:, 1], None


def example_keys(key: jax.Array, num: int) -> jax.Array:
    """One key per sample number [num]; a picture depends on the seed and its number alone."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(num))
