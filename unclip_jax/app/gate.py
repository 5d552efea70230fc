"""Which requests reach gradio: those that the page itself makes, of bounded size.

Gradio serves much besides the page (an API, a proxy, monitoring, fetching of URLs). This ASGI
middleware stands in front of it, refuses in words what the page does not need, and forbids the
browser, by a Content-Security-Policy, to load anything from elsewhere.
"""

from __future__ import annotations

import collections
import json
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

from unclip_jax.app.inputs import MAX_BYTES
from unclip_jax.app.store import Store

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

UPLOADS_PER_MINUTE = 60  # of all users together
MAX_CALL_BYTES = 2**18  # of what a click sends

_API = "/gradio_api"
_READ = re.compile(
    r"/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json|(assets|static|svelte)/.*)?"
    rf"|{_API}/(app_id|startup-events|login_check|queue/data|upload_progress|heartbeat/\w+)/?"
    rf"|{_API}/file=(?!https?:).+",
    re.DOTALL,
)
_WRITE = {
    f"{_API}/queue/join": MAX_CALL_BYTES,
    f"{_API}/cancel": MAX_CALL_BYTES,
    f"{_API}/reset": MAX_CALL_BYTES,
    f"{_API}/upload": MAX_BYTES + 2**16,  # and what multipart adds
}
_HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' data: blob:; font-src 'self' data:;"
        b" style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline' 'unsafe-eval';"
        b" worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class Gate:
    """ASGI middleware; see the module."""

    def __init__(self, app: Any, store: Store) -> None:
        """Stand before `app`, whose files lie in `store`."""
        self._app, self._store = app, store
        self._uploads: collections.deque[float] = collections.deque(maxlen=UPLOADS_PER_MINUTE)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it with a line of text."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return  # the page opens no web sockets
        path, method = scope["path"], scope["method"]
        if method in ("GET", "HEAD") and _READ.fullmatch(path):
            await self._app(scope, receive, _with_headers(send))
        elif method == "POST" and path in _WRITE:
            await self._write(scope, receive, _with_headers(send), _WRITE[path])
        else:
            await _refuse(send, 404, "this page has nothing there")

    async def _write(self, scope: Message, receive: Receive, send: Send, limit: int) -> None:
        is_upload = scope["path"] == f"{_API}/upload"
        if is_upload and not self._may_upload():
            await _refuse(
                send, 429, f"more than {UPLOADS_PER_MINUTE} uploads a minute; wait a little"
            )
            return
        body = await _body(receive, limit)
        if body is None:
            await _refuse(send, 413, f"more than the {limit / 2**20:.2g} MB that are taken")
        elif not is_upload and _fetches(body):
            await _refuse(send, 400, "pictures are uploaded, not fetched from addresses")
        else:
            await self._app(scope, _replay(body, receive), send)

    def _may_upload(self) -> bool:
        """Whether one more upload is within the rate; old files make room for it."""
        now = time.monotonic()
        if len(self._uploads) == self._uploads.maxlen and now - self._uploads[0] < 60.0:
            return False
        self._uploads.append(now)
        self._store.tidy()
        return True


def _with_headers(send: Send) -> Send:
    async def sends(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = message | {"headers": [*message.get("headers", []), *_HEADERS]}
        await send(message)

    return sends


async def _refuse(send: Send, status: int, words: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), *_HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": words.encode()})


async def _body(receive: Receive, limit: int) -> bytes | None:
    """The whole body of a request; None as soon as it is longer than the limit."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return bytes(body)
        body += message.get("body", b"")
        if len(body) > limit:
            return None
        if not message.get("more_body"):
            return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """What was read of a request, given once more; then whatever follows."""
    left = [{"type": "http.request", "body": body, "more_body": False}]

    async def receives() -> Message:
        return left.pop() if left else await receive()

    return receives


def _fetches(body: bytes) -> bool:
    """Whether a call names a file by an address elsewhere, which gradio would fetch."""
    try:
        left = [json.loads(body)]
    except ValueError:
        return False  # gradio says what is wrong with it
    except RecursionError:
        return True  # nested deeper than any form
    while left:
        value = left.pop()
        if isinstance(value, dict):
            if str(value.get("path", "")).lower().startswith(("http:", "https:")):
                return True
            left += value.values()
        elif isinstance(value, list):
            left += value
    return False
