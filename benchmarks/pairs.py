"""What a host holds of a data set, and its time to the first batch, by the number of pairs.

    python -m benchmarks.pairs --folder pairs --pairs 1000000 4000000 16000000 \\
        --images 1000000 4000000 --out docs/images/pairs.png

makes stores of embeddings of so many pairs (4 wide: what is measured does not depend on that) and
indices of shards of so many images, and opens each in a process of its own, which reads a batch of
128. `--before DIR` measures another checkout likewise, on stores and indices that it understands.
The CPU's seconds say more than those that passed where others use the machine. Figures go to stdout
and into FOLDER/figures.json, which is added to; `--out` draws all of them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

PAPER = 650_000_000  # pairs
WIDTH, TOKENS, SHARD, IMAGES = 4, 3, 2**16, 10_000
CAPTION = b"a caption of which the length is about that of a picture's in LAION"

# Runs in a checkout, old or new: KIND FOLDER -> a line of JSON.
CHILD = f"""
import json, sys, time
import numpy as np

def memory(what):
    for line in open("/proc/self/status"):
        if line.startswith(what):
            return 1024 * int(line.split()[1])

kind, folder = sys.argv[1:]
import grain
from unclip_jax.data.batches import batches
from unclip_jax.data.datasets import DataConfig, load
from unclip_jax.data.shards.index import Sample
from unclip_jax.data.shards.source import ShardedSource

class Numbers:
    settings = ["numbers"]

    def samples(self, file, skipped):
        first = int(file.name.split(".")[0]) * {IMAGES}
        for n in range(first, first + {IMAGES}):
            yield Sample(f"{{n:09d}}", ({CAPTION.decode()!r},), 0, 1)

    def image(self, file, place, size):
        return np.zeros((1, 1, 3), np.uint8)

sizes = {{"context_length": 8, "vocab_size": 514, "cache_bytes": 0, "image_size": 1}}
def opened():
    if kind == "embeddings":
        config = DataConfig("embeddings:" + folder, cache_dir=folder + "-cache", **sizes)
        return config, load(config, needs_images=False)
    config = DataConfig("wds:" + folder + "/*.tar", cache_dir=folder + "-cache", **sizes)
    return config, ShardedSource(config, folder + "/*.tar", Numbers())

before, began, used = memory("VmRSS"), time.perf_counter(), time.process_time()
config, source = opened()
next(batches(source, config, seed=0, batch_size=128))
print(json.dumps({{
    "pairs": len(source), "bytes": memory("VmHWM") - before,
    "seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - used,
}}))
"""


def make_store(folder: Path, count: int) -> None:
    """A store of `count` pairs, as `unclip embed` writes one."""
    from array_record.python import array_record_module as array_record

    from unclip_jax.data.embeddings import entries, shards, writer

    shard_count = writer.default_shards(count)
    meta = shards.Meta("clip", "data", count, WIDTH, 8, 514, True, "float32", shard_count)
    folder.mkdir(parents=True)
    (folder / shards.META).write_text(meta.to_json())
    for shard in range(shard_count):
        pairs = np.arange(meta.shard_pairs(shard).start, meta.shard_pairs(shard).stop)
        flags = np.full(len(pairs), shards.VALID | shards.FIRST, np.uint8)
        flags[pairs * 2654435761 % 2**32 < 0.1 * 2**32] |= shards.HELDOUT
        path = folder / meta.shard_name(shard)
        out = array_record.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        for row in _records(pairs, flags):
            out.write(row.tobytes())
        out.write(b"contents" + flags.tobytes())
        out.close()
        side = entries.of_shard(path, meta, shard, verify=False)
        (folder / entries.name_of(meta, shard)).write_bytes(side)
    writer.finish(folder, meta)


def _records(pairs: np.ndarray, flags: np.ndarray) -> np.ndarray:
    """What `embeddings.shards.pack` makes of pairs of these numbers and flags, uint8 [n, b]."""
    head = [("index", "<u8"), ("flags", "u1"), ("lengths", "<u4", 3)]
    body = [("z", "<f4", 2 * WIDTH), ("tokens", "<u2", TOKENS), ("name", "u1", 9)]
    rows = np.zeros(len(pairs), [*head, *body, ("caption", "u1", len(CAPTION))])
    rows["index"], rows["flags"], rows["lengths"] = pairs, flags, (9, len(CAPTION), TOKENS)
    rows["z"], rows["tokens"] = 0.5, (512, 7, 513)
    rows["name"] = pairs[:, None] // 10 ** np.arange(8, -1, -1) % 10 + ord("0")
    rows["caption"] = np.frombuffer(CAPTION, np.uint8)
    return rows.view(np.uint8).reshape(len(pairs), -1)


def make_shards(folder: Path, count: int) -> None:
    """Files that stand for shards of `IMAGES` images each."""
    folder.mkdir(parents=True)
    for shard in range(count // IMAGES):
        (folder / f"{shard:05d}.tar").write_bytes(b"x")


def measure(kind: str, folder: Path, checkout: Path) -> dict[str, float]:
    """One opening, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, kind, str(folder)],
        cwd=checkout, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def plot(figures: list[dict], path: Path) -> None:
    """Memory and time against pairs, and what the largest two say of the paper's 650 million."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    drawn, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    panels = (("bytes", 2**20, "MiB held"), ("cpu_seconds", 1, "CPU seconds to the first batch"))
    for kind, colour in (("embeddings", "C0"), ("images", "C1")):
        for when, style in (("before", ":"), ("now", "-")):
            rows = [f for f in figures if (f["kind"], f["when"]) == (kind, when)]
            rows.sort(key=lambda f: f["pairs"])
            for axis, (field, unit, _) in zip(axes, panels, strict=True):
                x = np.array([f["pairs"] for f in rows], float)
                y = np.array([f[field] / unit for f in rows])
                if len(x) < 2:
                    continue
                axis.plot(x, y, colour + style, marker="o", label=f"{kind}, {when}")
                slope = max(0.0, (y[-1] - y[-2]) / (x[-1] - x[-2]))
                far = y[-1] + slope * (PAPER - x[-1])
                axis.plot([x[-1], PAPER], [y[-1], far], colour + style, alpha=0.4)
                print(f"{kind}, {when}: {far:,.1f} {field} / {unit} at {PAPER:,} pairs")
    for axis, (_, _, label) in zip(axes, panels, strict=True):
        axis.set(xscale="log", yscale="log", xlabel="pairs", ylabel=label)
        axis.axvline(PAPER, color="grey", lw=0.5)
        axis.legend()
    drawn.suptitle("Opening a data set and reading a batch; pale: extrapolated to the paper's")
    drawn.tight_layout()
    drawn.savefig(path, dpi=110)


def main() -> None:
    """Make what lacks, measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--folder", type=Path, required=True)
    add("--pairs", type=int, nargs="*", default=[])
    add("--images", type=int, nargs="*", default=[])
    add("--before", type=Path, help="another checkout, measured instead of this one")
    add("--out", type=Path)
    args = parser.parse_args()
    checkout = (args.before or Path(__file__).parents[1]).resolve()
    when = "before" if args.before else "now"
    path = args.folder / "figures.json"
    figures = json.loads(path.read_text()) if path.exists() else []
    for kind, counts in (("embeddings", args.pairs), ("images", args.images)):
        for count in counts:
            folder = args.folder.resolve() / f"{kind}-{count}"
            if not folder.exists():
                {"embeddings": make_store, "images": make_shards}[kind](folder, count)
            if kind == "images":
                measure(kind, folder, checkout)  # which makes the indices
            found = {"kind": kind, "when": when} | measure(kind, folder, checkout)
            print(json.dumps(found), flush=True)
            figures.append(found)
            path.write_text(json.dumps(figures, indent=1))
    if args.out:
        plot(figures, args.out)


if __name__ == "__main__":
    main()
