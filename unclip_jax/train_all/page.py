"""The page that `unclip train-all` ends in: one HTML file, with every picture in it."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import shlex
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from unclip_jax.common.files import write_text
from unclip_jax.common.grids import captioned_grid, save_png
from unclip_jax.pipeline.tasks.outputs import StageBars
from unclip_jax.pipeline.unclip import UnCLIP
from unclip_jax.stages.clip import encode_text
from unclip_jax.train_all import words
from unclip_jax.train_all.budget import Budget
from unclip_jax.train_all.look import Found
from unclip_jax.training.writers import CURVES_FILE

PAGE = "index.html"
SAMPLES = "samples.png"
CAPTIONS = 6  # that are drawn, of those trained on and of those held out
EACH = 2  # pictures of a caption
BATCH = 4  # drawn together, as unclip sample does by default: its programs are these

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; max-width: 64em; margin: 2em auto; padding: 0 1em;
       color: #222; background: #fff; }
h2 { margin-top: 2em; }
.drawn { display: flex; flex-wrap: wrap; gap: 1em; }
figure { margin: 0; width: 14em; } figure img { width: 49%; }
figcaption { font-size: 14px; overflow-wrap: anywhere; }
.wide { max-width: 100%; display: block; margin: 1em 0; border: 1px solid #ddd; }
pre { background: #f4f4f4; padding: .7em 1em; white-space: pre-wrap; font-size: 13px; }
"""


def write(out: Path, found: Found, budget: Budget, *, drawing: bool) -> None:
    """Write the page.

    Args:
        out: the model's folder; the page goes there.
        found: the data.
        budget: what has been trained.
        drawing: whether every stage is there, so that pictures can be drawn.
    """
    parts = [_found(found, budget)]
    if drawing:
        parts.append(_drawn(out, found))
    parts += [_stage(out, name) for name in budget.entries if (out / name).is_dir()]
    parts.append(_next(out, budget))
    write_text(
        out / PAGE,
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(found.data.name)}: trained</title>\n<style>{STYLE}</style>\n"
        f"<h1>A model of {_text(found.data.name)}</h1>\n" + "\n".join(parts) + "\n</html>\n",
    )


def _text(text: object) -> str:
    return html.escape(str(text))


def _list(lines: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{_text(line)}</li>" for line in lines) + "</ul>"


def _picture(image: bytes, alt: str, style: str = "") -> str:
    data = base64.b64encode(image).decode("ascii")
    return f'<img{style} src="data:image/png;base64,{data}" alt="{_text(alt)}">'


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def _found(found: Found, budget: Budget) -> str:
    left = budget.left()
    state = f"still to train: {', '.join(left)}" if left else "all is trained"
    spent = f"{budget.spent / 60:.0f} minutes spent, {budget.minutes:g} asked for"
    sized = f"size {budget.size}; {spent}; {state}"
    return f"<p>{_text(sized)}.</p>\n" + _list(found.words())


def _stage(out: Path, name: str) -> str:
    """A stage's figures, its previews and curves, and the doctor's words."""
    folder = out / name
    parts = [f"<h2>{_text(name)}</h2>", f"<p>It {_text(words.ABOUT[name])}</p>"]
    if not (folder / "description.json").is_file():
        return "\n".join([*parts, "<p>Not begun.</p>"])
    run = words.read(folder)
    parts.append(_list(words.figures(run)))
    previews = sorted((folder / "previews").glob("step_*.png"))
    ends = list(dict.fromkeys([*previews[:1], *previews[-1:]]))
    if ends:
        parts.append(f"<p>Previews, the first and the last. {_text(words.PREVIEWS[name])}</p>")
    for file, what in [*((file, f"preview at {file.stem}") for file in ends),
                       (folder / CURVES_FILE, "curves of training")]:  # fmt: skip
        if file.is_file():
            parts.append(_picture(file.read_bytes(), f"{name}: {what}", ' class="wide"'))
    told = words.diagnosis(run, str(out / "clip") if name != "clip" else "")
    parts.append(f"<p>The doctor says:</p>\n<pre>{_text(told)}</pre>")
    return "\n".join(parts)


def chosen(captions: tuple[str, ...]) -> list[str]:
    """Some captions, evenly spread."""
    spread = np.linspace(0, len(captions) - 1, min(CAPTIONS, len(captions)))
    return [captions[i] for i in sorted(set(spread.round().astype(int).tolist()))]


def _drawn(out: Path, found: Found) -> str:
    """Pictures for captions of both splits, and whether CLIP knows them by their captions."""
    model = UnCLIP.load(out, mesh="all")
    trained = chosen(tuple(text for text in found.captions if text.strip()))
    others = tuple(text for text in found.heldout_captions if text not in trained and text.strip())
    unseen = chosen(others)
    captions = [*trained, *unseen]
    print(f"drawing {EACH} pictures of each of {len(captions)} captions", flush=True)
    with StageBars() as bars:
        key, told = jax.random.key(0), {"batch_size": BATCH, "progress": bars.update}
        pictures = model.generate(key, captions, num=EACH, **told)
    each = [caption for caption in captions for _ in range(EACH)]
    grid = captioned_grid(list(pictures), each, columns=2 * EACH)
    save_png(grid, out / SAMPLES, {"prompt": json.dumps(captions)})
    own = _recognised(model, pictures, captions)
    parts = ["<h2>What it draws</h2>"]
    for title, some in (("for captions it was trained on", trained), ("for captions it never saw",
                                                                      unseen)):  # fmt: skip
        if some:
            parts.append(f"<h3>{title}</h3>\n<div class='drawn'>")
            parts += [_figure(pictures, captions, caption) for caption in some]
            parts.append("</div>")
    parts.append(
        f"<p>Of these {len(each)} pictures CLIP finds the own caption nearest, of {len(captions)},"
        f" for {own:.0%}; chance {1 / len(captions):.0%}.</p>"
    )
    return "\n".join(parts)


def _figure(pictures: np.ndarray, captions: list[str], caption: str) -> str:
    at = EACH * captions.index(caption)
    shown = "".join(_picture(_png(x), caption) for x in pictures[at : at + EACH])
    return f"<figure>{shown}<figcaption>{_text(caption)}</figcaption></figure>"


def _recognised(model: UnCLIP, pictures: np.ndarray, captions: list[str]) -> float:
    """The share of the pictures whose own caption is the nearest of all, by the model's CLIP."""
    clip = model.need("clip", "know pictures by their captions")
    z_t = np.asarray(encode_text(clip.stage, clip.params, model.tokens(clip, captions)))
    nearest = np.argmax(np.asarray(model.embed_image(pictures)) @ z_t.T, axis=1)
    return float(np.mean(nearest == np.repeat(np.arange(len(captions)), EACH)))


def _next(out: Path, budget: Budget) -> str:
    model = ["--model", str(out)]
    more = f"{2 * math.ceil(max(budget.minutes, budget.spent / 60)):g}"  # than it has taken
    commands = [
        ["unclip", "sample", "text2im", *model, "--prompt", "a caption"],
        ["unclip", "app", *model],
        ["unclip", "train-all", "--data", budget.data, "--out", str(out), "--minutes", more],
    ]
    lines = "\n".join(_text(shlex.join(words)) for words in commands)
    return f"<h2>Go on</h2>\n<p>Draw, in a browser too; train on:</p>\n<pre>{lines}</pre>"
