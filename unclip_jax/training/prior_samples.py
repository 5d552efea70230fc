"""A trained prior's own z_i beside the real ones, for what is trained behind the prior.

Sampling hands the decoder z_i as the prior draws them, which is not how CLIP sees pictures. So some
rows of each batch take a stored sample of the prior for their caption in place of the real z_i.

Where several pictures have the same caption, a sample is of the one whose z_i is nearest to it,
and of copies of that one. With any other of them it would teach that z_i says nothing of the
picture.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from tqdm import tqdm

from unclip_jax.common.files import replacing
from unclip_jax.common.params import fingerprint
from unclip_jax.data.embeddings.shards import Pair
from unclip_jax.data.embeddings.store import WithEmbeddings, with_embeddings
from unclip_jax.data.examples import Met
from unclip_jax.data.records import BadRecord, fingerprint_of
from unclip_jax.errors import UserError
from unclip_jax.stages.conditioning import Condition
from unclip_jax.training.step import LossFn
from unclip_jax.weights.clip_text import ClipText
from unclip_jax.weights.trained import Part, clip_fingerprint, tokenizer

NAME = "prior_z_i"  # in records and batches: float32 [samples, e]

PAIRS_PER_PART = 4096
BATCH = 256

SLACK = 2e-6  # what float32 products of equal z_i may differ by, as a fraction of their lengths

_FORMAT = 3  # of what is kept; raised when the same samples are kept otherwise
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
        """The pair at `index`, with its samples; its own z_i for one that was not drawn."""
        part, row = divmod(index, PAIRS_PER_PART)
        pair, drawn = self._source[index], np.array(self._parts[part][row])
        drawn[~drawn.any(axis=1)] = pair["z_i"]
        return {**pair, NAME: drawn}


def with_samples(
    source: WithEmbeddings, prior: Part, clip: Part, samples: int, cache: Path
) -> WithSamples:
    """The source with so many samples of the prior for each pair's caption.

    They are drawn the first time, with the prior's own settings and a fixed key for each pair and
    number, and kept in `cache`, part by part: a run that is cut short goes on where it stopped. In
    place of a sample that is nearer to another picture of the same caption is the pair's own z_i.
    A part that does not open as what was kept is drawn again. A pair that can't be read, which
    training skips, has no sample.

    Raises:
        UserError: no pair can be read, or none any more.
    """
    about = [clip_fingerprint(clip), fingerprint(prior.params), source.fingerprint]
    about.append(fingerprint_of([_FORMAT, prior.description["stage"], str(samples)])[:8])
    folder = cache / "prior_samples" / "-".join(about)
    starts, each = range(0, len(source), PAIRS_PER_PART), (samples, prior.stage.model.embed_dim)
    shapes = {
        folder / f"{start:09d}.npy": (min(PAIRS_PER_PART, len(source) - start), *each)
        for start in starts
    }
    if missing := [path for path, shape in shapes.items() if not _is_kept(path, shape)]:
        _fill(missing, source, prior, clip, samples)
    return WithSamples(source, [np.load(path, mmap_mode="r") for path in shapes])


def _is_kept(path: Path, shape: tuple[int, ...]) -> bool:
    """Whether a file opens as a part of that shape."""
    try:
        part = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return part.shape == shape and part.dtype == np.float32


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
                    drawn = _draw(alike, prior, encoder, rows, i)
                    part[start : start + BATCH, i] = alike.own(rows, drawn)
                bar.update(len(rows))
            with replacing(path) as temporary, open(temporary, "wb") as file:
                np.save(file, part)


class Alike:
    """The valid pairs of a source, and all z_i of those whose captions others have, too."""

    def __init__(self, source: WithEmbeddings):
        """Read all pairs; z_i of those whose captions repeat are read again, and stay in memory.

        Raises:
            UserError: none is valid.
        """
        self._source, self._bad = source, Met()
        self._valid = np.zeros(len(source), bool)
        found: dict[str, list[int]] = {}
        for start in range(0, len(source), BATCH):
            indices = range(start, min(start + BATCH, len(source)))
            for i, pair in zip(indices, self.read(indices), strict=True):
                if pair is not None:
                    self._valid[i] = True
                    found.setdefault(pair.caption, []).append(i)
        if not found:
            raise UserError(
                f"name: {source.name}: every one of the {len(source)} records read is bad; the"
                " warnings above say why"
            )
        self._groups: list[tuple[np.ndarray, np.ndarray]] = []  # z_i [n, e], their lengths [n]
        self._place: dict[int, tuple[int, int]] = {}  # of a pair: its group, and its row there
        for indices in found.values():
            read = zip(indices, self.read(indices), strict=True) if len(indices) > 1 else ()
            if z_i := {i: pair.z_i for i, pair in read if pair is not None}:
                self._place |= {i: (len(self._groups), row) for row, i in enumerate(z_i)}
                every = np.stack([*z_i.values()])
                self._groups.append((every, np.linalg.norm(every, axis=1).clip(1e-12)))

    def read(self, indices: Sequence[int]) -> list[Pair | None]:
        """Some pairs, None where one is not valid or can't be read; the first time it is told.

        Raises:
            UserError: some could be read before, and now none can.
        """
        found: list[Pair | None] = []
        for i in indices:
            try:
                found.append(with_embeddings(self._source.store[i]))
            except BadRecord as error:
                found.append(None)
                if self._bad.add(i):
                    logging.warning("%s: skipped %s", self._source.name, error)
        if self._valid[indices].any() and not any(found):
            raise UserError(
                f"embeddings: {self._source.store.where}: can't be read any more, the warnings"
                " above say why; run the same command again, which goes on where it stopped"
            )
        return found

    def own(self, pairs: range, drawn: np.ndarray) -> np.ndarray:
        """Samples for the captions of pairs [n, e], or z_i of the pair where another is nearer."""
        drawn, together = drawn.copy(), defaultdict(list)
        for row, i in enumerate(pairs):
            if i in self._place:
                group, mine = self._place[i]
                together[group].append((row, mine))
        for group, places in together.items():
            (z_i, lengths), (rows, mine) = self._groups[group], np.array(places).T
            near = drawn[rows] @ z_i.T / lengths[None]
            most = near.max(axis=1) - SLACK * np.linalg.norm(drawn[rows], axis=1)
            other = near[np.arange(len(rows)), mine] < most
            drawn[rows[other]] = z_i[mine[other]]
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


def _draw(alike: Alike, prior: Part, encoder: Any, pairs: range, number: int) -> np.ndarray:
    """Sample `number` for the captions of pairs [n, e]; zero where a pair is not valid."""
    found = alike.read(pairs)
    valid = np.array([pair is not None for pair in found])
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
