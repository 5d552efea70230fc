"""Stages: each joins one network and one diffusion, and says how it trains and samples.

A stage is a frozen, hashable dataclass of settings. Its params are never inside it: they are the
first argument of every method.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any

from unclip_jax.common import config
from unclip_jax.errors import UserError
from unclip_jax.models.unet import UNetConfig
from unclip_jax.stages.ar_prior import ARPriorStage
from unclip_jax.stages.classifier import ClassifierStage
from unclip_jax.stages.clip import ClipStage
from unclip_jax.stages.decoder import DecoderStage
from unclip_jax.stages.prior import PriorStage
from unclip_jax.stages.upsampler import UpsamplerStage

Stage = ClipStage | PriorStage | ARPriorStage | DecoderStage | UpsamplerStage | ClassifierStage

__all__ = [
    "ARPriorStage",
    "ClassifierStage",
    "ClipStage",
    "DecoderStage",
    "PriorStage",
    "Stage",
    "UpsamplerStage",
    "build",
    "describe",
    "feature_rows",
    "unet",
]


def build(settings: Mapping[str, Any], path: str = "config.stage") -> Stage:
    """The stage that plain settings describe; `kind` says which, the rest are its fields.

    Raises:
        UserError: an unknown kind or field, or a value of the wrong type.
    """
    kinds = {stage.kind: stage for stage in typing.get_args(Stage)}
    settings = dict(settings)
    kind = settings.pop("kind", None)
    if kind not in kinds:
        raise UserError(f"{path}.kind: got {kind!r}, expected one of {', '.join(sorted(kinds))}")
    return config.build(kinds[kind], settings, path)


def describe(stage: Stage) -> dict[str, Any]:
    """Plain settings from which `build` makes an equal stage."""
    return {"kind": stage.kind} | config.to_dict(stage)


def unet(stage: Stage) -> UNetConfig | None:
    """The config of the stage's U-Net; None where it has none."""
    return getattr(stage, "unet", None)


def feature_rows(stage: Stage) -> int:
    """Rows of the first feature map of the stage's U-Net; 0 where it has none."""
    network = unet(stage)
    return 0 if network is None else network.feature_size(0)
