"""Faults in what lies on disk: the lock, the checkpoints, the space, the CLIP beside them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from unclip_jax.data.shards import storage
from unclip_jax.errors import UserError
from unclip_jax.training import workdir
from unclip_jax.training.doctor.findings import Finding, error, note, warning
from unclip_jax.training.doctor.workdir import Workdir, clip_of_folder, reads_clip
from unclip_jax.training.saved import damage, has_sums

GIB = 2**30


def examine(run: Workdir, clip: str) -> Iterator[Finding]:
    """Findings among the files; `clip` is the folder of the run's CLIP, or ""."""
    yield from state(run)
    yield from checkpoints(run)
    yield from disk(run)
    yield from clip_mismatch(run, clip)


def state(run: Workdir) -> Iterator[Finding]:
    """Whether the run lives, is done, or stopped on the way."""
    if (holder := workdir.holder(run.path)) is not None:
        yield note(
            "running",
            f"{holder} trains here, at step {run.step:,} of {run.train.steps:,}",
            "what follows is of that moment",
        )
    elif run.step < run.train.steps:
        yield note(
            "unfinished",
            f"nothing trains here, and the run is at step {run.step:,} of {run.train.steps:,}",
            "the same train.py command goes on; if it stops again, it says why",
        )


def checkpoints(run: Workdir) -> Iterator[Finding]:
    """Whether the run could go on, or be exported, from what is there."""
    train, found = run.train, run.checkpoints
    due = train.steps if not train.checkpoint_every else min(train.checkpoint_every, train.steps)
    if not found:
        if run.step > due:
            yield error(
                "no_checkpoint",
                f"the run is at step {run.step:,} and should have saved at {due:,}, but"
                f" {run.path / 'checkpoints'} holds no whole checkpoint",
                "look at what train.py printed, and at the space on that disk",
            )
        return
    for folder in found:
        problem = damage(folder)
        if problem and not train.best and folder in found[: -train.keep_checkpoints]:
            yield note(
                "checkpoint_half_deleted",
                f"{folder}: {problem}; newer ones are there, so it was being deleted when the run"
                " died",
                "nothing; the next save deletes the rest",
            )
        elif problem:
            instead = (
                " if there is another copy; else go on without it with"
                " --config.train.if_damaged=previous"
                if len(found) > 1
                else "; no other checkpoint is left"
            )
            advice = f"copy that folder again{instead}"
            yield error("checkpoint_damaged", f"{folder}: {problem}", advice)
        elif folder == found[-1] and not has_sums(folder):
            yield note(
                "checkpoint_unverified",
                f"{folder} was written without checksums, so damage would not be noticed",
                "the next save writes them",
            )


def disk(run: Workdir) -> Iterator[Finding]:
    """Whether the next checkpoint will fit; a bucket has no end."""
    if run.in_bucket or not run.checkpoints or run.step >= run.train.steps:
        return
    size = sum(p.stat().st_size for p in run.checkpoints[-1].rglob("*") if p.is_file())
    free = shutil.disk_usage(run.path).free
    if free < 2 * size:
        yield warning(
            "disk_nearly_full",
            f"{free / GIB:.2f} GiB are free, and a checkpoint takes {size / GIB:.2f} GiB while the"
            " one before it is still there",
            f"free some space, or set --config.train.keep_checkpoints below"
            f" {run.train.keep_checkpoints}",
        )


def siblings(run: Workdir) -> dict[str, Path]:
    """The CLIPs in the folders beside the workdir, by fingerprint."""
    found = {}
    here = run.path if run.in_bucket else run.path.absolute()
    for folder in sorted(here.parent.iterdir()):
        try:
            fingerprint = clip_of_folder(folder) if folder.is_dir() else None
        except UserError:
            continue  # what lies beside the run is not the doctor's patient
        if fingerprint:
            found[fingerprint] = folder
    return found


def find_clip(run: Workdir, given: str) -> Path | None:
    """The folder of the CLIP that the run stands on, `given` or among its siblings."""
    if not reads_clip(run):
        return None
    wanted = run.description["clip_fingerprint"]
    if given:
        return storage.place(given, "--clip") if clip_of_folder(given) == wanted else None
    return siblings(run).get(wanted)


def clip_mismatch(run: Workdir, given: str) -> Iterator[Finding]:
    """Whether the CLIP at hand is the one that the run was trained on."""
    if not reads_clip(run) or find_clip(run, given):
        return
    wanted = run.description["clip_fingerprint"]
    own = {clip_of_folder(given) or "no CLIP": given} if given else None
    found = siblings(run) if own is None else own
    if found:
        fingerprint, folder = next(iter(found.items()))
        yield error(
            "clip_mismatch",
            f"this {run.stage.kind} was trained on the embeddings of CLIP {wanted}, and {folder}"
            f" holds {fingerprint}: the two do not understand each other",
            f"put the CLIP {wanted} there, or train this stage again with --config.clip={folder}",
        )
