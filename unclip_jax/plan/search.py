"""The smallest arrangement in which a config fits: which mesh, how many microbatches, what remat.

Memory is modelled, and what the model finds is then compiled. A chip holds three things: its part
of the state and of the gradients (exact); what the backward pass keeps of its rows (exact for remat
"full", which keeps the blocks' inputs); and the results and gathered params of the one block that
is being recomputed.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from unclip_jax.errors import UserError
from unclip_jax.parallel import sharding
from unclip_jax.parallel.flops import sub_jaxprs
from unclip_jax.plan.analysis import by_blocks
from unclip_jax.plan.blocks import Split
from unclip_jax.plan.chips import GIB, Topology
from unclip_jax.plan.programs import Plan, device_bytes
from unclip_jax.stages.base import JointLoss
from unclip_jax.training.optimizers import trained

REMAT = ("none", "dots", "full")
ROOM = 0.9  # of a chip's memory: the model is one
MICROBATCHES = (1, 2, 4, 8, 16)
COMPARED = 24  # bytes for each picture and caption that are compared: similarities, who belongs
PRODUCTS = ("dot_general", "conv_general_dilated")


@dataclasses.dataclass(frozen=True)
class RowBytes:
    """Bytes of activations for each row of a microbatch.

    Attributes:
        kept: by remat policy, what lives from the forward to the backward pass.
        working: what the largest block needs at once.
        gathered: bytes of the largest block's params and their gradients, on a chip that gathers
            them; once, not for each row.
    """

    kept: Mapping[str, float]
    working: float
    gathered: float

    def bytes(self, rows: float, policy: str) -> float:
        """Bytes of a chip that has so many rows of a microbatch."""
        return rows * (self.kept[policy] + self.working) + self.gathered


def search(
    config: Mapping[str, Any], topology: Topology, devices: list[jax.Device]
) -> tuple[Plan, str]:
    """The first of `candidates`: it has not been compiled yet.

    Raises:
        UserError: nothing fits.
    """
    return next(candidates(config, topology, devices))


def candidates(
    config: Mapping[str, Any],
    topology: Topology,
    devices: list[jax.Device],
    policies: Sequence[str] = REMAT,
) -> Generator[tuple[Plan, str], None, None]:
    """What fits by the model, as a plan and in words.

    The least sharded mesh comes first, with the fewest microbatches and the least recomputation.
    Whoever asks for the next one says that this one did not fit, and gets one that needs less.

    Raises:
        UserError: nothing more fits.
    """
    first = with_remat(Plan.of(config, devices, sharding.MeshConfig(), {"grad_accum": 1}), "full")
    shapes = (first.params(), first.batch(), jax.random.key(0))
    split, _ = by_blocks(first, first.loss, shapes, first.micro_size)
    rows = row_bytes(split)
    joint = isinstance(first.loss, JointLoss)
    together = COMPARED * first.train.batch_size**2 if joint else 0
    limit, chips = ROOM * topology.chip.hbm_bytes, topology.device_count
    for plan, fsdp in _meshes(first, devices):
        held, gradients = device_bytes(plan.state()), device_bytes(trained(plan.params()))
        for accum, policy in itertools.product(MICROBATCHES, policies):
            if first.train.batch_size % (accum * chips):
                continue
            here = first.train.batch_size / accum / chips
            needed = held + gradients * (2 if accum > 1 else 1) + rows.bytes(here, policy)
            needed += together / chips
            if needed <= limit:
                text = (
                    f"smallest that fits: --mesh=fsdp={fsdp} --config.train.grad_accum={accum},"
                    f" remat {policy!r}, by the model {needed / GIB:.1f} GiB of"
                    f" {topology.chip.hbm_bytes / GIB:.1f}; compiled above"
                )
                train = dataclasses.replace(plan.train, grad_accum=accum)
                yield with_remat(dataclasses.replace(plan, train=train), policy), text
                limit = min(limit, needed * (1 - 1e-9))
    raise UserError(
        f"--topology={topology.name}: too small for this config at any mesh, with train.grad_accum"
        f" up to {MICROBATCHES[-1]} and remat 'full'; name a larger slice, or a smaller"
        " train.batch_size"
    )


def _meshes(first: Plan, devices: list[jax.Device]) -> Iterator[tuple[Plan, int]]:
    """The plan on every mesh of data and fsdp alone that its params split over."""
    for fsdp in (2**i for i in range(len(devices).bit_length())):
        if len(devices) % fsdp:
            continue
        try:
            mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=fsdp), devices)
            plan = dataclasses.replace(first, mesh=mesh)
            plan.state()
        except UserError:  # some param does not split into so many parts, or a slice has fewer
            continue
        yield plan, fsdp


def row_bytes(split: Split) -> RowBytes:
    """What each row of a microbatch needs, from the traced loss."""
    kept = dict.fromkeys(REMAT, 0.0)
    working = gathered = 0.0

    def has_rows(aval: Any) -> bool:
        return aval.shape[:1] == (split.rows,)

    for block in split.blocks:
        own = [_bytes(aval) for aval, spec in block.inputs if spec is None and has_rows(aval)]
        inputs = max(own, default=0)  # the others are shared
        results = [
            (equation.primitive.name, _bytes(v.aval))
            for equation in _all_equations(block.jaxpr)
            for v in equation.outvars
            if has_rows(v.aval)
        ]
        products = sum(size for name, size in results if name in PRODUCTS)
        everything = sum(size for _, size in results)
        weights = sum(math.prod(aval.shape) for aval, spec in block.inputs if spec is not None)
        kept["full"] += block.count * inputs
        kept["dots"] += block.count * (inputs + products)
        kept["none"] += block.count * (inputs + everything)
        working = max(working, 2 * products + 2 * inputs)
        gathered = max(gathered, weights * (2 + 4))  # bfloat16, and float32 gradients
    per_row = {policy: size / split.rows for policy, size in kept.items()}
    return RowBytes(per_row, working / split.rows, gathered)


def _all_equations(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """Equations with no jaxprs inside, at any depth."""
    for equation in jaxpr.eqns:
        inner = list(sub_jaxprs(equation))
        if not inner:
            yield equation
        for each in inner:
            yield from _all_equations(each)


def _bytes(aval: Any) -> int:
    floats = jnp.issubdtype(aval.dtype, jnp.floating)
    return math.prod(aval.shape) * (aval.dtype.itemsize if floats else 1)


def remat_of(stage: Any) -> str:
    """The remat policy of a stage's networks; the U-Net's where there are several."""
    model = stage.model
    return getattr(getattr(model, "unet", model), "remat", "none")


def with_remat(plan: Plan, policy: str) -> Plan:
    """The plan, all its networks recomputing as `policy` says."""
    return dataclasses.replace(
        plan, stage=dataclasses.replace(plan.stage, model=_with_remat(plan.stage.model, policy))
    )


def _with_remat(config: Any, policy: str) -> Any:
    changes = {
        field.name: _with_remat(getattr(config, field.name), policy)
        for field in dataclasses.fields(config)
        if dataclasses.is_dataclass(getattr(config, field.name))
    }
    if hasattr(config, "remat"):
        changes["remat"] = policy
    return dataclasses.replace(config, **changes)
