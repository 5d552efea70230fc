"""Sample from a trained model.

    python sample.py text2im --model runs/emoji --prompt "a red apple" --out apple.png

writes apple.png, a grid with the captions under the pictures and the settings in its metadata,
and every picture alone in the folder apple/.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from tqdm import tqdm

from unclip_jax.errors import UserError, run_command


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; `--help` of each task says the rest."""
    parser = argparse.ArgumentParser(
        prog="sample.py", description="Sample from a trained unclip_jax model."
    )
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    text2im = tasks.add_parser("text2im", help="pictures for captions")
    add = text2im.add_argument
    add("--model", required=True, metavar="DIR", help="folder with one sub-folder per stage")
    add("--prompt", action="append", default=[], metavar="TEXT", help="a caption; may be repeated")
    add("--prompts", metavar="FILE", help="a text file with one caption per line")
    add("--out", default="out.png", metavar="PNG", help="the grid; single pictures go beside it")
    add("--seed", type=int, default=0, help="same seed, same pictures (default 0)")
    add("--num", type=int, default=4, help="pictures per caption (default 4)")
    add("--guidance_scale", type=float, help="the decoder's; 1 = none (default: the model's own)")
    add("--prior_guidance_scale", type=float, help="the prior's (default: the model's own)")
    add("--prior_steps", metavar="N", help="the prior's sampling steps (default: the model's own)")
    add("--decoder_steps", metavar="N", help="the decoder's (default: the model's own)")
    add("--upsampler_steps", metavar="N", help="every upsampler's (default: the model's own)")
    add("--no_upsample", action="store_true", help="stop at the decoder's size")
    add("--batch_size", type=int, default=16, help="pictures computed together (default 16)")
    return parser.parse_args(argv)


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Captions from --prompt and --prompts.

    Raises:
        UserError: the file can't be read, or there is no caption at all.
    """
    prompts = list(args.prompt)
    if args.prompts:
        try:
            text = Path(args.prompts).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--prompts {args.prompts!r}: cannot be read ({error}); give a UTF-8 text file"
                " with one caption per line"
            ) from error
        prompts += [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UserError('--prompt: no caption given; write --prompt "a red apple"')
    return prompts


def with_steps(model, args: argparse.Namespace):
    """The model with the numbers of sampling steps that the command line asks for."""

    def respace(part, spacing: str | None):
        if spacing is None:
            return part
        sampling = dataclasses.replace(part.stage.sampling, spacing=spacing)
        part.stage.diffusion.process(spacing)  # a wrong spacing is an error here, not later
        return part._replace(stage=dataclasses.replace(part.stage, sampling=sampling))

    return dataclasses.replace(
        model,
        prior=respace(model.prior, args.prior_steps),
        decoder=respace(model.decoder, args.decoder_steps),
        upsamplers=tuple(respace(part, args.upsampler_steps) for part in model.upsamplers),
    )


class StageBars:
    """One progress bar on stderr for each stage's sampling; use as a context manager."""

    def __init__(self) -> None:
        """No bar yet."""
        self._bars: dict[str, tqdm] = {}

    def __enter__(self) -> StageBars:
        """Return self."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close what is left open."""
        for bar in self._bars.values():
            bar.close()

    def update(self, stage: str, step: int, steps: int) -> None:
        """Sampling of `stage` has done `step` of `steps`; another batch starts a bar anew."""
        bar = self._bars.get(stage)
        if bar is None or step < bar.n:
            if bar is not None:
                bar.close()
            bar = self._bars[stage] = tqdm(total=steps, desc=f"{stage:<14}", unit="step")
        bar.update(step - bar.n)
        if step == steps:
            bar.close()


def text2im(args: argparse.Namespace) -> None:
    """Captions to a grid and single pictures."""
    prompts = read_prompts(args)
    out = Path(args.out)
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {args.out!r}: expected a name that ends in .png")

    import jax
    from PIL import Image

    from unclip_jax.grids import captioned_grid, save_png
    from unclip_jax.pipeline import UnCLIP, check_prompts

    check_prompts(prompts)
    model = with_steps(UnCLIP.load(args.model), args)
    with StageBars() as bars:
        images = model.generate(
            jax.random.key(args.seed),
            prompts,
            num=args.num,
            prior_guidance_scale=args.prior_guidance_scale,
            guidance_scale=args.guidance_scale,
            upsample=not args.no_upsample,
            batch_size=args.batch_size,
            progress=bars.update,
        )
    settings = {
        key: value
        for key, value in vars(args).items()
        if key not in ("prompt", "prompts", "out") and value is not None
    }
    captions = [prompt for prompt in prompts for _ in range(args.num)]
    grid = captioned_grid(list(images), captions, columns=max(args.num, min(4, len(captions))))
    save_png(grid, out, {"prompt": json.dumps(prompts), "settings": json.dumps(settings)})
    singles = out.with_suffix("")
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        metadata = {
            "prompt": caption,
            "sample": str(i % args.num),
            "settings": json.dumps(settings),
        }
        save_png(Image.fromarray(image), singles / f"{i:04d}.png", metadata)
    print(f"{out}: {len(images)} pictures of {images.shape[1]} px; each alone in {singles}/")


def main(argv: list[str]) -> None:
    """Run one task."""
    args = parse(argv)
    {"text2im": text2im}[args.task](args)


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
