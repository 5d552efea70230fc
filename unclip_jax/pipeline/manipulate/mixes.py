"""Pictures that begin as others: one with some noise on it (img2img), or several, mixed.

Called as the functions of `edits`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.common import checks
from unclip_jax.errors import UserError, wrong
from unclip_jax.pipeline.drawing import Progress, check_prompts, in_batches, numbered
from unclip_jax.pipeline.manipulate.latents import (
    Latents,
    Walk,
    decode,
    decoder_size,
    embed,
    encode,
    render,
    renoise,
)
from unclip_jax.pipeline.manipulate.spheres import spherical_mean
from unclip_jax.pipeline.unclip import UnCLIP

# How embeddings are mixed: the weighted mean on the sphere, or their weighted sum (Kandinsky).
MIXES = ("sphere", "sum")

Thing = np.ndarray | str  # a picture, uint8 [h, w, 3], or a caption


def img2img(
    model: UnCLIP,
    key: jax.Array,
    images: Sequence[np.ndarray],
    walk: Walk,
    *,
    strength: float = 0.6,
    inverted: bool = False,
    num: int = 1,
    upsample: bool = True,
    progress: Progress | None = None,
) -> np.ndarray:
    """Pictures drawn anew from where they are covered by noise in part (SDEdit, arXiv 2108.01073).

    With a caption of the walk, z_i comes from the prior; without one, from the pictures themselves.

    Args:
        model: with a prior if the walk has a caption.
        key: see above.
        images: uint8 [h, w, 3], of any sizes.
        walk: steps, eta, guidance, and what to draw. Of its steps the last `strength` are done.
        strength: how far from the picture, 0 (the picture itself) to 1 (as good as from noise).
            It is traced: another one compiles nothing.
        inverted: whether the noise is the one that inversion finds, without a caption, so that more
            of the picture comes back, and all of it without a caption, guidance and eta; else it
            is drawn, for each of `num` another.

    Returns:
        uint8 [b * num, size, size, 3].

    Raises:
        UserError: a strength out of range, or what `encode` and `decode` raise.
    """
    strength = checks.number("strength", strength, least=0, most=1)
    walk.sampling(model)
    first = walk.steps - max(round(strength * walk.steps), int(strength > 0))
    keys, whose, _ = numbered(key, len(images), num)

    if inverted:
        plain = dataclasses.replace(walk, caption="", negative="")
        z_i, start = encode(model, images, plain, progress, first=first)
        start = start[whose]
    else:
        z_i, small = embed(model, images, walk.batch_size), decoder_size(model, images)[whose]
        start = renoise(model, keys, small, walk, first)
    z_i = z_i[whose]
    if walk.caption:
        z_i = of_caption(model, keys, walk.caption, walk, progress)
    made = decode(model, keys, Latents(z_i, start), walk, first=first, progress=progress)
    return render(model, keys, made, upsample, walk.batch_size, progress)


def of_caption(
    model: UnCLIP, keys: jax.Array, caption: str, walk: Walk, progress: Progress | None = None
) -> np.ndarray:
    """z_i [b, e] that the prior draws for a caption, one for each key [b]."""

    def make(rows: np.ndarray) -> jax.Array:
        return model.sample_prior(keys[rows], [caption] * len(rows), progress=progress)

    return in_batches(len(keys), walk.batch_size, make)


def mixed(
    model: UnCLIP,
    keys: jax.Array,
    things: Sequence[Thing],
    weights: Sequence[float] | None = None,
    *,
    how: str = "sphere",
    batch_size: int = 16,
    progress: Progress | None = None,
) -> np.ndarray:
    """z_i [b, e] between those of any number of pictures and captions, one for each key [b].

    A picture's z_i is CLIP's; a caption's is what the prior draws for it, as `generate` does.

    Args:
        model: with a prior if there are captions.
        keys: typed [b].
        things: pictures, uint8 [h, w, 3], and captions, in any order.
        weights: one for each; None for equal ones that sum to 1. They are traced.
        how: "sphere" is `spheres.spherical_mean`: the weights count by their shares, and the length
            stays that of an embedding. "sum" is the weighted sum as it is, Kandinsky's: weights
            may be negative, and those that do not sum to 1 make it longer or shorter.
        batch_size: captions that the prior draws together.
        progress: called as progress("prior", done, steps).

    Raises:
        UserError: nothing to mix, something that is neither, weights that do not fit.
    """
    checks.choice("how", how, MIXES)
    if isinstance(things, str) or not len(things):
        raise wrong("things", things, "a list of pictures and captions, at least one")
    told = np.full(len(things), 1 / len(things)) if weights is None else _checked(weights, things)
    if how == "sphere" and (told.min() < 0 or not told.sum()):
        raise wrong("weights", told.tolist(), "0 or more, and not all 0", 'or use how="sum"')
    check_prompts([thing for thing in things if isinstance(thing, str)] or ["none"])
    walk, found = Walk(batch_size=batch_size), []
    for thing in things:
        if isinstance(thing, str):
            found.append(of_caption(model, keys, thing, walk, progress))
        else:
            found.append(np.repeat(embed(model, [thing]), len(keys), axis=0))
    stacked, told = jnp.asarray(np.stack(found)), jnp.asarray(told, jnp.float32)
    if how == "sum":
        return np.asarray(jnp.einsum("nbe,n->be", stacked, told))
    return np.asarray(spherical_mean(stacked, told))


def _checked(weights: Sequence[float], things: Sequence[Thing]) -> np.ndarray:
    if len(weights) != len(things):
        raise wrong("how many weights", len(weights), f"one for each of {len(things)}")
    return np.asarray([checks.number(f"weights[{i}]", w) for i, w in enumerate(weights)])


def mix(
    model: UnCLIP,
    key: jax.Array,
    things: Sequence[Thing],
    weights: Sequence[float] | None = None,
    *,
    how: str = "sphere",
    negative: str = "",
    num: int = 1,
    guidance_scale: float | None = None,
    upsample: bool = True,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> np.ndarray:
    """Pictures of a mix of pictures and captions, uint8 [num, size, size, 3].

    `things`, `weights` and `how` are as for `mixed`, the rest as for `UnCLIP.variations`: the
    decoder draws with its own settings, and reads no caption.
    """
    if "z_i" not in model.decoder.stage.conditions:
        raise UserError("mix: this model's decoder reads captions alone, and no embedding to mix")
    model.check_away(negative, guidance_scale)
    keys, _, _ = numbered(key, 1, num)
    told = {"batch_size": batch_size, "progress": progress}
    z_i = mixed(model, keys, things, weights, how=how, **told)
    return model.draw(keys, z_i, negative, guidance_scale, upsample, **told)
