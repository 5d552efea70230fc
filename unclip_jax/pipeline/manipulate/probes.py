"""What CLIP and the prior know, seen through the decoder: sections 4, 5.1 and 7 of the paper."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from unclip_jax.common import checks
from unclip_jax.common.grids import FONTS
from unclip_jax.data import batches, datasets
from unclip_jax.data.images import square
from unclip_jax.errors import UserError, wrong
from unclip_jax.metrics import pca
from unclip_jax.pipeline.drawing import Progress, check_prompts
from unclip_jax.pipeline.manipulate.latents import Latents, Walk, decode, noise, render
from unclip_jax.pipeline.unclip import UnCLIP
from unclip_jax.stages.conditioning import example_keys
from unclip_jax.stages.normalisation import unit

PCA_DIMS = (20, 30, 40, 80, 120, 160, 200, 320)  # figure 7 of the paper

# What the decoder is given in figure 8, row by row.
ABLATIONS = ("caption alone", "caption and text embedding", "caption and prior")

_EMBEDDED_TOGETHER = 64


def fit_pca(model: UnCLIP, config: datasets.DataConfig) -> pca.PCA:
    """Principal components of the z_i of all pictures of a data set, in one pass.

    UserError for no such data, fewer than two different pictures, or a model without CLIP.
    """
    clip = model.need("clip", "embed pictures").stage
    size = clip.image_size
    seen = {"image_size": size, "fit": clip.model.fit}
    config = dataclasses.replace(config, **seen, captions="first", cache_bytes=0)

    def moments(batch: dict[str, np.ndarray]) -> pca.Moments:
        filled = np.resize(batch["image"], (_EMBEDDED_TOGETHER, size, size, 3))
        return pca.Moments.of(np.asarray(model.embed_image(filled))[: len(batch["image"])])

    how = {"shuffle": False, "epochs": 1, "drop_remainder": False}
    source = datasets.load(config)
    stream = batches.batches(source, config, seed=0, batch_size=_EMBEDDED_TOGETHER, **how)
    return pca.fit(functools.reduce(pca.Moments.merge, map(moments, stream)))


def pca_embeddings(components: pca.PCA, z_i: np.ndarray, dims: Sequence[int]) -> np.ndarray:
    """z_i [b, e] of which only the first principal components are left, figure 7 of the paper.

    Each is brought back to its own length, which a projection shortens.

    Args:
        components: see `fit_pca`.
        z_i: float [b, e].
        dims: numbers of components, each from 1 to e.

    Returns:
        float32 [b * len(dims), e], those of one picture side by side.

    Raises:
        UserError: a number out of range.
    """
    z_i = np.asarray(z_i, np.float64)
    width = z_i.shape[1]
    dims = [checks.count("PCA dimensions", k, 0) for k in dims]
    if not dims or not all(1 <= k <= width for k in dims):
        raise wrong("PCA dimensions", dims, f"numbers from 1 to CLIP's {width}")
    kept = np.stack([components.reconstruct(components.project(z_i, k)) for k in dims], axis=1)
    lengths = [np.linalg.norm(x, axis=-1, keepdims=True) for x in (z_i[:, None], kept)]
    kept *= lengths[0] / np.maximum(lengths[1], 1e-12)
    return kept.reshape(-1, width).astype(np.float32)


def ablate_prior(
    model: UnCLIP,
    key: jax.Array,
    prompts: Sequence[str],
    walk: Walk,
    *,
    upsample: bool = True,
    progress: Progress | None = None,
) -> np.ndarray:
    """The same captions and noise with three embeddings: figure 8 of the paper.

    The embedding is dropped (what training does for guidance), z_t in the place of z_i, or the
    prior's z_i.

    Args:
        model: with CLIP, prior and a decoder that reads z_i.
        key: prompt i draws from fold_in(key, i), whichever the embedding.
        prompts: captions, at least one; none empty.
        walk: steps, eta and guidance; its caption is not used.
        upsample: False stops after the decoder.
        progress: called as progress(stage, done, steps).

    Returns:
        uint8 [3, len(prompts), size, size, 3], in the order of `ABLATIONS`.

    Raises:
        UserError: a bad prompt, or a model that lacks what is needed.
    """
    check_prompts(prompts)
    keys = example_keys(key, len(prompts))
    x_T = noise(model, keys)
    z_t = np.asarray(model.embed_text(prompts))
    prior = np.asarray(model.sample_prior(keys, prompts, progress=progress))
    rows = []
    for z_i, keep in ((z_t, False), (z_t, True), (prior, True)):
        latents, how = Latents(z_i, x_T), {"captions": prompts, "keep_z_i": keep}
        small = decode(model, keys, latents, walk, progress=progress, **how)
        rows.append(render(model, keys, small, upsample, walk.batch_size, progress))
    return np.stack(rows)


def zero_shot(model: UnCLIP, z_i: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    """CLIP's probabilities [b, l] of l labels for z_i [b, e]: softmax of scaled cosines.

    Raises:
        UserError: fewer than two labels, or a CLIP with one tower and so no temperature.
    """
    check_labels(labels)
    clip = model.clip
    z_t = model.embed_text(labels)
    if clip.stage.model.towers != "both":
        raise UserError("this model's CLIP has one tower and so no temperature; use a whole CLIP")
    return np.asarray(_probabilities(clip.stage, clip.params, jnp.asarray(z_i), z_t))


def check_labels(labels: Sequence[str]) -> None:
    """Raise UserError unless there are at least two labels, none of them empty."""
    if len(labels) < 2:
        raise wrong("labels", list(labels), "at least two to choose from")
    check_prompts(labels)


@functools.partial(jax.jit, static_argnames="stage")
def _probabilities(stage, params, z_i, z_t):
    network = stage.network
    scale = network.apply({"params": params["network"]}, method=network.logit_scale)
    return jax.nn.softmax(scale * jnp.einsum("ie,te->it", unit(z_i), unit(z_t)), axis=-1)


def overlay(image: np.ndarray, word: str) -> np.ndarray:
    """A picture with a word written over it, as on a paper stuck to it: figure 6 of the paper.

    The word is black on a white strip across the lower part of the centre square, as large as fits.

    Args:
        image: uint8 [h, w, 3].
        word: any Unicode; what the font lacks shows as a box.

    Returns:
        uint8 [side, side, 3], the centre square, enlarged to at least 64 pixels to be legible.

    Raises:
        UserError: nothing to write.
    """
    if not word.strip() or not word.isprintable():
        raise wrong("word", word, "something to write over the picture")
    side = max(64, min(image.shape[:2]))
    picture = Image.fromarray(square(image, side))
    font = _fitting(word, width=0.9 * side, height=0.28 * side)
    left, top, right, bottom = font.getbbox(word)
    margin = round(0.04 * side)
    lower = round(0.92 * side)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, lower - (bottom - top) - 2 * margin, side, lower), fill="white")
    at = (side - (right - left)) / 2 - left, lower - margin - bottom
    draw.text(at, word, fill="black", font=font)
    return np.asarray(picture)


def _fitting(word: str, width: float, height: float) -> ImageFont.FreeTypeFont:
    """DejaVu Sans Bold at the largest size that fits."""
    path = FONTS / "DejaVuSans-Bold.ttf"
    left, top, right, bottom = ImageFont.truetype(path, 100).getbbox(word)
    scale = min(width / max(right - left, 1), height / max(bottom - top, 1))
    return ImageFont.truetype(path, max(1.0, 100 * scale))
