"""What is measured and shown of a stage while it trains, on held-out pairs.

A stage names its own: `stage.figures` is a choice of `FIGURES`, `stage.preview` one of `PREVIEWS`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from unclip_jax import stages
from unclip_jax.data.batches import batches
from unclip_jax.data.datasets import DataConfig
from unclip_jax.data.examples import TextEncoder
from unclip_jax.data.records import Source
from unclip_jax.data.tokenizer import Encoder
from unclip_jax.metrics import pca
from unclip_jax.metrics.prior_cosines import prior_cosines
from unclip_jax.metrics.psnr import psnr
from unclip_jax.metrics.retrieval import digests, image_text_retrieval
from unclip_jax.parallel import axes
from unclip_jax.parallel.distributed import whole
from unclip_jax.stages import ar_prior, normalisation
from unclip_jax.stages.clip import encode_image, encode_text
from unclip_jax.stages.conditioning import example_keys
from unclip_jax.stages.pixels import resize, to_float, to_uint8

Params = dict[str, Any]
Arrays = dict[str, np.ndarray]
Picture = tuple[np.ndarray, str]
Figures = dict[str, float]
Evaluate = Callable[[Params, int], Figures]
Preview = Callable[[Params, int], list[Picture]]

CHUNK = 64  # pairs measured together
WHITE = np.uint8(255)
HELD_OUT_AT_MOST = 512  # pairs that figures during training are measured on


class Held:
    """Held-out pairs, read when first asked for.

    Attributes:
        captions: of the previews.
    """

    def __init__(
        self, source: Source, data: DataConfig, previews: int, encoder: TextEncoder | Encoder | None
    ) -> None:
        """Keep what is needed to read `source`; the first `previews` pairs are previewed."""
        self._source, self._data, self._previews = source, data, previews
        self._encoder = encoder

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes that the arrays' "label" counts."""
        return self._source.classes

    @functools.cached_property
    def arrays(self) -> Arrays:
        """Up to HELD_OUT_AT_MOST pairs as one batch, evenly spread over the set, plain."""
        plain = dataclasses.replace(self._data, augment=0.0, cache_bytes=0)
        pairs = batches(
            self._source,
            plain,
            encoder=self._encoder,
            seed=0,
            batch_size=min(CHUNK, len(self._source)),
            epochs=1,
            drop_remainder=False,
        )
        parts: list[Arrays] = []
        for batch in pairs:
            parts.append(batch)
            if sum(len(part["index"]) for part in parts) >= HELD_OUT_AT_MOST:
                break
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    @functools.cached_property
    def preview(self) -> Arrays:
        """The previewed pairs as arrays."""
        return {name: array[: self._previews] for name, array in self.arrays.items()}

    @functools.cached_property
    def captions(self) -> list[str]:
        """The captions of the previewed pairs."""
        return self.caption(self.preview["index"])

    def caption(self, index: np.ndarray) -> list[str]:
        """The captions of pairs."""
        return [self._source[int(i)]["caption"] for i in index]

    def chunks(self) -> list[Arrays]:
        """All pairs in chunks of the same size; a last one that is not full is left out."""
        n = len(self.arrays["index"])
        size = min(CHUNK, n)
        starts = range(0, n - size + 1, size)
        return [{k: v[i : i + size] for k, v in self.arrays.items()} for i in starts]


# --------------------------------------------------------------------------------- figures


def spanned(params: Params) -> Mesh | None:
    """The mesh of params that span processes, which then compute together; None within one.

    Whatever else they compute with must be NumPy's, the same in all of them.
    """
    return jax.tree.leaves(params)[0].sharding.mesh if jax.process_count() > 1 else None


@functools.partial(jax.jit, static_argnames=("stage", "mesh"))
def _loss(stage: stages.Stage, params: Params, batch: Arrays, seed: int, mesh: Mesh | None):
    with axes.on(mesh):
        return stage.loss(params, batch, jax.random.key(seed))[0]


def held_out_loss(stage: stages.Stage, held: Held, params: Params) -> Figures:
    """The stage's own loss on held-out pairs, always with the same noise."""
    mesh, chunks = spanned(params), enumerate(held.chunks())
    values = [whole(_loss(stage, params, chunk, i, mesh)) for i, chunk in chunks]
    return {"heldout_loss": float(np.mean(values))}


def retrieval(stage: stages.Stage, held: Held, params: Params) -> Figures:
    """How well CLIP finds held-out pairs, and the rank of its image embeddings."""
    z_i, z_t = towers(stage, params, held.arrays)
    told = (digests(held.arrays[name]) for name in ("image", "tokens"))
    return image_text_retrieval(z_i, z_t, *told) | {"rank_99": float(pca.rank(z_i))}


def cosines(stage: stages.Stage, held: Held, params: Params) -> Figures:
    """Of sampled z_i with the true ones and with the captions."""
    arrays = held.arrays
    captions = digests(arrays["tokens"])
    return prior_cosines(sample(stage, params, arrays), arrays["z_i"], arrays["z_t"], captions)


def codes(stage: stages.Stage, held: Held, params: Params) -> Figures:
    """What the autoregressive prior's codes alone keep of held-out embeddings.

    `codes_variance` is the fraction of the variance that survives quantising, `codes_cosine` the
    mean cosine with what comes back: no prior that speaks in these codes can do better.
    """
    quantiser, z_i = jax.tree.map(whole, params["normalisation"]), held.arrays["z_i"]
    codes = ar_prior.quantise(quantiser, jnp.asarray(z_i), stage.model.buckets)
    kept = np.asarray(ar_prior.dequantise(quantiser, codes))
    spread = z_i - z_i.mean(axis=0, keepdims=True)
    return {
        "codes_variance": float(1.0 - np.sum((z_i - kept) ** 2) / np.sum(spread**2)),
        "codes_cosine": float(np.mean(normalisation.cosine(z_i, kept))),
    }


def enlarging(stage: stages.Stage, held: Held, params: Params) -> Figures:
    """PSNR of upsampled pictures, beside that of bicubic ones."""
    bicubic, images = enlarged(stage, params, held.preview)
    truth = held.preview["image"]
    return {"psnr": psnr(images, truth), "psnr_bicubic": psnr(bicubic, truth)}


def clean_accuracy(stage: stages.Stage, held: Held, params: Params) -> Figures:
    """How often the classifier is right about clean pictures."""
    chunks = held.chunks()
    right = [guessed_classes(stage, params, chunk["image"]) == chunk["label"] for chunk in chunks]
    return {"clean_accuracy": float(np.mean(right))}


FIGURES = {
    "heldout_loss": held_out_loss,
    "retrieval": retrieval,
    "prior_cosines": cosines,
    "codes": codes,
    "psnr": enlarging,
    "clean_accuracy": clean_accuracy,
}


# -------------------------------------------------------------------------------- previews


def found(stage: stages.Stage, held: Held, params: Params) -> list[Picture]:
    """The picture that each caption finds, by CLIP."""
    z_i, z_t = towers(stage, params, held.arrays)
    return found_by(z_t[: len(held.captions)], z_i, held)


def nearest(stage: stages.Stage, held: Held, params: Params) -> list[Picture]:
    """The picture nearest to each sampled z_i."""
    return found_by(sample(stage, params, held.preview), held.arrays["z_i"], held)


def drawn(stage: stages.Stage, held: Held, params: Params) -> list[Picture]:
    """The true pictures, and those drawn from their conditions: of z_i the true one."""
    images = to_uint8(sample(stage, params, held.preview))
    return beside([held.preview["image"], np.asarray(images)], held.captions)


def upsampled(stage: stages.Stage, held: Held, params: Params) -> list[Picture]:
    """Bicubic, upsampled and true pictures."""
    columns = [*enlarged(stage, params, held.preview), held.preview["image"]]
    return beside(columns, held.captions)


def guessed(stage: stages.Stage, held: Held, params: Params) -> list[Picture]:
    """The pictures, and what they are taken for."""
    classes = guessed_classes(stage, params, held.preview["image"])
    names = [held.classes[i] for i in classes]
    captions = [f"{caption} → {name}" for caption, name in zip(held.captions, names, strict=True)]
    return list(zip(held.preview["image"], captions, strict=True))


PREVIEWS = {one.__name__: one for one in (found, nearest, drawn, upsampled, guessed)}


def figures(stage: stages.Stage, held: Held) -> tuple[Evaluate, Preview]:
    """What the training loop calls with the averaged params and the step."""

    def evaluate(params: Params, step: int) -> Figures:
        measured = [FIGURES[name](stage, held, params) for name in stage.figures]
        pairs = {"pairs": float(len(held.arrays["index"]))}
        return pairs | {name: value for group in measured for name, value in group.items()}

    return evaluate, lambda params, step: PREVIEWS[stage.preview](stage, held, params)


# ------------------------------------------------------------------- what a stage makes of pairs


@functools.partial(jax.jit, static_argnames=("stage", "rows", "mesh"))
def _sample(stage: stages.Stage, params: Params, cond: Any, *, rows: int, mesh, **settings: Any):
    with axes.on(mesh):
        keys = example_keys(jax.random.key(0), rows)
        return stage.sample(params, keys, cond, **settings)


def sample(stage: stages.Stage, params: Params, arrays: Arrays) -> np.ndarray:
    """A sample of each pair's condition, with the stage's own guidance."""
    cond = stage.condition_of({name: jnp.asarray(x) for name, x in arrays.items()})
    own = {n: setting.default for n, setting in stage.settings.items() if n != "guidance_scale"}
    own |= stage.guided_by()
    if (mesh := spanned(params)) is not None:
        cond, own = jax.tree.map(np.asarray, (cond, own))
    return whole(_sample(stage, params, cond, rows=len(arrays["index"]), mesh=mesh, **own))


@functools.partial(jax.jit, static_argnames=("stage", "mesh"))
def _towers(stage: stages.Stage, params: Params, images: Arrays, tokens: Arrays, mesh: Mesh | None):
    with axes.on(mesh):
        return encode_image(stage, params, images), encode_text(stage, params, tokens)


def towers(stage: stages.Stage, params: Params, arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """CLIP's z_i and z_t of pairs."""
    made = _towers(stage, params, arrays["image"], arrays["tokens"], spanned(params))
    return whole(made[0]), whole(made[1])


def enlarged(stage: stages.Stage, params: Params, arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """Pictures made small and large again: by bicubic interpolation, and by an upsampler."""
    low = resize(to_float(jnp.asarray(arrays["image"])), stage.low_size)
    images = sample(stage, params, arrays | {"images": low})
    return np.asarray(to_uint8(resize(low, stage.image_size))), np.asarray(to_uint8(images))


@functools.partial(jax.jit, static_argnames=("stage", "mesh"))
def _guess(stage: stages.Stage, params: Params, images: Arrays, mesh: Mesh | None) -> jax.Array:
    with axes.on(mesh):
        clean = jnp.zeros(len(images), jnp.int32)
        return jnp.argmax(stage.logits(params, to_float(images), clean), axis=-1)


def guessed_classes(stage: stages.Stage, params: Params, images: np.ndarray) -> np.ndarray:
    """The likeliest classes [b] of clean pictures."""
    return whole(_guess(stage, params, images, spanned(params)))


def found_by(queries: np.ndarray, z_i: np.ndarray, held: Held) -> list[Picture]:
    """The pair nearest to each query, under the query's caption and its own."""
    nearest = np.argmax(queries @ z_i.T, axis=1)
    names = held.caption(held.arrays["index"][nearest])
    # Stored embeddings come without pictures: then the captions found must do.
    images = held.arrays.get("image", np.full((len(z_i), 1, 8, 3), WHITE))
    pairs = zip(held.captions, nearest, names, strict=True)
    return [(images[j], f"{caption} → {name}") for caption, j, name in pairs]


def beside(columns: list[np.ndarray], captions: list[str]) -> list[Picture]:
    """Several versions of each picture side by side, under one caption."""
    return list(zip(np.concatenate(columns, axis=2), captions, strict=True))
