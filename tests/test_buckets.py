"""A run whose workdir is a bucket, or whose hosts keep copies: it goes on, whatever happens."""

import json
import shutil
import subprocess
import sys
import threading
import time
from urllib.parse import quote, unquote

import jax
import numpy as np
import pytest

from tests import object_store, test_multihost, toy_run
from tests.object_store import BucketFileSystem
from tests.test_multihost import finish, leaves, seen, start_pod
from tests.toy_run import Batches, assert_same, environment, run
from unclip_jax.errors import UserError
from unclip_jax.training import lock, sums, workdir, writers
from unclip_jax.training.saved import Saved

RUN = "gs://bucket/runs/toy"
SETTINGS = {"schedule": "constant", "checkpoint_every": 10}


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(writers, "plot_metrics", lambda workdir: None)
    monkeypatch.setenv("UNCLIP_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A server of buckets; gs:// is there for this process and for those that it starts."""
    with object_store.bucket(tmp_path / "objects", monkeypatch) as server:
        monkeypatch.setattr(lock, "BEAT", 0.2)
        monkeypatch.setattr(lock, "PATIENCE", 1.0)
        monkeypatch.setattr(workdir, "WAITS", (0.01, 0.01))
        yield server


def objects(server):
    """Names of a run's objects."""
    names = (unquote(path.name) for path in server.root.iterdir() if path.name[0] != ".")
    return sorted(name.removeprefix(RUN.removeprefix("gs://") + "/") for name in names)


def content(server, name):
    return server.root / quote(f"{RUN.removeprefix('gs://')}/{name}", safe="")


def logged(path):
    return [
        {name: value for name, value in record.items() if not writers.by_the_clock(name)}
        for record in writers.read_metrics(path)
    ]


def test_a_run_in_a_bucket_goes_on_elsewhere_bit_for_bit(bucket, tmp_path):
    run(RUN, steps=20, **SETTINGS)
    there = objects(bucket)
    assert "checkpoints/20/commit_success.txt" in there and "lock" not in there
    assert {"metrics.jsonl", "description.json", "parameters.txt", "goodput.json"} <= set(there)
    shutil.rmtree(tmp_path / "cache")  # another host goes on
    batches = Batches()
    final = run(RUN, batches, steps=30, **SETTINGS)
    assert batches.log == list(range(20, 30))
    assert_same(final, run(tmp_path / "disk", steps=30, **SETTINGS))
    assert logged(content(bucket, "metrics.jsonl")) == logged(tmp_path / "disk" / "metrics.jsonl")
    with Saved(RUN) as saved:
        assert saved.steps() == [20, 30]
        saved.check(30)
        assert_same(saved.averaged(30), final.averaged)
    # Another run of that name, once the bucket is emptied, sees nothing of this one.
    for path in bucket.root.iterdir():
        path.unlink()
    run(RUN, steps=10, **SETTINGS)
    assert [record["step"] for record in logged(content(bucket, "metrics.jsonl"))] == [4, 8, 10]


def test_what_was_being_written_is_no_checkpoint(bucket):
    run(RUN, steps=20, **SETTINGS)
    content(bucket, "checkpoints/20/commit_success.txt").unlink()
    batches = Batches()
    run(RUN, batches, steps=20, **SETTINGS)
    assert batches.log == list(range(10, 20))


def test_a_changed_object_is_told(bucket):
    run(RUN, steps=20, **SETTINGS)
    data = [name for name in objects(bucket) if name.startswith("checkpoints/20/state/")]
    largest = max((content(bucket, name) for name in data), key=lambda path: path.stat().st_size)
    whole = bytearray(largest.read_bytes())
    whole[len(whole) // 2] ^= 4
    largest.write_bytes(whole)
    with pytest.raises(UserError, match=r"checkpoints/20: the checkpoint is damaged .*step 10"):
        run(RUN, steps=30, **SETTINGS)
    batches = Batches()
    with pytest.warns(UserWarning, match="checkpoint 20 is damaged .* moved to gs://.*damaged/20"):
        run(RUN, batches, steps=30, if_damaged="previous", **SETTINGS)
    assert batches.log == list(range(10, 30))


def test_one_run_at_a_time_on_a_bucket(bucket):
    """A lease that beats is respected, one that does not is taken, and who lost it stops."""
    place = workdir.Bucket(RUN)
    other = {"holder": "process 7 on another", "host": "another", "pid": 7, "token": "x"}
    over = threading.Event()

    def beat():
        while not over.wait(0.05):
            place.write("lock", json.dumps(other | {"beat": time.time()}).encode())

    thread = threading.Thread(target=beat)
    thread.start()
    time.sleep(0.2)
    with pytest.raises(UserError, match=r"workdir 'gs://.*in use by process 7 on another; wait"):
        run(RUN, steps=10, **SETTINGS)
    over.set()
    thread.join()
    batches = Batches()
    run(RUN, batches, steps=10, **SETTINGS)  # it is dead
    assert len(batches.log) == 10
    with place.lease():
        place.write("lock", json.dumps(other | {"beat": 0}).encode())
        deadline = time.monotonic() + 60
        with pytest.raises(UserError, match="process 7 on another has taken it over"):
            while time.monotonic() < deadline:
                place.check()
                time.sleep(0.05)


def test_a_store_that_fails_once_is_told_in_a_line(bucket, capfd):
    bucket.fails = 2  # TensorStore asks again by itself
    BucketFileSystem.fails = 1
    final = run(RUN, steps=10, **SETTINGS)
    err = capfd.readouterr().err
    (line,) = (line for line in err.splitlines() if "trying again" in line)
    assert line.startswith("gs://bucket/runs/toy/lock: failed (503, the backend is busy")
    assert bucket.fails == 0 and int(final.step) == 10
    BucketFileSystem.fails = 1000
    with pytest.raises(UserError, match=r"lock: failed \(503.*then run the same command again"):
        run(RUN, steps=20, **SETTINGS)
    BucketFileSystem.fails = 0


@pytest.mark.parametrize("address", ["s3://bucket/run", "gs://", "gs:///", "memory://run", ""])
def test_an_address_that_no_run_can_have(address):
    with pytest.raises(UserError, match=r"workdir: got .*, expected a folder, or gs://BUCKET"):
        run(address, steps=10)


# Copies on the hosts' disks


COPYING = {"schedule": "constant", "checkpoint_every": 100, "local_every": 5}


def dies(place, at, **settings):
    """A run whose data end before step `at`."""
    with pytest.raises(UserError, match=f"ran out at step {at}"):
        run(place, Batches(end=at - 1), **COPYING | settings)
    for thread in threading.enumerate():
        if thread.name == "copy":
            thread.join()


def copies(tmp_path):
    return sorted(int(path.name) for path in (tmp_path / "cache" / "copies").glob("*/0-of-1/*"))


def test_a_run_goes_on_from_a_copy_that_is_newer(tmp_path):
    dies(tmp_path / "run", 18)
    assert copies(tmp_path) == [10, 15]
    batches = Batches()
    final = run(tmp_path / "run", batches, **COPYING)
    assert batches.log == list(range(15, 30))
    assert_same(final, run(tmp_path / "whole", **COPYING))
    assert copies(tmp_path) == []  # it has ended


def test_a_copy_that_is_older_or_damaged_or_another_runs_is_not_used(tmp_path):
    dies(tmp_path / "run", 25, checkpoint_every=23)
    assert copies(tmp_path) == [15, 20]  # and checkpoint 23
    batches = Batches()
    run(tmp_path / "run", batches, steps=24, **COPYING)
    assert batches.log == [23]
    dies(tmp_path / "other", 18)
    (file,) = (tmp_path / "cache" / "copies").glob("*/0-of-1/15/arrays.bin")
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2] ^= 1
    file.write_bytes(whole)
    batches = Batches()
    run(tmp_path / "other", batches, steps=12, **COPYING)
    assert batches.log == [10, 11]  # from the one before
    dies(tmp_path / "third", 12)
    shutil.rmtree(tmp_path / "third")
    batches = Batches()
    run(tmp_path / "third", batches, steps=12, **COPYING)
    assert batches.log == list(range(12))


# Sums


def by_hand(array):
    """The definition, one element after another, in Python's integers."""
    array = np.asarray(array)
    if not array.size:
        return 0
    bits = array.view(f"u{array.dtype.itemsize}").reshape(-1, array.shape[-1] if array.ndim else 1)
    rows, columns = (
        sums._factors(np.arange(n, dtype=np.uint64), salt)
        for n, salt in zip(bits.shape, (sums._ROW, sums._COLUMN), strict=True)
    )
    return sum(
        int(bits[i, j]) * int(rows[i]) * int(columns[j])
        for i in range(bits.shape[0])
        for j in range(bits.shape[1])
    ) % 2**64  # fmt: skip


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (4, 6, 8), (2, 3, 4, 5), (0, 3), (3, 0)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool"])
def test_a_sum_is_that_of_its_parts_and_any_changed_bit_changes_it(shape, dtype):
    rng = np.random.default_rng(0)
    array = jax.numpy.asarray(rng.normal(size=shape), dtype)
    array = np.asarray(array)
    whole = sums.of_part(sums.Part(array, (0,) * array.ndim, shape))
    assert whole == by_hand(array)
    halves = [[slice(0, n // 2), slice(n // 2, n)] if n > 1 else [slice(0, n)] for n in shape]
    cuts = [()]
    for each in halves:
        cuts = [(*cut, half) for cut in cuts for half in each]
    parts = [sums.Part(array[cut], tuple(c.start for c in cut), shape) for cut in cuts]
    assert sum(map(sums.of_part, parts)) % 2**64 == whole
    if array.size and dtype != "bool":
        for bit in (0, 7):
            changed = bytearray(array.tobytes())
            changed[rng.integers(len(changed))] ^= 1 << bit
            changed = np.frombuffer(bytes(changed), array.dtype).reshape(shape)
            assert sums.of_part(sums.Part(changed, (0,) * array.ndim, shape)) != whole


# kill -9 while an object store is written to


@pytest.mark.slow
def test_killed_while_writing_to_the_store(bucket, tmp_path):
    """kill -9 in the midst of checkpoint 20: the run goes on from 10, and nothing is different."""
    settings = {"steps": 30, **SETTINGS}
    command = [sys.executable, toy_run.__file__, RUN, json.dumps(settings)]
    marks = {step: content(bucket, f"checkpoints/{step}/commit_success.txt") for step in (10, 20)}
    with subprocess.Popen(command, env=environment()) as process:
        deadline = time.monotonic() + 600
        while not any(name.startswith("checkpoints/20/state/") for name in objects(bucket)):
            assert time.monotonic() < deadline and process.poll() is None
            bucket.slow = 0.2 if marks[10].exists() else 0.0
            time.sleep(0.005)
        process.kill()
    bucket.slow = 0.0
    assert marks[10].exists() and not marks[20].exists() and "lock" in objects(bucket)
    batches = Batches()
    final = run(RUN, batches, **settings)
    assert batches.log == list(range(10, 30))
    assert_same(final, run(tmp_path / "disk", **settings))
    assert logged(content(bucket, "metrics.jsonl")) == logged(tmp_path / "disk" / "metrics.jsonl")


def writes_of(server, step, process):
    """How many objects of its part of a checkpoint a process has written, and whether it is done.

    A part's last object is the manifest that names the others.
    """
    part = f"checkpoints/{step}/state/ocdbt.process_{process}/"
    names = [name for name in objects(server) if name.startswith(part)]
    return len(names), f"{part}manifest.ocdbt" in names


@pytest.mark.slow
def test_two_slices_killed_while_writing_to_the_store_go_on_on_two_processes(bucket, tmp_path):
    """4 processes of 2 devices are 2 slices; the last is killed amid checkpoint 16, and so it ends.

    2 processes of 4 devices end the run from checkpoint 8, as if nothing was. The witness is a run
    of 4 processes that stops in order at 8: every bit is that of its run. Another, of 4 processes
    from the beginning to the end, sums in another order, so its params are equal but for rounding.
    """
    settings = test_multihost.SETTINGS | {"mesh": {"fsdp": 4, "slices": 2}}
    notes, witness, whole = (tmp_path / name for name in ("killed", "witness", "whole"))
    notes.mkdir()
    processes = start_pod(notes, 4, 2, **settings, place=RUN, slow=0.05)
    marks = {step: content(bucket, f"checkpoints/{step}/commit_success.txt") for step in (8, 16)}
    deadline = time.monotonic() + 1200
    while not writes_of(bucket, 16, 3)[0]:
        assert time.monotonic() < deadline
        assert [process.poll() for process in processes] == [None] * 4
        bucket.slow = 0.5 if marks[8].exists() else 0.0
        time.sleep(0.01)
    processes[3].kill()
    processes[3].communicate()
    assert not writes_of(bucket, 16, 3)[1], "it had written its part before it was killed"
    bucket.slow = 0.0
    time.sleep(5)  # the others write all they can, and wait for the one that is gone
    for process in processes[:3]:
        process.kill()
        process.communicate()
    assert marks[8].exists() and not marks[16].exists()

    said = finish(start_pod(notes, 2, 4, **settings, place=RUN))
    assert "resumed from step 8 of 24" in said[0]
    assert "on 8 x cpu (data 2, fsdp 4, spatial 1, tensor 1)" in said[0]
    finish(start_pod(witness, 4, 2, **settings | {"steps": 8}))
    finish(start_pod(witness, 2, 4, **settings))
    finish(start_pod(whole, 4, 2, **settings))
    for ours, theirs in zip(leaves(notes), leaves(witness), strict=True):
        assert ours.tobytes() == theirs.tobytes()
    for ours, theirs in zip(leaves(notes), leaves(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6)
    batches = seen(notes)
    assert batches == seen(witness) == seen(whole)
    stream = [i for step in sorted(batches) for i in batches[step]]
    assert len(stream) == 24 * 16
    for epoch in range(7):
        assert sorted(stream[50 * epoch : 50 * (epoch + 1)]) == list(range(50))
    assert len(set(stream[350:])) == 34
