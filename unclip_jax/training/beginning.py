"""The params that a run begins with: what is drawn at random, and what is measured on its data.

A run that goes on needs neither, but for their shapes: both are in its checkpoint.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from unclip_jax import stages
from unclip_jax.common.params import TRAINED, Params, flatten, is_weights, unflatten
from unclip_jax.data.embeddings.store import EmbeddingSource, WithEmbeddings
from unclip_jax.data.records import fingerprint_of
from unclip_jax.data.shards.folders import Folder
from unclip_jax.data.shards.storage import StorageError
from unclip_jax.errors import UserError
from unclip_jax.parallel import distributed
from unclip_jax.training.step import random_params

_FORMAT = 2  # of what is kept; raised when the same name is measured otherwise


class FromRandom:
    """The first params of a stage that begins at random."""

    def __init__(
        self, stage: stages.Stage, key: jax.Array, beside: Params, measured: Callable[[], Params]
    ):
        """Take what is not drawn: params that are there, and what measures others when called."""
        self._stage, self._key, self._beside, self._measured = stage, key, beside, measured

    def __call__(self) -> Params:
        """Draw and measure them, in the host's memory."""
        found = flatten(self._measured())
        drawn = flatten(random_params(self._stage.init, self._key))
        return unflatten(drawn | found) | self._beside

    def shapes(self) -> Params:
        """Their shapes and dtypes: nothing is drawn, measured or computed."""
        beside = jax.eval_shape(lambda: self._beside)
        return jax.eval_shape(self._stage.init, self._key) | beside


def shapes_and_frozen(init_params: Callable[[], Params]) -> tuple[Params, Params]:
    """The shapes of first params, and of the params those networks that no checkpoint holds.

    They are made for that only where there are such networks, or no `shapes` says what they are.
    """
    shapes = getattr(init_params, "shapes", dict)()
    if shapes and not any(is_weights(name) and name != TRAINED for name in shapes):
        return shapes, {}
    params = init_params()
    return params, {n: p for n, p in params.items() if is_weights(n) and n != TRAINED}


def measured(
    stage: stages.Stage, name: str, source: EmbeddingSource | WithEmbeddings, where: str
) -> Params:
    """The constants of a stage that are measured on its data, once for the same data and CLIP.

    All processes measure together, each on its part of the shards. What they find is kept under a
    fingerprint of the data in the folder `where`, which the lead process reads and writes; all
    processes must call it.

    Args:
        stage: names what it measures, `stage.measures`.
        name: of the normalisation.
        source: the data.
        where: a path or a URL.

    Raises:
        UserError: too few embeddings, or ones that do not vary.
    """
    depends = stage.measures(name)
    if depends is None:
        return stage.fit_constants(name, source.chunks)
    meta = source.store.meta
    of = [meta.clip_fingerprint, meta.unit_embeddings, meta.dtype, meta.width, source.fingerprint]
    file = f"{fingerprint_of([_FORMAT, stage.kind, depends, of])}.npz"
    folder = Folder(f"{where}/constants", "data.shared_dir")
    shapes = jax.eval_shape(stage.init, jax.random.key(0))
    known = _kept(folder, file) if distributed.is_lead() else b""
    found = _parsed(distributed.gather_bytes(known)[0], shapes)
    if found is not None:
        return found
    part = (jax.process_index(), jax.process_count())
    found = stage.fit_constants(
        name, lambda: source.chunks(part=part), gather=distributed.gather_arrays
    )
    if distributed.is_lead():
        _keep(folder, file, found)
    return found


def _kept(folder: Folder, file: str) -> bytes:
    try:
        size = folder.sizes().get(file, 0)
        return folder.read(file, 0, size) if size else b""
    except (UserError, StorageError) as error:
        logging.warning("%s; the constants of the data are measured again", error)
        return b""


def _keep(folder: Folder, file: str, found: Params) -> None:
    content = io.BytesIO()
    np.savez(content, **{name: np.asarray(x) for name, x in flatten(found).items()})
    try:
        folder.write(file, content.getvalue())
    except UserError as error:  # they are right all the same
        logging.warning("%s; the constants of the data are not kept", error)


def _parsed(content: bytes, shapes: Params) -> Params | None:
    """The params in a file; None where it is none, or they have other shapes."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            found: dict[str, Any] = {name: jnp.asarray(file[name]) for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    expected = flatten(shapes)
    fits = (n in expected and x.shape == expected[n].shape for n, x in found.items())
    return unflatten(found) if found and all(fits) else None
