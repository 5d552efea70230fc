"""The parts of a model together: loaded, checked, saved, on devices; what they read of captions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from unclip_jax import stages
from unclip_jax.common import checks
from unclip_jax.common.params import fingerprint
from unclip_jax.errors import UserError, wrong
from unclip_jax.parallel import sharding, shares
from unclip_jax.parallel.cpu import devices as cpu_devices
from unclip_jax.parallel.cpu import memory as host_memory
from unclip_jax.pipeline import drawing
from unclip_jax.stages.clip import encode_image, encode_text
from unclip_jax.stages.conditioning import text_mask
from unclip_jax.stages.pixels import squared
from unclip_jax.weights import adapters, box, hub
from unclip_jax.weights import folder as model_folder
from unclip_jax.weights.clip_text import ClipText
from unclip_jax.weights.convert import kandinsky, karlo
from unclip_jax.weights.known import Known
from unclip_jax.weights.t5 import T5, load_described
from unclip_jax.weights.trained import Part, clip_fingerprint, in_dtype, load_parts, tokenizer


def _each(change: Callable[[Part], Part], parts: Any) -> Any:
    """Parts in a tree, changed."""
    return jax.tree.map(change, parts, is_leaf=lambda part: isinstance(part, Part))


def _read(
    folders: list[Path], dtype: str, mesh: Mesh | None
) -> tuple[dict[str, Any], Known | None]:
    """The parts in some folders by the fields of `Model`, and what they were trained to draw."""
    for known, load in (kandinsky.is_kandinsky, kandinsky.load), (karlo.is_karlo, karlo.load):
        if any(map(known, folders)):
            return load([*map(hub.local_folder, folders)], dtype, mesh), None
    if len(folders) > 1:
        expected = "one model folder, or the repositories of a public model"
        raise wrong("model", [str(folder) for folder in folders], expected)
    return load_parts(folders[0], dtype, mesh), Known.find(folders[0])


@dataclasses.dataclass(frozen=True)
class Model:
    """Parts that belong together, and how captions and pictures reach them; `UnCLIP` draws.

    Attributes:
        clip: the frozen CLIP; None for a decoder that reads captions alone (GLIDE).
        prior: caption to image embedding, by diffusion or autoregressive; None where there is
            none, as in a model for image variations.
        decoder: image embedding and caption to a small picture.
        upsamplers: from small to large, any number.
        t5: the frozen text encoder of a decoder that reads T5's states (Imagen); else None.
        mesh: the devices it lies on, see `on`; None for the default device.
        known: what it was trained to draw, where its folder says so.
        hint: the picture that a decoder with hints follows, see `hinted`.
    """

    clip: Part | None
    prior: Part | None
    decoder: Part
    upsamplers: tuple[Part, ...] = ()
    t5: T5 | None = None
    mesh: Mesh | None = None
    known: Known | None = None
    hint: np.ndarray | None = None

    @classmethod
    def load(
        cls,
        model: str | Path | Iterable[str | Path] | None = None,
        dtype: str = "",
        t5: str | Path | None = None,
        mesh: Mesh | str | None = None,
    ) -> Self:
        """Load a model.

        Args:
            model: a model folder with one sub-folder per stage, as training writes them, or its
                address in a bucket, of which weights are copied to the cache folder once; or Karlo
                or Kandinsky 2.2, as the folder of its files (diffusers' layout, or Karlo's
                original one) or as the name of its repository on the Hugging Face hub. Of several
                repositories, such as Kandinsky's prior and decoder, a list. None is the box model,
                which comes with this package.
            dtype: "bfloat16" or "float32" keeps the weights in that dtype and computes in it; ""
                computes as each stage's config says, with the weights of a model folder in
                float32 and public ones as they are in their files.
            t5: folder of the T5 that the decoder was trained with, where it reads T5's states.
            mesh: devices to lie on, as for `on`. Each weight goes from its file to where it
                belongs, so no device need hold the whole model. "all" is every device of this
                process; of a CPU's, as many as the weights fit in memory for.

        Raises:
            UserError: nothing is named, no stage or not every stage is there, a file is damaged,
                the stages do not belong together, or the weights do not split over the mesh.
        """
        if dtype:
            checks.choice("dtype", dtype, ("float32", "bfloat16"))
        if mesh == "all":
            mesh = shares.local_mesh()
        model = box.folder() if model is None else model
        named = [model] if isinstance(model, str | Path) else list(model)
        if not named:
            raise wrong("model", named, "a folder or more, or None for the box model")
        folders = [hub.folder_of(name) for name in named]
        parts, known = _read(folders, dtype, mesh)
        if dtype:
            parts = _each(lambda part: part._replace(stage=in_dtype(part.stage, dtype)), parts)
        decoder = parts["decoder"]
        about, length = decoder.description.get("t5"), decoder.stage.context[0]
        loaded = cls(**parts, t5=load_described(t5, about, length), mesh=mesh, known=known)
        loaded.check()
        return loaded

    def on(self, mesh: Mesh) -> Self:
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

    def with_lora(self, files: Mapping[str | Path, float]) -> Self:
        """This model changed by adapters, each as much as its weight says.

        Args:
            files: weights by file, as train.py writes them (lora.safetensors) and `unclip save`: 1
                is the change that was trained, 0 none. Any number of files, of any of the parts but
                CLIP. Another weight compiles nothing.

        Raises:
            UserError: a file that is none, adapters of another model, or a weight that is none.
        """
        parts, chosen = self.parts(), {}
        for path, weight in files.items():
            found = adapters.read_adapters(path)
            names = [
                name
                for name, part in parts.items()
                if name != "clip"
                and (part.stage.kind, part.stage.image_size) == (found.kind, found.image_size)
            ]
            if not names:
                size = f" of {found.image_size} px" if found.image_size else ""
                there = ", ".join(name for name in parts if name != "clip")
                expected = f"of one of this model's parts: {there}"
                raise wrong(f"adapters {found.path!r}", f"a {found.kind}'s{size}", expected)
            chosen.setdefault(names[0], []).append((found, weight))
        changed = {name: adapters.blended(parts[name], some) for name, some in chosen.items()}
        upsamplers = tuple(
            changed.get(f"upsampler_{part.stage.image_size}", part) for part in self.upsamplers
        )
        return dataclasses.replace(
            self,
            prior=changed.get("prior", self.prior),
            decoder=changed.get("decoder", self.decoder),
            upsamplers=upsamplers,
        )

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

    def identity(self) -> list[Any]:
        """What this model's pictures depend on: its weights and how its stages draw, JSON-able."""
        return [
            [name, fingerprint(part.params), stages.describe(part.stage)]
            for name, part in self.parts().items()
        ] + ([] if self.hint is None else [["hint", fingerprint({"hint": self.hint})]])

    def save(self, folder: str | Path, dtype: str = "float32") -> None:
        """Write a model folder that `load` reads; `dtype` is that of the weights in it."""
        for name, part in self.parts().items():
            part = adapters.settled(part)
            description = part.description
            if name == "clip":  # its weights may be rounded; it stays the CLIP it was
                description = description | {"fingerprint": clip_fingerprint(part)}
            model_folder.save_stage(
                Path(folder) / name, params=part.params, description=description, dtype=dtype
            )
        if self.known:
            self.known.save(Path(folder))

    @property
    def image_size(self) -> int:
        """Side, in pixels, of the pictures `generate` makes; the longer one."""
        return max(self.picture_size)

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of the pictures `generate` makes."""
        return (self.upsamplers[-1] if self.upsamplers else self.decoder).stage.picture_size

    def sized(self, size: int | Sequence[int], field: str = "size") -> Self:
        """This model drawing pictures of another size: a side, or height and width, in pixels.

        Everything that draws or edits then works at that size; each has its own compiled programs.
        `field` is what messages call it.

        Raises:
            UserError: the decoder has one size alone, the sides are no multiples of what its levels
                divide (64 for Kandinsky), or upsamplers stand behind it.
        """
        if self.upsamplers:
            side = self.decoder.stage.image_size
            raise wrong(field, size, f"none: the upsamplers start from the decoder's {side} px")
        stage = self.decoder.stage.of_size(size, field)
        return dataclasses.replace(self, decoder=self.decoder._replace(stage=stage))

    def hinted(self, image: np.ndarray) -> Self:
        """This model drawing what a picture says, such as a depth map: uint8 [h, w, 3].

        UserError if the decoder takes no hints.
        """
        if "hint" not in self.decoder.stage.conditions:
            do = "use one such as Kandinsky's controlnet-depth"
            raise wrong("hint", f"a picture of {image.shape}", "none: this decoder takes none", do)
        return dataclasses.replace(self, hint=image)

    def beside(self, rows: int) -> dict[str, jax.Array]:
        """What the decoder is told of besides z_i and captions: the hint, for so many rows."""
        stage = self.decoder.stage
        if "hint" not in stage.conditions:
            return {}
        if self.hint is None:
            raise wrong("hint", None, "a picture, which this decoder follows", "give --hint FILE")
        seen = jnp.asarray(squared([self.hint], stage.picture_size), jnp.float32) / 255.0
        return {"hint": jnp.repeat(seen, rows, axis=0)}

    def x_0_of(self, images: np.ndarray) -> np.ndarray:
        """What the decoder denoises of pictures [b, h, w, 3] in [-1, 1]: them, or their latents."""
        return self._through(drawing.x_0_of, images)

    def images_of(self, x_0: Any) -> Any:
        """The pictures [b, h, w, 3], about in [-1, 1], of what the decoder drew."""
        return self._through(drawing.images_of, x_0)

    def _through(self, program: Callable[..., jax.Array], x: Any) -> Any:
        """Arrays [b, ...] through the autoencoder, one a device at a time; as they are without."""
        part = self.decoder
        if part.stage.autoencoder is None:
            return x
        x = np.asarray(x)

        def make(rows: np.ndarray) -> jax.Array:
            params, given, mesh = self.lay(part, jnp.asarray(x[rows]), len(rows))
            return program(part.stage, params, given, mesh)

        batches = drawing.batches(len(x), self.mesh.size if self.mesh else 1)
        return np.concatenate([np.asarray(make(rows)) for rows, _ in batches])[: len(x)]

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
                " one (of Karlo's repositories, text-to-image has the prior; of Kandinsky's, give"
                " the prior's too)"
            )
        return part

    def read(
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
