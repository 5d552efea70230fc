"""Where a run begins: at its newest checkpoint, at a newer copy on its hosts' disks, or anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from unclip_jax.common.params import TRAINED, is_weights
from unclip_jax.errors import wrong
from unclip_jax.parallel import sharding
from unclip_jax.training import beginning
from unclip_jax.training import step as steps
from unclip_jax.training.changes import Change, check_description
from unclip_jax.training.checkpoints import Checkpoints
from unclip_jax.training.config import TrainConfig
from unclip_jax.training.copies import Copies
from unclip_jax.training.feed import Feed
from unclip_jax.training.optimizers import Params, make_optimizer
from unclip_jax.training.step import TrainState
from unclip_jax.training.workdir import Workdir

Complete = Callable[[dict[str, Any]], Mapping[str, Any]]


class Begun(NamedTuple):
    """The step that a run goes on from, or 0; its state; which settings are others since."""

    step: int
    state: TrainState
    changes: list[Change]


def kept(state: TrainState) -> TrainState:
    """What a checkpoint holds of a state: all but frozen networks, which never change."""
    frozen = [name for name in state.params if is_weights(name) and name != TRAINED]
    params = {name: part for name, part in state.params.items() if name not in frozen}
    return state._replace(params=params)


def begin(
    feed: Feed,
    described: dict[str, Any],
    complete: Complete,
    init_params: Callable[[], Params],
    config: TrainConfig,
    mesh: Mesh,
    place: Workdir,
    checkpoints: Checkpoints,
    copies: Copies | None,
) -> Begun:
    """The state to go on from, with the data at the place that matches.

    No device ever holds more than its part of one state.
    """

    def changed(step: int, saved: dict[str, Any]) -> list[Change]:
        changes = check_description(complete(saved), described, place.name)
        if step > config.steps:
            at = f"at least {step}, where {place.name!r} is already"
            raise wrong("train.steps", config.steps, at, "raise it, or use another workdir")
        return changes

    newest = checkpoints.newest(
        lambda step: (step, changed(step, checkpoints.item(step, "description")))
    )
    optimizer, host = make_optimizer(config), sharding.host_device()

    def anew() -> Begun:
        with jax.default_device(host):  # one device may be too small for them
            params = init_params()
        return Begun(0, steps.sharded_state(params, optimizer, config, mesh), [])

    local = [] if copies is None else copies.usable(newest[0] if newest else 0)
    if newest is None and not local:
        return anew()
    with jax.default_device(host):
        shapes, networks = beginning.shapes_and_frozen(init_params)
    like = steps.state_shapes(shapes, optimizer, config, mesh)

    def whole(state: TrainState) -> TrainState:
        """With the frozen networks, which no checkpoint has."""
        frozen = {
            name: sharding.place(part, jax.tree.map(lambda leaf: leaf.sharding, like.params[name]))
            for name, part in networks.items()
        }
        return state._replace(params=frozen | state.params)

    for step in local:
        if (state := copies.restore(step, kept(like))) is not None:
            index = copies.index(step)
            changes = changed(step, index["description"])
            feed.restore(index["positions"])
            return Begun(step, whole(state), changes)
    if newest is None:
        return anew()

    def read(step: int) -> Begun:
        changes = changed(step, checkpoints.item(step, "description"))
        state, positions = checkpoints.restore(step, like=kept(like))
        feed.restore(positions)
        return Begun(step, whole(state), changes)

    return checkpoints.newest(read)
