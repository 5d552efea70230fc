"""Which solver, grid, number of steps and guidance suit a decoder, by its own pictures.

    python benchmarks/box_sampling.py --out report [--model DIR] [--num 200]
    python benchmarks/box_sampling.py --out report --weak DECODER --few DECODER

Every picture of a caption begins with the same z_i of the prior and the same noise, so that what
differs is the sampler alone. Asked of each way of sampling:

- mse: the mean squared error to the same walk in 100 steps of Heun's solver, pixels from -1 to 1;
- concept: whether the nearest real drawing is of the caption's emoji, by the judge of `box.py`;
- own caption: whether the picture's caption is the nearest of all, by the model's CLIP;
- style: whether it is in the style that its caption names, by a classifier of colours;
- Fréchet: distance to the training drawings, in the model's CLIP and by the judge. Of few pictures
  it is too large for all alike.

First solvers and grids at 4 to 25 network calls with the decoder's own guidance; then kinds of
guidance with the decoder's own solver and steps. `--weak` is a decoder folder for autoguidance to
lead away from, an earlier checkpoint or a shorter run; `--few` a decoder distilled from this one,
asked in 1, 2 and 4 calls.

Writes figures.json, tables.md, and a picture with a row for each way, of the first captions.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from box import JUDGE, Bench

from unclip_jax.common.grids import captioned_grid, save_png
from unclip_jax.diffusion import Sampling, guidance, sample
from unclip_jax.diffusion.gaussian import Denoise
from unclip_jax.errors import run_command
from unclip_jax.metrics.frechet import frechet
from unclip_jax.metrics.retrieval import own_caption
from unclip_jax.metrics.vectors import Vectors, moments
from unclip_jax.parallel import compile_cache
from unclip_jax.parallel.cpu import memory as host_memory
from unclip_jax.pipeline.unclip import UnCLIP
from unclip_jax.stages.conditioning import example_keys, initial_noise
from unclip_jax.stages.decoder import DecoderStage
from unclip_jax.stages.pixels import to_uint8
from unclip_jax.weights.trained import load_part

Guide = Callable[[DecoderStage, Any, Any], Denoise]  # of the stage, its params and a condition

CALLS = (4, 6, 8, 12, 25)
WAYS = (("dpm++", "even"), ("dpm++", "logsnr"), ("unipc2", "logsnr"), ("ddim", "even"))
WAYS += (("heun", "logsnr"),)
REFERENCE = Sampling(method="heun", spacing="logsnr:100", clip_x_0=1.0)
SHOWN = 12


def spaced(method: str, grid: str, calls: int) -> tuple[Sampling, int]:
    """A sampler that asks the network so often at most, and how often it does."""
    steps, asked = calls, calls
    if method == "heun":  # two calls a step, and one in the last
        steps = (calls + 1) // 2
        asked = 2 * steps - 1
    return Sampling(method=method, spacing=f"{grid}:{steps}", clip_x_0=1.0), asked


def classifier_free(scale: Any, rule: guidance.Rule = guidance.linear) -> Guide:
    """Guidance away from no z_i and no caption."""

    def guide(stage: DecoderStage, params: Any, cond: Any) -> Denoise:
        return guidance.classifier_free(
            partial(stage.denoise, params),
            cond,
            stage.null(params, cond),
            scale,
            learned_variance=stage.diffusion.learned_variance,
            encode=partial(stage.encode, params),
            rule=rule,
        )

    return guide


def autoguided(weak: Any, scale: float, also: float = 1.0) -> Guide:
    """Guidance away from a weaker decoder, of one that is guided classifier-free or not."""

    def guide(stage: DecoderStage, params: Any, cond: Any) -> Denoise:
        good = classifier_free(also)(stage, params, cond)
        return guidance.autoguided(good, weak.stage.denoiser(weak.params, cond), scale)

    return guide


class Ways:
    """Captions with their z_i and noise, drawn again and again."""

    def __init__(self, model: UnCLIP, args: argparse.Namespace) -> None:
        """Look at the real drawings, and ask the prior once."""
        data = model.decoder.description["data"]["name"]
        self.bench = bench = Bench(model, data, args)
        self.rows, self.size = bench.chosen["train"], args.batch_size
        self.captions = [bench.real.captions[i] for i in self.rows]
        self.keys = example_keys(jax.random.key(0), len(self.rows))
        z_i = bench.measurer.sample_prior(jax.random.key(0), self.captions)
        self.conds = [
            model.condition(jnp.asarray(z_i[rows]), [self.captions[i] for i in rows])
            for rows in self._batches()
        ]
        self.reference, self.found, self.shown = None, {}, {}

    def _batches(self) -> list[np.ndarray]:
        n = len(self.rows)
        return [np.arange(i, min(i + self.size, n)) for i in range(0, n, self.size)]

    def draw(self, part: Any, guide: Guide, sampling: Sampling) -> np.ndarray:
        """Pictures float32 [n, s, s, 3] in about [-1, 1]."""
        stage = part.stage
        walked = dataclasses.replace(stage, sampling=sampling)  # begun where this walk begins

        @jax.jit
        def drawn(params, keys, cond):
            noise, step_keys, _ = initial_noise(keys, stage.x_shape)
            denoise, x_T = guide(stage, params, cond), walked.begun(params, cond, noise)
            return sample(denoise, x_T, step_keys, stage.diffusion, sampling)

        parts = zip(self._batches(), self.conds, strict=True)
        return np.concatenate([drawn(part.params, self.keys[rows], cond) for rows, cond in parts])

    def ask(self, name: str, part: Any, guide: Guide, sampling: Sampling) -> None:
        """Draw one way, measure it, and say what was found."""
        pictures = self.draw(part, guide, sampling)
        if self.reference is None:
            self.reference = pictures
        images, bench = np.asarray(to_uint8(pictures)), self.bench
        starts = range(0, len(images), self.size)
        looked = [bench.measurer.look(images[i : i + self.size]) for i in starts]
        z_i, features = (np.concatenate(each) for each in zip(*map(_both, looked), strict=True))
        truth, real = bench.real.vectors.rows(self.rows), bench.real
        told = own_caption(z_i, truth.z_i, bench.z_t, self.rows, bench.told, real.same[self.rows])
        away = [moments(bench.reference.z_i), moments(bench.reference.features)]
        self.found[name] = {
            "mse": float(np.mean((pictures.clip(-1, 1) - self.reference.clip(-1, 1)) ** 2)),
            "concept": bench.nearest.figures(features, self.rows)["concept_top1"],
            "own caption": told["generated_r1"],
            "style": bench.classifier.accuracy(images, real.styles[self.rows]),
            "Fréchet, CLIP": frechet(moments(z_i), away[0]),
            "Fréchet, judge": frechet(moments(features), away[1]),
        }
        self.shown[name] = images[:SHOWN]
        print(json.dumps({name: self.found[name]}, ensure_ascii=False), flush=True)

    def write(self, out: Path) -> None:
        """Write figures.json, tables.md and ways.png."""
        (out / "figures.json").write_text(json.dumps(self.found, indent=1, ensure_ascii=False))
        heads = list(next(iter(self.found.values())))
        lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
        lines += [f"| {name} | {' | '.join(_told(f))} |" for name, f in self.found.items()]
        (out / "tables.md").write_text("\n".join(lines) + "\n")
        images = [image for row in self.shown.values() for image in row]
        named = [f"{way}: {c}" for way in self.shown for c in self.captions[:SHOWN]]
        save_png(captioned_grid(images, named, columns=SHOWN), out / "ways.png", {"seed": "0"})


def _both(vectors: Vectors) -> tuple[np.ndarray, np.ndarray]:
    return vectors.z_i, vectors.features


def _told(figures: dict[str, float]) -> list[str]:
    shares = {"concept", "own caption", "style"}
    return [f"{100 * v:.1f} %" if n in shares else f"{v:.4g}" for n, v in figures.items()]


def main(argv: list[str]) -> None:
    """Draw every way, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", metavar="DIR", help="default: the box model")
    parser.add_argument("--num", type=int, default=200, help="captions, of training")
    parser.add_argument("--weak", metavar="DIR", type=Path, help="a weaker decoder's folder")
    parser.add_argument("--few", metavar="DIR", type=Path, help="a distilled decoder's folder")
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--keep", type=Path, help="folder for what the networks see in real ones")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    args.judge, args.heldout = JUDGE, 1
    args.out.mkdir(parents=True, exist_ok=True)

    compile_cache.use()
    host_memory.keep_freed()
    model = UnCLIP.load(args.model)
    ways, part = Ways(model, args), model.decoder
    own, scale, diffusion = part.stage.sampling, part.stage.guidance_scale, part.stage.diffusion
    plain = classifier_free(scale)

    ways.ask("heun, logsnr: 199", part, plain, REFERENCE)
    for method, grid in WAYS:
        for calls in CALLS:
            sampling, asked = spaced(method, grid, calls)
            ways.ask(f"{method}, {grid}: {asked}", part, plain, sampling)
    if args.few:
        few = load_part(args.few)
        for calls in (1, 2, 4):
            sampling = Sampling(method="consistency", spacing=str(calls), clip_x_0=1.0)
            ways.ask(f"distilled: {calls}", few, classifier_free(1.0), sampling)

    guides = {f"classifier-free {w:g}": classifier_free(w) for w in (1.0, 1.5, 2.0, 3.0, 5.0)}
    for low, high in ((-6.0, 2.0), (-2.0, 2.0), (-2.0, 9.0)):
        limited = guidance.interval(3.0, diffusion, log_snr=(low, high))
        guides[f"3 where log SNR is {low:g} to {high:g}"] = classifier_free(limited)
    guides["rising to 3 on average"] = classifier_free(guidance.rising(3.0, diffusion))
    for norm in (0.0, 15.0):
        rule = guidance.apg(diffusion, norm=norm)
        guides[f"APG 3{f', norm {norm:g}' if norm else ''}"] = classifier_free(3.0, rule)
    guides["CFG-rescale 3, phi 0.7"] = classifier_free(3.0, guidance.rescaled(0.7))
    guides["CFG-Zero* 3"] = classifier_free(3.0, guidance.zero_star())
    if args.weak:
        weak = load_part(args.weak)
        for w in (1.5, 2.0, 3.0):
            guides[f"autoguidance {w:g}"] = autoguided(weak, w)
        guides[f"autoguidance 1.5 of classifier-free {scale:g}"] = autoguided(weak, 1.5, scale)
    for name, guide in guides.items():
        ways.ask(name, part, guide, own)
    ways.write(args.out)


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
