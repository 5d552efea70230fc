"""What people upload to the web page, what it keeps, and what its server gives away: nothing."""

import asyncio
import http.client
import importlib.util
import io
import json
import os
import re
import struct
import sys
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.test_app import filled, model
from unclip_jax.__main__ import dispatch
from unclip_jax.app import gate, inputs, look, results, tasks
from unclip_jax.app.store import Store
from unclip_jax.app.tasks import Served
from unclip_jax.common import checks
from unclip_jax.errors import UserError

needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="gradio (the extra `app`) is not installed"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return filled(tmp_path_factory.mktemp("app"))


@pytest.fixture(scope="module")
def served(folder):
    return Served(model(), str(folder / "model"), batch_size=1)


# ------------------------------------------------------------------------------ what people upload


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side):
    """A PNG of a few bytes that says it has side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


RED, BLUE = Image.new("RGB", (9, 5), "red"), Image.new("RGB", (9, 5), "blue")
NOISE = Image.effect_noise((64, 64), 90)
GOOD = {
    "cmyk.jpg": (encoded(RED.convert("CMYK"), "JPEG", quality=95), (5, 9, 3)),
    "sixteen.png": (encoded(Image.fromarray(np.full((3, 4), 40000, np.uint16)), "PNG"), (3, 4, 3)),
    "one.png": (encoded(Image.new("1", (1, 1)), "PNG"), (1, 1, 3)),
    "animated.gif": (encoded(RED, "GIF", save_all=True, append_images=[BLUE]), (5, 9, 3)),
    "clear.png": (encoded(Image.new("RGBA", (6, 6), (0, 0, 0, 0)), "PNG"), (6, 6, 3)),
    "palette.png": (encoded(RED.convert("P"), "PNG"), (5, 9, 3)),
    "wrong name.txt": (encoded(RED, "WEBP", lossless=True), (5, 9, 3)),
}
BAD = {
    "text.png": (b"this is no picture", "is no picture, or a broken one; give PNG"),
    "empty.png": (b"", "is no picture"),
    "truncated.png": (
        encoded(Image.effect_noise((64, 64), 90), "PNG")[:900],
        "not a readable image",
    ),
    "truncated.jpg": (encoded(Image.effect_noise((64, 64), 90), "JPEG")[:700], "not a readable"),
    "large.png": (bomb(7000), "7000 x 7000 pixels, at most 40 million"),
    "bomb.png": (bomb(60000), "more than 40 million pixels"),
    "program.eps": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "is a EPS file",
    ),
    "picture.svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "is no picture"),
    "heavy.png": (b"\0" * (inputs.MAX_BYTES + 1), "20 MB, at most 20"),
}


@pytest.mark.parametrize("name", GOOD)
def test_pictures_of_every_kind_are_taken(name, tmp_path):
    data, shape = GOOD[name]
    (tmp_path / name).write_bytes(data)
    image = inputs.picture("picture", str(tmp_path / name))
    assert image.dtype == np.uint8 and image.shape == shape
    if name == "animated.gif":
        assert image[0, 0].tolist() == [255, 0, 0]  # its first frame
    if name == "clear.png":
        assert image.min() == 255
    if name == "sixteen.png":
        assert abs(int(image[0, 0, 0]) - 40000 / 257) < 1


@pytest.mark.parametrize("name", BAD)
def test_anything_else_is_answered_in_words(name, tmp_path):
    data, words = BAD[name]
    (tmp_path / name).write_bytes(data)
    with (
        warnings.catch_warnings(action="ignore"),
        pytest.raises(UserError, match=r"^picture: ") as caught,
    ):
        inputs.picture("picture", str(tmp_path / name))
    assert words in str(caught.value) and str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: inputs.text("prompt", "  "), "prompt: is empty"),
        (lambda: inputs.text("prompt", None), "prompt: expected some words"),
        (lambda: inputs.text("prompt", "x" * 1001), "1,001 characters"),
        (lambda: inputs.lines("labels", "a", least=2, most=9), "got 1 lines, expected 2 to 9"),
        (lambda: inputs.lines("labels", None, least=1, most=9), "got 0 lines"),
        (lambda: inputs.whole("seed", 1.5, 0, 9), "seed: got 1.5, expected a whole number, 0 to 9"),
        (lambda: inputs.whole("seed", -1, 0, 9), "got -1"),
        (lambda: inputs.whole("seed", None, 0, 9), "got None"),
        (lambda: inputs.whole("seed", "7", 0, 9), "got '7'"),
        (lambda: inputs.whole("seed", float("nan"), 0, 9), "got nan"),
        (lambda: inputs.whole("seed", True, 0, 9), "got True"),
        (lambda: inputs.whole("seed", 2**53, 0, inputs.MAX_SEED), "got 9007199254740992"),
        (lambda: checks.number("eta", 1.01, 0, 1), "eta: got 1.01, expected.*0 or more, 1 or less"),
        (lambda: checks.number("eta", float("inf"), 0, 1), "got inf"),
        (lambda: checks.number("eta", [0], 0, 1), r"got \[0\]"),
        (lambda: inputs.scale("guidance scale", 31), "0 or more, 30 or less"),
        (lambda: inputs.choice("pictures", 5, (1, 4)), "got 5, expected one of 1, 4"),
        (lambda: inputs.choice("pictures", True, (1, 4)), "got True"),
        (lambda: inputs.choice("pictures", [4], (1, 4)), r"got \[4\]"),
        (lambda: inputs.picture("picture", None), "there is none; upload one"),
        (lambda: inputs.picture("picture", "/nowhere.png"), "upload it again"),
    ],
)
def test_forms_are_checked(wrong, words):
    with pytest.raises(UserError, match=words):
        wrong()


# --------------------------------------------------------------------------------- what is kept


def test_old_files_go_and_the_oldest_make_room(tmp_path):
    store = Store(tmp_path, seconds=100, size=25)
    now = time.time()
    for name, age in (("old", 200), ("older", 300), ("young", 10), ("younger", 5), ("new", 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"x" * 10)
        os.utime(tmp_path / name, (now - age, now - age))
    store.tidy()
    assert {path.name for path in tmp_path.iterdir()} == {"younger", "new"}
    made = [store.new() for _ in range(3)]
    assert len({path.name for path in made}) == 3
    assert all(len(path.name) > 30 for path in made), "nobody guesses it"


def test_what_people_type_is_text_on_the_page(tmp_path):
    evil = "<img src=x onerror=alert(1)>"
    drawn = tasks.Drawn([], 1, chances={evil: [1.0]}, seen=(evil,))
    result = results.Result(drawn, {"prompt": [evil]}, f"python {evil}", "", [], [], None)
    shown = [look.details(result), look.chances(result), look.wrong(evil), look.done([evil], 1.0)]
    for html in [*shown, look.head(evil, 64)]:
        assert "<img" not in html and "&lt;img" in html


# ------------------------------------------------------------------------------------- the gate


class Inner:
    """What stands behind the gate: it remembers what came through."""

    def __init__(self):
        self.bodies = []

    async def __call__(self, scope, receive, send):
        self.bodies.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"inside"})


def ask(app, method, path, *parts):
    """Status, headers and body of a request whose body comes in parts."""
    left = [
        {"type": "http.request", "body": part, "more_body": i + 1 < len(parts)}
        for i, part in enumerate(parts or (b"",))
    ]
    sent = []

    async def receive():
        return left.pop(0)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path}
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"]


@pytest.fixture
def gated(tmp_path):
    inner = Inner()
    return gate.Gate(inner, Store(tmp_path)), inner


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 200),
        ("HEAD", "/", 200),
        ("GET", "/assets/index.js", 200),
        ("GET", "/gradio_api/queue/data", 200),
        ("GET", "/gradio_api/file=/tmp/x/grid.png", 200),  # gradio checks where it lies
        ("POST", "/gradio_api/queue/join", 200),
        ("POST", "/gradio_api/upload", 200),
        ("GET", "/gradio_api/file=http://169.254.169.254/", 404),
        ("GET", "/gradio_api/proxy=https://x.hf.space/", 404),
        ("GET", "/gradio_api/info", 404),
        ("GET", "/monitoring", 404),
        ("POST", "/gradio_api/run/predict", 404),
        ("POST", "/gradio_api/call/click", 404),
        ("POST", "/", 404),
        ("PUT", "/gradio_api/upload", 404),
        ("GET", "/openapi.json", 404),
        ("GET", "/docs", 404),
    ],
)
def test_only_what_the_page_needs_comes_through(gated, method, path, status):
    app, inner = gated
    found, headers, body = ask(app, method, path)
    assert found == status and len(inner.bodies) == (status == 200)
    assert headers[b"content-security-policy"].startswith(b"default-src 'self'")
    assert status == 200 or body == b"this page has nothing there"


def test_bodies_are_bounded_and_addresses_refused(gated):
    app, inner = gated
    join = "/gradio_api/queue/join"
    assert ask(app, "POST", join, b'{"data":', b'["x"]}')[0] == 200
    assert inner.bodies == [b'{"data":["x"]}']
    half = b"x" * (gate.MAX_CALL_BYTES // 2)
    assert ask(app, "POST", join, half, half, b"y")[0] == 413
    far = {"data": [1, {"path": "HTTPS://example.org/x.png", "meta": {"_type": "gradio.FileData"}}]}
    assert ask(app, "POST", join, json.dumps(far).encode())[0] == 400
    deep = b'{"data":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    assert ask(app, "POST", join, deep)[0] in (200, 400)  # and no failure
    assert len(inner.bodies) <= 2


def test_uploads_have_a_rate(gated):
    app, _ = gated
    answers = [
        ask(app, "POST", "/gradio_api/upload")[0] for _ in range(gate.UPLOADS_PER_MINUTE + 2)
    ]
    assert answers == [200] * gate.UPLOADS_PER_MINUTE + [429] * 2


# ----------------------------------------------------------------------------------- the server


def test_without_gradio_the_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "unclip_jax.app.serve", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"unclip app: needs gradio.*\[app\]"):
        dispatch(["app", "--model", "nowhere"])


@pytest.fixture(scope="module")
def server(served):
    from unclip_jax.app.serve import serving

    with serving(served) as address:
        yield address.split("//")[1].strip("/")


def get(server, path, body=None, headers=None):
    """Status and body; the path goes out as it stands."""
    connection = http.client.HTTPConnection(server, timeout=60)
    connection.putrequest("POST" if body else "GET", path, skip_accept_encoding=True)
    for name, value in (headers or {}).items():
        connection.putheader(name, value)
    if body:
        connection.putheader("content-length", str(len(body)))
    connection.endheaders(body)
    answer = connection.getresponse()
    return answer.status, answer.read()


def upload(server, name, data):
    body = (
        b"--x\r\ncontent-disposition: form-data; name=files; filename="
        + json.dumps(name).encode()
        + b"\r\ncontent-type: image/png\r\n\r\n"
        + data
        + b"\r\n--x--\r\n"
    )
    return get(
        server, "/gradio_api/upload", body, {"content-type": "multipart/form-data; boundary=x"}
    )


@needs_gradio
def test_the_page_comes_whole_from_this_server(server):
    status, page = get(server, "/")
    assert status == 200
    loaded = re.findall(r"""(?:src|href)=["']([^"']+)""", page.decode())
    assert loaded and not [url for url in loaded if "//" in url and server not in url]
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


@needs_gradio
def test_no_file_but_the_page_s_own_is_served(server, folder):
    for name in ("../../../evil.png", "/etc/evil.png", "a.png"):
        status, answer = upload(server, name, encoded(RED, "PNG"))
        assert status == 200
        (path,) = json.loads(answer)
        root = Path(path).parent.parent
        assert root.name.startswith("unclip_jax_app_") and Path(path).parent != root
        assert Path(path).resolve() == Path(path)
        assert get(server, f"/gradio_api/file={path}") == (200, encoded(RED, "PNG"))
    secrets = {
        "/etc/passwd",
        str(Path(__file__).resolve()),
        str(Path("pyproject.toml").resolve()),
        str(next((folder / "model" / "clip").glob("*.json"))),
    }
    for secret in secrets:
        assert Path(secret).is_file()
        up = "../" * 12 + secret.lstrip("/")
        for asked in (
            f"/gradio_api/file={secret}",
            f"/gradio_api/file=/{secret}",
            f"/gradio_api/file={path}/{up}",
            f"/gradio_api/file={root}/{up}",
            f"/gradio_api/file={root}/{up.replace('/', '%2f').replace('.', '%2e')}",
            f"/gradio_api/file={up}",
            f"/gradio_api/file=file://{secret}",
            f"/static/{up}",
            f"/assets/{up}",
            f"/svelte/{up}",
            f"/{up}",
        ):
            status, body = get(server, asked)
            assert status >= 400 and Path(secret).read_bytes()[:40] not in body, asked
    assert get(server, f"/gradio_api/file={root}")[0] >= 400  # no listing


@needs_gradio
def test_a_path_that_was_not_uploaded_is_not_read(server):
    """A forged click that names a file of the server."""
    config = json.loads(get(server, "/config")[1])
    image = {part["id"] for part in config["components"] if part["type"] == "image"}
    checks = [
        d["id"] for d in config["dependencies"] if len(d["inputs"]) == 1 and d["inputs"][0] in image
    ]
    assert checks
    file = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    call = {"data": [file], "fn_index": checks[0], "session_hash": "forged"}
    headers = {"content-type": "application/json"}
    assert get(server, "/gradio_api/queue/join", json.dumps(call).encode(), headers)[0] == 200
    status, answer = get(server, "/gradio_api/queue/data?session_hash=forged")
    assert status == 200 and b"root:" not in answer
    assert b'"success":false' in answer.replace(b" ", b"")


@needs_gradio
def test_nothing_is_left_when_the_server_stops(served):
    from unclip_jax.app.serve import serving

    before = os.environ.get("GRADIO_TEMP_DIR")
    with serving(served) as address:
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        upload(address.split("//")[1].strip("/"), "a.png", encoded(RED, "PNG"))
        assert any(folder.iterdir())
    assert not folder.exists() and os.environ.get("GRADIO_TEMP_DIR") == before


@needs_gradio
def test_an_address_that_is_taken_is_named(served, server):
    from unclip_jax.app.serve import serving

    port = int(server.split(":")[1])
    with (
        pytest.raises(UserError, match=f"--port {port}: cannot be served"),
        serving(served, port=port),
    ):
        pass
