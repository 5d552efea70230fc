"""Which data set: a config, and the source it names."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import NamedTuple

from absl import logging

from unclip_jax.common import checks, extras
from unclip_jax.common.files import default_cache_dir
from unclip_jax.data.images import CENTRE, Fit
from unclip_jax.data.records import Source, summary
from unclip_jax.data.tokenizer import CONTEXT_LENGTH, VOCAB_SIZE
from unclip_jax.errors import UserError, did_you_mean, wrong

KEYS = ("image_key", "caption_key", "label_key")
DISK_CACHE_BYTES = 2**35


class Kind(NamedTuple):
    """A kind of data set.

    Its module, imported when it is asked for, has `open_source(config, rest)`: the `records.Source`
    that a config names, where `rest` is what its name has behind the prefix.

    Attributes:
        module: the name of that module.
        rest: what that `rest` is, for messages; "" where the name is no prefix but the whole.
        extra: the extra of this package that the module needs.
        has_images: whether its records hold pictures.
        settings: the fields of a config that it knows, of those that not every kind does.
    """

    module: str
    rest: str = ""
    extra: str = "train"
    has_images: bool = True
    settings: tuple[str, ...] = KEYS


EMOJI = Kind("unclip_jax.data.emoji.builder", extra="train,emoji", settings=("skin_tones",))
# What a data set's name is or begins with. To add a kind: its module, and a row here.
KINDS = {
    "emoji": EMOJI,
    "emoji_styles": EMOJI._replace(module="unclip_jax.data.emoji.styles"),
    "emoji_art": EMOJI._replace(module="unclip_jax.data.emoji.styles"),
    "emoji_art:": EMOJI._replace(module="unclip_jax.data.emoji.styles", rest="paraphrases"),
    "tfds:": Kind("unclip_jax.data.tfds", "NAME"),
    "wds:": Kind("unclip_jax.data.shards.webdataset", "PATTERN"),
    "parquet:": Kind("unclip_jax.data.shards.parquet", "PATTERN", extra="train,parquet"),
    "embeddings:": Kind(
        "unclip_jax.data.embeddings.store", "FOLDER", has_images=False, settings=("caption_key",)
    ),
}
FOLDER = Kind("unclip_jax.data.folder", "PATH")  # a name without any of these, but with a slash


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """A data set and what is made of its pairs.

    Attributes:
        name: "emoji"; "emoji_styles" or "emoji_art", whose art `unclip styles` fetches; the path
            of a folder of images; "tfds:NAME", a TFDS data set; "wds:PATTERN", webdataset's tar
            shards; "parquet:PATTERN", parquet files with images in them; "embeddings:FOLDER", what
            `unclip embed` stored, without pictures. A pattern is a path or address
            (gs://, s3://, http://) with `{00000..00123}` or `*`.
        split: "train", "heldout" or "all"; for TFDS whatever it calls its splits.
        image_size: side of the square images, in pixels.
        fit: how a picture of another shape becomes a square one; a CLIP has its own.
        captions: "all" pairs an image with each of its captions, "first" with one.
        skin_tones: emoji only: whether the variants with a skin tone are in it.
        image_key: the feature with the image (TFDS; "a/b" for a nested one), its column (parquet)
            or its suffix (wds). Shards have it under any usual name by default.
        caption_key: the feature with the text or texts, the column, or the field of the `.json`
            (wds); likewise.
        labels: whether records carry the class of their image: an emoji's group, the style where
            there are several, the sub-folder it lies in, its `.cls` (wds), or what is under
            `label_key`.
        label_key: the feature (TFDS) or column (parquet) with the class.
        bare: whether pictures without a caption count, too, with an empty one: for stages that read
            no captions.
        cache_dir: where prepared data and the indices of shards are; "" for `$UNCLIP_JAX_CACHE`,
            else `~/.cache/unclip_jax`; for "tfds:NAME" "" is TFDS's own default.
        shared_dir: a folder or URL that all hosts of a run share, where what is found out about
            the data once is kept: indices of shards, and what is measured on embeddings; "" for
            the cache.
        context_length: tokens per caption, start and end included.
        vocab_size: token ids; below 49408 only the first merges of CLIP's BPE are used.
        augment: strength of random scaling and shifting, from 0 to below 1.
        cache_bytes: decoded images are kept in memory where all of them fit in this.
        disk_cache_bytes: what is read of remote stored embeddings is kept in `cache_dir` up to
            this, of all stores together; 0 keeps nothing.
        read_threads: how many records are read and decoded at a time; 0 for as many as there are
            cores, at most 16, or 64 where records come over a network.
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
    bare: bool = False
    cache_dir: str = ""
    shared_dir: str = ""
    context_length: int = CONTEXT_LENGTH
    vocab_size: int = VOCAB_SIZE
    augment: float = 0.0
    cache_bytes: int = 2**30
    disk_cache_bytes: int = DISK_CACHE_BYTES
    read_threads: int = 0
    fit: Fit = CENTRE

    def __post_init__(self):
        """Check what can be checked without looking at the data.

        Raises:
            UserError: a field has no meaning.
        """
        for field in ("name", "split", "shared_dir"):
            if not isinstance(getattr(self, field), str):
                raise wrong(field, getattr(self, field), "a string")
        checks.choice("captions", self.captions, ("all", "first"))
        checks.count("image_size", self.image_size)
        if not 0.0 <= self.augment < 1.0:
            raise wrong("augment", self.augment, "0 (none) to below 1")
        checks.number("cache_bytes", self.cache_bytes, least=0)
        checks.count("disk_cache_bytes", self.disk_cache_bytes, least=0)
        if checks.count("read_threads", self.read_threads, least=0) > 1024:
            raise wrong("read_threads", self.read_threads, "0 (automatic) to 1024")

    def key(self, what: str) -> str:
        """The setting `{what}_key`; "" for the default, which stands for any usual name."""
        name = f"{what}_key"
        given = getattr(self, name)
        return "" if given == type(self).__dataclass_fields__[name].default else given

    def refuse(self, what: str, *fields: str) -> None:
        """Raise UserError if a field is set that a data set, `what`, has no use for."""
        for field in fields:
            given, default = (getattr(of, field) for of in (self, type(self)))
            if given not in (default, ""):
                raise wrong(field, given, f"{default!r}", f"{what} has no such choice")

    @property
    def cache(self) -> pathlib.Path:
        """Where prepared data and indices are."""
        return pathlib.Path(self.cache_dir) if self.cache_dir else default_cache_dir()

    @property
    def shared(self) -> str:
        """Where what all hosts may share is."""
        return self.shared_dir or str(self.cache)


def load(config: DataConfig, *, needs_images: bool = True, split_field: str = "split") -> Source:
    """The source that a config names; the emoji are rendered the first time.

    Args:
        config: the config.
        needs_images: False if whoever asks reads no pictures: stored embeddings will do.
        split_field: what the user knows the split by, for messages.

    Raises:
        UserError: there is no such data set, split, folder or feature, nothing usable in it, no
            pictures in it where they are needed, or what reads it isn't installed.
    """
    name = config.name
    prefix, colon, rest = name.partition(":")
    kind = KINDS.get(prefix + colon)
    if kind is None:
        rest, kind = name, FOLDER
        if os.path.basename(name) == name and not os.path.exists(os.path.expanduser(name)):
            known = ", ".join(known + kind.rest for known, kind in KINDS.items())
            near = did_you_mean(
                name, [*KINDS, *(entry.name for entry in os.scandir() if entry.is_dir())]
            )
            raise wrong(
                "name",
                name,
                f"a folder, and none of that name is here, or one of {known}",
                near or f"a data set of TFDS is tfds:{name}",
            )
    if not kind.has_images:
        if needs_images:
            raise UserError(
                f"name: {name!r}: stored embeddings hold no pictures, which are needed here; name"
                " the data set that they were computed from"
            )
        if config.augment:
            raise wrong("augment", config.augment, f"0 for {name}, which holds no pictures")
    config.refuse(name, *{*KEYS, "skin_tones"} - {*kind.settings})
    module = extras.load(kind.module, kind.extra, f"name: {name!r}")
    try:
        source = module.open_source(config, rest)
    except UserError as error:
        if not str(error).startswith("split: ") or split_field == "split":
            raise
        raise UserError(f"{split_field}{str(error).removeprefix('split')}") from error
    logging.info("%s", summary(source, config.split))
    return source
