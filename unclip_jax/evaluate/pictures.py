"""Sets of pictures as vectors: real ones read batch by batch, generated ones drawn so.

Of the pictures themselves no more than a batch is in memory, beside the few that are shown. Every
picture has its own key and every batch the same shape, so that the size of a batch changes pictures
and figures by rounding alone.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence

import jax
import numpy as np
from tqdm import tqdm

from unclip_jax.data import batches, datasets
from unclip_jax.data.images import square
from unclip_jax.data.records import Source, summary
from unclip_jax.evaluate.features import OWN_CLIP, FeatureNetwork, of_clip
from unclip_jax.metrics.retrieval import digests
from unclip_jax.metrics.vectors import Vectors
from unclip_jax.pipeline.drawing import batches as row_batches
from unclip_jax.pipeline.unclip import UnCLIP
from unclip_jax.stages.clip import encode_text
from unclip_jax.stages.conditioning import example_keys
from unclip_jax.stages.pixels import to_uint8
from unclip_jax.weights.trained import Part


@dataclasses.dataclass(frozen=True, eq=False)
class Measurer:
    """A model with the networks that look at its pictures.

    Attributes:
        model: what is measured.
        judge: the CLIP that measures, the model's own or another.
        clip: its image tower.
        network: whose features are compared; may be `clip` itself.
        batch_size: pictures computed together.
    """

    model: UnCLIP
    judge: Part
    clip: FeatureNetwork
    network: FeatureNetwork
    batch_size: int

    def by(self, judge: Part) -> Measurer:
        """The same with another CLIP, which is the feature network as well."""
        clip = of_clip(judge, self.model.mesh)
        return Measurer(self.model, judge, clip, clip, self.batch_size)

    def look(self, images: np.ndarray) -> Vectors:
        """At up to `batch_size` uint8 pictures [b, h, w, 3], filled up to a whole batch."""
        padded = np.resize(images, (self.batch_size, *images.shape[1:]))
        z_i = self.clip(padded)[: len(images)]
        if self.network.name == OWN_CLIP:
            return Vectors(z_i, z_i)
        return Vectors(z_i, self.network(padded)[: len(images)])

    def read_captions(self, captions: Sequence[str]) -> np.ndarray:
        """z_t [n, e] of any number of captions."""
        parts = []
        for rows, count in row_batches(len(captions), self.batch_size):
            tokens = self.model.tokens(self.judge, [captions[i] for i in rows])
            z_t = encode_text(self.judge.stage, self.judge.params, tokens)
            parts.append(np.asarray(z_t)[:count])
        return np.concatenate(parts)

    def captions_alike(self, captions: Sequence[str]) -> list[bytes]:
        """What tells captions apart, equal for those that the judge reads alike."""
        return digests(np.asarray(self.model.tokens(self.judge, list(captions))))

    def sample_prior(self, key: jax.Array, captions: Sequence[str]) -> np.ndarray:
        """One z_i [n, e] of the prior for each caption."""
        keys, parts = example_keys(key, len(captions)), []
        with _bar("embeddings of the prior", len(captions)) as bar:
            for rows, count in row_batches(len(captions), self.batch_size):
                drawn = self.model.sample_prior(keys[rows], [captions[i] for i in rows])
                parts.append(np.asarray(drawn)[:count])
                bar.update(count)
        return np.concatenate(parts)

    def draw(
        self,
        key: jax.Array,
        captions: Sequence[str],
        *,
        guidance_scale: float,
        upsample: bool,
        shown: int,
        name: str,
    ) -> tuple[Vectors, np.ndarray]:
        """Generate a picture for each caption; picture i has the key fold_in(key, i).

        Args:
            key: typed PRNG key.
            captions: [n].
            guidance_scale: the decoder's.
            upsample: whether the upsamplers run, too.
            shown: how many pictures are kept.
            name: what the progress bar says.

        Returns:
            The vectors of all, and the first `shown` pictures, uint8 [shown, size, size, 3].
        """
        model, parts, kept, keys = self.model, [], [], example_keys(key, len(captions))
        with _bar(name, len(captions)) as bar:
            for rows, count in row_batches(len(captions), self.batch_size):
                chosen, texts, z_i = keys[rows], [captions[i] for i in rows], None
                if "z_i" in model.decoder.stage.conditions:
                    z_i = model.sample_prior(chosen, texts)
                images = model.decode(chosen, z_i, texts, guidance_scale=guidance_scale)
                if upsample:
                    images = model.upsample(chosen, images)
                drawn = np.asarray(to_uint8(images))[:count]
                parts.append(self.look(drawn))
                kept.append(drawn[: max(0, shown - rows[0])])
                bar.update(count)
        return _join(parts), np.concatenate(kept)

    def read(self, config: datasets.DataConfig, split_field: str = "split") -> Real:
        """Every readable picture of a split, with its first caption."""
        config = dataclasses.replace(config, captions="first", cache_bytes=0)
        source = datasets.load(config, split_field=split_field)
        print(f"data: {summary(source, config.split)}", file=sys.stderr)
        parts, index, labels, alike = [], [], [], []
        how = {"shuffle": False, "epochs": 1, "drop_remainder": False}
        stream = batches.batches(source, config, seed=0, batch_size=self.batch_size, **how)
        with _bar(f"real pictures, {config.split}", len(source)) as bar:
            for batch in stream:
                parts.append(self.look(batch["image"]))
                index.append(batch["index"])
                labels.append(batch.get("label", np.zeros(0, np.int32)))
                alike += digests(batch["image"])
                bar.update(len(batch["index"]))
        rows, classes = np.concatenate(index), np.concatenate(labels)
        return Real(source, config.image_size, rows, classes, _join(parts), alike)


@dataclasses.dataclass(frozen=True, eq=False)
class Real:
    """The readable pictures of a split.

    Attributes:
        source: where they come from.
        image_size: side, in pixels, at which they were looked at.
        index: [n] of each picture in the source.
        labels: [n] of each picture's class; [0] where the source has none.
        vectors: of the pictures.
        alike: [n] what tells pictures apart, equal for equal ones.
    """

    source: Source
    image_size: int
    index: np.ndarray
    labels: np.ndarray
    vectors: Vectors
    alike: list[bytes]

    @functools.cached_property
    def captions(self) -> list[str]:
        """Every picture's first caption."""
        return [self.source[int(i)]["caption"] for i in self.index]

    def pictures(self, rows: np.ndarray) -> list[np.ndarray]:
        """Some of them as uint8 [s, s, 3]."""
        chosen = [self.source[int(self.index[row])]["image"] for row in rows]
        return [square(image, self.image_size) for image in chosen]


def _join(parts: list[Vectors]) -> Vectors:
    z_i, features = ([getattr(part, name) for part in parts] for name in ("z_i", "features"))
    return Vectors(np.concatenate(z_i), np.concatenate(features))


def _bar(name: str, total: int) -> tqdm:
    return tqdm(total=total, desc=f"{name:<26}", unit="picture")
