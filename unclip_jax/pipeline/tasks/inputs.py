"""What the command line names: captions, image files, the model, the seed, the walk."""

from __future__ import annotations

import argparse
import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.data import texts
from unclip_jax.data.images import MAX_PIXELS, open_alpha, open_rgb
from unclip_jax.data.records import BadRecord
from unclip_jax.errors import UserError, wrong
from unclip_jax.pipeline.drawing import check_prompts
from unclip_jax.pipeline.manipulate import Walk
from unclip_jax.pipeline.manipulate.masks import hole_of
from unclip_jax.pipeline.unclip import UnCLIP
from unclip_jax.weights.known import Unfamiliar
from unclip_jax.weights.trained import Part

# A JPEG is decoded at a fraction of its size where that still has twice as many pixels a side.
_LARGEST_SIDE = 2048


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Captions from --prompt and --prompts.

    Raises:
        UserError: the file can't be read, or there is no caption at all, or an empty one.
    """
    prompts = list(args.prompt)
    if args.prompts:
        try:
            text = texts.file_text(Path(args.prompts).read_bytes())
        except (OSError, texts.NotText) as error:
            raise UserError(
                f"--prompts {args.prompts!r}: cannot be read ({error}); give a UTF-8 text file"
                " with one caption per line"
            ) from error
        prompts += [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise UserError('--prompt: no caption given; write --prompt "a red apple"')
    check_prompts(prompts)
    return prompts


def read_image(path: str, flag: str = "--image") -> np.ndarray:
    """An image file of any size and mode as uint8 [h, w, 3].

    Raises:
        UserError: it cannot be read, or is no image.
    """
    try:
        return np.asarray(open_rgb(Path(path).read_bytes(), _LARGEST_SIDE))
    except (OSError, ValueError, BadRecord) as error:
        raise UserError(f"{flag} {path!r}: {error}; give an image file") from error


def read_mask(path: str) -> np.ndarray:
    """The part of a picture that a mask file says to paint, bool [h, w], see `masks.hole_of`.

    Raises:
        UserError: it cannot be read, has two readings, or paints nothing.
    """
    name = f"--mask {path!r}"
    try:
        data = Path(path).read_bytes()
        rgb, alpha = np.asarray(open_rgb(data, MAX_PIXELS)), open_alpha(data)
    except (OSError, ValueError, BadRecord) as error:
        raise UserError(f"{name}: {error}; give an image file") from error
    hole = hole_of(rgb, alpha, name)
    if not hole.any():
        most = f"nothing to paint, its lightest grey is {rgb.mean(axis=2).max():.0f} of 255"
        raise wrong(name, most, "white where to paint")
    return hole


def load(args: argparse.Namespace) -> UnCLIP:
    """The model, on all devices, with the sampling steps, the size and the hint asked for.

    Raises:
        UserError: no such model or adapters, or steps, a size or a hint that it cannot do.
    """
    files, weights = getattr(args, "lora", None) or [], getattr(args, "lora_weight", None)
    weights = [1.0] * len(files) if weights is None else weights
    if len(weights) != len(files):
        raise wrong("--lora_weight", weights, f"one for each of {len(files)} --lora")
    if len(set(files)) != len(files):
        raise wrong("--lora", files, "each file once")
    model = UnCLIP.load(args.model, args.dtype, args.t5, mesh="all")
    model = model.with_lora(dict(zip(files, weights, strict=True)))

    def respace(part: Part | None, name: str) -> Part | None:
        steps = getattr(args, name, None)
        return part if steps is None or part is None else part.respaced(f"--{name}", steps)

    model = told_of(args, model)
    return dataclasses.replace(
        model,
        prior=respace(model.prior, "prior_steps"),
        decoder=respace(model.decoder, "decoder_steps"),
        upsamplers=tuple(respace(part, "upsampler_steps") for part in model.upsamplers),
    )


def told_of(args: argparse.Namespace, model: UnCLIP) -> UnCLIP:
    """The model with the size and the hint that are asked for, if any."""
    asked, hint = [getattr(args, name, None) for name in ("height", "width")], "hint" in args
    if any(side is not None for side in asked):
        own = model.decoder.stage.picture_size
        sides = (o if a is None else a for a, o in zip(asked, own, strict=True))
        model = model.sized(tuple(sides), "--height and --width")
    return model.hinted(read_image(args.hint, "--hint")) if hint and args.hint else model


def warn_of_unfamiliar(model: UnCLIP, captions: Sequence[str]) -> None:
    """Warn of each caption with words that no caption of the model's training had."""
    known = model.known
    said = map(known.says, dict.fromkeys(captions)) if known else ()
    for line in filter(None, said):
        warnings.warn(line, Unfamiliar, stacklevel=2)


def seed_key(args: argparse.Namespace) -> jax.Array:
    """The typed key of --seed, or the keys [n] of several.

    Raises:
        UserError: more than 63 bits.
    """
    several = isinstance(args.seed, list)
    for seed in args.seed if several else [args.seed]:
        if not 0 <= seed < 2**63:
            raise UserError(f"--seed: got {seed}, expected 0 to {2**63 - 1}")
    return jnp.stack([*map(jax.random.key, args.seed)]) if several else jax.random.key(args.seed)


def walk_of(args: argparse.Namespace, model: UnCLIP | None = None, **fields) -> Walk:
    """The walk that the command line asks for.

    Args:
        args: with eta, guidance_scale, batch_size, perhaps negative, and steps unless given in
            `fields`.
        model: whose own guidance is the default; None for no guidance.
        fields: other fields of `Walk`.
    """
    scale = args.guidance_scale
    if scale is None and model is not None:
        scale = model.decoder.stage.guidance_scale
    given = {"steps": getattr(args, "steps", None), "negative": getattr(args, "negative", "")}
    given |= fields
    return Walk(eta=args.eta, guidance_scale=scale, batch_size=args.batch_size, **given)
