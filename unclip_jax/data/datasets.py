"""Which data set: a config, and the source it names."""

from __future__ import annotations

import dataclasses
import os
import pathlib

from absl import logging

from unclip_jax.data.folder import FolderSource
from unclip_jax.data.records import Source
from unclip_jax.data.tfds_source import (
    TfdsSource,
    emoji_source,
    emoji_styles_source,
    prepared_builder,
)
from unclip_jax.data.tokenizer import CONTEXT_LENGTH, VOCAB_SIZE
from unclip_jax.errors import UserError

EMOJI = {"emoji": emoji_source, "emoji_styles": emoji_styles_source}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """A data set and what is made of its pairs.

    Attributes:
      name: "emoji"; "emoji_styles", whose art python -m unclip_jax.data.styles fetches; the path
        of a folder of images; or "tfds:<name>", a TFDS data set.
      split: "train", "heldout" or "all"; for TFDS whatever it calls its splits.
      image_size: side of the square images, in pixels.
      captions: "all" pairs an image with each of its captions, "first" with one.
      skin_tones: emoji only: whether the variants with a skin tone are in it.
      image_key: TFDS only: the feature with the image; "a/b" for a nested one.
      caption_key: TFDS only: the feature with the text or texts; likewise.
      labels: whether records carry the class of their image as well: an emoji's group, the
        style where there are several, the sub-folder it lies in, or TFDS's `label_key`.
      label_key: TFDS only: the feature with the class; likewise.
      cache_dir: where prepared data are; "" for `$UNCLIP_JAX_CACHE`, else
        `~/.cache/unclip_jax`; for "tfds:..." "" is TFDS's own default.
      context_length: tokens per caption, start and end included.
      vocab_size: token ids; below 49408 only the first merges of CLIP's BPE are used.
      augment: strength of random scaling and shifting, from 0 to below 1.
      cache_bytes: decoded images are kept in memory where all of them fit in this.
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


def default_cache_dir() -> pathlib.Path:
    """`$UNCLIP_JAX_CACHE`, else `~/.cache/unclip_jax`."""
    return pathlib.Path(os.environ.get("UNCLIP_JAX_CACHE") or "~/.cache/unclip_jax").expanduser()


def load(config: DataConfig) -> Source:
    """The source that a config names; the emoji are rendered the first time.

    Raises:
      UserError: if there is no such data set, split, folder or feature, or nothing
        usable in it.
    """
    name = config.name
    if name in EMOJI:
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
    elif os.path.basename(name) != name or os.path.exists(os.path.expanduser(name)):
        source = FolderSource(name, config.split, config.captions, config.labels)
    else:
        raise UserError(
            f"name: {name!r}: expected 'emoji', 'emoji_styles', the path of a folder (./{name} if "
            f"it is meant as one), or 'tfds:{name}' for a data set of TFDS"
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


def fingerprint(source: Source) -> str:
    """16 hexadecimal digits that identify a source's pairs: data set, version, split, captions.

    It is the same at every image size, so that embeddings computed at CLIP's size fit
    the images a decoder trains on.
    """
    return source.fingerprint
