"""UnCLIP: all stages and their params together, caption in and picture out.

    model = UnCLIP.load()             # the box model; or UnCLIP.load("runs/emoji")
    images = model.generate(jax.random.key(0), ["a red apple"])     # uint8 [1, 256, 256, 3]

p(x | y) = p(x | z_i, y) p(z_i | y): the prior turns a caption's CLIP text embedding into a CLIP
image embedding, the decoder turns that into a small picture, the upsamplers make it large.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.errors import UserError, wrong
from unclip_jax.pipeline import negatives
from unclip_jax.pipeline.drawing import (
    DECODER,
    NEGATIVE,
    PRIOR,
    UPSAMPLER,
    Progress,
    check_prompts,
    in_batches,
    named,
    numbered,
    sample_stage,
    stage_keys,
)
from unclip_jax.pipeline.model import Model
from unclip_jax.stages import pixels
from unclip_jax.stages.conditioning import Condition


@dataclasses.dataclass(frozen=True)
class UnCLIP(Model):
    """The whole system. `load` makes it from a folder; every method is deterministic in its key."""

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
            text, mask, z_t = self.read(part, captions, reads_z_t=True)
            return part.stage.condition(text, z_t, mask)

        away = negatives.null(negative, condition)
        conds = condition(prompts), away
        return self._run(part, "prior", keys, PRIOR, conds, guidance_scale, noise, progress)

    def condition(self, z_i: jax.Array | None, prompts: Sequence[str]) -> Condition:
        """The decoder's condition of z_i [b, e] and b prompts, as for `decode`."""
        stage, text, mask, z_t = self.decoder.stage, None, None, None
        if "text_mask" in stage.conditions:
            text, mask, z_t = self.read(self.decoder, prompts, "z_t" in stage.conditions)
            if not stage.empty_null:
                mask &= jnp.asarray([bool(prompt) for prompt in prompts])[:, None]
        return stage.condition(text, z_i, z_t, mask, **self.beside(len(prompts)))

    def decode(
        self,
        keys: jax.Array,
        z_i: jax.Array | None,
        prompts: Sequence[str],
        *,
        negative: Sequence[str] | None = None,
        guidance_scale: float | None = None,
        noise: np.ndarray | None = None,
        negative_noise: np.ndarray | None = None,
        progress: Progress | None = None,
    ) -> jax.Array:
        """Small images [b, h, w, 3] in [-1, 1] from p(x | z_i, y); prompt "" is no caption.

        A decoder that reads captions alone takes None for z_i. Guidance leads away from no z_i and
        no caption, or from no z_i and the caption of `negative` [b]; "" is none. A decoder without
        captions is led away from the z_i that the prior draws for it, of `negative_noise`.
        """
        away = None
        if self.decoder.stage.guided_by(guidance_scale):
            away = self.away(keys, z_i, negative, negative_noise, progress)
        conds, told = (self.condition(z_i, prompts), away), (guidance_scale, noise, progress)
        return self.images_of(self._run(self.decoder, "decoder", keys, DECODER, conds, *told))

    def away(
        self,
        keys: jax.Array,
        z_i: jax.Array | None,
        negative: Sequence[str] | None,
        noise: np.ndarray | None = None,
        progress: Progress | None = None,
    ) -> negatives.Away | None:
        """What the decoder's `null` takes of negative prompts [b]; None where there are none.

        Where the prior draws them, it is led away from the same prompt: that is, from nothing.
        """
        if negative is not None and negatives.by_prior(self.decoder.stage, self.prior):
            told = {"guidance_scale": 1, "noise": noise, "progress": progress}
            z_i = self.sample_prior(stage_keys(keys, NEGATIVE), negative, **told)
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
        return sample_stage(
            part.stage, params, keys, cond, mesh, progress=named(progress, name), **settings
        )

    def generate(
        self,
        key: jax.Array | Sequence[jax.Array],
        prompts: Sequence[str],
        *,
        negative: str | Sequence[str] = "",
        num: int | Sequence[int] = 1,
        first: int | Sequence[int] = 0,
        prior_guidance_scale: float | None = None,
        guidance_scale: float | None = None,
        upsample: bool = True,
        batch_size: int = 16,
        noise: Mapping[str, np.ndarray] | None = None,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Pictures for captions.

        Args:
            key: PRNG key (jax.random.key), or one for each prompt. Sample i of a prompt uses
                fold_in(key, i), so a picture never depends on the others or on how many there are.
            prompts: captions, at least one; none empty.
            negative: what not to draw, one for all prompts or one for each; "" for nothing.
                Guidance leads away from it in the place of no caption, in the prior and in the
                decoder, where their scales are not 1.
            num: pictures per prompt, or one number for each prompt.
            first: the number i of a prompt's first picture, or one for each prompt: with first=4
                and num=2, the fifth and the sixth of those that num=6 gives, and no others are
                drawn. They are the same bit for bit where as many are computed together.
            prior_guidance_scale: the prior's guidance; None takes the model's own.
            guidance_scale: the decoder's guidance; None takes the model's own.
            upsample: False stops after the decoder.
            batch_size: pictures computed together. It changes no noise, but the order of sums: by
                at most 1 of 255 in float32 and, in bfloat16, by as much as its own rounding does,
                0.5 of 255 in the mean and over 100 at some edges (docs/samplers.md).
            noise: to use instead of what the key draws, for comparisons with other programs. For
                n pictures, any of "prior" [n, draws, steps, e], "decoder" [n, steps, h, w, c], of
                x_0's shape, "upsampler_SIZE" [n, steps, size, size, 3] and, as for "prior",
                "negative", where the prior draws negative prompts for the decoder: x_T, then what
                each step but the last adds.
            progress: called as progress(stage, done, steps); what it raises ends the sampling.

        Returns:
            uint8 [n, size, size, 3], the samples of one prompt side by side.

        Raises:
            UserError: an empty list, an empty prompt, no pictures at all, batch_size below 1, noise
                of a part that is not there, negative prompts that no part is guided away from, or
                lists that are not as long as the prompts'.
        """
        check_prompts(prompts)
        for scale in (prior_guidance_scale, guidance_scale):
            self.decoder.stage.guided_by(scale)  # a wrong one is told before anything is drawn
        avoided = negatives.one_each(negative, len(prompts))
        reads_z_i = "z_i" in self.decoder.stage.conditions
        guided = reads_z_i and self.prior and self.prior.stage.guided_by(prior_guidance_scale)
        if any(avoided) and not guided:
            negatives.check_decoder(self.decoder.stage, guidance_scale, self.prior)
        keys, whose, _ = numbered(key, len(prompts), num, first)
        texts, avoided = ([each[i] for i in whose] for each in (prompts, avoided))

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

        return self._pictures(make, keys, batch_size, noise)

    def variations(
        self,
        key: jax.Array | Sequence[jax.Array],
        images: np.ndarray | Sequence[np.ndarray],
        *,
        negative: str = "",
        num: int | Sequence[int] = 1,
        first: int | Sequence[int] = 0,
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
            uint8 [n, size, size, 3], the variations of one picture side by side.

        Raises:
            UserError: no variations or batch_size below 1, the model's CLIP has no image tower, or
                a negative prompt that the decoder is not guided away from.
        """
        self.check_away(negative, guidance_scale)
        z_i = self.embed_image(images)
        keys, whose, _ = numbered(key, len(z_i), num, first)
        z_i = z_i[whose]
        given = negative, guidance_scale, upsample, batch_size
        return self.draw(keys, z_i, *given, noise=noise, progress=progress)

    def check_away(self, negative: str, guidance_scale: float | None) -> None:
        """Raise UserError where the decoder cannot be guided away from a caption, or it is none."""
        if negatives.one_each(negative, 1) != [""]:
            negatives.check_decoder(self.decoder.stage, guidance_scale, self.prior)

    def draw(
        self,
        keys: jax.Array,
        z_i: np.ndarray | jax.Array,
        negative: str = "",
        guidance_scale: float | None = None,
        upsample: bool = True,
        batch_size: int = 16,
        *,
        noise: Mapping[str, np.ndarray] | None = None,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Pictures, uint8 [b, size, size, 3], of embeddings z_i [b, e] and no captions.

        `keys` are [b], one for each; the rest is as for `variations`.
        """
        self.check_away(negative, guidance_scale)
        [avoided] = negatives.one_each(negative, 1)

        def make(keys: jax.Array, rows: np.ndarray, noise: dict[str, np.ndarray]) -> jax.Array:
            away = [avoided] * len(rows) if avoided else None
            conds = z_i[rows], [""] * len(rows), away
            return self._render(keys, conds, guidance_scale, upsample, noise, progress)

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
            negative_noise=noise.get("negative"),
            progress=progress,
        )
        return self.upsample(keys, images, noise=noise, progress=progress) if upsample else images

    def _pictures(self, make, keys, batch_size, noise) -> np.ndarray:
        """uint8 pictures of `make(keys, rows, noise)`, in batches of rows."""
        noise = {name: np.asarray(array) for name, array in (noise or {}).items()}
        drawn = {"negative"} if negatives.by_prior(self.decoder.stage, self.prior) else set()
        sampled = sorted({*self.parts(), *drawn} - {"clip"})
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
