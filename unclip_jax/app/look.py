"""How the page looks: its style sheet, and its own bits of HTML."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

from unclip_jax.app import examples
from unclip_jax.app.examples import ATTRIBUTION
from unclip_jax.app.inputs import FORMATS, MAX_BYTES, MAX_PIXELS
from unclip_jax.app.results import Result
from unclip_jax.app.worker import Job
from unclip_jax.weights.known import Known

CSS = """
.gradio-container { max-width: 1080px !important; margin: 0 auto !important; }
footer { display: none !important; }
.head h1 { font-size: 1.5rem; font-weight: 600; margin: .4rem 0 .1rem; }
.head .html-container, .foot .html-container { padding: 0; }
.head p, .foot p { color: var(--neutral-500); font-size: .9rem; margin: 0; }
.dark .head p, .dark .foot p { color: var(--neutral-300); }
.foot p { border-top: 1px solid var(--border-color-primary); padding-top: .8rem; }
button[role=tab][aria-selected=true] { color: var(--body-text-color); font-weight: 500; }
button.quiet { align-self: end; height: 2.6rem; margin-bottom: .7rem; font-weight: 500;
         font-size: .88rem; white-space: nowrap; }

.said .html-container, .shown .html-container, .settings .html-container { padding: 0; }
.status { font-size: .95rem; }
.status:empty { display: none; }
.status p { margin: 0; padding: .45rem 0; }
.status .wrong { border-left: 3px solid #b4232a; padding-left: .8rem; margin: .25rem 0; }
.stage { display: grid; grid-template-columns: 8rem 1fr 5.5rem; gap: .8rem; align-items: center;
         padding: .2rem 0; font-variant-numeric: tabular-nums; }
.stage span:last-child { text-align: right; }
.bar { height: 6px; border-radius: 3px; background: var(--border-color-primary); }
.bar i { display: block; height: 100%; border-radius: 3px; background: var(--color-accent); }

.cells .grid-wrap { height: auto; min-height: 0; max-height: none; overflow: visible; }
.cells .gallery-container:has(.preview) { min-height: 26rem; }
.cells .grid-container { grid-template-rows: none; grid-auto-rows: auto; gap: .5rem;
         grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)); }
.cells .thumbnail-lg { aspect-ratio: auto; height: auto; display: flex; flex-direction: column;
         border: 0; box-shadow: none; background: none; }
.cells .thumbnail-lg > img { aspect-ratio: 1; height: auto; }
.cells .caption-label { position: static; max-width: 100%; align-self: center; border: 0;
         background: none; padding: .15rem 0 0; white-space: normal; text-align: center; }

.details { font-size: .88rem; }
.details dl { display: flex; flex-wrap: wrap; gap: .15rem 1.2rem; margin: 0; padding: .3rem 0; }
.details div { display: flex; gap: .45rem; min-width: 0; }
.details dt { color: var(--neutral-500); margin: 0; white-space: nowrap; }
.dark .details dt { color: var(--neutral-300); }
.details dd { margin: 0; overflow-wrap: anywhere; }
.details p { margin: .5rem 0 .25rem; }
.details pre { font-size: .82rem; white-space: pre-wrap; overflow-wrap: anywhere; padding: .7rem;
         margin: 0; border: 1px solid var(--border-color-primary); border-radius: 4px;
         background: var(--background-fill-secondary); }
.chances table { width: 100%; border-collapse: collapse; font-size: .92rem; margin: 0; }
.chances table, .chances :is(td, th, tr) { border: 0 !important; background: none; }
.chances :is(td, th) { padding: .2rem 1rem .2rem 0; text-align: left; overflow-wrap: anywhere; }
.chances th { font-weight: 600; }
.chances td + td { font-variant-numeric: tabular-nums; white-space: nowrap; }
.chances .bar { width: min(9rem, 16vw); display: inline-block; margin-right: .6rem;
         vertical-align: middle; }

.examples { display: flex; flex-wrap: wrap; gap: .4rem; align-items: center; font-size: .88rem; }
.examples > span { color: var(--neutral-500); }
.dark .examples > span { color: var(--neutral-300); }
.examples * { margin: 0 !important; }
button.example, button.copy { border: 1px solid var(--border-color-primary); border-radius: 6px;
         background: var(--background-fill-secondary); color: var(--body-text-color);
         padding: .25rem .6rem; min-height: 2rem; cursor: pointer; display: inline-flex;
         align-items: center; gap: .3rem; font-size: .88rem; font-weight: 400; }
:is(button.example, button.copy):is(:hover, :focus-visible) {
         border-color: var(--color-accent); }
button.example img { width: 2.4rem; height: 2.4rem; border-radius: 4px; background: #fff; }
.details header { display: flex; justify-content: space-between; align-items: center;
         margin: .4rem 0; }
.draft { display: block; width: 100%; max-height: 30rem; object-fit: contain; margin: .4rem 0;
         object-position: left; }
.alike .caption-label { display: none; }

@media (max-width: 640px) {
  /* All tabs in rows, where gradio would hide them behind three dots. */
  .tab-wrapper { flex-wrap: wrap; justify-content: start; height: auto !important; }
  .tab-wrapper > .tab-container[role=tablist], .overflow-menu, .overflow-dropdown {
         display: contents !important; }
  .overflow-menu > button { display: none !important; }
  .tab-wrapper button { width: auto !important; padding: .45rem .7rem !important; }
  .stage { grid-template-columns: 6.8rem 1fr 4.2rem; gap: .5rem; }
  .pictures .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .strip .grid-container { grid-template-columns: repeat(5, minmax(0, 1fr)); }
}
"""


def head(model: str | list[str] | None, size: int, known: Known | None = None) -> str:
    """What the page is, and what the model knows."""
    names = [model] if isinstance(model, str) else model or []
    name = " and ".join(f"<code>{escape(each)}</code>" for each in names) or "the box model"
    said = f" {escape(known.sentence())}" if known else ""
    return (
        f"<h1>unclip_jax</h1><p>DALL·E 2 in JAX, drawing {size} × {size} pixels with {name}.{said}"
        "</p>"
    )


def foot(waiting: int) -> str:
    """What is taken, and for how long it is kept."""
    return (
        f"<p>One request is drawn at a time, and up to {waiting} wait. Uploads: {FORMATS}, up to"
        f" {MAX_BYTES >> 20} MB and {MAX_PIXELS // 10**6} million pixels; the centre square is"
        " used, of an animation the first frame. Files are deleted after an hour."
        f" {ATTRIBUTION}</p>"
    )


IDLE = '<div class="status" role="status"></div>'
_COMPILING = (
    "Starting. What has not been drawn since the server began is compiled first, which can take"
    " a minute."
)


def _status(inside: str) -> str:
    return f'<div class="status" role="status">{inside}</div>'


def unfamiliar(known: Known | None, caption: str, label: str) -> str:
    """What a caption has that the model doesn't know, and names to take instead; "" for nothing.

    With the label of a field, a click on a name puts it there.
    """
    unknown = known.unknown(caption) if known else []
    if not unknown:
        return ""
    near, words = known.near(caption), ", ".join(f"“{escape(word)}”" for word in unknown)
    title = "near" if near else "it knows"
    said = f"The model was trained on no caption with {words}."
    names = near or known.examples()
    if not label:
        return f'<p class="wrong">{said} {title.capitalize()}: {escape(", ".join(names))}.</p>'
    return f'<p class="wrong">{said}</p>{examples.row([examples.near(names, label)], title)}'


def waiting(job: Job, ahead: int) -> str:
    """A job in the queue, or being drawn: a bar for each stage, and what there is so far."""
    if job.cancelled:
        return _status("<p>Cancelling; the step at hand, or compiling, is finished first.</p>")
    if ahead:
        others = "one other" if ahead == 1 else f"{ahead} others"
        return _status(f"<p>Waiting for {others}.</p>{job.hint}")
    bars = "".join(_bar(name, *done) for name, done in job.stages.items())
    return _status((bars or f"<p>{_COMPILING}</p>") + _draft(job) + job.hint)


def _draft(job: Job) -> str:
    """The pictures as the samplers have them."""
    if job.draft is None:
        return ""
    stage, images = job.draft
    columns = min(len(images), 4)
    rows = [np.concatenate(images[i : i + columns], axis=1) for i in range(0, len(images), columns)]
    whole = [row for row in rows if row.shape == rows[0].shape]
    file = io.BytesIO()
    Image.fromarray(np.concatenate(whole)).save(file, format="JPEG", quality=80)
    source = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    step, steps = job.stages[stage]
    alt = f"being drawn: {escape(stage)}, step {step} of {steps}"
    return f'<img class="draft" src="{source}" alt="{alt}">'


def _bar(name: str, step: int, steps: int) -> str:
    return (
        f'<div class="stage"><span>{escape(name)}</span>'
        f'<div class="bar"><i style="width:{100 * step / steps:.0f}%"></i></div>'
        f"<span>{step} of {steps}</span></div>"
    )


def wrong(words: str) -> str:
    """What cannot be done, and what to do instead."""
    said = escape(words[:1].upper() + words[1:])
    return f'<div class="status" role="alert"><p class="wrong">{said}.</p></div>'


def done(notes: Sequence[str], seconds: float, hint: str = "") -> str:
    """A job that is over."""
    noted = "".join(f'<p class="wrong">{escape(note[:1].upper() + note[1:])}</p>' for note in notes)
    return _status(f"<p>Done in {seconds:.0f} s.</p>{noted}{hint}")


def details(result: Result) -> str:
    """The settings, and the command line that draws the same."""
    rows = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(_shown(value))}</dd></div>"
        for name, value in result.settings.items()
    )
    said = ""
    if result.command:
        copy = '<button type="button" class="copy">Copy</button>'
        title = f"<header><span>The same pictures by command:</span>{copy}</header>"
        said = f"<section>{title}<pre>{escape(result.command)}</pre></section>"
    return f'<div class="details"><dl>{rows}</dl>{said}</div>'


def _shown(value: object) -> str:
    if value is True:
        return "yes"
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)


def chances(result: Result) -> str:
    """CLIP's probabilities, a row for each label, the first picture's largest on top."""
    if not result.drawn.chances:
        return ""
    head = "".join(f"<th>{escape(seen)}</th>" for seen in result.drawn.seen)
    ordered = sorted(result.drawn.chances.items(), key=lambda row: -row[1][0])
    rows = "".join(
        f"<tr><td>{escape(label)}</td>{''.join(map(_chance, found))}</tr>"
        for label, found in ordered
    )
    return f'<div class="chances"><table><tr><th>label</th>{head}</tr>{rows}</table></div>'


def _chance(p: float) -> str:
    bar = f'<span class="bar"><i style="width:{100 * p:.1f}%"></i></span>'
    return f"<td>{bar}{100 * p:.1f} %</td>"
