"""From an iterator of batches to arrays on the devices, and the iterator's position."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from unclip_jax.errors import UserError
from unclip_jax.parallel import distributed, sharding
from unclip_jax.training.config import TrainConfig


class BatchIterator(Protocol):
    """The share of every batch that one process reads (`sharding.data_shard`), in a fixed order."""

    def __next__(self) -> Mapping[str, np.ndarray]:
        """The next batch, arrays [batch_size / shares, ...]."""

    def get_state(self) -> Any:
        """The position: bytes, or JSON-able."""

    def set_state(self, states: Sequence[Any]) -> None:
        """Go to where `get_state` was called.

        Args:
            states: what it returned for every share, in order; their number may be another than
                the present one, if the iterator can go on from there.
        """


class Feed:
    """Batches on the devices, each with the data position right after it."""

    def __init__(self, batches: BatchIterator, config: TrainConfig, mesh: Mesh) -> None:
        """Feed the devices of `mesh` with this process's share of every batch."""
        self._batches, self._config, self._mesh = batches, config, mesh
        self._rows = config.batch_size // sharding.data_shard(mesh).count

    def take(self, step: int) -> tuple[dict[str, jax.Array], Any]:
        """The batch of `step`, on its way to the devices, and the position after it.

        Raises:
            UserError: the data end, or are not what can be trained on.
        """
        try:
            batch = next(self._batches)
        except StopIteration:
            raise UserError(
                f"data: ran out at step {step} of {self._config.steps}; repeat it or lower"
                " train.steps"
            ) from None
        position = self._batches.get_state()
        for name, array in batch.items():
            if np.ndim(array) < 1 or len(array) != self._rows:
                raise UserError(
                    f"batch[{name!r}]: got shape {list(np.shape(array))}, expected"
                    f" {self._rows} rows (train.batch_size {self._config.batch_size}, of which"
                    f" each of {self._config.batch_size // self._rows} shares reads its part)"
                )
            if array.dtype.kind not in "biuf" and not jnp.issubdtype(array.dtype, jnp.floating):
                raise UserError(f"batch[{name!r}]: got dtype {array.dtype}, expected numbers")
        return sharding.shard_batch(batch, self._mesh), position

    def positions(self, position: Any) -> dict[str, Any]:
        """The positions of all shares, JSON-able, for a checkpoint. Every process must call it."""
        every = distributed.gather(_encode(position))
        shares = [sharding.data_shard(self._mesh, process).index for process in range(len(every))]
        return {"shares": [every[shares.index(share)] for share in range(1 + max(shares))]}

    def restore(self, positions: Mapping[str, Any]) -> None:
        """Go on from what `positions` returned, on this mesh or another."""
        self._batches.set_state([_decode(saved) for saved in positions["shares"]])


def _encode(position: Any) -> dict[str, Any]:
    if isinstance(position, bytes):
        return {"base64": base64.b64encode(position).decode("ascii")}
    return {"json": position}


def _decode(saved: Mapping[str, Any]) -> Any:
    return base64.b64decode(saved["base64"]) if "base64" in saved else saved["json"]
