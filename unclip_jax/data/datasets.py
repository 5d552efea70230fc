"""Which data set: a config, and the source it names."""

from __future__ import annotations

import dataclasses
import os

from absl import logging

from unclip_jax.common.files import default_cache_dir
from unclip_jax.data.embeddings.store import EmbeddingSource
from unclip_jax.data.folder import FolderSource
from unclip_jax.data.records import Source
from unclip_jax.data.shards.parquet import ParquetShards
from unclip_jax.data.shards.source import ShardedSource
from unclip_jax.data.shards.storage import find
from unclip_jax.data.shards.webdataset import TarShards
from unclip_jax.data.tfds import TfdsSource, emoji_source, emoji_styles_source, prepared_builder
from unclip_jax.data.tokenizer import CONTEXT_LENGTH, VOCAB_SIZE
from unclip_jax.errors import UserError

EMOJI = {"emoji": emoji_source, "emoji_styles": emoji_styles_source}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """A data set and what is made of its pairs.

    Attributes:
      name: "emoji"; "emoji_styles", whose art python -m unclip_jax styles fetches; the
        path of a folder of images; "tfds:<name>", a TFDS data set;
        "wds:<pattern>", webdataset's tar shards; or "parquet:<pattern>", parquet files with
        images in them. A pattern is a path or address (gs://, s3://, http://) with
        `{00000..00123}` or `*`. Or "embeddings:<folder>", what
        `python -m unclip_jax embed` stored, without pictures.
      split: "train", "heldout" or "all"; for TFDS whatever it calls its splits.
      image_size: side of the square images, in pixels.
      captions: "all" pairs an image with each of its captions, "first" with one.
      skin_tones: emoji only: whether the variants with a skin tone are in it.
      image_key: the feature with the image (TFDS; "a/b" for a nested one), its column
        (parquet) or its suffix (wds). Shards have it under any usual name by default.
      caption_key: the feature with the text or texts, the column, or the field of the `.json`
        (wds); likewise.
      labels: whether records carry the class of their image as well: an emoji's group, the
        style where there are several, the sub-folder it lies in, its `.cls` (wds), or what is
        under `label_key`.
      label_key: the feature (TFDS) or column (parquet) with the class.
      cache_dir: where prepared data and the indices of shards are; "" for `$UNCLIP_JAX_CACHE`, else
        `~/.cache/unclip_jax`; for "tfds:..." "" is TFDS's own default.
      context_length: tokens per caption, start and end included.
      vocab_size: token ids; below 49408 only the first merges of CLIP's BPE are used.
      augment: strength of random scaling and shifting, from 0 to below 1.
      cache_bytes: decoded images are kept in memory where all of them fit in this.
      read_threads: how many records are read and decoded at a time; 0 for as many as there
        are cores, at most 16, or 64 where records come over a network.
    """

    name: str = "emoji"
    split: str = "train"
    image_size: int = 64
    captions: str = "all"
    skin_tones: bool = False
    image_key: str = "image"
    caption_key: str = "caption"
    labels: bool = False
    label_key: str = "label"
    cache_dir: str = ""
    context_length: int = CONTEXT_LENGTH
    vocab_size: int = VOCAB_SIZE
    augment: float = 0.0
    cache_bytes: int = 2**30
    read_threads: int = 0

    def __post_init__(self):
        """Checks what can be checked without looking at the data.

        Raises:
          UserError: if a field has no meaning.
        """
        for field in ("name", "split"):
            if not isinstance(getattr(self, field), str):
                raise UserError(f"{field}: {getattr(self, field)!r}: expected a string")
        if self.captions not in ("all", "first"):
            raise UserError(f"captions: {self.captions!r}: expected 'all' or 'first'")
        if not isinstance(self.image_size, int) or self.image_size < 1:
            raise UserError(f"image_size: {self.image_size!r}: expected a number of pixels, from 1")
        if not 0.0 <= self.augment < 1.0:
            raise UserError(f"augment: {self.augment}: expected 0 (none) to below 1")
        if self.cache_bytes < 0:
            raise UserError(f"cache_bytes: {self.cache_bytes}: expected bytes, or 0 for no cache")
        if not isinstance(self.read_threads, int) or not 0 <= self.read_threads <= 1024:
            raise UserError(f"read_threads: {self.read_threads!r}: expected 0 (automatic) to 1024")


def load(config: DataConfig, *, needs_images: bool = True) -> Source:
    """The source that a config names; the emoji are rendered the first time.

    Args:
      config: the config.
      needs_images: False if whoever asks reads no pictures: stored embeddings will do.

    Raises:
      UserError: if there is no such data set, split, folder or feature, nothing usable in it,
        or no pictures in it where they are needed.
    """
    name = config.name
    if name.startswith("embeddings:"):
        source = _embeddings(config, needs_images)
    elif name in EMOJI:
        source = EMOJI[name](
            config.image_size,
            config.skin_tones,
            config.split,
            config.captions,
            config.cache_dir or default_cache_dir(),
            labels=config.labels,
        )
    elif name.startswith("tfds:"):
        source = TfdsSource(
            prepared_builder(name.removeprefix("tfds:"), config.cache_dir or None),
            config.split,
            image_key=config.image_key,
            caption_key=config.caption_key,
            captions=config.captions,
            label_key=config.label_key if config.labels else None,
        )
    elif name.startswith(("wds:", "parquet:")):
        source = _shards(config)
    elif os.path.basename(name) != name or os.path.exists(os.path.expanduser(name)):
        source = FolderSource(name, config.split, config.captions, config.labels)
    else:
        raise UserError(
            f"name: {name!r}: expected 'emoji', 'emoji_styles', the path of a folder (./{name} if "
            f"it is meant as one), 'tfds:{name}' for a data set of TFDS, 'wds:PATTERN',"
            " 'parquet:PATTERN' or 'embeddings:FOLDER'"
        )
    logging.info(
        "%s, split %s: %d captions of %d images (%s)",
        source.name,
        config.split,
        len(source),
        source.image_count,
        source.fingerprint,
    )
    return source


def _embeddings(config: DataConfig, needs_images: bool) -> EmbeddingSource:
    if needs_images:
        raise UserError(
            f"name: {config.name!r}: stored embeddings hold no pictures, which are needed here;"
            " name the data set that they were computed from"
        )
    if config.augment:
        raise UserError(
            f"augment: {config.augment}: expected 0 for {config.name!r}, which holds no pictures"
        )
    return EmbeddingSource(
        config.name.removeprefix("embeddings:"),
        config.split,
        config.captions,
        context=(config.context_length, config.vocab_size),
        cache_dir=config.cache_dir or default_cache_dir(),
    )


def _shards(config: DataConfig) -> ShardedSource:
    kind, _, pattern = config.name.partition(":")
    # The defaults stand for whatever name is usual in such shards, "image" and "caption" first.
    keys = {
        "image_key": config.image_key if config.image_key != "image" else "",
        "caption_key": config.caption_key if config.caption_key != "caption" else "",
    }
    if kind == "wds":
        form = TarShards(**keys, labels=config.labels)
    else:
        form = ParquetShards(**keys, label_key=config.label_key if config.labels else "")
    return ShardedSource(
        config.name,
        find(pattern),
        form,
        split=config.split,
        captions=config.captions,
        labels=config.labels,
        cache_dir=config.cache_dir or default_cache_dir(),
    )


def fingerprint(source: Source) -> str:
    """16 hexadecimal digits that identify a source's pairs: data set, version, split, captions.

    It is the same at every image size, so that embeddings computed at CLIP's size fit
    the images a decoder trains on.
    """
    return source.fingerprint
