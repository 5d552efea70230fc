"""Stages: each joins one network and one diffusion, and says how it trains and samples.

A stage is a frozen, hashable dataclass of settings. Its params are never inside it: they are the
first argument of every method. What `base.Stage` lists, it says of itself: what it reads, what a
batch of that looks like, which figures it has, which conditions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unclip_jax.common import checks, config
from unclip_jax.stages.ar_prior import ARPriorStage
from unclip_jax.stages.base import Stage
from unclip_jax.stages.canvas import CanvasStage
from unclip_jax.stages.classifier import ClassifierStage
from unclip_jax.stages.clip import ClipStage
from unclip_jax.stages.decoder import DecoderStage
from unclip_jax.stages.eclipse_prior import EclipsePriorStage
from unclip_jax.stages.prior import PriorStage
from unclip_jax.stages.upsampler import UpsamplerStage

KINDS = {
    stage.kind: stage
    for stage in (
        ClipStage, PriorStage, ARPriorStage, EclipsePriorStage, CanvasStage, DecoderStage,
        UpsamplerStage, ClassifierStage,
    )
}  # fmt: skip

PRIORS = ("prior", "ar_prior", "eclipse_prior")  # kinds that draw z_i for captions

__all__ = [
    "PRIORS",
    "ARPriorStage",
    "CanvasStage",
    "ClassifierStage",
    "ClipStage",
    "DecoderStage",
    "EclipsePriorStage",
    "PriorStage",
    "Stage",
    "UpsamplerStage",
    "build",
    "describe",
]


def build(settings: Mapping[str, Any], path: str = "config.stage") -> Stage:
    """The stage that plain settings describe; `kind` says which, the rest are its fields.

    Raises:
        UserError: an unknown kind or field, or a value of the wrong type.
    """
    settings = dict(settings)
    kind = checks.choice(f"{path}.kind", settings.pop("kind", None), sorted(KINDS))
    return config.build(KINDS[kind], settings, path)


def describe(stage: Stage) -> dict[str, Any]:
    """Plain settings from which `build` makes an equal stage."""
    return {"kind": stage.kind} | config.to_dict(stage)
