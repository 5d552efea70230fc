"""What a stage reads besides pictures and captions: CLIP, its embeddings, frozen text encoders."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from unclip_jax import stages
from unclip_jax.common.files import default_cache_dir
from unclip_jax.data import batches, datasets, examples
from unclip_jax.data.embeddings import store as embeddings
from unclip_jax.data.embeddings import writer
from unclip_jax.data.embeddings.retrieval import RetrievalStore
from unclip_jax.data.embeddings.shards import Meta
from unclip_jax.data.records import BadRecord, Source, progress
from unclip_jax.errors import UserError
from unclip_jax.stages.clip import encode_image, encode_text
from unclip_jax.stages.normalisation import cosine
from unclip_jax.weights.clip_text import ClipText
from unclip_jax.weights.t5 import T5
from unclip_jax.weights.trained import Part, clip_fingerprint, load_part, tokenizer

EMBED_BATCH = 64
SAME_PICTURE = 0.998  # cosine of a picture's stored z_i with its own, from which on it is the same
GLANCE, GLANCES = 256, 8  # pairs looked at for repeated captions, and in how many places
COMPARED, SAME_CLIP = 64, 0.95  # pairs of unknown origin compared with a CLIP; the least cosine


def data_for(stage: stages.Stage, data: datasets.DataConfig) -> datasets.DataConfig:
    """The data's settings with what follows from the stage: sizes, labels, if captions count."""
    length, vocab_size = stage.context
    follows = {
        "image_size": stage.image_size,
        "fit": getattr(stage.model, "fit", None),
        "context_length": length,
        "vocab_size": vocab_size,
        "labels": "label" in stage.reads,
    }
    follows = {name: value for name, value in follows.items() if value}
    return dataclasses.replace(data, **follows, bare=not stage.reads_captions)


def seen_by(clip: stages.Stage, data: datasets.DataConfig) -> datasets.DataConfig:
    """The same pairs as another stage reads, in the size and the tokens of a CLIP."""
    return dataclasses.replace(data_for(clip, data), bare=data.bare)


def check_classes(stage: stages.Stage, source: Source, trained: Mapping[str, Any] | None) -> None:
    """Raise UserError unless the data's classes are those of the stage.

    Args:
        stage: one that reads labels.
        source: its data.
        trained: the description of the trained stage that it starts from, if from any.
    """
    names, count = ", ".join(source.classes), len(source.classes)
    if count != stage.num_classes:
        field = f"config.stage.model.{stage.classes_field}"
        raise UserError(
            f"{field}: got {stage.num_classes}, but {source.name} has {count} classes ({names});"
            f" set --{field}={count}"
        )
    known = list(source.classes) if trained is None else trained.get("classes", [])
    if known != list(source.classes):
        raise UserError(
            f"config.data.name: {source.name} has the classes {names}, but the stage in config.init"
            f" learned {', '.join(known)}; use data with those"
        )


def warn_of_repeats(source: Source) -> None:
    """Say in a line that many pairs of a training set share captions, as far as a glance shows."""
    n, length = len(source), min(GLANCE // GLANCES, len(source))
    starts = {round(i * (n - length) / (GLANCES - 1)) for i in range(GLANCES)}
    captions = []
    for index in sorted({start + i for start in starts for i in range(length)}):
        with contextlib.suppress(BadRecord):
            captions.append(source[index]["caption"])
    different = len(set(captions))
    if len(captions) - different > len(captions) // 10:
        logging.warning(
            "%s: %d of its %d pairs have %d different captions; equal ones are no negatives of each"
            " other, and no CLIP can tell their pictures apart",
            source.name,
            len(captions),
            n,
            different,
        )


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
    clip = load_part(folder, kind="clip")
    if clip.stage.model.embed_dim != stage.model.embed_dim:
        raise UserError(
            f"config.stage.model.embed_dim: got {stage.model.embed_dim}, but the CLIP in"
            f" {folder!r} has {clip.stage.model.embed_dim}; set them equal"
        )
    return clip


def load_canvas(folder: str, clip: Part) -> Part:
    """The trained canvas that a config names.

    UserError if the folder holds none, or one that was trained with another CLIP.
    """
    canvas = load_part(folder, kind="canvas")
    check_same_clip(canvas, f"config.canvas: {folder!r}", clip)
    return canvas


def load_prior(folder: str, stage: stages.Stage, clip: Part | None) -> Part:
    """The trained prior of which a stage's training takes samples.

    UserError if the folder holds none, or one that was trained with another CLIP, or if the stage
    is not drawn of z_i.
    """
    if clip is None or "z_i" not in stage.conditions:
        raise UserError(
            f"config.prior: got {folder!r}, but a {stage.kind} is not drawn of z_i; leave it out"
        )
    prior = load_part(folder)
    if prior.stage.kind not in stages.PRIORS:
        raise UserError(f"config.prior: {folder!r} holds a {prior.stage.kind}, expected a prior")
    check_same_clip(prior, f"config.prior: {folder!r}", clip)
    return prior


def check_same_clip(part: Part, what: str, clip: Part) -> None:
    """Raise UserError, which begins with `what`, unless a part was trained with that CLIP."""
    found, expected = part.description.get("clip_fingerprint"), clip_fingerprint(clip)
    if found != expected:
        raise UserError(
            f"{what} was trained with CLIP {found}, but config.clip is CLIP {expected}; give one"
            " that was trained with it"
        )


def text_encoder(
    stage: stages.Stage, clip: Part | None, t5: str, t5_dtype: str
) -> ClipText | T5 | None:
    """The frozen network whose text states the stage reads, None where it reads tokens.

    Raises:
        UserError: CLIP or T5 is another than the stage was made for, or T5 is named where none is
            read, or the other way round.
    """
    if stage.text_encoder == "t5":
        return load_t5(stage, t5, t5_dtype)
    if t5:
        reads = "reads CLIP's" if stage.text_encoder else "reads no"
        more = "" if stage.text_encoder else ", or set config.stage.model.text_width"
        raise UserError(
            f"config.t5: got {t5!r}, but this {stage.kind} {reads} text states; leave it out{more}"
        )
    if not stage.text_encoder:
        return None
    wanted = (stage.context[0], stage.model.text_width)
    found = (clip.stage.context[0], clip.stage.model.text_width)
    if wanted != found:
        raise UserError(
            f"config.stage: reads {wanted[0]} text states of width {wanted[1]}, but the CLIP in"
            f" config.clip gives {found[0]} of width {found[1]}; set them equal"
        )
    return ClipText.of(clip)


def load_t5(stage: stages.Stage, folder: str, dtype: str) -> T5:
    """The T5 whose states the stage reads.

    Raises:
        UserError: none is named, it cannot be read, or its width is another than the stage's.
    """
    if not folder:
        raise UserError(
            "config.t5: empty, expected the folder of a T5, whose text states this decoder reads;"
            " give --config.t5=DIR, with config.json, model.safetensors and tokenizer.json in it"
        )
    t5 = T5.load(folder, stage.context[0], dtype)
    if t5.width != stage.model.text_width:
        raise UserError(
            f"config.stage.model.text_width: got {stage.model.text_width}, but the T5 in"
            f" {folder!r} has width {t5.width}; set --config.stage.model.text_width={t5.width}"
        )
    return t5


def with_embeddings(
    source: Source, data: datasets.DataConfig, clip: Part, stored: str = ""
) -> embeddings.WithEmbeddings | embeddings.EmbeddingSource:
    """The source with z_i and z_t in its records.

    Args:
        source: of pictures, or of embeddings.
        data: what it was made of.
        clip: what z_i and z_t must be of.
        stored: where they are; "" for the cache, which is filled if they are not there.

    Raises:
        UserError: those stored are of another CLIP or of other data.
    """
    meta = meta_of(clip, source)
    of_clip = {n: getattr(meta, n) for n in ("clip_fingerprint", "unit_embeddings", "width")}
    if isinstance(source, embeddings.EmbeddingSource):
        source.store.check(**of_clip)
        if isinstance(source.store, RetrievalStore):
            check_made_by(clip, source)
        return source
    cache = Path(data.cache_dir) if data.cache_dir else default_cache_dir()
    folder = stored or cached_embeddings(data, clip, meta, cache / "embeddings")
    store = embeddings.EmbeddingStore.open(
        folder, cache_dir=cache, disk_cache_bytes=data.disk_cache_bytes, **of_clip
    )
    joined = embeddings.WithEmbeddings(source, store)
    if store.meta.data_fingerprint != source.fingerprint:
        check_pictures(joined, source, data, clip)
    return joined


def check_pictures(
    joined: embeddings.WithEmbeddings, source: Source, data: datasets.DataConfig, clip: Part
) -> None:
    """Raise UserError unless the CLIP makes the stored z_i of some pictures.

    Of a store from before fingerprints knew contents: it has the names and captions of the source.
    """
    seen = data_for(clip.stage, dataclasses.replace(data, augment=0.0, cache_bytes=0))
    pairs = next(batches.batches(source, seen, seed=0, batch_size=min(COMPARED, len(source))))
    z_i = np.asarray(encode_image(clip.stage, clip.params, pairs["image"]), np.float32)
    stored = np.stack([joined.store.valid(int(index)).z_i for index in pairs["index"]])
    near = float(np.min(cosine(z_i, stored)))
    about = f"{joined.store.where}: stored before fingerprints knew pictures' contents"
    if near < SAME_PICTURE:
        raise UserError(
            f"config.embeddings: {about}, and of {len(z_i)} pictures of {source.name} one has a z_i"
            f" with cosine {near:.3f} to the stored one, expected {SAME_PICTURE} or more: the"
            " pictures have changed; compute the embeddings again, into another folder"
        )
    logging.warning(
        "%s; of %d pictures compared all are as they were, the others are taken for unchanged",
        about,
        len(z_i),
    )


def check_made_by(clip: Part, source: embeddings.EmbeddingSource) -> None:
    """Raise UserError unless the CLIP makes the stored z_t of the first captions."""
    pairs = []
    for index in range(min(len(source), COMPARED)):
        with contextlib.suppress(BadRecord):
            pairs.append(source[index])
    if not pairs:
        raise UserError(f"config.data.name: {source.name}: its first {COMPARED} pairs are all bad")
    tokens = tokenizer(clip).encode([pair["caption"] for pair in pairs])
    z_t = np.asarray(encode_text(clip.stage, clip.params, tokens), np.float32)
    stored = np.stack([pair["z_t"] for pair in pairs])
    near = float(np.median(cosine(z_t, stored)))
    if near < SAME_CLIP:
        raise UserError(
            f"config.clip: its z_t of the first {len(pairs)} captions of {source.name} have cosine"
            f" {near:.3f} with those stored, expected {SAME_CLIP} or more; give the CLIP that made"
            " them"
        )


def meta_of(clip: Part, source: Source, **stored: Any) -> Meta:
    """What a store of a source's embeddings says of itself; `stored` is how they lie in it."""
    context_length, vocab_size = clip.stage.context
    return Meta(
        clip_fingerprint=clip_fingerprint(clip),
        data_fingerprint=source.fingerprint,
        count=len(source),
        width=clip.stage.model.embed_dim,
        context_length=context_length,
        vocab_size=vocab_size,
        unit_embeddings=clip.stage.unit_embeddings,
        **stored,
    )


def cached_embeddings(data: datasets.DataConfig, clip: Part, meta: Meta, cache: Path) -> Path:
    """The folder in the cache with a source's embeddings, which are computed the first time."""
    length = "unit" if meta.unit_embeddings else "projected"
    folder = cache / f"{meta.clip_fingerprint}-{length}-{meta.data_fingerprint}"
    if "tokenizer" in clip.description:  # its own; without, captions have this package's ids
        folder = folder.with_name(f"{folder.name}-own-tokens")
    if folder.exists():
        return folder
    seen = seen_by(clip.stage, data)

    def encode(images: np.ndarray, tokens: np.ndarray) -> tuple[jax.Array, jax.Array]:
        z_i = encode_image(clip.stage, clip.params, images)
        return z_i, encode_text(clip.stage, clip.params, tokens)

    print(f"embedding {meta.count} pairs of {data.name}, {data.split}, with CLIP", flush=True)
    began = time.monotonic()
    with progress("embedding", " pairs", meta.count) as bar:
        writer.compute_whole(
            datasets.load(seen),
            encode,
            folder,
            meta,
            image_size=seen.image_size,
            fit=seen.fit,
            tokenizer=tokenizer(clip),
            batch_size=EMBED_BATCH,
            threads=examples.threads_for(seen),
            on_pairs=lambda done, of: bar.update(done - bar.n),
        )
    print(f"embedded in {time.monotonic() - began:.0f} s", flush=True)
    return folder
