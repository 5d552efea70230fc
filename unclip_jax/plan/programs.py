"""The programs that a config means: its train step and its sampler, with shapes for arrays."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from unclip_jax import stages
from unclip_jax.common import config as settings
from unclip_jax.common.params import flatten, in_weights, unflatten
from unclip_jax.errors import UserError
from unclip_jax.parallel import axes, sharding
from unclip_jax.training import lora
from unclip_jax.training.config import TrainConfig
from unclip_jax.training.optimizers import make_optimizer
from unclip_jax.training.step import LossFn, TrainState, make_train_step, placed, state_shapes
from unclip_jax.weights.trained import read_stage, stage_folder

Shapes = Any  # a pytree of jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Plan:
    """A stage, how it trains, and on which mesh.

    Attributes:
        stage: what trains.
        train: the loop's settings.
        mesh: of devices that may not be there.
        lora: the adapters that train in the network's place; those of rank 0 are none.
        sampled: dtype of the sampler's weights in memory.
    """

    stage: stages.Stage
    train: TrainConfig
    mesh: Mesh
    lora: lora.Lora = dataclasses.field(default_factory=lora.Lora)
    sampled: str = "float32"

    @classmethod
    def of(
        cls,
        config: Mapping[str, Any],
        devices: list[jax.Device],
        mesh: sharding.MeshConfig | None = None,
        changes: Mapping[str, Any] | None = None,
    ) -> Plan:
        """The plan of a config file.

        Args:
            config: what its `get_config` returned.
            devices: what to train on.
            mesh: their arrangement; None takes the config's own.
            changes: fields of config.train to change.

        Raises:
            UserError: a field is not as it must be, the mesh does not fit the devices, or the
                batch does not fit the mesh.
        """
        stage = stages.build(config["stage"])
        if config.get("canvas"):
            canvas, _ = read_stage(stage_folder(config["canvas"]), "canvas")
            stage = stage.with_canvas(canvas.model)
        train = settings.build(TrainConfig, config["train"], "config.train")
        train = dataclasses.replace(train, **(changes or {}))
        if mesh is None:
            mesh = settings.build(sharding.MeshConfig, config["mesh"], "config.mesh")
        made = sharding.make_mesh(mesh, devices)
        sharding.check_batch_size(train.batch_size, made, train.grad_accum)
        sharding.check_spatial(made, stage.feature_rows)
        adapters = settings.build(lora.Lora, config.get("lora", {}), "config.lora")
        return cls(stage, train, made, adapters)

    @property
    def micro_size(self) -> int:
        """Examples in a microbatch, over all devices."""
        return self.train.batch_size // self.train.grad_accum

    def params(self) -> Shapes:
        """The params that train, and what lies beside them, as they lie on the mesh."""
        if not self.lora.rank:
            return placed(self._own("float32"), self.mesh)
        begun = functools.partial(lora.attach, self.lora, jax.random.key(0))
        return placed(jax.eval_shape(begun, self._own(self.lora.dtype)), self.mesh)

    def _own(self, dtype: str) -> Shapes:
        """The stage's own params, with weights of a dtype."""
        made = flatten(jax.eval_shape(self.stage.init, jax.random.key(0)))
        kept = {n: x.update(dtype=dtype) if in_weights(n) else x for n, x in made.items()}
        return unflatten(kept)

    @property
    def loss(self) -> LossFn:
        """The loss of `params`."""
        return lora.loss(self.lora, self.stage.loss) if self.lora.rank else self.stage.loss

    def state(self) -> TrainState:
        """The train state, as it lies on the mesh."""
        return state_shapes(self.params(), make_optimizer(self.train), self.train, self.mesh)

    def batch(self, rows: int | None = None) -> Shapes:
        """A batch of so many rows (the whole batch's by default), split over the mesh."""
        return split(self.stage.batch_spec(rows or self.train.batch_size), self.mesh)

    def step(self, loss: LossFn | None = None) -> Callable[..., Any]:
        """The real train step, of the stage's loss or of another."""
        optimizer = make_optimizer(self.train)
        return make_train_step(loss or self.loss, optimizer, self.train, self.mesh)

    def lowered_step(self, loss: LossFn | None = None) -> jax.stages.Lowered:
        """The train step, ready to compile; it consumes its state."""
        return self.step(loss).lower(self.state(), self.batch())

    def sampler(self) -> Callable[..., jax.Array]:
        """The real sampler: (params, keys [b], a batch's conditions, guidance scale) to pictures.

        Raises:
            UserError: the stage draws nothing.
        """
        stage, mesh = self.stage, self.mesh
        if stage.makes is None:
            raise UserError(f"--sample: got a {stage.kind}, which draws nothing; leave it out")

        def sample(params: Any, keys: jax.Array, batch: Any, scale: jax.Array) -> jax.Array:
            with axes.on(mesh):
                settings = {"guidance_scale": scale} if stage.guided_by() else {}
                return stage.sample(params, keys, stage.condition_of(batch), **settings)

        return sample

    def sampler_shapes(self, rows: int) -> tuple[Shapes, ...]:
        """The shapes that `sampler` takes, for `rows` pictures."""
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
        batch = {
            name: jax.ShapeDtypeStruct((rows, *field.shape), field.dtype)
            for name, field in self.stage.conditions.items()
        }
        keys, batch = split((keys, batch), self.mesh)
        whole = sharding.replicated(self.mesh)
        scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
        return placed(self._own(self.sampled), self.mesh), keys, batch, scale


def split(tree: Shapes, mesh: Mesh) -> Shapes:
    """The shapes of arrays [rows, ...], split over a mesh."""
    rows = sharding.batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), tree)


def device_bytes(tree: Shapes) -> int:
    """Bytes of a tree of placed shapes on one device."""
    return sum(
        x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree)
    )
