"""The server: gradio behind the gate, with all files in one folder that goes when it stops."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
from gradio.themes.utils.fonts import Font
from starlette.middleware import Middleware

from unclip_jax.app import examples, look
from unclip_jax.app.gate import Gate
from unclip_jax.app.inputs import MAX_BYTES
from unclip_jax.app.page import Page
from unclip_jax.app.store import Store
from unclip_jax.app.tasks import Served
from unclip_jax.app.worker import Worker
from unclip_jax.errors import UserError

WAITING = 8  # requests that may wait while one is drawn

# Fonts of the reader's own machine: none is loaded from anywhere.
_FONTS = [Font(name) for name in ("system-ui", "Helvetica Neue", "Arial", "sans-serif")]
_MONO = [Font(name) for name in ("ui-monospace", "DejaVu Sans Mono", "monospace")]


@contextlib.contextmanager
def serving(
    served: Served, *, host: str = "127.0.0.1", port: int | None = None, share: bool = False
) -> Iterator[str]:
    """Serve the page while the block runs.

    Args:
        served: the model.
        host: address to listen at; the default is reached from this machine alone.
        port: to listen at; None is 7860, or the next free one.
        share: also through gradio's tunnel, where anyone with the link can draw.

    Yields:
        the page's address.

    Raises:
        UserError: the address is taken or not ours, or the tunnel cannot be reached.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="unclip_jax_app_"))
        stack.enter_context(_environment("GRADIO_TEMP_DIR", folder))
        store, worker = Store(Path(folder)), Worker(WAITING)
        stack.callback(worker.close)
        blocks = Page(served, worker, store).build()
        stack.callback(blocks.close, verbose=False)
        try:
            _, local, shared = blocks.launch(
                server_name=host,
                server_port=port,
                share=share,
                prevent_thread_lock=True,
                quiet=True,
                theme=_theme(),
                css=look.CSS,
                head=examples.HEAD,
                footer_links=[],
                run_history=False,
                ssr_mode=False,
                enable_monitoring=False,
                allowed_paths=[],
                max_file_size=MAX_BYTES,
                app_kwargs={"middleware": [Middleware(Gate, store=store)]},
            )
        except (OSError, ValueError) as error:
            raise UserError(
                f"--host {host} --port {port or 'any'}: cannot be served at ({error}); give another"
            ) from error
        if share and not shared:
            raise UserError(
                "--share: gradio's tunnel cannot be reached from here; leave it out, and see"
                " docs/app.md for ssh"
            )
        yield shared or local


def _theme() -> gr.themes.Base:
    theme = gr.themes.Default(primary_hue="slate", font=_FONTS, font_mono=_MONO)
    return theme.set(
        button_primary_background_fill_dark="*primary_500",
        button_primary_background_fill_hover_dark="*primary_600",
    )


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
