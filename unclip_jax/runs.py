"""What each stage needs to train: where its params start, its data, its figures, its previews.

`prepare(config)` turns a config into a `Run`, which train.py hands to the training loop. Here, and
only here, a stage's kind decides something.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax import checkpoint, pipeline, stages
from unclip_jax import config as settings
from unclip_jax.data import batches, datasets, embeddings
from unclip_jax.data.records import Source
from unclip_jax.errors import UserError
from unclip_jax.evaluation.prior import prior_cosines
from unclip_jax.evaluation.retrieval import image_text_retrieval
from unclip_jax.pipeline import Part
from unclip_jax.stages import embedding
from unclip_jax.stages.images import resize, to_float, to_uint8
from unclip_jax.train_config import TrainConfig

Params = dict[str, Any]
Arrays = dict[str, np.ndarray]
Picture = tuple[np.ndarray, str]
Evaluate = Callable[[Params, int], dict[str, float]]
Preview = Callable[[Params, int], list[Picture]]

EMBED_BATCH = 64
HELD_OUT_AT_MOST = 512  # pairs that figures during training are measured on
MACHINE_FIELDS = ("cache_dir", "cache_bytes")  # of the data's settings: they change no batch
NORMALISATIONS = ("whiten", "scale", "none")


@dataclasses.dataclass(frozen=True)
class Settings:
    """A whole config, checked; configs/base.py says what each part is."""

    stage: dict[str, Any]
    data: datasets.DataConfig
    train: TrainConfig
    heldout_split: str = "heldout"
    clip: str = ""
    normalisation: str = "whiten"
    previews: int = 16

    def __post_init__(self) -> None:
        """Check the fields that belong to no part."""
        if self.normalisation not in NORMALISATIONS:
            raise UserError(
                f"config.normalisation: got {self.normalisation!r}, expected one of"
                f" {', '.join(NORMALISATIONS)}"
            )
        if self.previews < 1:
            raise UserError(f"config.previews: got {self.previews}, expected at least 1")


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything the training loop is handed.

    Attributes:
        stage: what trains.
        init_params: makes the first params.
        source: the training set.
        data: how its images and captions become arrays.
        train: the loop's settings.
        evaluate: figures of the EMA params on held-out data.
        preview: pictures with captions, made with the EMA params.
        description: what a checkpoint or model folder says of itself.
    """

    stage: stages.Stage
    init_params: Callable[[], Params]
    source: Source
    data: datasets.DataConfig
    train: TrainConfig
    evaluate: Evaluate
    preview: Preview
    description: dict[str, Any]


def prepare(config: Mapping[str, Any]) -> Run:
    """Check a config and prepare its data, embedding it with CLIP where the stage needs that.

    Raises:
        UserError: anything in the config, the data or the CLIP folder is not as it must be.
    """
    given = settings.build(Settings, config, "config")
    stage = stages.build(given.stage)
    clip = load_clip(given.clip, stage) if stage.kind in ("prior", "decoder") else None
    data = data_for(stage, given.data)
    source = datasets.load(data)
    heldout = datasets.load(dataclasses.replace(data, split=given.heldout_split, captions="first"))
    description = {
        "stage": stages.describe(stage),
        "data": {k: v for k, v in settings.to_dict(data).items() if k not in MACHINE_FIELDS},
        "data_fingerprint": source.fingerprint,
        "train": settings.to_dict(given.train),
    }
    key = jax.random.key(given.train.seed)
    if clip is not None:
        fingerprint = checkpoint.fingerprint(clip.params)
        description |= {"clip_fingerprint": fingerprint, "normalisation": given.normalisation}
        source = with_embeddings(source, data, clip, fingerprint)
        heldout_data = dataclasses.replace(data, split=given.heldout_split, captions="first")
        heldout = with_embeddings(heldout, heldout_data, clip, fingerprint)
        stats = normalisation(given.normalisation, source.store, stage.model.embed_dim)

        def init_params() -> Params:
            return stage.init(key) | {"normalisation": stats}
    else:
        init_params = functools.partial(stage.init, key)
    held = Held(heldout, data, given.previews)
    make = {
        "clip": clip_figures,
        "prior": prior_figures,
        "decoder": decoder_figures,
        "upsampler": upsampler_figures,
    }
    evaluate, preview = make[stage.kind](stage, held)
    return Run(stage, init_params, source, data, given.train, evaluate, preview, description)


def data_for(stage: stages.Stage, data: datasets.DataConfig) -> datasets.DataConfig:
    """The data's settings with what follows from the stage: image size and vocabulary."""
    changes: dict[str, Any] = {}
    if hasattr(stage, "image_size"):
        changes["image_size"] = stage.image_size
    if hasattr(stage, "context"):
        changes |= dict(zip(("context_length", "vocab_size"), stage.context, strict=True))
    return dataclasses.replace(data, **changes)


def load_clip(folder: str, stage: stages.Stage) -> Part:
    """The trained CLIP that a config names.

    Raises:
        UserError: none named, not a CLIP, or one of another embedding size than the stage's.
    """
    if not folder:
        raise UserError(
            "config.clip: empty, expected the folder of a trained CLIP; train one and give"
            " --config.clip=WORKDIR"
        )
    clip = pipeline.load_part(folder, kind="clip")
    if clip.stage.model.embed_dim != stage.model.embed_dim:
        raise UserError(
            f"config.stage.model.embed_dim: got {stage.model.embed_dim}, but the CLIP in"
            f" {folder!r} has {clip.stage.model.embed_dim}; set them equal"
        )
    return clip


def with_embeddings(
    source: Source, data: datasets.DataConfig, clip: Part, fingerprint: str
) -> embeddings.WithEmbeddings:
    """The source with z_i and z_t in its records, computed once and kept in the cache."""
    seen = data_for(clip.stage, data)

    def encode(images: np.ndarray, tokens: np.ndarray) -> tuple[jax.Array, jax.Array]:
        z_i = pipeline.encode_image(clip.stage, clip.params, images)
        return z_i, pipeline.encode_text(clip.stage, clip.params, tokens)

    cache = Path(data.cache_dir) if data.cache_dir else datasets.default_cache_dir()
    store = embeddings.compute(
        datasets.load(seen),
        seen,
        encode,
        cache / "embeddings" / f"{fingerprint}-{source.fingerprint}",
        clip_fingerprint=fingerprint,
        batch_size=EMBED_BATCH,
    )
    return embeddings.WithEmbeddings(source, store)


def normalisation(
    kind: str, store: embeddings.EmbeddingStore, embed_dim: int
) -> embedding.Normalisation:
    """The normalisation of image embeddings that a config names, from the training set's own."""
    if kind == "whiten":
        return embedding.whitening(jnp.asarray(store.z_i[store.valid]))
    return embedding.scaling(embed_dim) if kind == "scale" else embedding.identity(embed_dim)


class Held:
    """Held-out pairs, read when first asked for.

    Attributes:
        captions: of the previews.
    """

    def __init__(self, source: Source, data: datasets.DataConfig, previews: int) -> None:
        """Keep what is needed to read `source`; the first `previews` pairs are previewed."""
        self._source, self._data, self._previews = source, data, previews

    @functools.cached_property
    def arrays(self) -> Arrays:
        """Up to HELD_OUT_AT_MOST pairs as one batch, evenly spread over the set, plain."""
        plain = dataclasses.replace(self._data, augment=0.0, cache_bytes=0)
        stream = batches.batches(
            self._source,
            plain,
            seed=0,
            batch_size=min(EMBED_BATCH, len(self._source)),
            epochs=1,
            drop_remainder=False,
        )
        parts: list[Arrays] = []
        for batch in stream:
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
        size = min(EMBED_BATCH, n)
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
    """Retrieval on held-out pairs; previews show the picture that each caption finds."""

    def embed(params: Params) -> tuple[np.ndarray, np.ndarray]:
        arrays = held.arrays
        z_i = pipeline.encode_image(stage, params, arrays["image"])
        return np.asarray(z_i), np.asarray(pipeline.encode_text(stage, params, arrays["tokens"]))

    def evaluate(params: Params, step: int) -> dict[str, float]:
        return image_text_retrieval(*embed(params))

    def preview(params: Params, step: int) -> list[Picture]:
        z_i, z_t = embed(params)
        found = np.argmax(z_t[: len(held.captions)] @ z_i.T, axis=1)
        names = held.caption(held.arrays["index"][found])
        return [
            (held.arrays["image"][j], f"{caption} → {name}")
            for caption, j, name in zip(held.captions, found, names, strict=True)
        ]

    return evaluate, preview


def prior_figures(stage: stages.PriorStage, held: Held) -> tuple[Evaluate, Preview]:
    """Cosines on held-out pairs; previews show the picture nearest to each sampled z_i."""
    sample = jax.jit(stage.sample)

    def draw(params: Params, arrays: Arrays) -> np.ndarray:
        keys = pipeline.example_keys(jax.random.key(0), len(arrays["index"]))
        cond = stage.condition(jnp.asarray(arrays["tokens"]), jnp.asarray(arrays["z_t"]))
        return np.asarray(sample(params, keys, cond, guidance_scale=stage.guidance_scale))

    def evaluate(params: Params, step: int) -> dict[str, float]:
        arrays = held.arrays
        return prior_cosines(draw(params, arrays), arrays["z_i"], arrays["z_t"])

    def preview(params: Params, step: int) -> list[Picture]:
        found = np.argmax(draw(params, held.preview) @ held.arrays["z_i"].T, axis=1)
        names = held.caption(held.arrays["index"][found])
        return [
            (held.arrays["image"][j], f"{caption} → {name}")
            for caption, j, name in zip(held.captions, found, names, strict=True)
        ]

    return evaluate, preview


def decoder_figures(stage: stages.DecoderStage, held: Held) -> tuple[Evaluate, Preview]:
    """Held-out loss; previews decode the true z_i of held-out pictures, shown beside them."""
    loss = held_out_loss(stage, held)
    sample = jax.jit(stage.sample)

    def preview(params: Params, step: int) -> list[Picture]:
        arrays = held.preview
        keys = pipeline.example_keys(jax.random.key(0), len(arrays["index"]))
        cond = stage.condition(jnp.asarray(arrays["tokens"]), jnp.asarray(arrays["z_i"]))
        images = sample(params, keys, cond, guidance_scale=stage.guidance_scale)
        return beside([arrays["image"], np.asarray(to_uint8(images))], held.captions)

    return (lambda params, step: loss(params)), preview


def upsampler_figures(stage: stages.UpsamplerStage, held: Held) -> tuple[Evaluate, Preview]:
    """Held-out loss and PSNR; previews show bicubic, upsampled and true pictures."""
    loss = held_out_loss(stage, held)
    sample = jax.jit(stage.sample)

    def upsample(params: Params) -> tuple[np.ndarray, np.ndarray]:
        low = resize(to_float(jnp.asarray(held.preview["image"])), stage.low_size)
        keys = pipeline.example_keys(jax.random.key(0), len(low))
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


def psnr(images: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 images [b, h, w, c], the mean over the batch."""
    error = (images.astype(np.float64) - truth) ** 2
    return float(np.mean(10 * np.log10(255.0**2 / np.maximum(error.mean((1, 2, 3)), 1e-10))))


def beside(columns: list[np.ndarray], captions: list[str]) -> list[Picture]:
    """Several versions of each picture side by side, under one caption."""
    return list(zip(np.concatenate(columns, axis=2), captions, strict=True))
