"""Batches: determinism, epochs, sharding, exact resuming, and bad records."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from unclip_jax.data.batches import batches
from unclip_jax.data.datasets import DataConfig
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
            shares.append(
                order(batches(Pictures(10), config, seed=3, batch_size=2, **sharding), 10)
            )
        merged = [shares[n % count][n // count] for n in range(20 * count)]
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
        state = json.loads(json.dumps(first.get_state()))
        same(take(first, 2), whole[stop : stop + 2])
        second = fresh()
        take(second, 3)  # wherever it was
        second.set_state(state)
        same(take(second, 14 - stop), whole[stop:])
        first.set_state(state)  # and back in itself
        same(take(first, 3), whole[stop : stop + 3])


def test_a_state_of_something_else_is_refused():
    state = batches(Pictures(9), CACHED, seed=0, batch_size=2).get_state()
    other_seed = batches(Pictures(9), CACHED, seed=1, batch_size=2)
    other_data = batches(Pictures(8), CACHED, seed=0, batch_size=2)
    with pytest.raises(UserError, match="state: seed was 0 and is 1"):
        other_seed.set_state(state)
    with pytest.raises(UserError, match="state: data was"):
        other_data.set_state(state)
    with pytest.raises(UserError, match="state"):
        other_data.set_state({})


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
            np.testing.assert_array_equal(whole["image"][p::2], shares[p]["image"])


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
    only_even = Pictures(8, bad=range(0, 8, 2))
    options = {"seed": 0, "batch_size": 2, "shuffle": False, "process_count": 2}
    with pytest.raises(UserError, match="every one of the 4"):
        next(batches(only_even, CACHED, process_index=0, **options))
    good = next(batches(only_even, CACHED, process_index=1, **options))
    assert good["index"].tolist() == [1, 3]


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
        ({"batch_size": 8, "epochs": 1}, "batch_size: 8: more than the 7"),
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
