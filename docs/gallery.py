"""The gallery, docs/gallery.md: captions that nobody chose, as the model in the package draws them.

    python docs/gallery.py --draw          # draw anew, with the weights as they are; then the page
    python docs/gallery.py                 # the page alone, from docs/gallery.json

The captions are every n-th of the names that the model says it knows (`known.json`), 48 in all, in
its styles by turns. `recognised` in docs/gallery.json is filled by hand once someone who does not
know the captions has named the pictures: {"right": 30, "of": 48, "seed": 0, "by": "who, and when"}.
Drawing anew empties it. `make docs` builds the page from the same file. README's grid has the first
picture of every third caption.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
DATA, PAGE, PICTURES = DOCS / "gallery.json", DOCS / "gallery.md", DOCS / "images" / "gallery"
COUNT, SEEDS, SIDE, COLUMNS, COLOURS = 48, (0, 1), 112, 3, 48
GRID, EVERY, ROW = DOCS / "images" / "box_grid.png", 3, 8

INTRO = """# Gallery

What the model in the package draws for captions that nobody chose: {every} of the {names:,} names
that it was trained on, by the alphabet, in its styles by turns. Both pictures of each caption are
shown, seeds {seeds}, with the settings that every command draws with.
`python docs/gallery.py --draw` draws it anew.
"""

UNDRAWN = """# Gallery

Not drawn yet for the present weights: `python docs/gallery.py --draw` does it, in some minutes.
"""


def read() -> dict[str, Any] | None:
    """What docs/gallery.json says; None where nothing was drawn yet."""
    return json.loads(DATA.read_text(encoding="utf-8")) if DATA.exists() else None


def page(data: dict[str, Any] | None) -> str:
    """The page in Markdown.

    Args:
        data: of docs/gallery.json.
    """
    if data is None:
        return UNDRAWN
    count = len(data["captions"])
    step = data["names"] / count
    seeds = " and ".join(map(str, data["seeds"]))
    every = f"every {step:.0f}th" if step >= 4 else f"{count}"
    parts = [INTRO.format(every=every, names=data["names"], seeds=seeds)]
    if found := data["recognised"]:
        share = 100 * found["right"] / found["of"]
        parts.append(
            f"**{share:.0f} % were recognised**: of {found['of']} pictures of seed {found['seed']},"
            f" {found['right']} were named rightly, the captions unseen, by {found['by']}."
            "\n"
        )
    parts.append(("| " * COLUMNS) + "|\n" + ("|---" * COLUMNS) + "|")
    for start in range(0, count, COLUMNS):
        row = list(enumerate(data["captions"]))[start : start + COLUMNS]
        cells = [f"![{text}](images/gallery/{i:02d}.png) {text}" for i, text in row]
        cells += [""] * (COLUMNS - len(cells))
        parts.append(f"| {' | '.join(cells)} |")
    return "\n".join(parts) + "\n"


def draw(model_folder: str | None) -> dict[str, Any]:
    """Draw every caption with every seed, write the pictures, and say what was drawn."""
    import jax
    import numpy as np
    from PIL import Image

    from unclip_jax.common.grids import captioned_grid
    from unclip_jax.errors import UserError
    from unclip_jax.parallel import compile_cache
    from unclip_jax.parallel.cpu import devices
    from unclip_jax.pipeline.unclip import UnCLIP
    from unclip_jax.weights.trained import clip_fingerprint

    devices.use()
    compile_cache.use()
    model = UnCLIP.load(model_folder, mesh="all")
    if model.known is None:
        raise UserError(
            "--model: doesn't say what it knows; run python -m unclip_jax.weights.known --model DIR"
        )
    captions = model.known.every(COUNT)
    rows = [model.generate(jax.random.key(s), captions, batch_size=8) for s in SEEDS]
    small = [
        np.asarray(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.LANCZOS))
        for picture in rows[0][::EVERY]
    ]
    grid = captioned_grid(small, captions[::EVERY], columns=ROW)
    grid.quantize(256).save(GRID, optimize=True)
    PICTURES.mkdir(parents=True, exist_ok=True)
    for file in PICTURES.glob("*.png"):
        file.unlink()
    for i, pair in enumerate(zip(*rows, strict=True)):
        picture = Image.fromarray(np.concatenate(pair, axis=1))
        picture = picture.resize((SIDE * len(pair), SIDE), Image.Resampling.LANCZOS)
        picture.quantize(COLOURS).save(PICTURES / f"{i:02d}.png", optimize=True)
    return {
        "clip": clip_fingerprint(model.clip),
        "names": len(model.known.names),
        "seeds": list(SEEDS),
        "captions": captions,
        "recognised": None,
    }


def main(argv: list[str]) -> None:
    """Draw, if asked to, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--draw", action="store_true", help="draw anew; some minutes on a CPU")
    parser.add_argument("--model", metavar="DIR", help="default: the box model")
    args = parser.parse_args(argv)
    if args.draw:
        DATA.write_text(json.dumps(draw(args.model), indent=1, ensure_ascii=False) + "\n", "utf-8")
    PAGE.write_text(page(read()), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    sys.path.insert(0, str(DOCS.parent))
    from unclip_jax.errors import run_command

    run_command(main, sys.argv[1:])
