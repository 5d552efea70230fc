"""Parts that several tabs have: fields of their forms, buttons, and what shows a result."""

from __future__ import annotations

import dataclasses
from typing import Any

import gradio as gr

from unclip_jax.app import look, tasks
from unclip_jax.app.results import Result

_NEW_SEED = "() => Math.floor(Math.random() * 2 ** 31)"

# The picture of the strip whose caption, "θ = 0.25", is nearest to theta.
_AT_THETA = """(theta, strip) => {
    const away = (cell) => Math.abs(parseFloat(cell.caption.slice(4)) - theta);
    const nearest = (a, b) => (away(b) < away(a) ? b : a);
    return strip && strip.length ? strip.reduce(nearest).image : null;
}"""


def upload(label: str) -> gr.Image:
    """A field for a picture; its value is the path of the file as it was uploaded."""
    field = gr.Image(
        label=label,
        type="filepath",
        sources=["upload", "clipboard"],
        height=220,
        buttons=[],
        elem_classes="upload",
    )
    # Gradio would open the file itself, and answer a broken one with a traceback in the log.
    field.preprocess = lambda payload: payload and payload.path
    return field


def line(
    label: str, *, placeholder: str = "", info: str | None = None, visible: bool = True
) -> gr.Textbox:
    """A field for one line, which may wrap: Enter draws."""
    wraps = {"lines": 1, "max_lines": 4}
    return gr.Textbox(label=label, placeholder=placeholder, info=info, visible=visible, **wraps)


def shown(html: str) -> gr.HTML:
    """Bits of HTML between the fields."""
    return gr.HTML(html, elem_classes="shown")


def seed() -> gr.Number:
    """A field for the seed, and a button for another one."""
    with gr.Row():
        field = gr.Number(0, label="Seed", precision=0, min_width=120, scale=3)
        another = gr.Button("New seed", min_width=90, scale=1, elem_classes="quiet")
    another.click(fn=None, js=_NEW_SEED, outputs=field, api_visibility="private")
    return field


def guidance(unset: str, label: str = "Guidance scale") -> gr.Number:
    """A field for a guidance scale, which may stay empty."""
    return gr.Number(None, label=label, info=unset)


def small(decoder_size: int, image_size: int) -> gr.Checkbox:
    """A field that leaves the upsamplers out."""
    return gr.Checkbox(
        False,
        label=f"Stop at {decoder_size} pixels",
        info=f"leaves out the upsampling to {image_size}",
        visible=decoder_size != image_size,
    )


def steps() -> gr.Radio:
    """A field for the steps of DDIM."""
    return gr.Radio(tasks.STEPS, value=25, label="Steps")


@dataclasses.dataclass(frozen=True)
class Buttons:
    """Draw, and cancel what is being drawn."""

    draw: gr.Button
    cancel: gr.Button

    @classmethod
    def make(cls) -> Buttons:
        """Both in a row."""
        with gr.Row():
            draw = gr.Button("Draw", variant="primary", min_width=120, elem_classes="draw")
            cancel = gr.Button("Cancel", interactive=False, min_width=120, elem_classes="cancel")
        return cls(draw, cancel)

    def updates(self, *, busy: bool) -> list[Any]:
        """Which of the two can be pressed."""
        return [gr.update(interactive=not busy), gr.update(interactive=busy)]


@dataclasses.dataclass(frozen=True)
class Output:
    """What shows how a request goes, and what it came to.

    Attributes:
        status: progress, and words when something is wrong.
        results: components of a result, in the order of `updates`.
        walks: whether the tab has a theta to slide along.
    """

    status: gr.HTML
    results: list[gr.components.Component]
    walks: bool

    @classmethod
    def make(cls, *, walks: bool = False, chances: bool = False) -> Output:
        """In the order of reading: status, pictures, files, settings."""
        status = gr.HTML(look.IDLE, elem_classes="said")
        results = []
        if walks:
            image = gr.Image(
                label="Picture",
                height=300,
                interactive=False,
                buttons=["download", "fullscreen"],
                elem_classes="walked",
            )
            theta = gr.Slider(0, 1, value=0, label="θ", interactive=True, elem_classes="theta")
            results += [image, theta]
        if chances:
            results.append(gr.HTML(visible=False, elem_classes="shown"))
        gallery = gr.Gallery(
            label="Strip" if walks else "Pictures",
            show_label=False,
            columns=9 if walks else 4,
            object_fit="contain",
            height="auto",
            interactive=False,
            buttons=["download", "fullscreen"],
            allow_preview=not walks,
            elem_classes=["cells", "strip" if walks else "pictures"],
        )
        results.append(gallery)
        with gr.Row():
            results.append(gr.DownloadButton("Download the grid (PNG)", visible=False, size="sm"))
            if walks:
                results.append(gr.DownloadButton("Download the GIF", visible=False, size="sm"))
                theta.input(
                    fn=None,
                    js=_AT_THETA,
                    inputs=[theta, gallery],
                    outputs=image,
                    api_visibility="private",
                )
        results.append(gr.HTML(visible=False, elem_classes="settings"))
        return cls(status, results, walks)

    def updates(self, result: Result) -> list[Any]:
        """The values of `results` that show a result."""
        shown = result.walk if self.walks else result.pictures
        values: list[Any] = []
        if self.walks:
            largest = float(result.settings.get("theta_max", 1.0))
            step = largest / (len(shown) - 1)
            values += [shown[0][0], gr.update(value=0, maximum=largest or 1, step=step or 1)]
        elif result.drawn.seen:
            values.append(gr.update(value=look.chances(result), visible=True))
        alike = {text for _, text in shown} == {""}
        if (
            alike
        ):  # the caption stands beside the pictures, and says to screen readers what they are
            shown = [(file, result.drawn.cells[0][1]) for file, _ in shown]
        columns = 9 if self.walks else _columns(len(shown), result.drawn.columns)
        kinds = ["cells", "strip" if self.walks else "pictures", *["alike"] * alike]
        values.append(gr.update(value=shown, columns=columns, elem_classes=kinds))
        values.append(gr.update(value=result.grid, visible=True))
        if self.walks:
            values.append(gr.update(value=result.gif, visible=True))
        return [*values, gr.update(value=look.details(result), visible=True)]


def _columns(pictures: int, columns: int) -> int:
    """Pictures in a row of the page: those of the grid, but large, and at most five."""
    if columns == pictures:  # one row
        return {1: 1, 4: 2, 8: 4, 9: 3}.get(columns, min(columns, 5))
    return 2 if columns == 1 else columns
