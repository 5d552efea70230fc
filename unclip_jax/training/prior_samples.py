"""A trained prior's own z_i beside the real ones, for what is trained behind the prior.

Sampling hands the decoder z_i as the prior draws them, which is not how CLIP sees pictures. So some
rows of each batch take a stored sample of the prior for their caption in place of the real z_i.

Where several pictures have the same caption, a sample is of the one whose z_i is nearest to it.
With any other of them it would teach that z_i says nothing of the picture.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from unclip_jax.common.files import replacing
from unclip_jax.common.params import fingerprint
from unclip_jax.data.embeddings.shards import VALID
from unclip_jax.data.embeddings.store import WithEmbeddings
from unclip_jax.data.records import fingerprint_of
from unclip_jax.metrics.vectors import unit
from unclip_jax.stages.conditioning import Condition
from unclip_jax.training.step import LossFn
from unclip_jax.weights.clip_text import ClipText
from unclip_jax.weights.trained import Part, clip_fingerprint, tokenizer

NAME = "prior_z_i"  # in records and batches: float32 [samples, e]

PAIRS_PER_PART = 4096
BATCH = 256

_FORMAT = 2  # of what is kept; raised when the same samples are kept otherwise
_CHOICE = np.iinfo(np.uint32).max - 1  # folded into a step's key, for the choice of rows


class WithSamples:
    """A source with z_i and z_t whose records also carry samples of the prior, under `NAME`.

    Everything else is the source's own.
    """

    def __init__(self, source: WithEmbeddings, parts: list[np.ndarray]):
        """Join a source to the samples of its pairs, of which each part has `PAIRS_PER_PART`."""
        self._source, self._parts = source, parts

    def __getattr__(self, name: str) -> Any:
        """What the source has by that name."""
        if name.startswith("_"):  # of this object itself, which is being copied
            raise AttributeError(name)
        return getattr(self._source, name)

    def __len__(self) -> int:
        """The number of pairs."""
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The pair at `index`, with its samples."""
        part, row = divmod(index, PAIRS_PER_PART)
        return {**self._source[index], NAME: np.array(self._parts[part][row])}


def with_samples(
    source: WithEmbeddings, prior: Part, clip: Part, samples: int, cache: Path
) -> WithSamples:
    """The source with so many samples of the prior for each pair's caption.

    They are drawn the first time, with the prior's own settings and a fixed key for each pair and
    number, and kept in `cache`, part by part: a run that is cut short goes on where it stopped. In
    place of a sample that is nearer to another picture of the same caption is the pair's own z_i.
    """
    about = [clip_fingerprint(clip), fingerprint(prior.params), source.fingerprint]
    about.append(fingerprint_of([_FORMAT, prior.description["stage"], str(samples)])[:8])
    folder = cache / "prior_samples" / "-".join(about)
    paths = [folder / f"{start:09d}.npy" for start in range(0, len(source), PAIRS_PER_PART)]
    if missing := [path for path in paths if not path.exists()]:
        _fill(missing, source, prior, clip, samples)
    return WithSamples(source, [np.load(path, mmap_mode="r") for path in paths])


def _fill(
    missing: list[Path], source: WithEmbeddings, prior: Part, clip: Part, samples: int
) -> None:
    """Draw and write the parts that are not there."""
    encoder = ClipText.of(clip) if prior.stage.reads_states else tokenizer(prior)
    alike = Alike(source)
    parts = [range(int(p.stem), min(int(p.stem) + PAIRS_PER_PART, len(source))) for p in missing]
    with tqdm(desc="samples of the prior", total=sum(map(len, parts)), disable=None) as bar:
        for path, pairs in zip(missing, parts, strict=True):
            part = np.zeros((len(pairs), samples, prior.stage.model.embed_dim), np.float32)
            for start in range(0, len(pairs), BATCH):
                rows = pairs[start : start + BATCH]
                for i in range(samples):
                    drawn = _draw(source, prior, encoder, rows, i)
                    part[start : start + BATCH, i] = alike.own(rows, drawn)
                bar.update(len(rows))
            with replacing(path) as temporary, open(temporary, "wb") as file:
                np.save(file, part)


class Alike:
    """The pairs of a source whose captions others have, too, with their z_i."""

    def __init__(self, source: WithEmbeddings):
        """Read all pairs once; z_i of those whose captions repeat stay in memory."""
        found: dict[str, list[int]] = {}
        for i in range(len(source)):
            pair = source.store[i]
            if pair.flags & VALID:
                found.setdefault(pair.caption, []).append(i)
        self._place: dict[int, tuple[np.ndarray, int]] = {}  # of a pair: all z_i, and which is its
        for pairs in found.values():
            if len(pairs) > 1:
                z_i = np.stack([source.store[i].z_i for i in pairs])
                self._place |= {i: (z_i, row) for row, i in enumerate(pairs)}

    def own(self, pairs: range, drawn: np.ndarray) -> np.ndarray:
        """Samples for the captions of pairs [n, e], or z_i of the pair where another is nearer."""
        drawn = drawn.copy()
        for row, i in enumerate(pairs):
            if i in self._place:
                z_i, mine = self._place[i]
                near = unit(z_i) @ drawn[row]
                if near[mine] < near.max():
                    drawn[row] = z_i[mine]
        return drawn


@functools.partial(jax.jit, static_argnames="stage")
def _sample(
    stage: Any, params: Any, pairs: jax.Array, number: jax.Array, cond: Condition
) -> jax.Array:
    """Sample `number` of each pair's caption [b, e]."""

    def key(pair: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(0), pair), number)

    settings = {name: setting.default for name, setting in stage.settings.items()}
    return stage.sample(params, jax.vmap(key)(pairs), cond, **settings)


def _draw(
    source: WithEmbeddings, prior: Part, encoder: Any, pairs: range, number: int
) -> np.ndarray:
    """Sample `number` for the captions of pairs [n, e]; zero where a pair has no embeddings."""
    found = [source.store[i] for i in pairs]
    valid = np.array([bool(pair.flags & VALID) for pair in found])
    if not valid.any():
        return np.zeros((len(pairs), prior.stage.model.embed_dim), np.float32)
    rows = np.resize(np.flatnonzero(valid), BATCH)  # always as many: one program
    captions = [found[i].caption for i in rows]
    z_t = jnp.asarray(np.stack([found[i].z_t for i in rows]))
    mask = None
    if isinstance(encoder, ClipText):
        states = encoder.states(encoder.tokenizer.encode(captions))
        text, mask = states["text_states"], states["text_mask"]
    else:
        text = jnp.asarray(encoder.encode(captions))
    cond = prior.stage.condition(text, z_t, mask)
    numbers = jnp.asarray(np.array(pairs)[rows])
    drawn = _sample(prior.stage, prior.params, numbers, jnp.int32(number), cond)
    out = np.zeros((len(pairs), drawn.shape[1]), np.float32)
    out[rows] = drawn
    return out


@dataclasses.dataclass(frozen=True)
class Mixed:
    """A loss of batches in which some rows take one of their samples in place of the real z_i.

    Attributes:
        loss: of batches without samples.
        share: how often a row does.
    """

    loss: LossFn
    share: float

    def __call__(self, params: Any, batch: Any, key: jax.Array) -> Any:
        """The loss and its metrics."""
        batch = dict(batch)
        drawn, z_i = batch.pop(NAME), batch["z_i"]
        share_key, which_key = jax.random.split(jax.random.fold_in(key, _CHOICE))
        taken = jax.random.bernoulli(share_key, self.share, z_i.shape[:1])
        which = jax.random.randint(which_key, z_i.shape[:1], 0, drawn.shape[1])
        chosen = jnp.take_along_axis(drawn, which[:, None, None], axis=1)[:, 0]
        return self.loss(params, batch | {"z_i": jnp.where(taken[:, None], chosen, z_i)}, key)
