"""Files found by pattern, and shards on a web server and in a bucket, read by ranges."""

import functools
import http.server
import os
import threading

import fsspec
import pytest

from tests.tar_shards import archive, fill, jpeg, shard, source
from unclip_jax.data.records import BadRecord
from unclip_jax.data.shards import storage, webdataset
from unclip_jax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    return fill(tmp_path)


# --- patterns -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a", ["a"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("x{08..11}y", ["x08y", "x09y", "x10y", "x11y"]),
        ("{0..2}{a,b}", ["0a", "0b", "1a", "1b", "2a", "2b"]),
        ("{a,}", ["a", ""]),
    ],
)
def test_braces_stand_for_their_values(pattern, expected):
    assert list(storage.expand(pattern)) == expected


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("{3..1}", "is empty"),
        ("{}", "expected"),
        ("{a}", "expected"),
        ("{0..}", "expected"),
        ("{a,{b,c}}", "braces in braces"),
        ("a}", "without the other"),
        ("{0..1000000}", "1000001 files"),
        ("{0..999}{0..999}{0..9}", "10000000 files"),
        ("{0..999999999999999999}", "files"),
        ("{0..9999999999999999999999}", "expected"),
    ],
)
def test_braces_without_sense_are_refused(pattern, why):
    with pytest.raises(UserError, match=why):
        list(storage.expand(pattern))


def test_a_pattern_finds_files_or_says_what_is_wrong(folder):
    assert [file.name for file in storage.find(f"{folder}/*.tar")] == [
        f"0000{n}.tar" for n in range(3)
    ]
    assert storage.find(f"file://{folder}/00000.tar") == storage.find(f"{folder}/00000.tar")
    both = storage.find(f"{folder}/0000{{2,0}}.tar")
    assert [file.name for file in both] == ["00002.tar", "00000.tar"]
    for pattern, why in {
        f"{folder}/{{00000..00007}}.tar": r"0000\d\.tar: no such file",
        f"{folder}/*.zip": "no file matches",
        f"{folder}/*/x": "no file matches",
        f"{folder}": "a folder",
        "zz://a": "zz:// is an unknown protocol",
        "http://127.0.0.1:1/*.tar": "lists no files",
    }.items():
        with pytest.raises(UserError, match=why):
            storage.find(pattern)


def test_links_to_files_are_files(folder, tmp_path_factory):
    links = tmp_path_factory.mktemp("links")
    for path in folder.glob("*.tar"):
        (links / path.name).symlink_to(path)
    for pattern in ("*.tar", "{00000..00002}.tar"):
        files = storage.find(f"{links}/{pattern}")
        assert [file.size for file in files] == [
            p.stat().st_size for p in sorted(folder.glob("*.tar"))
        ]
        assert source(links, pattern)[25]["image"] == jpeg(25)
    (links / "broken.tar").symlink_to(folder / "nothing")
    with pytest.raises(UserError, match="broken"):
        source(links, "broken.tar")


def test_what_takes_a_network_is_known_by_its_address():
    for pattern in ("wds:gs://b/a.tar", "s3://b/*.tar", "parquet:HTTPS://h/a.parquet"):
        assert storage.is_remote(pattern)
    for pattern in ("wds:/d/a.tar", "emoji", "wds:memory://b/a.tar", "wds:file:///a", "tfds:a/b"):
        assert not storage.is_remote(pattern)


def test_a_missing_package_is_named(monkeypatch):
    def missing(protocol):
        raise ImportError("Please install it")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    for protocol, extra in (("gs", "gcs"), ("s3", "s3"), ("https", "http")):
        with pytest.raises(UserError, match=rf"pip install .*\[{extra}\]"):
            storage.find(f"{protocol}://bucket/a.tar")


# --- elsewhere ------------------------------------------------------------------------


def test_shards_in_a_bucket(folder):
    bucket = fsspec.filesystem("memory")
    for path in folder.glob("*.tar"):
        bucket.pipe(f"/bucket/{path.name}", path.read_bytes())
    try:
        for pattern in ("memory://bucket/{00000..00002}.tar", "memory://bucket/*.tar"):
            data = source(folder, pattern)
            assert data.fingerprint == source(folder).fingerprint
            assert data[25]["image"] == jpeg(25)
        bucket.rm("/bucket/00002.tar")
        with pytest.raises(BadRecord, match=r"memory://.*00002\.tar: no such file"):
            data[25]
    finally:
        bucket.rm("/bucket", recursive=True)


class Server(http.server.ThreadingHTTPServer):
    """A web server that counts what it sends, and fails as often as it is told to."""

    daemon_threads = True

    def __init__(self, folder, ranges=True):
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.sent, self.gets, self.failures, self.ranges = 0, 0, 0, ranges
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def end_headers(self):
        if self.command == "HEAD":
            self.send_header("ETag", "one")
        super().end_headers()

    def do_GET(self):
        if self.server.failures:
            self.server.failures -= 1
            self.send_error(503)
            return
        path = self.translate_path(self.path)
        if not os.path.isfile(path):
            self.send_error(404)
            return
        with open(path, "rb") as file:
            content = file.read()
        ranged = self.headers.get("Range") if self.server.ranges else None
        if ranged:
            first, last = map(int, ranged.removeprefix("bytes=").split("-"))
            content = content[first : last + 1]
        self.send_response(206 if ranged else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        # Counted before the client can have it, and look.
        self.server.gets, self.server.sent = self.server.gets + 1, self.server.sent + len(content)
        self.wfile.write(content)


@pytest.fixture
def serve(folder, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(storage, "WAITS", (0.0, 0.0, 0.0))
    servers = []

    def start(**options):
        servers.append(Server(folder, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_over_the_web_only_what_is_asked_for_is_read(folder, serve):
    server = serve()
    data = source(folder, server.url + "/{00000..00002}.tar")
    total = sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert server.sent <= total  # the index reads a shard of small images once
    server.sent = 0
    again = source(folder, server.url + "/{00000..00002}.tar")
    assert server.sent == 0
    assert again.fingerprint == data.fingerprint == source(folder).fingerprint
    order = [21, 3, 3, 14]
    assert [again[i]["image"] for i in order] == [jpeg(i) for i in order]
    assert server.sent == sum(len(jpeg(i)) for i in order)


def test_a_shard_of_large_images_is_read_once_when_it_is_indexed(folder, serve, monkeypatch):
    monkeypatch.setattr(webdataset, "_BLOCK_REMOTE", 4096)
    members = []
    for number in range(8):
        members += [(f"{number}.png", bytes(200_000)), (f"{number}.txt", b"text")]
    (folder / "large.tar").write_bytes(archive(members))
    server = serve()
    assert len(source(folder, server.url + "/large.tar")) == 8
    assert server.sent <= (folder / "large.tar").stat().st_size  # contents are its identity


def test_a_server_that_fails_for_a_while_is_asked_again(folder, serve):
    server = serve()
    data = source(folder, server.url + "/00000.tar")
    server.failures = 3
    assert data[4]["image"] == jpeg(4)
    server.failures = 4
    with pytest.raises(BadRecord, match=r"000004: http://.*/00000\.tar: .*503"):
        data[4]
    server.failures = 0
    (folder / "00000.tar").unlink()
    gets = server.gets
    with pytest.raises(BadRecord, match="no such file"):
        data[4]
    assert server.gets == gets
    with pytest.raises(UserError, match=r"00000\.tar: no such file"):
        source(folder, server.url + "/00000.tar")


@pytest.mark.parametrize(("code", "attempts"), [(403, 1), (404, 1), (429, 4), (503, 4), (None, 4)])
def test_only_what_may_pass_is_tried_again(folder, monkeypatch, code, attempts):
    class Refusal(Exception):
        def __init__(self):
            self.code = code

    class Bucket:
        asked = 0

        def cat_file(self, path, start, stop):
            self.asked += 1
            raise Refusal

    monkeypatch.setattr(storage, "WAITS", (0.0, 0.0, 0.0))
    bucket = Bucket()
    file = storage.StoredFile("gs://b/a.tar", 100, "", bucket, "b/a.tar")
    assert (file.read(7, 7), bucket.asked) == (b"", 0)
    with pytest.raises(storage.StorageError, match=r"gs://b/a\.tar: Refusal"):
        file.read(0, 10)
    assert bucket.asked == attempts
    with pytest.raises(storage.StorageError, match="no bytes 90"):
        file.read(90, 101)


def test_a_server_without_ranges_is_named(folder, serve):
    server = serve(ranges=False)
    (folder / "big.tar").write_bytes(shard(range(100)) + bytes(2**22))
    with pytest.raises(UserError, match="knows no ranges"):
        source(folder, server.url + "/big.tar")
