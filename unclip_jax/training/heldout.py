"""What is measured and shown of each kind of stage while it trains, on held-out pairs.

Each kind has a function of the stage and the held-out pairs, which returns an `Evaluate` and a
`Preview`: what the training loop calls with the averaged params.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax import stages
from unclip_jax.data.batches import TextEncoder, batches
from unclip_jax.data.datasets import DataConfig
from unclip_jax.data.records import Source
from unclip_jax.data.tokenizer import Encoder
from unclip_jax.metrics import pca
from unclip_jax.metrics.prior_cosines import prior_cosines
from unclip_jax.metrics.psnr import psnr
from unclip_jax.metrics.retrieval import image_text_retrieval
from unclip_jax.stages import ar_prior, normalisation
from unclip_jax.stages.clip import encode_image, encode_text
from unclip_jax.stages.conditioning import example_keys
from unclip_jax.stages.pixels import resize, to_float, to_uint8

Params = dict[str, Any]
Arrays = dict[str, np.ndarray]
Picture = tuple[np.ndarray, str]
Evaluate = Callable[[Params, int], dict[str, float]]
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


def held_out_loss(stage: stages.Stage, held: Held) -> Callable[[Params], dict[str, float]]:
    """The stage's own loss on held-out pairs, always with the same noise."""

    @jax.jit
    def loss(params: Params, batch: Arrays, key: jax.Array) -> jax.Array:
        return stage.loss(params, batch, key)[0]

    def evaluate(params: Params) -> dict[str, float]:
        values = [loss(params, chunk, jax.random.key(i)) for i, chunk in enumerate(held.chunks())]
        return {"heldout_loss": float(np.mean(values))}

    return evaluate


def clip_figures(stage: stages.ClipStage, held: Held) -> tuple[Evaluate, Preview]:
    """Retrieval and rank on held-out pairs; previews show the picture that each caption finds."""

    def embed(params: Params) -> tuple[np.ndarray, np.ndarray]:
        arrays = held.arrays
        z_i = encode_image(stage, params, arrays["image"])
        return np.asarray(z_i), np.asarray(encode_text(stage, params, arrays["tokens"]))

    def evaluate(params: Params, step: int) -> dict[str, float]:
        z_i, z_t = embed(params)
        return image_text_retrieval(z_i, z_t) | {"rank_99": float(pca.rank(z_i))}

    def preview(params: Params, step: int) -> list[Picture]:
        z_i, z_t = embed(params)
        found = np.argmax(z_t[: len(held.captions)] @ z_i.T, axis=1)
        names = held.caption(held.arrays["index"][found])
        return [
            (held.arrays["image"][j], f"{caption} → {name}")
            for caption, j, name in zip(held.captions, found, names, strict=True)
        ]

    return evaluate, preview


def prior_figures(
    stage: stages.PriorStage | stages.ARPriorStage, held: Held
) -> tuple[Evaluate, Preview]:
    """Cosines on held-out pairs; previews show the picture nearest to each sampled z_i."""
    sample = jax.jit(stage.sample)

    def draw(params: Params, arrays: Arrays) -> np.ndarray:
        keys = example_keys(jax.random.key(0), len(arrays["index"]))
        text = arrays["text_states" if stage.reads_states else "tokens"]
        mask = arrays["text_mask"] if stage.reads_states else None
        cond = stage.condition(*jax.tree.map(jnp.asarray, (text, arrays["z_t"], mask)))
        return np.asarray(sample(params, keys, cond, guidance_scale=stage.guidance_scale))

    def evaluate(params: Params, step: int) -> dict[str, float]:
        arrays = held.arrays
        return prior_cosines(draw(params, arrays), arrays["z_i"], arrays["z_t"])

    def preview(params: Params, step: int) -> list[Picture]:
        found = np.argmax(draw(params, held.preview) @ held.arrays["z_i"].T, axis=1)
        names = held.caption(held.arrays["index"][found])
        # Stored embeddings come without pictures: then the captions found must do.
        images = held.arrays.get("image", np.full((len(held.arrays["z_i"]), 1, 8, 3), WHITE))
        return [
            (images[j], f"{caption} → {name}")
            for caption, j, name in zip(held.captions, found, names, strict=True)
        ]

    return evaluate, preview


def ar_prior_figures(stage: stages.ARPriorStage, held: Held) -> tuple[Evaluate, Preview]:
    """A prior's figures, the loss, and what the codes alone keep of held-out embeddings.

    `codes_variance` is the fraction of the variance that survives quantising, `codes_cosine` the
    mean cosine with what comes back: no prior that speaks in these codes can do better.
    """
    cosines, preview = prior_figures(stage, held)
    loss = held_out_loss(stage, held)

    def evaluate(params: Params, step: int) -> dict[str, float]:
        quantiser, z_i = params["normalisation"], held.arrays["z_i"]
        codes = ar_prior.quantise(quantiser, jnp.asarray(z_i), stage.model.buckets)
        kept = np.asarray(ar_prior.dequantise(quantiser, codes))
        spread = z_i - z_i.mean(axis=0, keepdims=True)
        return (
            cosines(params, step)
            | loss(params)
            | {
                "codes_variance": float(1.0 - np.sum((z_i - kept) ** 2) / np.sum(spread**2)),
                "codes_cosine": float(np.mean(normalisation.cosine(z_i, kept))),
            }
        )

    return evaluate, preview


def decoder_figures(stage: stages.DecoderStage, held: Held) -> tuple[Evaluate, Preview]:
    """Held-out loss; previews are drawn from held-out captions and, if it reads z_i, the true ones.

    They stand beside the true pictures.
    """
    loss = held_out_loss(stage, held)
    sample = jax.jit(stage.sample)

    def preview(params: Params, step: int) -> list[Picture]:
        arrays = held.preview
        keys = example_keys(jax.random.key(0), len(arrays["index"]))
        cond = stage.condition_of(jax.tree.map(jnp.asarray, arrays))
        images = sample(params, keys, cond, guidance_scale=stage.guidance_scale)
        return beside([arrays["image"], np.asarray(to_uint8(images))], held.captions)

    return (lambda params, step: loss(params)), preview


def upsampler_figures(stage: stages.UpsamplerStage, held: Held) -> tuple[Evaluate, Preview]:
    """Held-out loss and PSNR; previews show bicubic, upsampled and true pictures."""
    loss = held_out_loss(stage, held)
    sample = jax.jit(stage.sample)

    def upsample(params: Params) -> tuple[np.ndarray, np.ndarray]:
        low = resize(to_float(jnp.asarray(held.preview["image"])), stage.low_size)
        keys = example_keys(jax.random.key(0), len(low))
        images = to_uint8(sample(params, keys, low))
        return np.asarray(to_uint8(resize(low, stage.image_size))), np.asarray(images)

    def evaluate(params: Params, step: int) -> dict[str, float]:
        bicubic, images = upsample(params)
        truth = held.preview["image"]
        return loss(params) | {"psnr": psnr(images, truth), "psnr_bicubic": psnr(bicubic, truth)}

    def preview(params: Params, step: int) -> list[Picture]:
        bicubic, images = upsample(params)
        return beside([bicubic, images, held.preview["image"]], held.captions)

    return evaluate, preview


def classifier_figures(stage: stages.ClassifierStage, held: Held) -> tuple[Evaluate, Preview]:
    """Held-out loss, and the accuracy on clean pictures; previews show what those are taken for."""
    loss = held_out_loss(stage, held)

    @jax.jit
    def guess(params: Params, images: Arrays) -> jax.Array:
        clean = jnp.zeros(len(images), jnp.int32)
        return jnp.argmax(stage.logits(params, to_float(images), clean), axis=-1)

    def evaluate(params: Params, step: int) -> dict[str, float]:
        right = [guess(params, chunk["image"]) == chunk["label"] for chunk in held.chunks()]
        return loss(params) | {"clean_accuracy": float(np.mean(right))}

    def preview(params: Params, step: int) -> list[Picture]:
        found = np.asarray(guess(params, held.preview["image"]))
        captions = zip(held.captions, found, strict=True)
        names = [f"{caption} → {held.classes[i]}" for caption, i in captions]
        return list(zip(held.preview["image"], names, strict=True))

    return evaluate, preview


def beside(columns: list[np.ndarray], captions: list[str]) -> list[Picture]:
    """Several versions of each picture side by side, under one caption."""
    return list(zip(np.concatenate(columns, axis=2), captions, strict=True))


FIGURES: dict[str, Callable[[Any, Held], tuple[Evaluate, Preview]]] = {
    "clip": clip_figures,
    "prior": prior_figures,
    "ar_prior": ar_prior_figures,
    "decoder": decoder_figures,
    "upsampler": upsampler_figures,
    "classifier": classifier_figures,
}
