"""Compute the CLIP embeddings of a data set, once, on any number of hosts.

    unclip embed --clip runs/clip --data photos/ --split all --out photos-clip

The same command on every host of a pod shares the work: of n processes, process p computes the
shards p, p + n, ... Interrupted, the same command goes on after the last finished shard, with the
same number of processes or another. The store then serves

    unclip train --config=paper/prior --config.data.name=embeddings:photos-clip
    unclip train --config=paper/decoder --config.data.name=photos/ \\
        --config.data.split=all --config.embeddings=photos-clip

See docs/data.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from unclip_jax.common import bars, command_line
from unclip_jax.data import datasets
from unclip_jax.data.embeddings.shards import DTYPES
from unclip_jax.data.embeddings.writer import (
    PAIRS_PER_SHARD,
    Encode,
    compute,
    default_shards,
    finish,
    missing_shards,
)
from unclip_jax.data.examples import threads_for
from unclip_jax.data.records import summary
from unclip_jax.errors import UserError
from unclip_jax.parallel import distributed
from unclip_jax.stages.pixels import to_float
from unclip_jax.training.inputs import data_for, meta_of
from unclip_jax.weights.trained import Part, load_part, tokenizer

SECONDS_BETWEEN_LINES = 30.0  # of progress, where it goes into a log
SECONDS_BETWEEN_LOOKS = 2.0  # at what the other processes have finished


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = command_line.parser("embed", __doc__)
    add = parser.add_argument
    add("--clip", required=True, metavar="DIR", help="a trained CLIP")
    add("--data", required=True, metavar="NAME", help="as config.data.name: emoji, a folder, ...")
    add("--split", default="train", metavar="NAME", help="of the data (default train)")
    add("--captions", default="all", choices=("all", "first"), help="of an image (default all)")
    add("--image_key", default="image", metavar="KEY", help="as config.data.image_key")
    add("--caption_key", default="caption", metavar="KEY", help="as config.data.caption_key")
    add("--bare", action="store_true",
        help="pictures without captions too, for decoders that read none")  # fmt: skip
    add("--skin_tones", action="store_true", help="as config.data.skin_tones")
    add("--cache_dir", default="", metavar="DIR", help="as config.data.cache_dir")
    add("--shared_dir", default="", metavar="FOLDER", help="as config.data.shared_dir")
    add("--out", required=True, metavar="FOLDER", help="a path, or a URL such as gs://bucket/name")
    add("--shards", type=int, metavar="N",
        help=f"files (default: one for every {PAIRS_PER_SHARD} pairs)")  # fmt: skip
    add("--dtype", default="float32", choices=tuple(DTYPES),
        help="that embeddings are stored in (default float32)")  # fmt: skip
    add("--batch_size", type=int, default=256, metavar="B",
        help="pairs computed together on each host (default 256)")  # fmt: skip
    add("--distributed", default="auto", choices=distributed.MODES,
        help="join other processes: if there are any, always, never (default auto)")  # fmt: skip
    add("--coordinator_address", metavar="HOST:PORT", help="of process 0")
    add("--num_processes", type=int, metavar="N", help="how many there are")
    add("--process_id", type=int, metavar="P", help="this one, from 0")
    return parser.parse_args(argv)


def encoder(clip: Part, devices: Sequence[jax.Device]) -> Encode:
    """CLIP on some devices of this process: the rows of a batch are spread over them.

    Args:
        clip: with both towers.
        devices: any number; it must divide the batch.

    Returns:
        (images uint8 [b, s, s, 3], tokens int32 [b, l]) -> z_i and z_t, each float32 [b, e].
    """
    stage = clip.stage
    mesh = jax.make_mesh(
        (len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=tuple(devices)
    )
    rows = NamedSharding(mesh, PartitionSpec("data"))
    params = jax.device_put(clip.params, NamedSharding(mesh, PartitionSpec()))

    @jax.jit
    def towers(params: dict, images: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        z_i = stage.encode_image(params, to_float(images))
        return z_i, stage.encode_text(params, tokens)[0]

    def encode(images: np.ndarray, tokens: np.ndarray) -> tuple[jax.Array, jax.Array]:
        return towers(params, *jax.device_put((images, tokens), rows))

    return encode


def main(argv: list[str]) -> None:
    """Compute this process's share of what is missing, and wait for the others'."""
    args = parse(argv)
    distributed.initialize(
        args.distributed, args.coordinator_address, args.num_processes, args.process_id
    )
    distributed.check_initialized()
    clip = load_part(args.clip, kind="clip")
    if clip.stage.model.towers != "both":
        raise UserError(f"--clip {args.clip!r}: has the {clip.stage.model.towers} tower alone")
    devices = jax.local_devices()
    if args.batch_size < 1 or args.batch_size % len(devices):
        raise UserError(
            f"--batch_size: got {args.batch_size}, expected a multiple of {len(devices)}, the"
            " devices of this host"
        )
    fields = "split captions skin_tones image_key caption_key cache_dir shared_dir"
    given = {name: getattr(args, name) for name in fields.split()}
    data = data_for(clip.stage, datasets.DataConfig(name=args.data, **given))
    data = dataclasses.replace(data, bare=args.bare)
    source = datasets.load(data)
    print(f"data: {summary(source, data.split)}", flush=True)
    shards = default_shards(len(source)) if args.shards is None else args.shards
    meta = meta_of(clip, source, dtype=args.dtype, shards=shards)
    index, count = jax.process_index(), jax.process_count()
    title = f"process {index} of {count}"
    with bars.bar(SECONDS_BETWEEN_LINES, desc=title, unit=" pairs", dynamic_ncols=True) as bar:

        def show(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        compute(
            source, encoder(clip, devices), args.out, meta,
            image_size=clip.stage.image_size, fit=clip.stage.model.fit, batch_size=args.batch_size,
            tokenizer=tokenizer(clip), threads=threads_for(data),
            process_index=index, process_count=count, on_pairs=show,
        )  # fmt: skip
        written = bar.n
    # JAX takes a process that leaves minutes before the others for a failure of the run.
    while missing_shards(args.out, meta):
        time.sleep(SECONDS_BETWEEN_LOOKS)
    if distributed.is_lead():  # where the last two ended at once
        finish(args.out, meta)
    print(f"{args.out}: complete, {meta.count} pairs; {title} wrote {written} of them")
