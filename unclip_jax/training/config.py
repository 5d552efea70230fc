"""Settings of the training loop and its optimizer, the same for every stage."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from typing import Any, Literal

from unclip_jax.common import checks
from unclip_jax.errors import wrong


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of the loop and the optimizer. An `every` of 0 stands for never.

    Attributes:
        batch_size: examples per step, over all devices and microbatches.
        steps: total number of steps.
        learning_rate: the peak.
        warmup_steps: over which the learning rate rises linearly.
        schedule: "constant" or "cosine" (to zero at `steps`) after the warm-up.
        optimizer: "adamw", or "muon": steps of matrices made orthogonal, and Adam for all else.
        b1: Adam's decay of the first moment.
        b2: Adam's decay of the second moment.
        eps: added to the root of the second moment.
        muon_momentum: Muon's decay of the average gradient.
        weight_decay: decoupled, on kernels and token embeddings only.
        grad_clip: greatest global norm of the gradient; 0 does not clip.
        grad_accum: microbatches per step, one after another; memory is that of one.
        sam_rho: radius of sharpness-aware minimisation (the paper's CLIP: 0.1), which takes two
            gradients a step; 0 takes one.
        ema_decay: of the averaged weights that are evaluated and exported.
        ema_dtype: in which the average is kept, "float32" or "bfloat16" (stochastically rounded).
        moment_dtype: in which Adam's moments are kept, likewise.
        ema_warmup: whether step n (from 0) averages with min(ema_decay, (1 + n) / (10 + n)).
        log_every: steps between log lines.
        checkpoint_every: steps between checkpoints; the last step always makes one.
        local_every: steps between copies on the hosts' own disks, of which the last two stay; a run
            that dies goes on from them where they are newer and every host has its own.
        best: name of an evaluation's figure, such as "heldout_loss"; the checkpoint where it was
            best stays, besides the latest. Empty keeps the latest alone.
        best_is: whether the "least" or the "greatest" is best.
        eval_every: steps between evaluations, and one after the last step.
        preview_every: steps between preview grids, and one after the last step.
        keep_checkpoints: how many stay on disk.
        if_damaged: what to do where the newest checkpoint is not as it was written: "stop", or go
            on from the "previous" whole one.
        stall_minutes: after how many minutes without the end of a step, an evaluation or a save the
            stacks of all threads are written; 0 for never.
        seed: of every random number that training draws.
    """

    batch_size: int = 64
    steps: int = 1000
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    optimizer: Literal["adamw", "muon"] = "adamw"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    muon_momentum: float = 0.95
    weight_decay: float = 0.0
    grad_clip: float = 0.0
    grad_accum: int = 1
    sam_rho: float = 0.0
    ema_decay: float = 0.9999
    ema_warmup: bool = True
    ema_dtype: Literal["float32", "bfloat16"] = "float32"
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    log_every: int = 100
    checkpoint_every: int = 1000
    local_every: int = 0
    eval_every: int = 0
    preview_every: int = 0
    keep_checkpoints: int = 2
    if_damaged: Literal["stop", "previous"] = "stop"
    best: str = ""
    best_is: Literal["least", "greatest"] = "least"
    stall_minutes: float = 30.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every range."""

        def each(check: Callable[..., Any], names: str, **limits: float) -> None:
            for name in names.split():
                check(f"train.{name}", getattr(self, name), **limits)

        each(checks.count, "batch_size steps grad_accum log_every keep_checkpoints")
        each(
            checks.count,
            "warmup_steps checkpoint_every local_every eval_every preview_every seed",
            least=0,
        )
        each(checks.number, "weight_decay grad_clip sam_rho stall_minutes", least=0)
        each(checks.number, "learning_rate eps", above=0)
        each(checks.number, "b1 b2 muon_momentum ema_decay", least=0, below=1)
        for name, hint in typing.get_type_hints(TrainConfig).items():
            if typing.get_origin(hint) is Literal:
                checks.choice(f"train.{name}", getattr(self, name), typing.get_args(hint))
        if self.optimizer == "muon" and self.moment_dtype != "float32":
            expected = "float32, as train.optimizer is muon"
            raise wrong("train.moment_dtype", self.moment_dtype, expected)
        if self.best and not self.eval_every:
            raise wrong("train.best", self.best, "an empty name, as train.eval_every is 0")
        if self.schedule == "cosine" and self.warmup_steps >= self.steps:
            expected = f"less than train.steps ({self.steps})"
            raise wrong("train.warmup_steps", self.warmup_steps, expected)
