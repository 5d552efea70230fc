"""UnCLIP: all stages and their params together, caption in and picture out.

    model = UnCLIP.load("runs/emoji")
    images = model.generate(jax.random.key(0), ["a red apple"])     # uint8 [1, 256, 256, 3]

p(x | y) = p(x | z_i, y) p(z_i | y): the prior turns a caption's CLIP text embedding into a CLIP
image embedding, the decoder turns that into a small picture, the upsamplers make it large.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax import checkpoint, stages
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.errors import UserError
from unclip_jax.stages import images as pixels

# Called as progress(stage, step, steps).
Progress = Callable[[str, int, int], None]

# One key per example and purpose: each stage folds its own number into the example's key.
PRIOR, DECODER, UPSAMPLER = 0, 1, 2


class Part(NamedTuple):
    """One trained stage: its settings, its params, and what its folder says of itself."""

    stage: stages.Stage
    params: dict[str, Any]
    description: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Report:
    """Forwards a sampler's steps under the stage's name; equal reports share one program."""

    progress: Progress
    name: str

    def __call__(self, step: int, steps: int) -> None:
        self.progress(self.name, int(step), int(steps))


@functools.partial(jax.jit, static_argnames=("stage", "progress"))
def _sample(stage, params, keys, cond, progress, **settings):
    """One compiled program per stage, batch size and progress callable."""
    return stage.sample(params, keys, cond, progress=progress, **settings)


@functools.partial(jax.jit, static_argnames="stage")
def encode_text(stage: stages.ClipStage, params, tokens: jax.Array) -> jax.Array:
    """Compiled `ClipStage.encode_text`, without the token states: [b, l] -> z_t [b, e]."""
    return stage.encode_text(params, tokens)[0]


@functools.partial(jax.jit, static_argnames="stage")
def encode_image(stage: stages.ClipStage, params, images: jax.Array) -> jax.Array:
    """Compiled `ClipStage.encode_image` of uint8 images [b, h, w, 3] -> z_i [b, e]."""
    return stage.encode_image(params, pixels.to_float(images))


def example_keys(key: jax.Array, num: int) -> jax.Array:
    """One key per sample number [num]; a picture depends on the seed and its number alone."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(num))


def _stage_keys(keys: jax.Array, purpose: int) -> jax.Array:
    return jax.vmap(lambda key: jax.random.fold_in(key, purpose))(keys)


@dataclasses.dataclass(frozen=True)
class UnCLIP:
    """The whole system. `load` makes it from a folder; every method is deterministic in its key.

    Attributes:
        clip: the frozen CLIP.
        prior: caption to image embedding.
        decoder: image embedding and caption to a small picture.
        upsamplers: from small to large, any number.
    """

    clip: Part
    prior: Part
    decoder: Part
    upsamplers: tuple[Part, ...] = ()

    @classmethod
    def load(cls, folder: str | Path) -> UnCLIP:
        """Load a model folder: one sub-folder per stage, as training writes them.

        Raises:
            UserError: no stage or not every stage is there, a file is damaged, or the stages do
                not belong together.
        """
        parts = find_parts(Path(folder))
        for kind in ("clip", "prior", "decoder"):
            if len(parts.get(kind, [])) != 1:
                found = ", ".join(f"{len(v)} {k}" for k, v in sorted(parts.items())) or "no stage"
                raise UserError(
                    f"model {str(folder)!r}: expected exactly one {kind}, found {found};"
                    " give a folder with one sub-folder for each of clip, prior and decoder (and"
                    " any upsamplers), as train.py writes them"
                )
        model = cls(
            clip=load_part(parts["clip"][0]),
            prior=load_part(parts["prior"][0]),
            decoder=load_part(parts["decoder"][0]),
            upsamplers=tuple(
                sorted(
                    (load_part(path) for path in parts.get("upsampler", [])),
                    key=lambda part: part.stage.low_size,
                )
            ),
        )
        model.check()
        return model

    def check(self) -> None:
        """Raise UserError unless the stages belong together."""
        expected = checkpoint.fingerprint(self.clip.params)
        for name in ("prior", "decoder"):
            found = getattr(self, name).description.get("clip_fingerprint")
            if found != expected:
                raise UserError(
                    f"{name}: trained with CLIP {found}, but this model's CLIP is {expected};"
                    f" use the CLIP it was trained with, or train the {name} again"
                )
        size = self.decoder.stage.image_size
        for part in self.upsamplers:
            if part.stage.low_size != size:
                raise UserError(
                    f"upsampler to {part.stage.image_size} px: starts from"
                    f" {part.stage.low_size} px, but the stage before it makes {size} px"
                )
            size = part.stage.image_size

    def save(self, folder: str | Path, dtype: str = "float32") -> None:
        """Write a model folder that `load` reads."""
        named = [("clip", self.clip), ("prior", self.prior), ("decoder", self.decoder)]
        named += [(f"upsampler_{p.stage.image_size}", p) for p in self.upsamplers]
        for name, part in named:
            checkpoint.save_stage(
                Path(folder) / name, params=part.params, description=part.description, dtype=dtype
            )

    @property
    def image_size(self) -> int:
        """Side, in pixels, of the pictures `generate` makes."""
        return (self.upsamplers[-1] if self.upsamplers else self.decoder).stage.image_size

    def tokens(self, part: Part, prompts: Sequence[str]) -> np.ndarray:
        """Prompts as the token ids [b, l] that one part reads."""
        context_length, vocab_size = part.stage.context
        return Tokenizer(context_length=context_length, vocab_size=vocab_size).encode(list(prompts))

    def embed_text(self, prompts: Sequence[str]) -> jax.Array:
        """z_t [b, e] of b captions."""
        return encode_text(self.clip.stage, self.clip.params, self.tokens(self.clip, prompts))

    def embed_image(self, images: np.ndarray) -> jax.Array:
        """z_i [b, e] of uint8 images [b, h, w, 3] of any size."""
        return encode_image(self.clip.stage, self.clip.params, jnp.asarray(images))

    def sample_prior(
        self,
        keys: jax.Array,
        prompts: Sequence[str],
        *,
        guidance_scale: float | None = None,
        progress: Progress | None = None,
    ) -> jax.Array:
        """z_i [b, e] drawn from p(z_i | y) for b prompts, one typed key each."""
        stage, params, _ = self.prior
        tokens = self.tokens(self.prior, prompts)
        cond = stage.condition(jnp.asarray(tokens), self.embed_text(prompts))
        scale = stage.guidance_scale if guidance_scale is None else guidance_scale
        return _sample(
            stage,
            params,
            _stage_keys(keys, PRIOR),
            cond,
            guidance_scale=jnp.float32(scale),
            progress=progress and _Report(progress, "prior"),
        )

    def decode(
        self,
        keys: jax.Array,
        z_i: jax.Array,
        prompts: Sequence[str],
        *,
        guidance_scale: float | None = None,
        progress: Progress | None = None,
    ) -> jax.Array:
        """Small images [b, s, s, 3] in [-1, 1] from p(x | z_i, y); prompt "" is no caption."""
        stage, params, _ = self.decoder
        cond = stage.condition(jnp.asarray(self.tokens(self.decoder, prompts)), z_i)
        cond["text_mask"] &= jnp.asarray([bool(prompt) for prompt in prompts])[:, None]
        scale = stage.guidance_scale if guidance_scale is None else guidance_scale
        return _sample(
            stage,
            params,
            _stage_keys(keys, DECODER),
            cond,
            guidance_scale=jnp.float32(scale),
            progress=progress and _Report(progress, "decoder"),
        )

    def upsample(
        self, keys: jax.Array, images: jax.Array, *, progress: Progress | None = None
    ) -> jax.Array:
        """Small images through every upsampler: [b, s, s, 3] -> [b, size, size, 3] in [-1, 1]."""
        for i, (stage, params, _) in enumerate(self.upsamplers):
            report = progress and _Report(progress, f"upsampler {stage.image_size}")
            images = _sample(
                stage, params, _stage_keys(keys, UPSAMPLER + i), images, progress=report
            )
        return images

    def generate(
        self,
        key: jax.Array,
        prompts: Sequence[str],
        *,
        num: int = 1,
        prior_guidance_scale: float | None = None,
        guidance_scale: float | None = None,
        upsample: bool = True,
        batch_size: int = 16,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Pictures for captions.

        Args:
            key: typed PRNG key (jax.random.key). Sample i of any prompt uses fold_in(key, i), so
                a picture never depends on the other prompts or on how many there are.
            prompts: captions, at least one; none empty.
            num: pictures per prompt.
            prior_guidance_scale: the prior's guidance; None takes the model's own.
            guidance_scale: the decoder's guidance; None takes the model's own.
            upsample: False stops after the decoder.
            batch_size: pictures computed together; it changes no picture.
            progress: called as progress(stage, step, steps).

        Returns:
            uint8 [len(prompts) * num, size, size, 3], the samples of one prompt side by side.

        Raises:
            UserError: an empty list, an empty prompt, num or batch_size below 1.
        """
        check_prompts(prompts)
        for name, value in (("num", num), ("batch_size", batch_size)):
            if value < 1:
                raise UserError(f"{name}: got {value}, expected at least 1")
        todo = [(prompt, i) for prompt in prompts for i in range(num)]
        keys = jnp.tile(example_keys(key, num), len(prompts))
        batch_size = min(batch_size, len(todo))
        batches = []
        for start in range(0, len(todo), batch_size):
            # The last batch is filled up with its first example, so that no second program is
            # compiled for its size.
            rows = [i if i < len(todo) else start for i in range(start, start + batch_size)]
            texts, row_keys = [todo[i][0] for i in rows], keys[jnp.asarray(rows)]
            z_i = self.sample_prior(
                row_keys, texts, guidance_scale=prior_guidance_scale, progress=progress
            )
            images = self.decode(
                row_keys, z_i, texts, guidance_scale=guidance_scale, progress=progress
            )
            if upsample:
                images = self.upsample(row_keys, images, progress=progress)
            batches.append(np.asarray(pixels.to_uint8(images)))
        return np.concatenate(batches)[: len(todo)]


def check_prompts(prompts: Sequence[str]) -> None:
    """Raise UserError unless `prompts` is a list of captions with something in each."""
    if isinstance(prompts, str):
        raise UserError(f"prompts: got one string, expected a list; write [{prompts!r}]")
    if not prompts:
        raise UserError("prompts: got an empty list, expected at least one caption")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"prompts[{i}]: got {prompt!r}, expected a caption; write what to draw")


def find_parts(folder: Path) -> dict[str, list[Path]]:
    """Stage folders by kind: `folder`'s children, or the `model` folders in them.

    Raises:
        UserError: no such folder, or no stage in it.
    """
    if not folder.is_dir():
        raise UserError(
            f"model: {str(folder)!r} is no folder; give a folder that train.py or UnCLIP.save wrote"
        )
    found: dict[str, list[Path]] = {}
    for child in sorted(folder.iterdir()):
        for path in (child, child / "model"):
            if (path / checkpoint.CONFIG_FILE).is_file():
                kind = checkpoint.read_description(path)["stage"].get("kind")
                found.setdefault(kind, []).append(path)
    if not found:
        raise UserError(
            f"model {str(folder)!r}: no trained stage in it; expected sub-folders that hold"
            f" {checkpoint.CONFIG_FILE} and weights, as train.py writes them"
        )
    return found


def load_part(path: str | Path, kind: str | None = None) -> Part:
    """Load one stage folder, or the `model` folder in a training workdir.

    Raises:
        UserError: not a stage folder, of another kind than asked for, or damaged.
    """
    path = Path(path)
    if not (path / checkpoint.CONFIG_FILE).is_file() and (path / "model").is_dir():
        path = path / "model"
    description = checkpoint.read_description(path)
    stage = stages.build(description["stage"], f"{path / checkpoint.CONFIG_FILE}: stage")
    if kind is not None and stage.kind != kind:
        raise UserError(f"{str(path)!r}: holds a {stage.kind}, expected a {kind}")
    shapes = jax.eval_shape(stage.init, jax.random.key(0))
    params, description = checkpoint.load_stage(path, shapes)
    return Part(stage, params, description)
