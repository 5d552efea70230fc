"""Negative prompts: captions that guidance leads away from, in the place of no caption.

Everything else of the null stays as it is: the decoder's has no z_i, so that guidance leads away
from any picture of the negative caption, and towards the z_i and the caption that are asked for.

A decoder that reads z_i and no captions (Kandinsky) is led away from the z_i that the prior draws
for the negative caption.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from unclip_jax.errors import UserError, wrong
from unclip_jax.stages.base import Stage
from unclip_jax.stages.conditioning import Condition
from unclip_jax.weights.trained import Part

# The condition of negative prompts, and where there is one [b]: what a stage's `null` takes.
Away = tuple[Condition, jax.Array]


def null(
    negative: Sequence[str] | None, condition: Callable[[Sequence[str]], Condition]
) -> Away | None:
    """What a stage's `null` takes of negative prompts [b], where "" is none; None of None."""
    if negative is None:
        return None
    return condition(negative), jnp.asarray([bool(text) for text in negative])


def one_each(negative: str | Sequence[str], rows: int) -> list[str]:
    """A negative prompt, or "", for each row, of one for all or one for each.

    Raises:
        UserError: it is neither.
    """
    found = [negative] * rows if isinstance(negative, str) else list(negative or [""] * rows)
    if len(found) != rows:
        expected = f"one for all or one for each of {rows} prompts"
        raise wrong("how many negative prompts", len(found), expected)
    for i, text in enumerate(found):
        if not isinstance(text, str):
            raise wrong(f"negative[{i}]", text, 'a caption, or "" for none')
    return [text if text.strip() else "" for text in found]


def by_prior(stage: Stage, prior: Part | None) -> bool:
    """Whether the decoder is led away from what the prior draws for a negative prompt."""
    reads = stage.conditions
    return prior is not None and "z_i" in reads and "text_mask" not in reads


def check_decoder(
    stage: Stage, guidance_scale: float | None = None, prior: Part | None = None
) -> None:
    """Raise `UserError` unless the decoder can be guided away from a caption at this scale."""
    if "text_mask" not in stage.conditions and not by_prior(stage, prior):
        raise UserError(
            "negative: given, but this decoder reads no captions; leave it out, or guide the prior"
            " (prior_guidance_scale above 1)"
        )
    if not stage.guided_by(guidance_scale):
        raise UserError(
            "negative: given, but with a guidance scale of 1 nothing leads away from it; give a"
            " guidance_scale above 1"
        )
