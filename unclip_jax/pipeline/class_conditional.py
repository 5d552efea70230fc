"""Pictures of a class, from a cascade with classifier guidance: ADM (arXiv 2105.05233).

    unclip class_conditional --decoder runs/adm/decoder \\
        --classifier runs/adm/classifier --upsampler runs/adm/upsampler --label food --out food.png

The decoder draws a small picture of the class: by its class embedding, by the gradient of a
classifier of noised images, or by both. Upsamplers make it large. A class is named as in the data,
or by how its name begins.
"""

from __future__ import annotations

import argparse
import functools
import json
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax import stages
from unclip_jax.common import checks, command_line
from unclip_jax.common.files import check_place
from unclip_jax.common.grids import captioned_grid, save_png
from unclip_jax.diffusion import guidance
from unclip_jax.errors import UserError
from unclip_jax.pipeline.drawing import DECODER, in_batches, numbered, stage_keys
from unclip_jax.pipeline.unclip import UnCLIP
from unclip_jax.stages.pixels import to_uint8
from unclip_jax.weights.trained import Part, load_part

Params = dict[str, Any]


@functools.partial(jax.jit, static_argnames=("stage", "classifier"))
def _draw(
    stage: stages.DecoderStage,
    params: Params,
    keys: jax.Array,
    label: jax.Array,
    guidance_scale: jax.Array | None,
    classifier: stages.ClassifierStage | None,
    classifier_params: Params | None,
    classifier_scale: jax.Array,
) -> jax.Array:
    """Small images [b, s, s, 3] in [-1, 1] of classes int32 [b]; a scale of None is none."""
    guide = None
    if classifier is not None:
        guide = functools.partial(
            guidance.classifier_guided,
            log_prob=lambda x_t, t: classifier.log_prob(classifier_params, x_t, t, label),
            scale=classifier_scale,
            diffusion=stage.diffusion,
        )
    scale = 1.0 if guidance_scale is None else guidance_scale
    cond = stage.condition(label=label)
    return stage.sample(params, keys, cond, guidance_scale=scale, guide=guide)


def generate(
    key: jax.Array,
    decoder: Part,
    labels: Sequence[str],
    *,
    classifier: Part | None = None,
    upsamplers: Sequence[Part] = (),
    num: int | Sequence[int] = 1,
    first: int | Sequence[int] = 0,
    guidance_scale: float | None = None,
    classifier_scale: float = 1.0,
    batch_size: int = 16,
) -> np.ndarray:
    """Pictures of classes.

    Args:
        key: typed PRNG key. Sample i of any class uses fold_in(key, i), so a picture never depends
            on the other classes or on how many there are.
        decoder: of classes; or, with a classifier, one without any condition.
        labels: names of classes, at least one; see `number`.
        classifier: of the decoder's images, noised as it noises them; None for no such guidance.
        upsamplers: from small to large.
        num: pictures per class, or one number for each.
        first: the number i of a class's first picture, likewise, see `UnCLIP.generate`.
        guidance_scale: classifier-free, away from no class; None takes the decoder's own.
        classifier_scale: of the classifier's gradient; 1 is Bayes' rule, more is more typical, and
            0 asks no classifier.
        batch_size: pictures computed together, see `UnCLIP.generate`.

    Returns:
        uint8 [n, size, size, 3], the pictures of one class side by side.

    Raises:
        UserError: no class, or no such class, parts that do not belong together, a scale that is
            not finite, or num or batch_size below 1.
    """
    known = check(decoder, classifier)
    if not labels:
        raise UserError(f"label: none given; expected one of: {', '.join(known)}")
    keys, whose, _ = numbered(key, len(labels), num, first)
    numbers = np.asarray([number(name, known) for name in labels])[whose]
    cascade = UnCLIP(clip=None, prior=None, decoder=decoder, upsamplers=tuple(upsamplers))
    cascade.check()
    away = decoder.stage.guided_by(guidance_scale).get("guidance_scale")
    away = away if decoder.stage.num_classes else None
    strength = checks.number("classifier_scale", classifier_scale)
    guiding = classifier[:2] if classifier is not None and strength else (None, None)

    def make(rows: np.ndarray) -> jax.Array:
        own = stage_keys(keys[rows], DECODER)
        label = jnp.int32(numbers[rows])
        given = own, label, away, *guiding, jnp.float32(strength)
        small = _draw(decoder.stage, decoder.params, *given)
        return to_uint8(cascade.upsample(keys[rows], small))

    return in_batches(len(numbers), batch_size, make)


def names(part: Part) -> list[str]:
    """The names of a trained stage's classes, by number.

    Raises:
        UserError: its description has none.
    """
    found, count = part.description.get("classes") or [], part.stage.num_classes
    if len(found) != count:
        raise UserError(
            f"{part.stage.kind}: its description names {len(found)} classes, expected {count}; use"
            " a folder that train.py wrote"
        )
    return found


def number(name: str, classes: Sequence[str]) -> int:
    """The number of a class: of its whole name, or of the only one that begins so.

    Upper and lower case are the same.

    Raises:
        UserError: no class begins so, or several do.
    """
    wanted = name.strip().casefold()
    folded = [known.casefold() for known in classes]
    if wanted in folded:
        return folded.index(wanted)
    found = [i for i, known in enumerate(folded) if wanted and known.startswith(wanted)]
    if len(found) != 1:
        why = "is no class" if not found else f"begins {len(found)} classes"
        raise UserError(f"label: {name!r} {why}; expected one of: {', '.join(classes)}")
    return found[0]


def check(decoder: Part, classifier: Part | None) -> list[str]:
    """The names of the classes that can be drawn.

    Raises:
        UserError: the decoder reads something else than a class, or neither knows one; or the
            classifier is of other classes, images or noise than the decoder.
    """
    stage = decoder.stage
    other = sorted(set(stage.conditions) - {"label"})
    if other:
        raise UserError(
            f"decoder: it reads {', '.join(other)}, expected one that reads a class alone; for"
            " captions use sample.py"
        )
    if classifier is None:
        if not stage.num_classes:
            raise UserError("decoder: it reads no class; give a classifier that guides it to one")
        return names(decoder)
    found = names(classifier)
    if stage.num_classes and found != names(decoder):
        raise UserError(
            f"classifier: knows {', '.join(found)}; expected the decoder's classes:"
            f" {', '.join(names(decoder))}"
        )
    for field in ("image_size", "diffusion.steps", "diffusion.schedule"):
        got, expected = map(operator.attrgetter(field), (classifier.stage, stage))
        if got != expected:
            raise UserError(
                f"classifier: its {field} is {got!r}, expected the decoder's {expected!r}; train it"
                " with that"
            )
    return found


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = command_line.parser("class_conditional", __doc__)
    add = parser.add_argument
    add("--decoder", required=True, metavar="DIR", help="a trained decoder of classes")
    add("--classifier", metavar="DIR", help="a classifier of noised images that guides it")
    add("--upsampler", action="append", default=[], metavar="DIR", help="may be repeated")
    add("--label", action="append", default=[], metavar="CLASS", help="a class; may be repeated")
    add("--out", default="out.png", metavar="PNG", help="the grid (default out.png)")
    add("--seed", type=int, default=0, help="same seed, same pictures (default 0)")
    add("--num", type=int, default=4, help="pictures per class (default 4)")
    add("--first", type=int, default=0, metavar="I", help="number of the first (default 0)")
    add("--classifier_scale", type=float, default=1.0, help="1 is Bayes' rule (default 1)")
    add("--guidance_scale", type=float, help="classifier-free; 1 = none (default: the decoder's)")
    add("--steps", metavar="N", help="the decoder's sampling steps (default: its own)")
    add("--batch_size", type=int, default=16, help="pictures computed together (default 16)")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Draw, and write the grid."""
    args = parse(argv)
    if Path(args.out).suffix.lower() != ".png":
        raise UserError(f"--out {args.out!r}: expected a name that ends in .png")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed: got {args.seed}, expected 0 to {2**63 - 1}")
    check_place("--out", Path(args.out))
    decoder = load_part(args.decoder, "decoder")
    if args.steps is not None:
        decoder = decoder.respaced("--steps", args.steps)
    classifier = load_part(args.classifier, "classifier") if args.classifier else None
    upsamplers = [load_part(folder, "upsampler") for folder in args.upsampler]
    images = generate(
        jax.random.key(args.seed),
        decoder,
        args.label,
        classifier=classifier,
        upsamplers=sorted(upsamplers, key=lambda part: part.stage.low_size),
        num=args.num,
        first=args.first,
        guidance_scale=args.guidance_scale,
        classifier_scale=args.classifier_scale,
        batch_size=args.batch_size,
    )
    captions = [label for label in args.label for _ in range(args.num)]
    grid = captioned_grid(list(images), captions, columns=max(args.num, min(4, len(captions))))
    settings = {name: value for name, value in vars(args).items() if value is not None}
    save_png(grid, Path(args.out), {"settings": json.dumps(settings)})
    print(f"{args.out}: {len(images)} pictures of {images.shape[1]} px")
