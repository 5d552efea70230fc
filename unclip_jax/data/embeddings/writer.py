"""Computing the embeddings of a data set and storing them, by any number of processes.

Process p of n computes the shards p, p + n, p + 2n, ... that are not there yet, and reads the pairs
of those alone. A shard appears whole or not at all, and where a pair lies follows from its number.
So the work may be interrupted and go on with another number of processes: the store ends with each
pair in it once.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from absl import logging

from unclip_jax.common.files import making_folder
from unclip_jax.data.embeddings import entries
from unclip_jax.data.embeddings.folders import Folder
from unclip_jax.data.embeddings.shards import FIRST, HELDOUT, META, VALID, Meta, Pair, ShardWriter
from unclip_jax.data.examples import Captions
from unclip_jax.data.images import CENTRE, Fit, square
from unclip_jax.data.records import BadRecord, Source, is_heldout
from unclip_jax.data.tokenizer import Encoder, Tokenizer
from unclip_jax.errors import UserError

Encode = Callable[[np.ndarray, np.ndarray], tuple[Any, Any]]

PAIRS_PER_SHARD = 2**16


def default_shards(count: int) -> int:
    """So many that none has more than `PAIRS_PER_SHARD` pairs."""
    return -(-count // PAIRS_PER_SHARD)


def compute(
    source: Source,
    encode: Encode,
    out: str | os.PathLike,
    meta: Meta,
    *,
    image_size: int,
    fit: Fit = CENTRE,
    batch_size: int,
    threads: int,
    tokenizer: Encoder | None = None,
    process_index: int = 0,
    process_count: int = 1,
    on_pairs: Callable[[int, int], None] = lambda done, of: None,
) -> None:
    """Compute and store this process's shards that are not there. Images are not augmented.

    Args:
        source: the pairs.
        encode: (images uint8 `[b, s, s, 3]`, tokens int32 `[b, l]`) -> (z_i, z_t), each
            `[b, e]`; always called with `batch_size` rows, so it compiles once. It may return
            before the arrays are computed.
        out: the store's folder, a path or a URL of fsspec's.
        meta: what the store will say of itself.
        image_size: s, CLIP's, in pixels.
        fit: CLIP's.
        batch_size: pairs encoded at once.
        tokenizer: makes the tokens of captions; None for this package's, of meta's sizes.
        threads: that read and decode ahead, such as `examples.threads_for` gives.
        process_index: this process.
        process_count: how many there are.
        on_pairs: told how many pairs are done, and of how many.

    Raises:
        UserError: the store there is of another CLIP, data or plan, can't be written, an embedding
            isn't finite, or every record is bad.
    """
    folder = Folder(out, cache_dir="")  # nothing is read, so nothing is kept in a cache
    _agree(folder, meta)
    names = folder.names()
    made = _complete(folder, meta, names, range(process_index, meta.shards, process_count))
    mine = [s for s in meta.missing(names) if s % process_count == process_index]
    total = sum(len(meta.shard_pairs(s)) for s in mine)
    examples = _Examples(source, meta, image_size, fit, tokenizer)
    numbers = itertools.chain.from_iterable(map(meta.shard_pairs, mine))
    with contextlib.closing(_ahead(examples, numbers, threads, 2 * batch_size)) as read:
        pairs = _encoded(read, encode, batch_size, source.name)
        done, any_valid = 0, False
        for shard in mine:
            name = meta.shard_name(shard)
            folder.tidy(name)
            folder.tidy(entries.name_of(meta, shard))
            with folder.writing(name) as path:
                writer = ShardWriter(path, meta, shard)
                for pair in itertools.islice(pairs, len(meta.shard_pairs(shard))):
                    writer.add(pair)
                    any_valid |= bool(pair.flags & VALID)
                    done += 1
                    on_pairs(done, total)
                if not any_valid:
                    raise UserError(
                        f"name: {source.name}: every one of the {done} records read is bad; the"
                        " warnings above say why"
                    )
                writer.finish()
                # First its contents: where a shard is, they are.
                side = entries.of_shard(path, meta, shard, verify=False)
                folder.write(entries.name_of(meta, shard), side)
    finish(out, meta, anew=bool(mine) or made)


def _complete(folder: Folder, meta: Meta, names: set[str], shards: Iterable[int]) -> bool:
    """Write the contents of those shards that lack them, as all do that older versions wrote.

    Returns whether there were any.
    """
    any_made = False
    for shard in shards:
        name = meta.shard_name(shard)
        if name in names and entries.name_of(meta, shard) not in names:
            with entries.told_of_damage(folder, name), folder.copied(name) as path:
                side = entries.of_shard(path, meta, shard, verify=True)
            folder.write(entries.name_of(meta, shard), side)
            any_made = True
    return any_made


def finish(out: str | os.PathLike, meta: Meta, *, anew: bool = False) -> None:
    """Write the directory of a store if all of its shards are there; `anew` if it is there, too."""
    folder = Folder(out, cache_dir="")
    sizes = folder.sizes()
    sides = [entries.name_of(meta, shard) for shard in range(meta.shards)]
    complete = not meta.missing(sizes) and sizes.keys() >= {*sides}
    if complete and (anew or entries.NAME not in sizes):
        folder.write(entries.NAME, entries.joined(entries.read_ends(folder, sides, sizes)))


def missing_shards(out: str | os.PathLike, meta: Meta) -> int:
    """How many shards of a store are not there yet."""
    return len(meta.missing(Folder(out, cache_dir="").names()))


def compute_whole(
    source: Source, encode: Encode, folder: str | os.PathLike, meta: Meta, **settings: Any
) -> None:
    """`compute` in one process; the folder appears once all of it is there, or is left as it is.

    For a cache that several processes may want to fill at once: the first one's stays. `settings`
    are those of `compute` from `image_size` to `tokenizer`, and `on_pairs`.

    Raises:
        UserError: as `compute`.
    """
    folder = pathlib.Path(folder).expanduser()
    if folder.exists():
        return
    try:
        with making_folder(folder) as partial:
            compute(source, encode, partial, meta, **settings)
    except OSError as error:
        if not folder.exists():
            raise UserError(f"embeddings: {folder}: can't be written ({error})") from error


def _agree(folder: Folder, meta: Meta) -> None:
    """Write the plan, or see that the one that is there is the same."""
    names = folder.names()
    if META in names:
        there = Meta.from_json(folder.read_text(META), str(folder))
        there.check(str(folder), "give another folder, or what it was begun with", **vars(meta))
    else:
        if any(name.startswith("embeddings-") for name in names):
            raise UserError(f"embeddings: {folder}: shards, but no {META}; give another folder")
        with folder.writing(META) as path:
            path.write_text(meta.to_json(), encoding="utf-8")


class _Examples:
    """Index -> a pair without its embeddings, and its pixels, if it has any. For threads."""

    def __init__(
        self, source: Source, meta: Meta, image_size: int, fit: Fit, tokenizer: Encoder | None
    ):
        self._source, self._size, self._fit = source, image_size, fit
        own = tokenizer or Tokenizer(meta.context_length, meta.vocab_size)
        self._captions = Captions(source.name, own)
        self._blank = np.zeros((image_size, image_size, 3), np.uint8)
        self._no_tokens = np.zeros(meta.context_length, np.int32)

    def __call__(self, index: int) -> tuple[Pair, np.ndarray]:
        image_of = self._source.image_of
        flags = FIRST if index == 0 or image_of(index) != image_of(index - 1) else 0
        name, caption, image = f"pair {index}", "", self._blank
        tokens = self._no_tokens
        try:
            record = self._source[index]
            name, caption = record["name"], record["caption"]
            tokens = self._captions.tokens(index, name, caption)
            image = square(record["image"], self._size, self._fit)
            flags |= VALID
        except BadRecord as error:
            where = "" if str(error).startswith(name) else f"{name}: "
            logging.warning("%s: skipped %s%s", self._source.name, where, error)
        flags |= HELDOUT if is_heldout(name) else 0
        return Pair(index, flags, name, caption, tokens, None, None), image


def _ahead(function: Callable, items: Iterable, threads: int, depth: int) -> Iterator:
    """`map(function, items)` in order, up to `depth` of them ahead in threads."""
    pool, items = ThreadPoolExecutor(threads), iter(items)
    try:
        first = itertools.islice(items, depth)
        waiting = collections.deque(pool.submit(function, item) for item in first)
        while waiting:
            waiting.extend(pool.submit(function, item) for item in itertools.islice(items, 1))
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _encoded(
    examples: Iterator[tuple[Pair, np.ndarray]], encode: Encode, batch_size: int, name: str
) -> Iterator[Pair]:
    """The pairs with their embeddings. While one batch is computed, the next is put together."""
    under_way = None
    while batch := list(itertools.islice(examples, batch_size)):
        pairs = [pair for pair, _ in batch]
        rows = np.arange(batch_size) % len(batch)  # the last batch is filled up
        images = np.stack([image for _, image in batch])[rows]
        embeddings = encode(images, np.stack([pair.tokens for pair in pairs])[rows])
        if under_way:
            yield from _joined(*under_way, name)
        under_way = pairs, embeddings
    if under_way:
        yield from _joined(*under_way, name)


def _joined(pairs: list[Pair], embeddings: tuple[Any, Any], name: str) -> Iterator[Pair]:
    z_i, z_t = (np.asarray(rows, np.float32) for rows in embeddings)
    for pair, row_i, row_t in zip(pairs, z_i, z_t, strict=False):
        if not pair.flags & VALID:
            yield pair
            continue
        if not (np.isfinite(row_i).all() and np.isfinite(row_t).all()):
            raise UserError(
                f"clip: the embeddings of {pair.name}, pair {pair.index} of {name}, are not finite;"
                " check the CLIP checkpoint"
            )
        yield pair._replace(z_i=row_i, z_t=row_t)
