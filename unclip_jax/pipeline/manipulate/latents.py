"""The bipartite latent (z_i, x_T) of a picture, section 3 of the paper.

z_i is what CLIP sees in the picture. x_T is the rest, what the decoder needs beside z_i to draw
this picture and no other: the noise that DDIM inversion of the decoder, conditioned on z_i, finds
(Dhariwal & Nichol 2021, arXiv 2105.05233, appendix F). Decoding (z_i, x_T) with DDIM, eta = 0,
gives the picture back; changing one half and keeping the other edits it.

Both ways walk the same timesteps. Which ones depends on what the network predicts, since either
prediction is useless at one end. From eps, x_0 is known up to the network's error times sigma /
sqrt(alpha_bar), 20000 at the end of a cosine schedule: such a network walks 0, s, 2s, ..., without
the noisiest steps. From x_0, eps is known up to the error times sqrt(alpha_bar) / sigma, 160 at
timestep 0: such a network walks s - 1, 2s - 1, ..., without the cleanest.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.common import checks
from unclip_jax.diffusion import gaussian, grids, guidance, samplers
from unclip_jax.diffusion.progress import Watchable
from unclip_jax.errors import UserError, wrong
from unclip_jax.parallel import axes
from unclip_jax.pipeline import negatives
from unclip_jax.pipeline.drawing import DECODER, Progress, in_batches, named, stage_keys
from unclip_jax.pipeline.unclip import UnCLIP
from unclip_jax.stages import pixels
from unclip_jax.stages.conditioning import initial_noise
from unclip_jax.stages.pixels import squared


class Latents(NamedTuple):
    """The bipartite latents of b pictures.

    Attributes:
        z_i: CLIP image embeddings, float32 [b, e], in CLIP's coordinates.
        x_T: what the decoder starts from, float32 [b, h, w, c]: pixels, or an autoencoder's
            latents.
    """

    z_i: jax.Array
    x_T: jax.Array


@dataclasses.dataclass(frozen=True)
class Walk:
    """How the decoder walks between x_T and a picture.

    Attributes:
        steps: of DDIM, from 2. For a network that predicts eps, a number that some whole stride
            gives exactly: 25, 50, 100 and 250 do for 1000 timesteps; any number for a decoder
            whose own spacing is "leading".
        eta: DDIM's noise on the way to the picture, 0 (none) to 1 (as much as DDPM's).
        guidance_scale: classifier-free guidance on the way to the picture. None is the
            conditional model alone, without clipping, as inversion went, at half the cost, and so
            is 1. With a number, 1 too, x_0 is clipped as the decoder's own settings say, since
            guidance overshoots.
        caption: what the decoder reads beside z_i, both ways; "" for no caption.
        batch_size: pictures computed together, see `UnCLIP.generate`.
        negative: the caption that guidance leads away from, in the place of no caption.

    Raises:
        UserError: a field is out of its range, or a negative caption is without guidance.
    """

    steps: int = 50
    eta: float = 0.0
    guidance_scale: float | None = None
    caption: str = ""
    batch_size: int = 16
    negative: str = ""

    def __post_init__(self) -> None:
        """Check every field but `steps`, which only a diffusion can judge."""
        plain = {
            "steps": checks.count("steps", self.steps, least=0),
            "eta": checks.number("eta", self.eta, least=0, most=1),
            "batch_size": checks.count("batch_size", self.batch_size),
        }
        if self.guidance_scale is not None:
            plain["guidance_scale"] = checks.number("guidance_scale", self.guidance_scale)
        [plain["negative"]] = negatives.one_each(self.negative, 1)
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        if self.negative and self.guidance_scale in (None, 1.0):
            expected = "above 1, where something is to be led away from"
            raise wrong("guidance_scale", self.guidance_scale, expected)

    def sampling(self, model: UnCLIP) -> samplers.Sampling:
        """The decoder's DDIM; UserError if its diffusion cannot walk in so many steps."""
        stage = model.decoder.stage
        if not 2 <= self.steps <= stage.diffusion.steps:
            raise wrong("steps", self.steps, f"2 to the diffusion's {stage.diffusion.steps}")
        spacing = grids.respaced(stage.sampling.spacing, str(self.steps))
        if spacing == str(self.steps):  # no grid that the network is always asked on
            leading = stage.diffusion.prediction == "eps"
            spacing = f"ddim{self.steps}" if leading else ",".join(["1"] * self.steps)
        stage.diffusion.process(spacing)  # a wrong number of steps is an error here, not later
        if self.guidance_scale is None:
            return samplers.Sampling(method="ddim", spacing=spacing)
        return dataclasses.replace(stage.sampling, method="ddim", spacing=spacing, last_noise=0.0)


def encode(
    model: UnCLIP,
    images: Sequence[np.ndarray],
    walk: Walk,
    progress: Progress | None = None,
    *,
    first: int | None = None,
) -> Latents:
    """The bipartite latents of pictures.

    CLIP and the decoder each see the centre square of a picture at their own size.

    Args:
        model: with a CLIP that has its image tower, and a decoder that reads z_i.
        images: uint8 [h, w] or [h, w, 1 | 3 | 4], of any sizes, different ones too.
        walk: steps, caption and batch size; eta and guidance have no part in inversion.
        progress: called as progress("inversion", done, steps).
        first: stop so many steps before the noisiest, where `decode` begins with the same.

    Raises:
        UserError: no images, one that is none, or a model that lacks what is needed.
    """
    sampling = samplers.Sampling(method="ddim", spacing=walk.sampling(model).spacing)
    z_i = embed(model, images, walk.batch_size)
    small = decoder_size(model, images)
    stage = model.decoder.stage

    def make(rows: np.ndarray) -> jax.Array:
        cond = model.condition(z_i[rows], [walk.caption] * len(rows))
        given = (jnp.asarray(model.x_0_of(small[rows])), cond)
        params, given, mesh = model.lay(model.decoder, given, len(rows))
        report = named(progress, "inversion")
        return _invert(stage, params, *given, _traced(first), sampling, mesh, progress=report)

    return Latents(z_i, in_batches(len(small), walk.batch_size, make))


def decode(
    model: UnCLIP,
    keys: jax.Array,
    latents: Latents,
    walk: Walk,
    *,
    captions: Sequence[str] | None = None,
    keep_z_i: bool = True,
    known: tuple[np.ndarray, np.ndarray] | None = None,
    first: int | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Small pictures, float32 [b, h, w, 3] in about [-1, 1], from b latents.

    Args:
        model: as for `encode`.
        keys: one typed key per latent [b], for the noise of eta > 0.
        latents: where to start.
        walk: how to get there.
        captions: one for each, instead of the walk's.
        keep_z_i: False drops z_i, as training does for guidance.
        known: for inpainting, pictures [b, h, w, 3] in [-1, 1] and where they are *not* known,
            bool, as large as x_T and with one channel.
        first: how many of the noisiest steps to leave out; x_T is the state where the next begins.
        progress: called as progress("decoder", done, steps).
    """
    _check_reads_z_i(model)
    stage = model.decoder.stage
    texts = [walk.caption] * len(latents.z_i) if captions is None else list(captions)
    sampling = walk.sampling(model)
    if walk.negative:
        negatives.check_decoder(stage, walk.guidance_scale, model.prior)
    scale = stage.guided_by(1 if walk.guidance_scale is None else walk.guidance_scale)

    def make(rows: np.ndarray) -> jax.Array:
        cond = model.condition(latents.z_i[rows], [texts[i] for i in rows])
        cond["z_i_mask"] &= jnp.full(len(rows), keep_z_i)
        avoided = [walk.negative] * len(rows) if walk.negative else None
        away = model.away(keys[rows], latents.z_i[rows], avoided, progress=progress)
        around = known and tuple(map(jnp.asarray, (model.x_0_of(known[0][rows]), known[1][rows])))
        how = jnp.float32(walk.eta), _traced(first), scale
        given = (keys[rows], latents.x_T[rows], cond, away, *how, around)
        params, given, mesh = model.lay(model.decoder, given, len(rows))
        report = named(progress, "decoder")
        return model.images_of(_decode(stage, params, *given, sampling, mesh, progress=report))

    return in_batches(len(texts), walk.batch_size, make)


def render(
    model: UnCLIP,
    keys: jax.Array,
    small: np.ndarray,
    upsample: bool = True,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> np.ndarray:
    """Small pictures [b, s, s, 3] in [-1, 1] as uint8, through the upsamplers unless told not to.

    Row i depends on keys[i] and on small[i] alone.
    """

    def make(rows: np.ndarray) -> jax.Array:
        images = jnp.asarray(small[rows])
        if upsample:
            images = model.upsample(keys[rows], images, progress=progress)
        return pixels.to_uint8(images)

    return in_batches(len(small), batch_size, make)


def embed(model: UnCLIP, images: Sequence[np.ndarray], batch_size: int = 16) -> np.ndarray:
    """z_i [b, e] of pictures of any sizes, `UnCLIP.embed_image`'s; raises what `encode` does."""
    _check_reads_z_i(model)
    squares = model.need("clip", "embed pictures").stage.prepare(images)
    return in_batches(len(squares), batch_size, lambda rows: model.embed_image(squares[rows]))


def decoder_size(model: UnCLIP, images: Sequence[np.ndarray]) -> np.ndarray:
    """The centres of pictures at the decoder's size, float32 [b, h, w, 3] in [-1, 1]."""
    return np.asarray(pixels.to_float(squared(images, model.decoder.stage.picture_size)))


def noise(model: UnCLIP, keys: jax.Array) -> np.ndarray:
    """Standard normal x_T, float32 [b, h, w, c], as `UnCLIP.decode` draws them from b keys."""
    return np.asarray(_noise(keys, model.decoder.stage.x_shape))


def renoise(
    model: UnCLIP, keys: jax.Array, small: np.ndarray, walk: Walk, first: int
) -> np.ndarray:
    """Pictures [b, h, w, 3] in [-1, 1] with as much noise as `decode` begins with, from b keys.

    They are as the decoder's x_T: of an autoencoder's latents, where it has one.
    """
    stage, sampling = model.decoder.stage, walk.sampling(model)

    def make(rows: np.ndarray) -> jax.Array:
        given = keys[rows], jnp.asarray(model.x_0_of(small[rows])), _traced(first)
        _, given, mesh = model.lay(model.decoder, given, len(rows))
        return _noised(stage, *given, sampling, mesh)

    return in_batches(len(small), walk.batch_size, make)


def _traced(first: int | None) -> jax.Array | None:
    return None if first is None else jnp.int32(first)


def _check_reads_z_i(model: UnCLIP) -> None:
    if "z_i" not in model.decoder.stage.conditions:
        raise UserError(
            "this model's decoder reads captions alone, and so knows no CLIP embedding to edit; use"
            " a decoder with stage.model.embed_dim above 0"
        )


# -------------------------------------------------------------------------- compiled programs


@functools.partial(jax.jit, static_argnames="shape")
def _noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return initial_noise(stage_keys(keys, DECODER), shape)[0]


@functools.partial(jax.jit, static_argnames=("stage", "sampling", "mesh"))
def _noised(stage, keys, x_0, left_out, sampling, mesh):
    with axes.on(mesh):
        drawn = initial_noise(stage_keys(keys, DECODER), x_0.shape[1:])[0]
        return samplers.noised(x_0, drawn, stage.diffusion, sampling, first=left_out)


@functools.partial(Watchable, static=("stage", "sampling", "mesh"))
def _invert(stage, params, x_0, cond, left_out, sampling, mesh, *, loop):
    """One compiled program per decoder, batch size, number of steps and mesh."""
    encoded = loop.once(stage.encode, params, cond)

    def denoise(x_t: jax.Array, t: jax.Array) -> jax.Array:
        return stage.denoise(params, x_t, t, encoded).astype(jnp.float32)

    with axes.on(mesh):
        return samplers.invert(denoise, x_0, stage.diffusion, sampling, loop, first=left_out)


@functools.partial(Watchable, static=("stage", "sampling", "mesh"))
def _decode(
    stage, params, keys, x_T, cond, away, eta, left_out, scale, known, sampling, mesh, *, loop
):
    """One compiled program per decoder, batch size, steps, mesh, guided or not, known or not.

    Eta, `left_out`, the scale, captions and pictures are traced.
    """
    null, fills = stage.null(params, *((cond,) if away is None else away)), stage.model.inpaint
    if known is not None and fills:
        picture, hole = known
        shown = jnp.concatenate([jnp.where(hole, 0.0, picture), 1.0 - hole], axis=-1)
        cond, null = (each | {"known": shown} for each in (cond, null))
    denoise = guidance.classifier_free(
        lambda x_t, t, encoded: stage.denoise(params, x_t, t, encoded),
        cond,
        null,
        scale.get("guidance_scale", 1),
        learned_variance=stage.diffusion.learned_variance,
        encode=lambda condition: loop.once(stage.encode, params, condition),
    )
    if known is not None and fills:
        first_t = stage.diffusion.process(sampling.spacing).timesteps[-1]
        denoise = noised_around(denoise, picture, hole, x_T, stage.diffusion, first_t)
    elif known is not None:
        denoise = knowing(denoise, *known, stage.diffusion)
    _, step_keys, _ = initial_noise(stage_keys(keys, DECODER), x_T.shape[1:])
    with axes.on(mesh):
        x_0 = samplers.sample(
            denoise, x_T, step_keys, stage.diffusion, sampling, eta=eta, first=left_out, loop=loop
        )
    return jnp.where(hole, x_0, picture) if known is not None and fills else x_0


def noised_around(
    denoise: gaussian.Denoise,
    picture: jax.Array,
    hole: jax.Array,
    noise: jax.Array,
    diffusion: gaussian.Diffusion,
    first_t: int,
) -> gaussian.Denoise:
    """A network that sees, outside of the hole, the picture under the noise that the walk began in.

    So a decoder that was trained to fill in is asked in diffusers, which puts x_t back there after
    each step. What the sampler makes of x_t there has no effect.

    Args:
        denoise: the network, perhaps wrapped in guidance.
        picture: x_0 [b, h, w, c].
        hole: True where the picture is not known, bool [b, h, w, 1].
        noise: x_T [b, h, w, c].
        diffusion: what the network predicts.
        first_t: the timestep of x_T, which is seen as it is everywhere.
    """

    def sees(x_t: jax.Array, t: jax.Array) -> jax.Array:
        alpha, sigma = diffusion.levels(t, x_t)
        began = (t == first_t).reshape(-1, *(1,) * (x_t.ndim - 1))
        return denoise(jnp.where(hole | began, x_t, alpha * picture + sigma * noise), t)

    return sees


def knowing(
    denoise: gaussian.Denoise, picture: jax.Array, hole: jax.Array, diffusion: gaussian.Diffusion
) -> gaussian.Denoise:
    """A network that knows the picture outside of the hole, and so predicts it perfectly there.

    Whatever the sampler, it then walks x_t outside of the hole along q(x_{t-1} | x_t, x_0) of the
    true x_0: what is known is at every step as noisy as what is drawn, as in imputation with
    diffusion models (Song et al. 2021, arXiv 2011.13456, appendix I.2; RePaint, Lugmayr et al.
    2022, arXiv 2201.09865, section 4.1).

    Args:
        denoise: the network, perhaps wrapped in guidance.
        picture: x_0 [b, h, w, c].
        hole: True where the picture is not known, bool [b, h, w, 1].
        diffusion: what the network predicts. A learned variance is left alone.
    """
    process = diffusion.process()
    hole = jnp.broadcast_to(hole, picture.shape)

    def knows(x_t: jax.Array, t: jax.Array) -> jax.Array:
        prediction, fraction = gaussian.split_variance(diffusion, denoise(x_t, t), x_t)
        eps = gaussian.eps_from_x_0(process, x_t, t, picture)
        perfect = gaussian.target(diffusion, process, picture, t, eps)
        variance = [] if fraction is None else [fraction]
        return jnp.concatenate([jnp.where(hole, prediction, perfect), *variance], axis=-1)

    return knows
