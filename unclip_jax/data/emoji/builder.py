"""The emoji as a TensorFlow Datasets builder: real pictures, real captions, no download.

`tfds.load`-style use needs no TensorFlow: the records are ArrayRecords with the images as PNG
bytes. Importing this module registers the builder as `emoji`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import tensorflow_datasets as tfds
from tqdm import tqdm

from unclip_jax.data.datasets import DataConfig
from unclip_jax.data.emoji.catalogue import ATTRIBUTION, Emoji, catalogue, groups, rasterise
from unclip_jax.data.records import is_heldout
from unclip_jax.data.tfds import TfdsSource
from unclip_jax.errors import UserError, wrong

MAX_IMAGE_SIZE = 4096

Builder = TypeVar("Builder", bound="PictureBuilder")


@dataclasses.dataclass(eq=False, repr=False, kw_only=True)
class EmojiConfig(tfds.core.BuilderConfig):
    """Configuration of the emoji builder; its name follows from its options.

    Attributes:
        image_size: side of the square images, in pixels.
        skin_tones: whether the variants with a skin tone are in it.
    """

    name: str = ""
    image_size: int = 64
    skin_tones: bool = False

    def __post_init__(self):
        """Name the configuration "64" or "64_skin_tones"."""
        if not 1 <= self.image_size <= MAX_IMAGE_SIZE:
            raise wrong("image_size", self.image_size, f"1 to {MAX_IMAGE_SIZE} pixels for emoji")
        self.name = f"{self.image_size}_skin_tones" if self.skin_tones else f"{self.image_size}"


class Drawing(NamedTuple):
    """One picture of a data set.

    Attributes:
        name: of the picture.
        emoji: what it is of.
        captions: the canonical one first.
        art: the drawing, an SVG or the file of a picture.
        split: the one that it is in.
        features: what this data set has beside those that all have.
    """

    name: str
    emoji: Emoji
    captions: tuple[str, ...]
    art: str | bytes
    split: str
    features: dict[str, Any]


class PictureBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """What the builders of emoji share."""

    what: str  # messages call their data
    about: str  # a sentence, with {} for the size
    homepage: str
    attribution: str
    features: Mapping[str, Any]  # those that not all have
    splits: tuple[str, ...] = ("train", "heldout")
    # TFDS would look beside this file for checksums of downloads, of which there are none, and
    # needs a package for it that it doesn't install (importlib_resources).
    code_path = None
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012
        EmojiConfig(image_size=size, skin_tones=tones)
        for tones in (False, True)
        for size in (64, 32, 48, 128, 224, 256, 512, 1024)
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        size = self.builder_config.image_size
        return self.dataset_info_from_configs(
            description=f"{self.about.format(size)} {self.attribution}",
            homepage=self.homepage,
            license=self.attribution,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
                    "caption": tfds.features.Text(doc="the canonical caption"),
                    "captions": tfds.features.Sequence(tfds.features.Text()),
                    "category": tfds.features.Text(doc="Unicode's group"),
                    "concept": tfds.features.Text(doc="code points of the neutral form"),
                    **self.features,
                }
            ),
            supervised_keys=("caption", "image"),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # everything is here
        drawings = self._drawings()
        return {
            split: self._generate_examples([d for d in drawings if d.split == split])
            for split in self.splits
        }

    def _drawings(self) -> Sequence[Drawing]:
        raise NotImplementedError

    def _generate_examples(self, chosen: Sequence[Drawing]) -> Iterator[tuple[str, dict]]:
        for drawing in tqdm(chosen, desc="Rendering", unit="", disable=None):
            yield (
                drawing.name,
                {
                    "image": io.BytesIO(rasterise(drawing.art, self.builder_config.image_size)),
                    "caption": drawing.captions[0],
                    "captions": list(drawing.captions),
                    "category": drawing.emoji.category,
                    "concept": drawing.emoji.concept,
                    **drawing.features,
                },
            )


class EmojiBuilder(PictureBuilder):
    """Twemoji pictures with their names as captions.

    Splits `train` and `heldout` (about 10 %) part the *concepts*: man, woman and person
    firefighter, in every skin tone, are on one side.
    """

    name = what = "emoji"
    RELEASE_NOTES = {"1.0.0": "Twemoji rendered on white, splits by concept."}  # noqa: RUF012
    about = "Emoji, {} px on white, captioned by their names."
    homepage, attribution = "https://github.com/jdecked/twemoji", ATTRIBUTION
    features = {"codepoints": tfds.features.Text(doc="hexadecimal, joined by hyphens")}  # noqa: RUF012

    def _drawings(self) -> Sequence[Drawing]:
        return [
            Drawing(
                e.codepoints,
                e,
                e.captions,
                e.art.read_text(encoding="utf-8"),
                "heldout" if is_heldout(e.concept) else "train",
                {"codepoints": e.codepoints},
            )
            for e in catalogue(self.builder_config.skin_tones)
        ]


def open_source(config: DataConfig, rest: str = "") -> TfdsSource:
    """The emoji that a config asks for; with labels, an emoji's class is its group."""
    classes = groups() if config.labels else ()
    return source(EmojiBuilder, config, "codepoints", "category", classes)


def source(
    builder_class: type[PictureBuilder],
    config: DataConfig,
    name_key: str,
    label_key: str,
    classes: tuple[str, ...] = (),
    caption_key: str = "captions",
) -> TfdsSource:
    """A builder's pictures, rendered into the config's cache if they weren't before."""
    return TfdsSource(
        prepared(builder_class, config.image_size, config.skin_tones, config.cache),
        config.split,
        image_key="image",
        caption_key=caption_key,
        captions=config.captions,
        name_key=name_key,
        label_key=label_key if config.labels else None,
        classes=classes,
    )


def prepared(
    builder_class: type[Builder], image_size: int, skin_tones: bool, data_dir: str | os.PathLike
) -> Builder:
    """A builder configured by `EmojiConfig`, its data rendered into TFDS's `data_dir` if need be.

    The data appear under their final name in one rename: of processes that prepare at once each
    renders, one wins, and all read the same.

    Raises:
        UserError: `data_dir` can't be written.
    """
    config = EmojiConfig(image_size=image_size, skin_tones=skin_tones)
    known = config.name if config.name in builder_class.builder_configs else config
    builder = builder_class(config=known, data_dir=data_dir, file_format="array_record")
    final = pathlib.Path(builder.data_dir)
    if final.exists():
        return builder
    tfds.disable_progress_bar()  # TFDS's bars for each shard; ours is per emoji
    what = f"the {builder_class.what}"
    print(f"Rendering {what} at {image_size} px into {data_dir}", file=sys.stderr)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints of a download
            builder.download_and_prepare()
    except OSError as error:
        if not final.exists():  # else another process was first
            raise UserError(
                f"cache_dir: {data_dir}: {what} can't be prepared there ({error}); give another "
                "cache_dir or set UNCLIP_JAX_CACHE"
            ) from error
    return builder_class(config=known, data_dir=data_dir, file_format="array_record")
