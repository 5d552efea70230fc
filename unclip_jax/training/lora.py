"""Low-rank adapters: a frozen network and a small, trained change (LoRA, arXiv 2106.09685).

A kernel W of [in, out] acts as W + (alpha / rank) A B, with A of [in, rank] and B of [rank, out]
(section 4.1). A starts random and B at zero, so that training begins at the network as it is. Only
A and B have gradients, moments and averages; W stays frozen, in few bits. While it trains, what
goes through A and B is added to what goes through W, and the sum of both is not made. Afterwards
the product is added to W in float32, and what is saved is an ordinary stage that samples at its
ordinary cost. So nothing of the product is rounded away, however few bits W has.

    params = lora.attach(config, key, params)     # {"network": adapters, "base_network": W, ...}
    loss = lora.loss(config, stage.loss)(params, batch, key)
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from unclip_jax.common import checks
from unclip_jax.common.params import TRAINED, Params, flatten, unflatten
from unclip_jax.errors import wrong
from unclip_jax.models import low_rank
from unclip_jax.models.low_rank import matrix_shape
from unclip_jax.stages.base import JointLoss
from unclip_jax.training.step import Batch, LossFn

BASE = "base_network"  # the frozen network's entry beside its adapters; see `params.is_weights`
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Lora:
    """Settings of low-rank adapters.

    Attributes:
        rank: of the change to every kernel; 0 trains the network whole, without adapters.
        alpha: the change is alpha / rank times the product of the adapters.
        convolutions: whether convolutions are adapted as well, as matrices of [height * width *
            in, out]; attention and linear layers always are.
        dtype: "bfloat16" or "float32", of the frozen weights in memory. What is saved in the end
            is the change added to the weights as they were read, rounded nowhere.
    """

    rank: int = 0
    alpha: float = 16.0
    convolutions: bool = False
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        """Check every field."""
        checks.count("config.lora.rank", self.rank, least=0)
        if not self.alpha > 0:
            raise wrong("config.lora.alpha", self.alpha, "a positive number")
        checks.choice("config.lora.dtype", self.dtype, DTYPES)

    @property
    def scale(self) -> float:
        """The factor on the product of the adapters."""
        return self.alpha / self.rank


def passes(params: Params) -> int:
    """How many forward passes a step computes of what it trains; frozen kernels have no gradient.

    Two with adapters, else three (Chowdhery et al. 2022, appendix B).
    """
    return 2 if any(name.endswith(low_rank.A) for name in flatten(params[TRAINED])) else 3


def init(config: Lora, key: jax.Array, network: Params) -> Params:
    """Adapters of a network: a tree of "lora_a" [.., in, rank] and "lora_b" [.., rank, out].

    A is normal with variance 1 / in, B is zero; both are float32. They stand where the kernels
    stand that they change.
    """
    adapters = {}
    for i, (name, kernel) in enumerate(flatten(network).items()):
        shape = matrix_shape(name, kernel.shape, config.convolutions)
        if shape is None:
            continue
        *layers, inputs, outputs = shape
        drawn = jax.random.normal(jax.random.fold_in(key, i), (*layers, inputs, config.rank))
        where = name.removesuffix("kernel")
        adapters[where + low_rank.A] = drawn * inputs**-0.5
        adapters[where + low_rank.B] = jnp.zeros((*layers, config.rank, outputs))
    return unflatten(adapters)


def merge(config: Lora, network: Params, adapters: Params) -> Params:
    """The network with its adapters added, see `low_rank.merged`."""
    return low_rank.merged(network, adapters, config.scale)


def attach(config: Lora, key: jax.Array, params: Params) -> Params:
    """A stage's params with new adapters as what is trained, and its network frozen beside them."""
    base = params[TRAINED]
    return params | {TRAINED: init(config, key, base), BASE: base}


def merged(config: Lora, params: Params) -> Params:
    """The inverse of `attach`: a stage's own params, with the adapters in them, see `merge`."""
    rest = {name: part for name, part in params.items() if name != BASE}
    return rest | {TRAINED: merge(config, params[BASE], params[TRAINED])}


def beside(config: Lora, params: Params) -> Params:
    """A stage's own params, with the adapters beside the kernels they change: `low_rank.apply`."""
    rest = {name: part for name, part in params.items() if name != BASE}
    adapters = flatten(params[TRAINED])
    scaled = {n: x * config.scale if n.endswith(low_rank.B) else x for n, x in adapters.items()}
    return rest | {TRAINED: unflatten(flatten(params[BASE]) | scaled)}


def loss(config: Lora, own: LossFn) -> LossFn:
    """A stage's loss, of params with adapters."""
    whole = functools.partial(beside, config)
    if isinstance(own, JointLoss):
        return own.of(whole)

    def of_adapters(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
        return own(whole(params), batch, key)

    return of_adapters
