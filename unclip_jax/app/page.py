"""The page: a tab for each task, and what a click does."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import gradio as gr

from unclip_jax.app import examples, inputs, look, tasks
from unclip_jax.app.results import Result, keep
from unclip_jax.app.store import Store
from unclip_jax.app.tasks import Request, Served
from unclip_jax.app.widgets import (
    Buttons,
    Output,
    guidance,
    line,
    seed,
    shown,
    small,
    steps,
    upload,
)
from unclip_jax.app.worker import Job, Worker
from unclip_jax.errors import UserError
from unclip_jax.pipeline.drawing import Progress
from unclip_jax.pipeline.manipulate import MIXES

_POLL_SECONDS = 0.2

# One at a time decodes an upload, so that many large ones do not fill the memory.
_decoding = threading.Lock()


class Page:
    """The page of one model."""

    def __init__(self, served: Served, worker: Worker, store: Store) -> None:
        """Draw with `served` in the thread of `worker`, into folders of `store`."""
        self.served, self.worker, self.store = served, worker, store

    def build(self) -> gr.Blocks:
        """Lay it out; a model has the tabs that its parts allow."""
        model = self.served.model
        reads_z_i = "z_i" in model.decoder.stage.conditions
        with gr.Blocks(title="unclip_jax", analytics_enabled=False) as blocks:
            gr.HTML(look.head(self.served.name, model.image_size, model.known), elem_classes="head")
            with gr.Tabs():
                if model.prior is not None or not reads_z_i:
                    self._text_to_image()
                if model.clip is not None and reads_z_i:
                    self._img2img()
                    self._mix()
                    self._variations()
                    self._interpolation()
                    self._text_diff()
                    self._labels()
                    if model.prior is not None:
                        self._ablation()
            gr.HTML(look.foot(self.worker.limit), elem_classes="foot")
            blocks.unload(self._leave)
        return blocks.queue(default_concurrency_limit=None, max_size=100)

    # ---------------------------------------------------------------------------- the tabs

    @contextlib.contextmanager
    def _tab(self, name: str, prepare: Callable[..., Request], **kind: bool) -> Iterator[list]:
        """A tab that draws what `prepare(served, *form)` asks for; yields the form, to fill."""
        form: list[gr.components.Component] = []
        with gr.Tab(name), gr.Row():
            with gr.Column(scale=2, min_width=300):
                yield form
                buttons = Buttons.make()
            with gr.Column(scale=3, min_width=300):
                output = Output.make(**kind)
        for field in form:
            if isinstance(field, gr.Image):
                _check(field, output)
        self._on_click(buttons, prepare, form, output)

    def _text_to_image(self) -> None:
        with self._tab("Text to image", tasks.text_to_image) as form:
            form.append(line("Prompt", placeholder="a red apple"))
            shown(examples.captions(self.served.model.known, "Prompt"))
            form += [gr.Radio(tasks.NUMS, value=4, label="Pictures"), seed()]
            with gr.Accordion("More settings", open=False):
                form.append(guidance("empty: the model's own"))
                form.append(guidance("empty: the model's own", "Prior's guidance scale"))
                form += [self._small(), *self._negative()]

    def _img2img(self) -> None:
        info = "0: the picture itself; 1: nothing of it but what CLIP sees"
        has_prior = self.served.model.prior is not None
        with self._tab("From a picture", tasks.img2img) as form:
            form += [
                upload("Picture"),
                line("Prompt", info="may be empty", visible=has_prior),
            ]
            shown(examples.turns(None, "Prompt" if has_prior else None))
            form += [
                gr.Slider(0, 1, value=0.6, step=0.05, label="Strength", info=info),
                gr.Checkbox(False, label="Start from inversion", info="keeps more of the picture"),
                gr.Radio(tasks.NUMS, value=4, label="Pictures"),
                seed(),
                *self._walk("empty: the model's own"),
            ]

    def _mix(self) -> None:
        info = f"up to {tasks.MAX_PROMPTS}; may be empty"
        has_prior = self.served.model.prior is not None
        with self._tab("Mix", tasks.mix) as form:
            with gr.Row():
                form += [upload("First picture"), upload("Second picture")]
            shown(examples.pairs())
            weights = "pictures' first, apart by spaces; empty: equal ones"
            form += [
                gr.Textbox(label="Prompts, one a line", info=info, lines=3, visible=has_prior),
                line("Weights", info=weights),
                gr.Radio(MIXES, value=MIXES[0], label="How"),
                gr.Radio(tasks.NUMS, value=4, label="Pictures"),
                seed(),
            ]
            with gr.Accordion("More settings", open=False):
                form += [guidance("empty: the model's own"), self._small(), *self._negative()]

    def _variations(self) -> None:
        info = "0: the picture itself; 1: freest"
        with self._tab("Variations", tasks.variations) as form:
            form.append(upload("Picture"))
            shown(examples.single())
            form += [
                gr.Radio(tasks.NUMS, value=4, label="Pictures"),
                gr.Slider(0, 1, value=1, step=0.05, label="η", info=info),
                seed(),
                *self._walk("empty: none"),
            ]

    def _interpolation(self) -> None:
        with self._tab("Interpolation", tasks.interpolation, walks=True) as form:
            with gr.Row():
                form += [upload("First picture"), upload("Second picture")]
            shown(examples.pairs())
            form.append(gr.Radio(tasks.FRAMES, value=9, label="Frames"))
            form += [seed(), *self._walk("empty: none")]

    def _text_diff(self) -> None:
        with self._tab("Text diff", tasks.text_diff, walks=True) as form:
            form += [
                upload("Picture"),
                line("From", placeholder="a red thing", info="may be empty"),
                line("To", placeholder="a blue thing"),
            ]
            shown(examples.turns("From", "To"))
            form += [
                gr.Slider(0, 1, value=0.5, step=0.05, label="θ at the end"),
                gr.Radio(tasks.FRAMES, value=5, label="Frames"),
                seed(),
                *self._walk("empty: none"),
            ]

    def _labels(self) -> None:
        words, info = "red apple\ndog face\nflag of France", "does it change what CLIP sees?"
        with self._tab("What CLIP sees", tasks.labels, chances=True) as form:
            form.append(upload("Picture"))
            shown(examples.single())
            form += [
                gr.Textbox(words, label="Labels, one a line", lines=4),
                line("A word to write on it", info=f"{info} may be empty"),
                gr.Radio(tasks.DECODED, value=0, label="Pictures decoded of what it sees"),
                seed(),
                *self._walk("empty: the model's own"),
            ]

    def _ablation(self) -> None:
        info = (
            f"up to {tasks.MAX_PROMPTS}; each is drawn from the caption alone, from its text"
            " embedding in the image's place, and from the prior's embedding"
        )
        prompts = "red apple\nflag of France"
        with self._tab("What the prior adds", tasks.ablation) as form:
            form.append(gr.Textbox(prompts, label="Prompts, one a line", info=info, lines=4))
            form += [seed(), *self._walk("empty: the model's own")]

    def _walk(self, unset: str) -> list[gr.components.Component]:
        with gr.Accordion("More settings", open=False):
            return [steps(), guidance(unset), self._small(), *self._negative()]

    def _negative(self) -> list[gr.components.Component]:
        """A field for what not to draw, where the decoder can be led away from a caption."""
        if "text_mask" not in self.served.model.decoder.stage.conditions:
            return []
        info = "what not to draw, where there is guidance; may be empty"
        return [line("Negative prompt", info=info)]

    def _small(self) -> gr.Checkbox:
        model = self.served.model
        return small(model.decoder.stage.image_size, model.image_size)

    # ------------------------------------------------------------------------- what is done

    def _on_click(
        self,
        buttons: Buttons,
        prepare: Callable[..., Request],
        form: Sequence[gr.components.Component],
        output: Output,
    ) -> None:
        """Draw what `prepare(served, *form)` asks for."""
        unchanged = [gr.skip()] * len(output.results)

        async def click(request: gr.Request, *values: Any) -> AsyncIterator[list[Any]]:
            began, said = time.monotonic(), ""
            try:
                job = await asyncio.to_thread(self.submit, _owner(request), prepare, values)
            except UserError as error:
                yield [look.wrong(str(error)), *unchanged, *buttons.updates(busy=False)]
                return
            try:
                while not job.over.is_set():
                    if said != (said := look.waiting(job, self.worker.ahead(job))):
                        yield [said, *unchanged, *buttons.updates(busy=True)]
                    await asyncio.sleep(_POLL_SECONDS)
            finally:  # also where the browser has gone away meanwhile
                self.worker.cancel_job(job)
            if job.error:
                yield [look.wrong(job.error), *unchanged, *buttons.updates(busy=False)]
            else:
                said = look.done(job.notes, time.monotonic() - began, job.hint)
                shown = output.updates(job.result)
                yield [said, *shown, *buttons.updates(busy=False)]

        outputs = [output.status, *output.results, buttons.draw, buttons.cancel]
        hidden = {"api_visibility": "private", "show_progress": "hidden"}
        lines = [field.submit for field in form if isinstance(field, gr.Textbox)]  # Enter
        gr.on([buttons.draw.click, *lines], click, list(form), outputs, **hidden)
        buttons.cancel.click(self._leave, **hidden)

    def submit(self, owner: str, prepare: Callable[..., Request], values: Sequence[Any]) -> Job:
        """Check a form and put it into the queue; the job's result is a `Result`.

        Raises:
            UserError: something in the form, or a full queue.
        """
        with _decoding:
            request = prepare(self.served, *values)

        def task(progress: Progress) -> Result:
            drawn = request.draw(progress)
            return keep(request, drawn, self.store.new())

        return self.worker.submit(owner, task, hint=self._hint(request))

    def _hint(self, request: Request) -> str:
        """What is to be said of the captions of a request."""
        args, prompt = request.args, getattr(request.args, "prompt", [])
        asked = {"Prompt": [prompt], "": []} if isinstance(prompt, str) else {"": prompt}
        if args.task == "text2im":
            asked = {"Prompt": prompt}
        asked["To"] = [getattr(args, "to", "")]
        known = self.served.model.known
        said = (look.unfamiliar(known, text, to) for to, texts in asked.items() for text in texts)
        return "".join(dict.fromkeys(said))

    def _leave(self, request: gr.Request) -> None:
        self.worker.cancel(_owner(request))


def _owner(request: gr.Request) -> str:
    return str(request.session_hash)


def _check(field: gr.Image, output: Output) -> None:
    """Say at once what is wrong with an upload, and take it away."""

    def check(path: str | None) -> tuple[Any, str]:
        try:
            with _decoding:
                inputs.picture(field.label.lower(), path)
        except UserError as error:
            return None, look.wrong(str(error))
        return gr.skip(), look.IDLE

    field.upload(
        check, field, [field, output.status], api_visibility="private", show_progress="hidden"
    )
