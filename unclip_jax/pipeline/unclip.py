"""UnCLIP: all stages and their params together, caption in and picture out.

    model = UnCLIP.load()             # the box model; or UnCLIP.load("runs/emoji")
    images = model.generate(jax.random.key(0), ["a red apple"])     # uint8 [1, 256, 256, 3]

p(x | y) = p(x | z_i, y) p(z_i | y): the prior turns a caption's CLIP text embedding into a CLIP
image embedding, the decoder turns that into a small picture, the upsamplers make it large.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from unclip_jax.common import checks
from unclip_jax.diffusion.progress import Watchable
from unclip_jax.errors import UserError, wrong
from unclip_jax.parallel import axes, sharding
from unclip_jax.parallel.cpu import devices as cpu_devices
from unclip_jax.parallel.cpu import memory as host_memory
from unclip_jax.pipeline import negatives
from unclip_jax.stages import pixels
from unclip_jax.stages.clip import encode_image, encode_text
from unclip_jax.stages.conditioning import Condition, example_keys, text_mask
from unclip_jax.weights import box, hub
from unclip_jax.weights import folder as model_folder
from unclip_jax.weights.clip_text import ClipText
from unclip_jax.weights.convert import karlo
from unclip_jax.weights.t5 import T5, load_described
from unclip_jax.weights.trained import Part, clip_fingerprint, in_dtype, load_parts, tokenizer

# Called as progress(stage, done, steps), in order and at last with done = steps. What it raises
# ends the sampling.
Progress = Callable[[str, int, int], None]

# One key per example and purpose: each stage folds its own number into the example's key.
PRIOR, DECODER, UPSAMPLER = 0, 1, 2


@functools.partial(Watchable, static=("stage", "mesh"))
def _sample(stage, params, keys, cond, mesh=None, negative=None, *, loop, **settings):
    """One compiled program per stage, batch size, mesh, with and without negative prompts."""
    if negative is not None:
        settings["null"] = stage.null(params, *negative)
    with axes.on(mesh):
        return stage.sample(params, keys, cond, loop=loop, **settings)


def named(progress: Progress | None, stage: str) -> Callable[[int, int], None] | None:
    """Progress of one stage as that of the whole."""
    return progress and functools.partial(progress, stage)


def stage_keys(keys: jax.Array, purpose: int) -> jax.Array:
    """The keys [b] that a stage draws with."""
    return jax.vmap(lambda key: jax.random.fold_in(key, purpose))(keys)


def _each(change: Callable[[Part], Part], parts: Any) -> Any:
    """Parts in a tree, changed."""
    return jax.tree.map(change, parts, is_leaf=lambda part: isinstance(part, Part))


@dataclasses.dataclass(frozen=True)
class UnCLIP:
    """The whole system. `load` makes it from a folder; every method is deterministic in its key.

    Attributes:
        clip: the frozen CLIP; None for a decoder that reads captions alone (GLIDE).
        prior: caption to image embedding, by diffusion or autoregressive; None where there is
            none, as in a model for image variations.
        decoder: image embedding and caption to a small picture.
        upsamplers: from small to large, any number.
        t5: the frozen text encoder of a decoder that reads T5's states (Imagen); else None.
        mesh: the devices it lies on, see `on`; None for the default device.
    """

    clip: Part | None
    prior: Part | None
    decoder: Part
    upsamplers: tuple[Part, ...] = ()
    t5: T5 | None = None
    mesh: Mesh | None = None

    @classmethod
    def load(
        cls,
        model: str | Path | None = None,
        dtype: str = "",
        t5: str | Path | None = None,
        mesh: Mesh | str | None = None,
    ) -> UnCLIP:
        """Load a model.

        Args:
            model: a model folder with one sub-folder per stage, as training writes them; or Karlo,
                as the folder of its files (diffusers' layout or the original one) or as the name
                of its repository on the Hugging Face hub. None is the box model, which comes
                with this package.
            dtype: "bfloat16" or "float32" keeps the weights in that dtype and computes in it; ""
                computes as each stage's config says, with the weights of a model folder in
                float32 and Karlo's as they are in its files.
            t5: folder of the T5 that the decoder was trained with, where it reads T5's states.
            mesh: devices to lie on, as for `on`. Each weight goes from its file to where it
                belongs, so no device need hold the whole model. "all" is every device that there
                is; of a CPU's, as many as the weights fit in memory for.

        Raises:
            UserError: no stage or not every stage is there, a file is damaged, the stages do not
                belong together, or the weights do not split over the mesh.
        """
        if dtype:
            checks.choice("dtype", dtype, ("float32", "bfloat16"))
        if mesh == "all":
            mesh = cpu_devices.make_mesh() if jax.device_count() > 1 else None
        folder = box.folder() if model is None else hub.local_folder(model)
        is_karlo = karlo.is_karlo(folder)
        parts = karlo.load([folder], dtype, mesh) if is_karlo else load_parts(folder, dtype, mesh)
        if dtype:
            parts = _each(lambda part: part._replace(stage=in_dtype(part.stage, dtype)), parts)
        decoder = parts["decoder"]
        about, length = decoder.description.get("t5"), decoder.stage.context[0]
        loaded = cls(**parts, t5=load_described(t5, about, length), mesh=mesh)
        loaded.check()
        return loaded

    def on(self, mesh: Mesh) -> UnCLIP:
        """This model on several devices, which draw each batch together.

        No picture changes by more than another batch size changes it, see `generate`.

        Args:
            mesh: `sharding.make_mesh()` gives every device a copy of the weights and its share of
                each batch, MeshConfig(data=1, fsdp=-1) of the weights as well. Of a batch that they
                do not divide each computes a part of every picture, where U-Nets draw it, and all
                of it otherwise; devices of a CPU leave all but large U-Nets to one of them.

        Raises:
            UserError: the weights do not split so.
        """

        def placed(part: Part) -> Part:
            where = sharding.tree_shardings(part.params, mesh)
            return part._replace(params=host_memory.place(part.params, where))

        parts = {name: getattr(self, name) for name in ("clip", "prior", "decoder", "upsamplers")}
        return dataclasses.replace(self, mesh=mesh, **_each(placed, parts))

    @property
    def nbytes(self) -> int:
        """Bytes of all its weights, one copy of each."""
        weights = jax.tree.leaves([part.params for part in self.parts().values()])
        return sum(x.nbytes for x in weights)

    def check(self) -> None:
        """Raise UserError unless the stages belong together."""
        standing = [("prior", self.prior)]
        if "z_i" in self.decoder.stage.conditions:
            standing.append(("decoder", self.decoder))
        for name, part in standing:
            if part is None:
                continue
            found = part.description.get("clip_fingerprint")
            if self.clip is None:
                raise UserError(f"{name}: was trained with CLIP {found}, but there is no CLIP here")
            expected = clip_fingerprint(self.clip)
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

    def parts(self) -> dict[str, Part]:
        """Every part there is, by the name of its sub-folder."""
        named = {"clip": self.clip, "prior": self.prior, "decoder": self.decoder}
        named |= {f"upsampler_{part.stage.image_size}": part for part in self.upsamplers}
        return {name: part for name, part in named.items() if part is not None}

    def save(self, folder: str | Path, dtype: str = "float32") -> None:
        """Write a model folder that `load` reads; `dtype` is that of the weights in it."""
        for name, part in self.parts().items():
            description = part.description
            if name == "clip":  # its weights may be rounded; it stays the CLIP it was
                description = description | {"fingerprint": clip_fingerprint(part)}
            model_folder.save_stage(
                Path(folder) / name, params=part.params, description=description, dtype=dtype
            )

    @property
    def image_size(self) -> int:
        """Side, in pixels, of the pictures `generate` makes."""
        return (self.upsamplers[-1] if self.upsamplers else self.decoder).stage.image_size

    def tokens(self, part: Part, prompts: Sequence[str]) -> np.ndarray:
        """Prompts as the token ids [b, l] that one part reads."""
        return tokenizer(part).encode(list(prompts))

    def embed_text(self, prompts: Sequence[str]) -> jax.Array:
        """z_t [b, e] of b captions."""
        clip = self.need("clip", "embed captions")
        return encode_text(clip.stage, clip.params, self.tokens(clip, prompts))

    def embed_image(self, images: np.ndarray | Sequence[np.ndarray]) -> jax.Array:
        """z_i [b, e] of uint8 pictures [b, h, w, 3], or of a list of [h, w, 3] of any sizes.

        CLIP sees of each what its `fit` says, by default the centre square.

        Raises:
            UserError: they are something else, or there is no CLIP with an image tower.
        """
        if not isinstance(images, list | tuple):
            images = np.asarray(images)
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
                given = f"{images.dtype} of shape {images.shape}"
                raise wrong("images", given, "uint8 [b, h, w, 3]")
        clip = self.need("clip", "embed pictures")
        return encode_image(clip.stage, clip.params, jnp.asarray(clip.stage.prepare(images)))

    def need(self, name: str, purpose: str) -> Part:
        """The part of that name; UserError, which says what it is needed for, if there is none."""
        part = getattr(self, name)
        if part is None:
            named = name.replace("clip", "CLIP")
            raise UserError(
                f"this model has no {named}, which is needed to {purpose}; use a model that has"
                " one (of Karlo's repositories, text-to-image has the prior)"
            )
        return part

    def _read(
        self, part: Part, prompts: Sequence[str], reads_z_t: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """What `part` reads of captions: tokens or states, their mask, and CLIP's z_t or None."""
        if part.stage.reads_states and self.t5 is None:
            clip = self.need("clip", "encode captions")
            z_t, found = ClipText.of(clip).encode(self.tokens(clip, prompts))
            return found["text_states"], found["text_mask"], z_t
        z_t = self.embed_text(prompts) if reads_z_t else None
        if part.stage.reads_states:
            found = self.t5.encode(list(prompts))
            return found["text_states"], found["text_mask"], z_t
        tokens = jnp.asarray(self.tokens(part, prompts))
        return tokens, text_mask(tokens, part.stage.context[1]), z_t

    def sample_prior(
        self,
        keys: jax.Array,
        prompts: Sequence[str],
        *,
        negative: Sequence[str] | None = None,
        guidance_scale: float | None = None,
        noise: np.ndarray | None = None,
        progress: Progress | None = None,
    ) -> jax.Array:
        """z_i [b, e] drawn from p(z_i | y) for b prompts, one typed key each.

        Guidance leads away from a caption of `negative` [b] as it does from none; "" is none.
        """
        part = self.need("prior", "turn captions into pictures")

        def condition(captions: Sequence[str]) -> Condition:
            text, mask, z_t = self._read(part, captions, reads_z_t=True)
            return part.stage.condition(text, z_t, mask)

        away = negatives.null(negative, condition)
        conds = condition(prompts), away
        return self._run(part, "prior", keys, PRIOR, conds, guidance_scale, noise, progress)

    def condition(self, z_i: jax.Array | None, prompts: Sequence[str]) -> Condition:
        """The decoder's condition of z_i [b, e] and b prompts, as for `decode`."""
        stage, text, mask, z_t = self.decoder.stage, None, None, None
        if "text_mask" in stage.conditions:
            text, mask, z_t = self._read(self.decoder, prompts, "z_t" in stage.conditions)
            if not stage.empty_null:
                mask &= jnp.asarray([bool(prompt) for prompt in prompts])[:, None]
        return stage.condition(text, z_i, z_t, mask)

    def decode(
        self,
        keys: jax.Array,
        z_i: jax.Array | None,
        prompts: Sequence[str],
        *,
        negative: Sequence[str] | None = None,
        guidance_scale: float | None = None,
        noise: np.ndarray | None = None,
        progress: Progress | None = None,
    ) -> jax.Array:
        """Small images [b, s, s, 3] in [-1, 1] from p(x | z_i, y); prompt "" is no caption.

        A decoder that reads captions alone takes None for z_i. Guidance leads away from no z_i and
        no caption, or from no z_i and the caption of `negative` [b]; "" is none.
        """
        conds = self.condition(z_i, prompts), self.away(z_i, negative)
        return self._run(
            self.decoder, "decoder", keys, DECODER, conds, guidance_scale, noise, progress
        )

    def away(self, z_i: jax.Array | None, negative: Sequence[str] | None) -> negatives.Away | None:
        """What the decoder's `null` takes of negative prompts [b]; None where there are none."""
        return negatives.null(negative, functools.partial(self.condition, z_i))

    def upsample(
        self,
        keys: jax.Array,
        images: jax.Array,
        *,
        noise: Mapping[str, np.ndarray] | None = None,
        progress: Progress | None = None,
    ) -> jax.Array:
        """Small images through every upsampler: [b, s, s, 3] -> [b, size, size, 3] in [-1, 1]."""
        for i, part in enumerate(self.upsamplers):
            size = part.stage.image_size
            given = (noise or {}).get(f"upsampler_{size}")
            name = f"upsampler {size}"
            conds = images, None
            images = self._run(part, name, keys, UPSAMPLER + i, conds, None, given, progress)
        return images

    def _run(self, part, name, keys, purpose, conds, guidance_scale, noise, progress) -> jax.Array:
        """Sample one part with what only some stages take left out where they don't.

        `conds` are the condition and what guidance leads away from in the null's place, if any.
        """
        cond, negative = conds
        settings: dict[str, Any] = part.stage.guided_by(guidance_scale)
        if settings and negative is not None:
            settings["negative"] = negative
        if noise is not None:
            if part.stage.sampling is None:
                raise UserError(f"noise: given for a {part.stage.kind}, which has none")
            settings["noise"] = jnp.asarray(noise, jnp.float32)
        keys = stage_keys(keys, purpose)
        given = (keys, cond, settings)
        params, (keys, cond, settings), mesh = self.lay(part, given, len(keys))
        return _sample(
            part.stage, params, keys, cond, mesh, progress=named(progress, name), **settings
        )

    def lay(self, part: Part, given: Any, rows: int) -> tuple[Any, Any, Mesh | None]:
        """A part's params and a batch where they are to be computed.

        Args:
            part: one of this model's.
            given: arrays [rows, ...] of the batch, which are split over the devices, and others.
            rows: of the batch.

        Returns:
            The params, the arrays, and the mesh that both are on; None for the default device.
        """
        if self.mesh is None:
            return part.params, given, None
        work = part.stage.unet.work if part.stage.unet else 0
        params, mesh = cpu_devices.for_rows(part.params, rows, self.mesh, work=work)
        return params, sharding.spread(given, rows, mesh), mesh

    def generate(
        self,
        key: jax.Array,
        prompts: Sequence[str],
        *,
        negative: str | Sequence[str] = "",
        num: int = 1,
        prior_guidance_scale: float | None = None,
        guidance_scale: float | None = None,
        upsample: bool = True,
        batch_size: int = 16,
        noise: Mapping[str, np.ndarray] | None = None,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Pictures for captions.

        Args:
            key: typed PRNG key (jax.random.key). Sample i of any prompt uses fold_in(key, i), so
                a picture never depends on the other prompts or on how many there are.
            prompts: captions, at least one; none empty.
            negative: what not to draw, one for all prompts or one for each; "" for nothing.
                Guidance leads away from it in the place of no caption, in the prior and in the
                decoder, where their scales are not 1.
            num: pictures per prompt.
            prior_guidance_scale: the prior's guidance; None takes the model's own.
            guidance_scale: the decoder's guidance; None takes the model's own.
            upsample: False stops after the decoder.
            batch_size: pictures computed together. It changes no noise, but the order of sums: by
                at most 1 of 255 in float32 and, in bfloat16, by as much as its own rounding does,
                0.5 of 255 in the mean and over 100 at some edges (docs/samplers.md).
            noise: to use instead of what the key draws, for comparisons with other programs. For
                n pictures, any of "prior" [n, draws, steps, e], "decoder" [n, steps, s, s, 3] and
                "upsampler_SIZE" [n, steps, size, size, 3]: x_T, then what each step but the last
                adds.
            progress: called as progress(stage, done, steps); what it raises ends the sampling.

        Returns:
            uint8 [len(prompts) * num, size, size, 3], the samples of one prompt side by side.

        Raises:
            UserError: an empty list, an empty prompt, num or batch_size below 1, noise of a part
                that is not there, or negative prompts that no part is guided away from.
        """
        check_prompts(prompts)
        for scale in (prior_guidance_scale, guidance_scale):
            self.decoder.stage.guided_by(scale)  # a wrong one is told before anything is drawn
        avoided = negatives.one_each(negative, len(prompts))
        reads_z_i = "z_i" in self.decoder.stage.conditions
        guided = reads_z_i and self.prior and self.prior.stage.guided_by(prior_guidance_scale)
        if any(avoided) and not guided:
            negatives.check_decoder(self.decoder.stage, guidance_scale)
        num = checks.count("num", num)
        texts, avoided = (
            [text for text in each for _ in range(num)] for each in (prompts, avoided)
        )

        def make(keys: jax.Array, rows: np.ndarray, noise: dict[str, np.ndarray]) -> jax.Array:
            captions, z_i = [texts[i] for i in rows], None
            away = [avoided[i] for i in rows] if any(avoided) else None
            if reads_z_i:
                z_i = self.sample_prior(
                    keys,
                    captions,
                    negative=away,
                    guidance_scale=prior_guidance_scale,
                    noise=noise.get("prior"),
                    progress=progress,
                )
            conds = z_i, captions, away
            return self._render(keys, conds, guidance_scale, upsample, noise, progress)

        keys = jnp.tile(example_keys(key, num), len(prompts))
        return self._pictures(make, keys, batch_size, noise)

    def variations(
        self,
        key: jax.Array,
        images: np.ndarray,
        *,
        negative: str = "",
        num: int = 1,
        guidance_scale: float | None = None,
        upsample: bool = True,
        batch_size: int = 16,
        noise: Mapping[str, np.ndarray] | None = None,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Other pictures with the CLIP embedding of given ones, and no caption.

        Args:
            key: as for `generate`, and so are the rest; there is no prior to give noise for.
            images: as for `embed_image`.
            negative: what not to draw; "" for nothing.
            num: variations of each picture.

        Returns:
            uint8 [b * num, size, size, 3], the variations of one picture side by side.

        Raises:
            UserError: num or batch_size below 1, the model's CLIP has no image tower, or a negative
                prompt that the decoder is not guided away from.
        """
        [avoided] = negatives.one_each(negative, 1)
        if avoided:
            negatives.check_decoder(self.decoder.stage, guidance_scale)
        z_i = jnp.repeat(self.embed_image(images), checks.count("num", num), axis=0)

        def make(keys: jax.Array, rows: np.ndarray, noise: dict[str, np.ndarray]) -> jax.Array:
            away = [avoided] * len(rows) if avoided else None
            conds = z_i[rows], [""] * len(rows), away
            return self._render(keys, conds, guidance_scale, upsample, noise, progress)

        keys = jnp.tile(example_keys(key, num), len(images))
        return self._pictures(make, keys, batch_size, noise)

    def _render(self, keys, conds, guidance_scale, upsample, noise, progress) -> jax.Array:
        """z_i to pictures [b, size, size, 3] in [-1, 1]: the decoder, then the upsamplers.

        `conds` are z_i, captions and negative ones, as for `decode`.
        """
        z_i, captions, negative = conds
        images = self.decode(
            keys,
            z_i,
            captions,
            negative=negative,
            guidance_scale=guidance_scale,
            noise=noise.get("decoder"),
            progress=progress,
        )
        return self.upsample(keys, images, noise=noise, progress=progress) if upsample else images

    def _pictures(self, make, keys, batch_size, noise) -> np.ndarray:
        """uint8 pictures of `make(keys, rows, noise)`, in batches of rows."""
        noise = {name: np.asarray(array) for name, array in (noise or {}).items()}
        sampled = sorted(set(self.parts()) - {"clip"})
        for name, array in noise.items():
            if name not in sampled:
                raise wrong("noise", name, f"some of {', '.join(sampled)}")
            if array.shape[:1] != (len(keys),):
                expected = f"one for each of {len(keys)} pictures"
                raise wrong(f"noise[{name!r}]'s shape", array.shape, expected)

        def pictures(rows: np.ndarray) -> jax.Array:
            chosen = {name: array[rows] for name, array in noise.items()}
            return pixels.to_uint8(make(keys[rows], rows, chosen))

        return in_batches(len(keys), batch_size, pictures)


def in_batches(total: int, batch_size: int, make: Callable[[np.ndarray], jax.Array]) -> np.ndarray:
    """`make(rows)` of one batch of row numbers after the other, joined."""
    size = min(checks.count("batch_size", batch_size), total)
    return np.concatenate([np.asarray(make(rows)) for rows, _ in batches(total, size)])[:total]


def batches(total: int, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Row numbers [size] of each batch, and how many of them count.

    The last batch is filled up with its first row, so no second program is compiled for its size.
    """
    for start in range(0, total, size):
        rows = np.arange(start, start + size)
        yield np.where(rows < total, rows, start), min(size, total - start)


def check_prompts(prompts: Sequence[str]) -> None:
    """Raise UserError unless `prompts` is a list of captions with something in each."""
    if isinstance(prompts, str):
        raise wrong("prompts", prompts, "a list", f"write [{prompts!r}]")
    if not prompts:
        raise wrong("prompts", prompts, "at least one caption")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise wrong(f"prompts[{i}]", prompt, "a caption", "write what to draw")
