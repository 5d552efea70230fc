"""What is in a folder of pictures, for a person and for the choice of settings."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections import Counter

import numpy as np
from PIL import Image

from unclip_jax.data import datasets
from unclip_jax.data.datasets import DataConfig
from unclip_jax.data.records import BadRecord, Source, summary
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.errors import UserError, wrong

CLASSES_OF = 50_000  # images of which classes are asked for, which takes a second listing
GLANCE = 256  # pairs that are looked at, evenly spread
FEW = 100  # pictures below which a model learns them by heart and nothing else
CONTEXTS = (24, 48, 77)  # tokens that captions may have, start and end included
FEWEST_HELD = 4  # pictures that figures may be of
UNCUT = 0.99  # of the captions are to fit
VOCAB_SIZE = 4096  # of the models of every size


@dataclasses.dataclass(frozen=True)
class Found:
    """A data set as it was found.

    Attributes:
        data: names it.
        said: pairs, images and what was left out, a line for each split.
        pairs: to train on.
        images: to train on.
        heldout_split: that figures are measured on: "heldout", or "train" where that is too few.
        fingerprint: of the training set.
        sides: the shorter sides of the pictures looked at, in pixels, sorted.
        captions: of the pairs looked at, each once, in their order.
        heldout_captions: likewise of those held out.
        context_length: tokens that fit nearly every caption.
        classes: names of classes with pictures of each among those looked at; {} for none.
    """

    data: DataConfig
    said: tuple[str, ...]
    pairs: int
    images: int
    heldout_split: str
    fingerprint: str
    sides: tuple[int, ...]
    captions: tuple[str, ...]
    heldout_captions: tuple[str, ...]
    context_length: int
    classes: dict[str, int]

    @property
    def side(self) -> int:
        """The median of the pictures' shorter sides."""
        return self.sides[len(self.sides) // 2]

    def words(self) -> list[str]:
        """What was found, in lines for a person."""
        least, most = self.sides[0], self.sides[-1]
        sizes = f"all {most}" if least == most else f"{least} to {most}, half of them {self.side}"
        lines = [*self.said, f"shorter sides: {sizes} px or more" if least != most else
                 f"shorter sides: {sizes} px"]  # fmt: skip
        if self.classes:
            most_common = Counter(self.classes).most_common(4)
            shown = ", ".join(f"{name} ({n})" for name, n in most_common)
            lines.append(f"{len(self.classes)} classes: {shown}{', ...' * (len(self.classes) > 4)}")
        shown = "; ".join(f'"{caption[:60]}"' for caption in self.captions[:3])
        lines.append(f"captions such as {shown}; up to {self.context_length} tokens are read")
        return lines

    def warnings(self, draws: int) -> list[str]:
        """What to expect of a model that draws pictures of so many pixels."""
        lines = []
        if self.images < FEW:
            lines.append(
                f"{self.images} pictures are few: they will be learned by heart, and nothing else"
            )
        if self.heldout_split == "train":
            lines.append("too few are held out to measure by: figures are of pictures trained on")
        if len(self.captions) == 1:
            lines.append("all captions are the same: pictures will not follow what is asked for")
        if self.side < draws:
            lines.append(
                f"most pictures have fewer than {draws} px: they are enlarged, and so drawn as soft"
            )
        return lines


def look(data: DataConfig) -> Found:
    """Look at a data set.

    Raises:
        UserError: it is not there, or holds no picture with a caption.
    """
    source = _load(data, "train")
    said = [summary(source, "train")]
    split = "heldout"
    try:
        held = datasets.load(dataclasses.replace(data, split=split, captions="first"))
        said.append(f"held out, never trained on: {held.image_count} images")
    except UserError as error:
        if "split" not in str(error):
            raise
        held = source
    if held is source or held.image_count < FEWEST_HELD:
        split = "train"
    sides, captions, lengths = _glance(source)
    fits = [length for length in CONTEXTS if np.mean(lengths <= length) >= UNCUT]
    return Found(
        data=data,
        said=tuple(said),
        pairs=len(source),
        images=source.image_count,
        heldout_split=split,
        fingerprint=source.fingerprint,
        sides=tuple(sorted(sides)),
        captions=captions,
        heldout_captions=() if split == "train" else _glance(held)[1],
        context_length=(*fits, CONTEXTS[-1])[0],
        classes=_classes(data) if source.image_count <= CLASSES_OF else {},
    )


def _load(data: DataConfig, split: str) -> Source:
    try:
        return datasets.load(dataclasses.replace(data, split=split))
    except UserError as error:
        if str(error).startswith("split: "):
            raise wrong("--data", data.name, "pictures to train on", str(error)) from error
        raise UserError(str(error).replace("name: ", "--data: ", 1)) from error


def _indices(source: Source) -> list[int]:
    spread = np.linspace(0, len(source) - 1, min(GLANCE, len(source)))
    return sorted(set(spread.round().astype(int).tolist()))


def _glance(source: Source) -> tuple[list[int], tuple[str, ...], np.ndarray]:
    """Shorter sides in pixels, different captions, and tokens of each, of some pairs.

    UserError if none of them can be read.
    """
    sides, captions = [], []
    for index in _indices(source):
        with contextlib.suppress(BadRecord, OSError, ValueError):
            record = source[index]
            image = record["image"]
            if isinstance(image, bytes):
                with Image.open(io.BytesIO(image)) as opened:  # reads no more than the header
                    sides.append(min(opened.size))
            else:
                sides.append(min(image.shape[:2]))
            captions.append(record["caption"])
    if not sides:
        expected = "pictures that can be read"
        raise wrong("--data", source.name, expected, "unclip train-all reads what PIL reads")
    different = tuple(dict.fromkeys(captions))
    tokenizer = Tokenizer(CONTEXTS[-1], VOCAB_SIZE)
    tokens = tokenizer.encode(list(different))
    return sides, different, 1 + np.argmax(tokens == tokenizer.end_token, axis=1)


def _classes(data: DataConfig) -> dict[str, int]:
    """Pictures of each class among those looked at; {} where there are none."""
    with contextlib.suppress(UserError, BadRecord, OSError):
        source = datasets.load(dataclasses.replace(data, split="train", labels=True))
        if len(source.classes) > 1:
            counted = Counter(int(source[index]["label"]) for index in _indices(source))
            return {name: counted.get(i, 0) for i, name in enumerate(source.classes)}
    return {}
