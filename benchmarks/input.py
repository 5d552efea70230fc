"""How fast pairs are read, decoded and tokenised, against how fast training needs them.

    python benchmarks/input.py [--images=1500] [--batch_size=64]
    python benchmarks/input.py --need --hosts=32 --step_time=prior=0.9,decoder=2.5

The first form makes JPEGs of 512x384 with captions, stores them in every way that
`config.data.name` knows for files, and prints images per second, in random order and with
nothing cached, the best of three runs. The second prints what each paper preset needs of a
host: its batch, over the hosts, over the seconds that a step takes. What they printed is in
docs/data.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import http.server
import io
import multiprocessing
import os
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from unclip_jax.data.batches import batches
from unclip_jax.data.datasets import DataConfig, load
from unclip_jax.data.shards import parquet
from unclip_jax.data.tokenizer import Tokenizer

BATCHES = {  # per step, in configs/paper
    "clip": 32768,
    "prior": 4096,
    "ar_prior": 4096,
    "decoder": 2048,
    "upsampler_256": 1024,
    "upsampler_1024": 512,
}
CAPTION = "a photograph of number {} of many, with soft light, some noise and no people in it"
PER_SHARD = 250
ROW_GROUP = 100


def photograph(rng: np.random.Generator) -> bytes:
    """A JPEG of about 60 kB: large shapes, fine grain."""
    shapes = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    pixels = np.asarray(shapes.resize((512, 384), Image.Resampling.BICUBIC)).astype(np.int16)
    grainy = np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(grainy).save(file, "JPEG", quality=90)
    return file.getvalue()


def store(folder: Path, count: int) -> None:
    """The same pairs as a folder, as tar shards and as parquet."""
    rng = np.random.default_rng(0)
    pairs = [(photograph(rng), CAPTION.format(number)) for number in range(count)]
    (folder / "folder").mkdir()
    for number, (image, caption) in enumerate(pairs):
        (folder / "folder" / f"{number:06d}.jpg").write_bytes(image)
        (folder / "folder" / f"{number:06d}.txt").write_text(caption)
    for shard, first in enumerate(range(0, count, PER_SHARD)):
        part = pairs[first : first + PER_SHARD]
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number, (image, caption) in enumerate(part, start=first):
                for suffix, content in (("jpg", image), ("txt", caption.encode())):
                    info = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        table = pa.table({"jpg": [i for i, _ in part], "caption": [c for _, c in part]})
        pq.write_table(table, folder / f"{shard:05d}.parquet", row_group_size=ROW_GROUP)
    size = sum(len(image) for image, _ in pairs) / count
    print(f"{count} JPEGs of 512x384, {size / 1000:.0f} kB each; {os.cpu_count()} CPU cores")


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Serves byte ranges of files over connections that stay open."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        """Answers with the range asked for."""
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        with open(self.translate_path(self.path), "rb") as file:
            file.seek(first)
            content = file.read(last + 1 - first)
        self.send_response(206)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def serve(folder: str, address: multiprocessing.Queue) -> None:
    """A web server on this machine, for ever."""
    handler = functools.partial(Ranges, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    address.put(f"http://127.0.0.1:{server.server_port}")
    server.serve_forever()


def rate(config: DataConfig, batch_size: int) -> float:
    """Images per second of one pass over a data set, the best of three."""
    source = load(config)
    rates = []
    for seed in range(3):
        start = time.perf_counter()
        stream = batches(source, config, seed=seed, batch_size=batch_size, epochs=1)
        count = sum(len(batch["index"]) for batch in stream)
        rates.append(count / (time.perf_counter() - start))
    return max(rates)


def measure(images: int, batch_size: int) -> None:
    """Prints images per second for each way to store them, and captions per second."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, address = Path(temporary), multiprocessing.Queue()
        store(folder, images)
        web = multiprocessing.Process(target=serve, args=(temporary, address), daemon=True)
        web.start()
        url = address.get(timeout=60)
        last = (images - 1) // PER_SHARD
        names = {
            "folder": f"{folder}/folder",
            "wds, local": f"wds:{folder}/*.tar",
            "wds, http": f"wds:{url}/{{00000..{last:05d}}}.tar",
            f"parquet, groups of {ROW_GROUP} in memory": f"parquet:{folder}/*.parquet",
            f"parquet, groups of {ROW_GROUP} read again": f"parquet:{folder}/*.parquet",
        }
        print(f"{'images/s':<36}{'to 64 px':>12}{'to 256 px':>12}")
        for what, name in names.items():
            parquet._KEPT = 0 if what.endswith("again") else 2**28
            config = DataConfig(name, "all", cache_dir=f"{folder}/cache", cache_bytes=0)
            found = [
                rate(dataclasses.replace(config, image_size=size), batch_size) for size in (64, 256)
            ]
            print(f"{what:<36}{found[0]:>12.0f}{found[1]:>12.0f}", flush=True)
        web.kill()
    captions = [CAPTION.format(number) for number in range(5000)]
    tokenizer = Tokenizer()
    start = time.perf_counter()
    tokens = tokenizer.encode(captions)
    seconds = time.perf_counter() - start
    used = (tokens > 0).sum()
    print(f"{'captions/s, one thread':<36}{len(captions) / seconds:>12.0f}")
    print(f"{'tokens/s, one thread':<36}{used / seconds:>12.0f}")


def need(hosts: int, step_times: str) -> None:
    """Prints the images per second that each paper preset needs of each host."""
    alone = "=" not in step_times
    given = {} if alone else dict(pair.split("=") for pair in step_times.split(","))
    if unknown := given.keys() - BATCHES.keys():
        raise SystemExit(f"--step_time: {', '.join(unknown)}: expected {', '.join(BATCHES)}")
    print(f"{f'on {hosts} hosts':<20}{'batch':>8}{'s/step':>9}{'images/s per host':>20}")
    for preset, batch in BATCHES.items():
        if alone or preset in given:
            seconds = float(step_times if alone else given[preset])
            print(f"{preset:<20}{batch:>8}{seconds:>9g}{batch / seconds / hosts:>20.0f}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1500, help="pairs to make (default 1500)")
    parser.add_argument("--batch_size", type=int, default=64, help="pairs per batch (default 64)")
    parser.add_argument("--need", action="store_true", help="print what training needs instead")
    parser.add_argument("--hosts", type=int, default=32, help="that share a batch (default 32)")
    parser.add_argument(
        "--step_time", default="1", help="seconds, for all or as preset=seconds,... (default 1)"
    )
    args = parser.parse_args()
    if args.need:
        need(args.hosts, args.step_time)
    else:
        measure(args.images, args.batch_size)


if __name__ == "__main__":
    main()
