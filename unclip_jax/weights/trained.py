"""Parts: a stage with its params, as model folders hold them."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from unclip_jax import stages
from unclip_jax.common.params import fingerprint, flatten
from unclip_jax.data.shards import storage
from unclip_jax.data.tokenizer import MIN_VOCAB_SIZE, VOCAB_SIZE, Encoder, FileTokenizer, Tokenizer
from unclip_jax.diffusion import grids
from unclip_jax.errors import UserError
from unclip_jax.parallel import sharding
from unclip_jax.parallel.cpu import memory as host_memory
from unclip_jax.weights import folder as model_folder


class Part(NamedTuple):
    """One trained stage: its settings, its params, and what its folder says of itself."""

    stage: stages.Stage
    params: dict[str, Any]
    description: dict[str, Any]

    def respaced(self, flag: str, steps: str) -> Part:
        """The part, sampling in so many steps.

        Raises:
            UserError: it does not sample by diffusion, or cannot do as many; the flag is named.
        """
        if self.stage.sampling is None:
            kind = self.stage.kind
            raise UserError(
                f"{flag}: got {steps}, but a {kind} has no sampling steps; leave it out"
            )
        kept = grids.respaced(self.stage.sampling.spacing, steps)
        self.stage.diffusion.process(kept)
        sampling = dataclasses.replace(self.stage.sampling, spacing=kept)
        return self._replace(stage=dataclasses.replace(self.stage, sampling=sampling))


def clip_fingerprint(clip: Part) -> str:
    """What names a CLIP: the fingerprint of its weights as they were trained.

    A CLIP that came from a file, stored in a narrower dtype perhaps, or converted, has its first
    fingerprint in its description; the stages that stand on it name that one.
    """
    return clip.description.get("fingerprint") or fingerprint(clip.params)


def tokenizer(part: Part) -> Encoder:
    """What makes the tokens that a stage reads: public weights' own, or that of this package.

    Raises:
        UserError: public weights that came without one, and whose ids cannot be OpenAI's.
    """
    length, vocab_size = part.stage.context
    if "tokenizer" in part.description:
        return FileTokenizer.of(part.description["tokenizer"], length)
    end = getattr(part.stage.model, "end", vocab_size - 1)
    if end != vocab_size - 1 or not MIN_VOCAB_SIZE <= vocab_size <= VOCAB_SIZE:
        raise UserError(
            f"captions: {part.description.get('converted_from', 'this CLIP')} has {vocab_size} ids,"
            f" of which {end} ends a text, and came without its tokenizer; convert it again from a"
            " folder with its tokenizer.json"
        )
    return Tokenizer(length, vocab_size)


def find_parts(folder: Path) -> dict[str, list[Path]]:
    """Stage folders by kind: `folder`'s children, or the `model` folders in them.

    Raises:
        UserError: no such folder, no stage in it, or one without its config.
    """
    if not folder.is_dir():
        raise UserError(
            f"model: {str(folder)!r} is no folder; give a folder that train.py or UnCLIP.save wrote"
        )
    found: dict[str, list[Path]] = {}
    for child in sorted(folder.iterdir()):
        for path in (child, child / "model"):
            if any(
                (path / n).is_file() for n in (model_folder.CONFIG_FILE, model_folder.PARAMS_FILE)
            ):
                kind = model_folder.read_description(path)["stage"].get("kind")
                found.setdefault(kind, []).append(path)
    if not found:
        raise UserError(
            f"model {str(folder)!r}: no trained stage in it; expected sub-folders that hold"
            f" {model_folder.CONFIG_FILE} and weights, as train.py writes them"
        )
    return found


def stage_folder(path: str | Path) -> Path:
    """The folder itself, or the `model` folder in a training workdir; here or in a bucket."""
    path = storage.place(path, "model")
    if not (path / model_folder.CONFIG_FILE).is_file() and (path / "model").is_dir():
        return path / "model"
    return path


def read_stage(path: Path, kind: str | None = None) -> tuple[stages.Stage, dict[str, Any]]:
    """The stage that a stage folder describes, and all that the folder says of itself.

    Raises:
        UserError: not a stage folder, one that says something wrong, or of another kind than asked
            for.
    """
    about = model_folder.read_description(path)
    stage = stages.build(about["stage"], f"{path / model_folder.CONFIG_FILE}: stage")
    if kind is not None and stage.kind != kind:
        raise UserError(f"{str(path)!r}: holds a {stage.kind}, expected a {kind}")
    return stage, about


@functools.lru_cache(maxsize=64)
def _shapes(stage: stages.Stage) -> Any:
    """Shape and dtype of its params: what draws several times traces a network once."""
    return jax.eval_shape(stage.init, jax.random.key(0))


def load_part(
    path: str | Path, kind: str | None = None, dtype: str = "", mesh: Mesh | None = None
) -> Part:
    """Load one stage folder, or the `model` folder in a training workdir.

    Args:
        path: the folder, or its address in a bucket.
        kind: what it must hold, or None for anything.
        dtype: of the weights in memory; "" stands for float32. Constants stay as they are.
        mesh: devices that the weights go to, see `sharding.tree_shardings`; else the default one.

    Raises:
        UserError: not a stage folder, of another kind than asked for, or damaged; or the mesh does
            not divide its weights.
    """
    path = stage_folder(path)
    stage, _ = read_stage(path, kind)
    shapes = _shapes(stage)
    if mesh is None:
        params, description = model_folder.load_stage(path, shapes, dtype)
    else:
        where = flatten(sharding.tree_shardings(shapes, mesh))
        params, description = model_folder.load_stage(
            path, shapes, dtype, lambda name, array: host_memory.place(array, where[name])
        )
    if stage.keeps_fingerprint:  # in whatever dtype it is in memory, it stays this CLIP
        description.setdefault("fingerprint", model_folder.read_fingerprint(path))
    return Part(stage, params, description)


def in_dtype(config: Any, dtype: str) -> Any:
    """A stage, or any config within one, in which every network computes in `dtype`."""
    changes = {
        field.name: in_dtype(value, dtype)
        for field in dataclasses.fields(config)
        if dataclasses.is_dataclass(value := getattr(config, field.name))
    }
    if hasattr(config, "dtype"):
        changes["dtype"] = dtype
    return dataclasses.replace(config, **changes)


def load_parts(folder: Path, dtype: str = "", mesh: Mesh | None = None) -> dict[str, Any]:
    """The parts of a model folder by the fields of `pipeline.UnCLIP`.

    Args:
        folder: of one sub-folder for each stage.
        dtype: as for `load_part`.
        mesh: as for `load_part`.

    Raises:
        UserError: no decoder, more than one of a kind that there is one of, or a damaged part.
    """
    found = find_parts(folder)
    priors = [path for kind in stages.PRIORS for path in found.get(kind, [])]
    counts = {"clip": found.get("clip", []), "prior": priors, "decoder": found.get("decoder", [])}
    for kind, paths in counts.items():
        if len(paths) > 1 or (kind == "decoder" and not paths):
            listing = ", ".join(f"{len(v)} {k}" for k, v in sorted(found.items()))
            expected = f"expected {'one' if kind == 'decoder' else 'at most one'} {kind}"
            raise UserError(
                f"model {str(folder)!r}: {expected}, found {listing}; give one with a sub-folder"
                " for each of clip, prior and decoder (and any upsamplers), as train.py writes them"
            )
    parts = {
        kind: load_part(paths[0], dtype=dtype, mesh=mesh) if paths else None
        for kind, paths in counts.items()
    }
    upsamplers = [load_part(path, dtype=dtype, mesh=mesh) for path in found.get("upsampler", [])]
    return parts | {"upsamplers": tuple(sorted(upsamplers, key=lambda p: p.stage.low_size))}
