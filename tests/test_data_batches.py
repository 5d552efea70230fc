"""Batches: determinism, epochs, sharding, exact resuming, and bad records."""

import collections
import itertools
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from unclip_jax.data.batches import batches
from unclip_jax.data.datasets import DataConfig
from unclip_jax.data.positions import Layout, Positions, Share
from unclip_jax.data.records import BadRecord
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.errors import UserError

SIZE = 8


class Pictures:
    """Grey squares whose level is their index, some of them bad; two captions each if asked."""

    def __init__(self, count, bad=(), unreadable=(), per_image=1):
        self.name, self.fingerprint, self.skipped = "pictures", f"{count}-{per_image}", {}
        self.image_count, self._count = count, count * per_image
        self._bad, self._unreadable, self._per_image = set(bad), set(unreadable), per_image
        self.reads = 0

    def __len__(self):
        return self._count

    def image_of(self, index):
        return index // self._per_image

    def __getitem__(self, index):
        self.reads += 1
        if index in self._unreadable:
            raise BadRecord(f"picture {index}: gone")
        number = self.image_of(index)
        image = np.full((SIZE, SIZE, 3), number % 256, np.uint8)
        return {
            "image": b"not an image" if index in self._bad else image,
            "caption": f"caption {index}",
            "index": index,
            "name": f"picture {index}",
            "score": np.float32(index / 2),
        }


CACHED = DataConfig(image_size=SIZE, context_length=8, vocab_size=514)
READ_AGAIN = DataConfig(image_size=SIZE, context_length=8, vocab_size=514, cache_bytes=0)
both_ways = pytest.mark.parametrize("config", [CACHED, READ_AGAIN], ids=["cached", "read again"])


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def indices(several):
    return [batch["index"].tolist() for batch in several]


def order(iterator, count):
    return [index for batch in indices(take(iterator, count)) for index in batch]


def same(some, others):
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


@both_ways
def test_a_batch_is_what_its_index_says(config):
    for batch in take(batches(Pictures(40), config, seed=0, batch_size=6), 20):
        assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
            "image": ((6, SIZE, SIZE, 3), "uint8"),
            "tokens": ((6, 8), "int32"),
            "index": ((6,), "int32"),
            "score": ((6,), "float32"),
        }
        np.testing.assert_array_equal(batch["image"][:, 3, 4, 1], batch["index"])
        np.testing.assert_array_equal(batch["score"], batch["index"] / 2)
        captions = [f"caption {index}" for index in batch["index"]]
        with pytest.warns(UserWarning):
            expected = Tokenizer(8, 514).encode(captions)
        np.testing.assert_array_equal(batch["tokens"], expected)


@both_ways
def test_each_epoch_is_a_permutation_and_its_own(config):
    flat = order(batches(Pictures(30), config, seed=1, batch_size=5), 18)
    epochs = [flat[:30], flat[30:60], flat[60:]]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = order(batches(Pictures(30), config, seed=1, batch_size=5), 18)
    other = order(batches(Pictures(30), config, seed=2, batch_size=5), 18)
    assert again == flat != other


def test_unshuffled_finite_epochs_keep_the_order_and_the_remainder():
    def run(**options):
        return indices(batches(Pictures(7), CACHED, seed=0, shuffle=False, **options))

    assert run(batch_size=3, epochs=1, drop_remainder=False) == [[0, 1, 2], [3, 4, 5], [6]]
    assert run(batch_size=3, epochs=1) == [[0, 1, 2], [3, 4, 5]]
    assert run(batch_size=7, epochs=2) == [list(range(7))] * 2


@both_ways
def test_processes_share_the_stream_of_one(config):
    whole = order(batches(Pictures(10), config, seed=3, batch_size=4), 15)
    for count in (2, 3):
        shares = []
        for process in range(count):
            sharding = {"process_index": process, "process_count": count}
            stream = batches(Pictures(10), config, seed=3, batch_size=2, **sharding)
            shares.append(indices(take(stream, 10)))
        merged = [index for parts in zip(*shares, strict=True) for part in parts for index in part]
        assert merged == whole[: len(merged)]


@both_ways
@pytest.mark.parametrize("augment", [0.0, 0.3])
@pytest.mark.parametrize("bad", [(), (2, 5, 11)])
def test_resuming_is_exact(config, augment, bad):
    config = DataConfig(**{**vars(config), "augment": augment})

    def fresh():
        return batches(Pictures(17, bad=bad), config, seed=5, batch_size=4)

    whole = take(fresh(), 14)
    for stop in (0, 1, 6, 9):
        first = fresh()
        same(take(first, stop), whole[:stop])
        state = json.loads(json.dumps([first.get_state()]))
        same(take(first, 2), whole[stop : stop + 2])
        second = fresh()
        take(second, 3)  # wherever it was
        second.set_state(state)
        same(take(second, 14 - stop), whole[stop:])
        first.set_state(state)  # and back in itself
        same(take(first, 3), whole[stop : stop + 3])


def start(source, count, *, config=CACHED, states=None, seed=0, batch_size=2, **options):
    """The streams of `count` processes, continued from states if there are any."""
    streams = [
        batches(
            source, config, seed=seed, batch_size=batch_size,
            process_index=process, process_count=count, **options,
        )
        for process in range(count)
    ]  # fmt: skip
    for stream in streams if states else ():
        stream.set_state(states)
    return streams


def saved(streams):
    return json.loads(json.dumps([stream.get_state() for stream in streams]))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(
    "counts", [(1, 2), (2, 1), (3, 2), (2, 3), (1, 4, 3), (3, 2, 3, 1), (2, 2, 5), (4, 1, 1, 2)]
)
def test_other_numbers_of_processes_read_what_is_left_exactly_once(counts, shuffle):
    rng = np.random.default_rng([*counts, shuffle])
    for seed, bad in enumerate([(), (0, 3, 4, 5, 9, 12, 15, 18), (1, 2, 20)]):
        source, epochs = Pictures(23, bad=bad), 4
        options = {"epochs": epochs, "shuffle": shuffle, "drop_remainder": False, "seed": seed}
        seen, states = collections.Counter(), None
        for place, count in enumerate(counts):
            config = CACHED if rng.integers(2) else READ_AGAIN
            streams = start(source, count, config=config, states=states, **options)
            steps = None if place == len(counts) - 1 else rng.integers(4)
            for stream in streams:
                seen.update(index for i in indices(itertools.islice(stream, steps)) for index in i)
            states = saved(streams)
        assert seen == {index: epochs for index in range(23) if index not in bad}


@both_ways
def test_the_pictures_do_not_depend_on_who_reads_them(config):
    config = DataConfig(**{**vars(config), "augment": 0.4})
    source = Pictures(11, bad=(4,))
    whole = [
        np.concatenate([b["image"] for b in take(s, 20)]) for s in start(source, 1, config=config)
    ]
    streams = start(source, 3, config=config)
    parts = [batch for stream in streams for batch in take(stream, 4)]
    for stream in start(source, 2, config=config, states=saved(streams)):
        parts += take(stream, 2)
    known = {image.tobytes() for image in whole[0]}
    pictures = [image.tobytes() for part in parts for image in part["image"]]
    assert len(set(pictures)) == len(pictures)
    assert set(pictures) <= known


def test_positions_are_the_set_that_their_counts_say():
    rng = np.random.default_rng(0)
    for _ in range(200):
        layouts = tuple(
            Layout(int(rng.integers(1, 4)), tuple(rng.integers(0, 9, rng.integers(1, 5)).tolist()))
            for _ in range(rng.integers(4))
        )
        read = set()
        for layout in layouts:
            stream = itertools.count()
            left = list(layout.counts)
            while any(left):  # deal the stream out, a block to each share in turn
                for p in range(len(left)):
                    for position in itertools.islice(stream, layout.block):
                        read |= {position} if left[p] else set()
                        left[p] -= bool(left[p])
        positions = Positions(layouts)
        assert {n for n in range(120) if n in positions} == read
        first = next(n for n in itertools.count() if n not in read)
        assert positions.first_missing() == first
        rest = positions.beyond(first)
        assert {n for n in range(120) if n in rest} | set(range(first)) == read
        assert all(layout.last() > first for layout in rest.layouts)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("block", [1, 3])
def test_shares_deal_a_stream_out_among_them(count, block):
    shares = [Share(index, count, block) for index in range(count)]
    dealt = [[share.position(j) for j in range(40)] for share in shares]
    assert len(set(itertools.chain(*dealt))) == 40 * count
    # The first batch holds the first positions, in the order of shares.
    first = itertools.chain.from_iterable(own[:block] for own in dealt)
    assert list(first) == list(range(count * block))
    for share, own in zip(shares, dealt, strict=True):
        for position in range(35 * count):
            assert share.below(position) == sum(n < position for n in own)


def test_a_process_that_fell_behind_what_others_once_read_does_not_read_it_again():
    """Four processes had read the even ones to 10; of two, one has read the odd ones to 13."""
    options = {"shuffle": False, "batch_size": 1}
    source, states = Pictures(20), saved(start(Pictures(20), 2, **options))
    for state, consumed in zip(states, (1, 7), strict=True):
        state |= {"consumed": consumed, "earlier": [[1, [3, 0, 3, 0]]]}
    for count, expected in (
        (2, [[12, 14], [15, 17]]),
        (1, [[12, 14]]),
        (3, [[12, 15], [16, 19], [14, 17]]),
    ):
        streams = start(source, count, states=states, **options)
        assert [order(stream, 2) for stream in streams] == expected


def test_a_state_stays_small_however_often_the_processes_change():
    source, states = Pictures(40, bad=range(0, 40, 7)), None
    for count in [3, 2, 5, 1, 4, 2] * 3:
        streams = start(source, count, states=states)
        for stream in streams:
            take(stream, 9)
        states = saved(streams)
        assert len(states[0]["earlier"]) <= 2


def test_states_that_do_not_belong_together_are_refused():
    states = saved(start(Pictures(9), 2))
    one = saved(start(Pictures(9), 1))
    stream, other_seed, other_data = (
        start(Pictures(count), 2, seed=seed)[0] for count, seed in ((9, 0), (9, 1), (8, 0))
    )
    with pytest.raises(UserError, match=r"states\[0\]\.seed: got 0, expected 1"):
        other_seed.set_state(states)
    with pytest.raises(UserError, match=r"states\[0\]\.data: got"):
        other_data.set_state(states)
    for wrong in (
        states[::-1], states[:1], states[1:], [*states, *one], one * 2, [], states[0], [{}],
        [states[0], {**states[1], "earlier": [[1, [1, 2]]]}],
        [states[0], {**states[1], "batch_size": 3}],
        [{k: v for k, v in state.items() if k != "consumed"} for state in states],
    ):  # fmt: skip
        with pytest.raises(UserError, match="states"):
            stream.set_state(wrong)
    short = batches(Pictures(9), CACHED, seed=0, batch_size=2, epochs=1)
    with pytest.raises(UserError, match="more epochs"):
        short.set_state([{**one[0], "consumed": 10}])


def test_augmentation_differs_by_position_and_not_by_run():
    config = DataConfig(image_size=SIZE, context_length=8, vocab_size=514, augment=0.4)
    one = take(batches(Pictures(4), config, seed=0, batch_size=4), 6)
    same(one, take(batches(Pictures(4), config, seed=0, batch_size=4), 6))
    zeroth = [batch["image"][batch["index"].tolist().index(0)] for batch in one]
    assert len({image.tobytes() for image in zeroth}) > 3
    # Sharding draws the same numbers, for they belong to positions.
    halves = [
        take(
            batches(Pictures(4), config, seed=0, batch_size=2, process_index=p, process_count=2), 6
        )
        for p in (0, 1)
    ]
    for whole, *shares in zip(one, *halves, strict=True):
        for p in (0, 1):
            np.testing.assert_array_equal(np.split(whole["image"], 2)[p], shares[p]["image"])


@both_ways
def test_bad_records_are_named_counted_and_left_out(config, caplog):
    source = Pictures(20, bad=(3, 4), unreadable=(11,))
    stream = batches(source, config, seed=0, batch_size=5)
    seen = take(stream, 20)
    assert all(len(batch["index"]) == 5 for batch in seen)
    counts = np.bincount(np.concatenate([batch["index"] for batch in seen]), minlength=20)
    assert (counts[[3, 4, 11]] == 0).all()
    assert (np.delete(counts, [3, 4, 11]) >= 5).all()
    assert stream.skipped == 3
    for name in ("picture 3: not a readable image", "picture 4", "picture 11: gone"):
        assert sum(name in message for message in caplog.messages) == 1


@both_ways
@pytest.mark.parametrize("options", [
    {},
    {"epochs": 1},
    {"shuffle": False},
    {"shuffle": False, "process_index": 1, "process_count": 2},
    {"process_index": 1, "process_count": 2},
])  # fmt: skip
def test_when_all_are_bad_it_is_an_error_and_no_endless_search(config, options):
    stream = batches(Pictures(6, bad=range(6)), config, seed=0, batch_size=2, **options)
    with pytest.raises(UserError, match=r"every one of the \d records read is bad"):
        next(stream)


def test_a_share_of_bad_records_alone_is_an_error():
    only_odd_pairs = Pictures(8, bad=(0, 1, 4, 5))
    options = {"seed": 0, "batch_size": 2, "shuffle": False, "process_count": 2}
    with pytest.raises(UserError, match="every one of the 4"):
        next(batches(only_odd_pairs, CACHED, process_index=0, **options))
    good = next(batches(only_odd_pairs, CACHED, process_index=1, **options))
    assert good["index"].tolist() == [2, 3]


def test_one_good_record_is_enough():
    stream = batches(Pictures(9, bad=range(1, 9)), CACHED, seed=0, batch_size=4)
    assert indices(take(stream, 3)) == [[0, 0, 0, 0]] * 3
    assert stream.skipped == 8


def test_a_small_data_set_is_read_once_and_a_large_one_again():
    small, large = Pictures(10), Pictures(10)
    take(batches(small, CACHED, seed=0, batch_size=5), 20)
    assert small.reads == 10
    take(batches(large, READ_AGAIN, seed=0, batch_size=5), 20)
    assert large.reads >= 100
    limit = 10 * SIZE * SIZE * 3
    fits, misses = (DataConfig(image_size=SIZE, cache_bytes=b) for b in (limit, limit - 1))
    for config, again in ((fits, False), (misses, True)):
        source = Pictures(10)
        take(batches(source, config, seed=0, batch_size=5), 6)
        assert (source.reads > 10) == again


@pytest.mark.parametrize("drop_remainder", [True, False])
def test_batches_from_memory_are_those_that_are_read(drop_remainder):
    options = {"seed": 3, "batch_size": 4, "epochs": 2, "drop_remainder": drop_remainder}
    streams = [batches(Pictures(11, bad=(2, 7)), c, **options) for c in (CACHED, READ_AGAIN)]
    for _ in range(4 if drop_remainder else 5):
        kept, read = map(next, streams)
        assert {n: x.dtype for n, x in kept.items()} == {n: x.dtype for n, x in read.items()}
        for name, array in kept.items():
            np.testing.assert_array_equal(array, read[name])
        assert streams[0].get_state() == streams[1].get_state()
    for stream in streams:
        with pytest.raises(StopIteration):
            next(stream)


def test_as_many_threads_read_as_are_asked_for():
    together = threading.Barrier(20)

    class Slow(Pictures):
        def __getitem__(self, index):
            together.wait(timeout=60)  # for twenty readers, or it breaks
            return super().__getitem__(index)

    config = DataConfig(**{**vars(READ_AGAIN), "read_threads": 20})
    next(batches(Slow(100), config, seed=0, batch_size=10))
    for wrong in (-1, 1.5, 2000):
        with pytest.raises(UserError, match="read_threads"):
            DataConfig(read_threads=wrong)


def test_long_captions_are_named_once_and_counted(caplog):
    stream = batches(Pictures(9), CACHED, seed=0, batch_size=3)
    take(stream, 9)
    assert stream.truncated == 9  # eight tokens hold no "caption n" of bytes
    assert sum("cut the caption" in message for message in caplog.messages) == 5
    assert batches(Pictures(9), DataConfig(image_size=SIZE), seed=0, batch_size=3).truncated == 0


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"epochs": 0}, "epochs"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"process_index": 2, "process_count": 2}, "process_index"),
        ({"batch_size": 8, "epochs": 1}, "batch_size: got 8, expected at most 7"),
    ],
)
def test_bad_arguments_are_named(options, field):
    with pytest.raises(UserError, match=field):
        batches(Pictures(7), CACHED, **{"seed": 0, "batch_size": 2, **options})


def test_a_plain_script_reads_batches_and_ends(tmp_path):
    """No parsed absl flags, no guarded main module, threads still reading ahead at the end."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; sys.path[:0] = sys.argv[1].split(':')\n"
        "from test_data_batches import Pictures, READ_AGAIN, batches\n"
        "stream = batches(Pictures(50), READ_AGAIN, seed=0, batch_size=4)\n"
        "print(next(stream)['index'].tolist())\n"
    )
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    run = subprocess.run(
        [sys.executable, script, path], capture_output=True, text=True, timeout=120, check=True
    )
    expected = next(batches(Pictures(50), CACHED, seed=0, batch_size=4))["index"].tolist()
    assert run.stdout.strip() == str(expected)


def test_more_bad_records_than_are_told_apart_are_counted_and_skipped(monkeypatch):
    monkeypatch.setattr("unclip_jax.data.examples.TOLD_APART", 3)
    source = Pictures(20, bad=range(0, 20, 2))
    stream = batches(source, CACHED, seed=0, batch_size=5)
    seen = take(stream, 4)  # two epochs
    assert all((batch["index"] % 2).all() for batch in seen)
    assert 10 <= stream.skipped <= 20 and len(stream._examples.bad._known) == 3


def test_a_remote_source_is_read_by_threads_though_it_fits_into_memory():
    readers = set()

    class Remote(Pictures):
        remote = True

        def __getitem__(self, index):
            readers.add(threading.get_ident())
            return super().__getitem__(index)

    options = {"seed": 0, "batch_size": 4}
    found = take(batches(Remote(40), CACHED, **options), 3)
    same(found, take(batches(Pictures(40), CACHED, **options), 3))
    assert readers and threading.get_ident() not in readers
