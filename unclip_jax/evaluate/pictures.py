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

from unclip_jax.common import bars
from unclip_jax.data import batches, datasets
from unclip_jax.data.images import square
from unclip_jax.data.records import Source, summary
from unclip_jax.evaluate.features import OWN_CLIP, FeatureNetwork, of_clip
from unclip_jax.metrics.retrieval import digests
from unclip_jax.metrics.vectors import Moments, Vectors, moments
from unclip_jax.parallel import distributed, shares
from unclip_jax.pipeline.drawing import Kept
from unclip_jax.pipeline.drawing import batches as row_batches
from unclip_jax.pipeline.unclip import UnCLIP
from unclip_jax.stages.clip import encode_text
from unclip_jax.stages.conditioning import example_keys
from unclip_jax.stages.pixels import to_uint8
from unclip_jax.weights.trained import Part, clip_fingerprint


@dataclasses.dataclass(frozen=True, eq=False)
class Measurer:
    """A model with the networks that look at its pictures.

    Attributes:
        model: what is measured.
        judge: the CLIP that measures, the model's own or another.
        clip: its image tower.
        network: whose features are compared; may be `clip` itself.
        batch_size: pictures computed together.
        kept: where batches that were drawn are kept.
    """

    model: UnCLIP
    judge: Part
    clip: FeatureNetwork
    network: FeatureNetwork
    batch_size: int
    kept: Kept = dataclasses.field(default_factory=Kept)

    def by(self, judge: Part) -> Measurer:
        """The same with another CLIP, which is the feature network as well."""
        clip = of_clip(judge, self.model.mesh)
        return dataclasses.replace(self, judge=judge, clip=clip, network=clip)

    def about(self) -> list[str]:
        """Which networks look, and at what size of batch, JSON-able."""
        return [clip_fingerprint(self.judge), self.network.name, str(self.batch_size)]

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
        for rows, count in shares.own(row_batches(len(captions), self.batch_size)):
            tokens = self.model.tokens(self.judge, [captions[i] for i in rows])
            z_t = encode_text(self.judge.stage, self.judge.params, tokens)
            parts.append(np.asarray(z_t)[:count])
        return shares.joined(parts)

    def captions_alike(self, captions: Sequence[str]) -> list[bytes]:
        """What tells captions apart, equal for those that the judge reads alike."""
        return digests(np.asarray(self.model.tokens(self.judge, list(captions))))

    def sample_prior(self, key: jax.Array, captions: Sequence[str]) -> np.ndarray:
        """One z_i [n, e] of the prior for each caption."""
        keys, parts = example_keys(key, len(captions)), []
        with _bar("embeddings of the prior", len(captions)) as bar:
            for rows, count in shares.own(row_batches(len(captions), self.batch_size)):
                drawn = self.model.sample_prior(keys[rows], [captions[i] for i in rows])
                parts.append(np.asarray(drawn)[:count])
                bar.update(count)
        return shares.joined(parts)

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
        keys, parts, pictures = example_keys(key, len(captions)), [], []
        kept, call = self.kept, self.kept.call()
        with _bar(name, len(captions)) as bar:
            for rows, count in shares.own(row_batches(len(captions), self.batch_size)):
                found = kept.read(call, rows[0])
                if found is None:
                    texts = [captions[i] for i in rows]
                    drawn = self._drawn(keys[rows], texts, guidance_scale, upsample)[:count]
                    looked = self.look(drawn)
                    found = looked.z_i, looked.features, drawn[: max(0, shown - rows[0])]
                    kept.write(call, rows[0], found)
                parts.append(Vectors(*found[:2]))
                pictures.append(found[2])
                bar.update(count)
        return _join(parts), shares.joined(pictures)

    def _drawn(
        self, keys: jax.Array, captions: list[str], guidance_scale: float, upsample: bool
    ) -> np.ndarray:
        """A batch of pictures, uint8."""
        model, z_i = self.model, None
        if "z_i" in model.decoder.stage.conditions:
            z_i = model.sample_prior(keys, captions)
        images = model.decode(keys, z_i, captions, guidance_scale=guidance_scale)
        if upsample:
            images = model.upsample(keys, images)
        return np.asarray(to_uint8(images))

    def read(self, config: datasets.DataConfig, split_field: str = "split") -> Real:
        """Every readable picture of a split, with its first caption."""
        config = dataclasses.replace(config, captions="first", cache_bytes=0)
        source = datasets.load(config, split_field=split_field)
        if distributed.is_lead():
            print(f"data: {summary(source, config.split)}", file=sys.stderr)
        parts, index, labels, alike = [], [], [], []
        how = {"shuffle": False, "epochs": 1, "drop_remainder": False}
        how |= {"process_index": jax.process_index(), "process_count": jax.process_count()}
        stream = batches.batches(source, config, seed=0, batch_size=self.batch_size, **how)
        with _bar(f"real pictures, {config.split}", len(source)) as bar:
            for batch in stream:
                parts.append(self.look(batch["image"]))
                index.append(batch["index"])
                labels.append(batch.get("label", np.zeros(0, np.int32)))
                alike += digests(batch["image"])
                bar.update(len(batch["index"]))
        if jax.process_count() == 1:
            rows, classes = np.concatenate(index), np.concatenate(labels)
            return Real(source, config.image_size, rows, classes, _join(parts), alike)
        looked, rows, classes = _join(parts), shares.joined(index), shares.joined(labels)
        # The batches of one process follow each other otherwise where records are bad.
        order = np.argsort(rows, kind="stable")
        digested = (
            [np.frombuffer(b"".join(alike), np.uint8).reshape(len(alike), -1)] if alike else []
        )
        alike = [one.tobytes() for one in shares.joined(digested)[order]]
        classes = classes[order] if len(classes) else classes
        return Real(source, config.image_size, rows[order], classes, looked.rows(order), alike)


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

    def about(self) -> list[str]:
        """Which pictures these are, JSON-able."""
        return [self.source.fingerprint, str(self.image_size), str(len(self.index))]

    @functools.cached_property
    def captions(self) -> list[str]:
        """Every picture's first caption."""
        return [self.source[int(i)]["caption"] for i in self.index]

    def pictures(self, rows: np.ndarray) -> list[np.ndarray]:
        """Some of them as uint8 [s, s, 3]."""
        chosen = [self.source[int(self.index[row])]["image"] for row in rows]
        return [square(image, self.image_size) for image in chosen]


def _join(parts: list[Vectors]) -> Vectors:
    """The vectors of all batches of all processes."""
    z_i, features = ([getattr(part, name) for part in parts] for name in ("z_i", "features"))
    return Vectors(shares.joined(z_i), shares.joined(features))


def with_moments(vectors: Vectors) -> Vectors:
    """The same with their features' moments, of which every process computes a part."""
    if jax.process_count() == 1:
        return vectors
    part = np.array_split(vectors.features, jax.process_count())[jax.process_index()]
    return dataclasses.replace(vectors, known=merged(moments(part) if len(part) else None))


def merged(own: Moments | None) -> Moments:
    """The moments of the vectors of all processes, of those of each. All must call it."""
    arrays = [] if own is None else [np.concatenate([own.mean[None], own.scatter])[None]]
    counts = [count for count in distributed.gather(0 if own is None else own.count) if count]
    every = zip(counts, shares.joined(arrays), strict=True)
    return functools.reduce(Moments.merge, (Moments(n, x[0], x[1:]) for n, x in every))


def _bar(name: str, total: int) -> tqdm:
    """Of what this process does of all; the lead shows its own."""
    share = -(-total // jax.process_count())
    silent = not distributed.is_lead()
    return bars.bar(total=share, desc=f"{name:<26}", unit="picture", disable=silent)
