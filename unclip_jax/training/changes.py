"""What a resumed run may have otherwise than before, and what it has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from unclip_jax.errors import UserError

# Settings of `train` that a resumed run may change: first those that touch nothing that a step
# computes (but a cosine schedule ends at `steps`), then those that say how far a step goes and how
# it is computed. Nothing that a checkpoint holds is made otherwise under them.
CHANGEABLE = tuple(
    f"train.{name}"
    for name in (
        "steps", "log_every", "eval_every", "preview_every", "checkpoint_every", "local_every",
        "keep_checkpoints",
        "best", "best_is", "if_damaged", "stall_minutes",
        "learning_rate", "warmup_steps", "schedule", "weight_decay", "grad_clip", "grad_accum",
        "ema_decay", "ema_warmup",
    )
)  # fmt: skip

_LISTED = 3


class Change(NamedTuple):
    """A setting that a resumed run has otherwise than before, both as JSON or "absent"."""

    setting: str
    was: str
    now: str

    def __str__(self) -> str:
        """In words."""
        said = f"{self.setting} was {self.was}, now {self.now}"
        why = " (pictures or captions of the data set are others now)"
        return said + why * (self.setting == "data_fingerprint")


def check_description(
    saved: Mapping[str, Any], current: Mapping[str, Any], where: str
) -> list[Change]:
    """How the run to resume and this one differ; UserError if in more than `CHANGEABLE`."""
    before, now = _leaves(saved), _leaves(current)
    changes = [
        Change(name, before.get(name, "absent"), now.get(name, "absent"))
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    differing = [str(change) for change in changes if change.setting not in CHANGEABLE]
    if differing:
        more = f" and {len(differing) - _LISTED} more" if len(differing) > _LISTED else ""
        raise UserError(
            f"workdir {where!r}: holds a run with other settings:"
            f" {'; '.join(differing[:_LISTED])}{more}; resume with the same ones (only"
            f" {', '.join(CHANGEABLE)} may change) or use another workdir"
        )
    return changes


def _leaves(tree: Any, path: str = "") -> dict[str, str]:
    """Dotted path -> JSON of every leaf; lists count as leaves."""
    if isinstance(tree, Mapping) and tree:
        leaves = {}
        for name, value in tree.items():
            leaves.update(_leaves(value, f"{path}.{name}" if path else name))
        return leaves
    return {path: json.dumps(tree, ensure_ascii=False)}
