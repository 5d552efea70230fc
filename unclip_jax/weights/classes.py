"""Classes by name: what the data calls them, and which number a stage knows each by.

A data set counts its classes by the alphabet or as TFDS does. A stage learns the numbers, so its
description keeps the names, under `classes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unclip_jax import stages
from unclip_jax.data.records import Source
from unclip_jax.errors import UserError
from unclip_jax.weights.trained import Part


def reads_labels(stage: stages.Stage) -> bool:
    """Whether the stage learns from the class of each image."""
    return getattr(stage, "num_classes", 0) > 0


def check_data(stage: stages.Stage, source: Source, trained: Mapping[str, Any] | None) -> None:
    """Raise UserError unless the data's classes are those of the stage.

    Args:
        stage: one that reads labels.
        source: its data.
        trained: the description of the trained stage that it starts from, if from any.
    """
    names = ", ".join(source.classes)
    if len(source.classes) != stage.num_classes:
        field = "out_channels" if stage.kind == "classifier" else "num_classes"
        raise UserError(
            f"config.stage.model.{field}: got {stage.num_classes}, but {source.name} has"
            f" {len(source.classes)} classes ({names}); set --config.stage.model.{field}="
            f"{len(source.classes)}"
        )
    known = list(source.classes) if trained is None else trained.get("classes", [])
    if known != list(source.classes):
        raise UserError(
            f"config.data.name: {source.name} has the classes {names}, but the stage in config.init"
            f" learned {', '.join(known)}; use data with those"
        )


def names(part: Part) -> list[str]:
    """The names of a trained stage's classes, by number.

    Raises:
        UserError: its description has none.
    """
    found = part.description.get("classes")
    if not found or len(found) != part.stage.num_classes:
        raise UserError(
            f"{part.stage.kind}: its description names {len(found or ())} classes, expected"
            f" {part.stage.num_classes}; use a folder that train.py wrote"
        )
    return found


def number(name: str, classes: Sequence[str]) -> int:
    """The number of a class: of its whole name, or of the only one that begins so.

    Upper and lower case are the same.

    Raises:
        UserError: no class begins so, or several do.
    """
    wanted = name.strip().casefold()
    folded = [known.casefold() for known in classes]
    if wanted in folded:
        return folded.index(wanted)
    found = [i for i, known in enumerate(folded) if wanted and known.startswith(wanted)]
    if len(found) != 1:
        why = "is no class" if not found else f"begins {len(found)} classes"
        raise UserError(f"label: {name!r} {why}; expected one of: {', '.join(classes)}")
    return found[0]
