"""Edits of pictures by their latents: variations, interpolations, text diffs; and inpainting.

The figures of section 3 of the paper. Every function that decodes takes a model with CLIP and a
decoder that reads z_i. It returns uint8 pictures at the model's full size, or at the decoder's with
`upsample=False`; the i-th of `num` of the same draws from fold_in(key, i), and they stand side by
side. It calls progress(stage, done, steps).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.common import checks
from unclip_jax.errors import UserError, wrong
from unclip_jax.metrics.psnr import psnr
from unclip_jax.pipeline.drawing import Progress, check_prompts
from unclip_jax.pipeline.manipulate import masks
from unclip_jax.pipeline.manipulate.latents import (
    Latents,
    Walk,
    decode,
    decoder_size,
    embed,
    encode,
    noise,
    render,
)
from unclip_jax.pipeline.manipulate.spheres import slerp
from unclip_jax.pipeline.unclip import UnCLIP
from unclip_jax.stages.conditioning import example_keys
from unclip_jax.stages.pixels import squared, to_uint8


def reconstruct(
    model: UnCLIP,
    key: jax.Array,
    images: Sequence[np.ndarray],
    walk: Walk,
    *,
    upsample: bool = True,
    progress: Progress | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Pictures encoded and decoded again.

    Args:
        model: see above.
        key: typed PRNG key; without eta, only the upsamplers draw from it.
        images: uint8 [h, w, 3], of any sizes.
        walk: how; with eta = 0 and no guidance the pictures come back, the closer the more steps.

    Returns:
        uint8 [b, size, size, 3], and the PSNR [b], in dB, of what the decoder made, at its size.
    """
    latents = encode(model, images, walk, progress)
    keys = jnp.tile(example_keys(key, 1), len(images))
    small = decode(model, keys, latents, walk, progress=progress)
    truth = squared(images, model.decoder.stage.picture_size)
    decoded = np.asarray(to_uint8(small))
    ratios = [psnr(decoded[i : i + 1], truth[i : i + 1]) for i in range(len(truth))]
    return render(model, keys, small, upsample, walk.batch_size, progress), np.asarray(ratios)


def pictures(
    model: UnCLIP,
    key: jax.Array,
    latents: Latents,
    walk: Walk,
    *,
    num: int = 1,
    upsample: bool = True,
    progress: Progress | None = None,
) -> np.ndarray:
    """Pictures of b latents, uint8 [b * num, size, size, 3].

    With eta = 0 all `num` of one latent are the same but for the upsamplers; with eta > 0 they are
    variations of it, figure 3 of the paper: what z_i leaves open differs, the more the larger eta.
    """
    keys = jnp.tile(example_keys(key, checks.count("num", num)), len(latents.z_i))
    repeated = Latents(*(np.repeat(np.asarray(part), num, axis=0) for part in latents))
    small = decode(model, keys, repeated, walk, progress=progress)
    return render(model, keys, small, upsample, walk.batch_size, progress)


def interpolate(latents: Latents, frames: int, x_T: np.ndarray | None = None) -> Latents:
    """The latents between the first of two and the second: figure 4 of the paper.

    z_i is slerped. So is x_T, and the ends then decode to the two pictures themselves; or one x_T
    [h, w, c] is kept throughout, and the ends are variations of the two pictures.

    Raises:
        UserError: other than two latents, or fewer than two frames, which include both ends.
    """
    if len(latents.z_i) != 2:
        raise UserError(f"interpolation: got {len(latents.z_i)} pictures, expected two")
    theta = np.linspace(0.0, 1.0, checks.count("frames", frames, least=2), dtype=np.float32)

    def between(ends: np.ndarray) -> np.ndarray:
        first, last = (np.repeat(np.asarray(end)[None], frames, axis=0) for end in ends)
        return np.asarray(slerp(first, last, theta))

    kept = between(latents.x_T) if x_T is None else np.repeat(x_T[None], frames, axis=0)
    return Latents(between(latents.z_i), kept)


def text_diff(
    model: UnCLIP, latents: Latents, source: str, target: str, thetas: Sequence[float]
) -> Latents:
    """Latents turned from one caption towards another: figure 5 of the paper.

    z_d = norm(z_t - z_t0) and z_theta = slerp(z_i, z_d, theta), with x_T kept. z_d is given the
    length of z_i, so a z_i that is not of length one (Karlo's) keeps its length.

    Args:
        model: with a CLIP that has its text tower.
        latents: b of them.
        source: what the pictures show, y_0; "" for the empty caption.
        target: what they shall show, y.
        thetas: how far to turn, 0 (not at all) to 1 (to z_d); the paper goes to 0.25 to 0.5. They
            give b * len(thetas) latents, those of one picture side by side.

    Raises:
        UserError: a theta out of range, or two captions with the same embedding.
    """
    theta = np.asarray(thetas, np.float32).reshape(-1)
    if not len(theta) or not np.all((theta >= 0) & (theta <= 1)):
        raise wrong("theta", list(thetas), "numbers from 0 to 1")
    check_prompts([target])
    z_t0, z_t = np.asarray(model.embed_text([source, target]))
    difference = z_t - z_t0
    if np.linalg.norm(difference) <= 1e-6 * np.linalg.norm(z_t):
        raise UserError(
            f"captions {source!r} and {target!r}: CLIP gives both the same embedding, so there is"
            " no direction from one to the other; give captions that differ"
        )
    z_i = np.repeat(np.asarray(latents.z_i), len(theta), axis=0)
    direction = difference[None] / np.linalg.norm(difference)
    direction = direction * np.linalg.norm(z_i, axis=1, keepdims=True)
    turned = slerp(z_i, direction, np.tile(theta, len(latents.z_i)))
    return Latents(np.asarray(turned), np.repeat(np.asarray(latents.x_T), len(theta), axis=0))


def inpaint(
    model: UnCLIP,
    key: jax.Array,
    image: np.ndarray,
    hole: np.ndarray,
    walk: Walk,
    *,
    num: int = 1,
    upsample: bool = True,
    progress: Progress | None = None,
) -> np.ndarray:
    """A picture with a hole painted anew, uint8 [num, size, size, 3].

    At each step the decoder knows the picture outside of the hole (see `latents.knowing`); one that
    was trained to fill in is shown it as well (`latents.noised_around`). With a caption, z_i comes
    from the prior, and from CLIP without one, of the picture with its hole in the mean colour of
    the rest. Outside of the hole the result is the given picture, at full size, without a trace of
    what was in the hole.

    Args:
        model: with a prior if the walk has a caption.
        key: see above.
        image: uint8 [h, w, 3].
        hole: bool [h, w], True where to paint; in the proportions of the image. A pixel of which
            any part is in it is painted, at every size, and one around it by the decoder; a latent
            likewise.
        walk: eta 1 harmonises best; its caption says what to paint.

    Raises:
        UserError: nothing to paint, or a hole of another kind or other proportions.
    """
    hole = masks.check_hole(hole, image)
    stage = model.decoder.stage
    size = stage.picture_size
    if not masks.cover(hole, image, size).any():
        raise UserError(
            "mask: nothing to paint in the picture's centre square; paint white, or erase, what is"
            " to be painted anew"
        )
    keys = example_keys(key, checks.count("num", num))
    if walk.caption:
        z_i = np.asarray(model.sample_prior(keys, [walk.caption] * num, progress=progress))
    else:
        z_i = np.repeat(embed(model, [masks.filled(image, hole)]), num, axis=0)
    start = Latents(z_i, noise(model, keys))
    known = decoder_size(model, [masks.kept(image, hole, size)])
    if stage.autoencoder:  # latents are told of what is around them
        plain = decoder_size(model, [masks.filled(image, hole)])
        known = np.where(masks.cover(hole, image, size), plain, known)
    holes = masks.cover(hole, image, stage.x_shape[:2], wider=1)
    told = tuple(np.repeat(each, num, axis=0) for each in (known, holes[None]))
    small = decode(model, keys, start, walk, known=told, progress=progress)
    small = np.where(masks.cover(hole, image, size, wider=1), small, known)
    painted = render(model, keys, small, upsample, walk.batch_size, progress)
    size = painted.shape[1:3]
    return np.where(masks.cover(hole, image, size)[None], painted, masks.kept(image, hole, size))


def upscale(
    model: UnCLIP,
    key: jax.Array,
    image: np.ndarray,
    *,
    num: int = 1,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """A picture, uint8 [h, w, 3], through the upsamplers alone.

    It enters at the upsampler with the largest input that its shorter side fills; if it fills
    none, at the first.

    Returns:
        What entered, uint8 [low, low, 3], and uint8 [num, size, size, 3], which differ in what the
        upsamplers draw.

    Raises:
        UserError: a model without upsamplers.
    """
    if not model.upsamplers:
        raise UserError("this model has no upsampler; use a model that has one")
    filled = [
        i for i, part in enumerate(model.upsamplers) if part.stage.low_size <= min(image.shape[:2])
    ]
    used = model.upsamplers[max(filled, default=0) :]
    low = squared([image], used[0].stage.low_size)
    small = np.repeat(low.astype(np.float32) / 127.5 - 1.0, checks.count("num", num), axis=0)
    rest = dataclasses.replace(model, upsamplers=used)
    keys = example_keys(key, num)
    return low[0], render(rest, keys, small, batch_size=batch_size, progress=progress)
