"""Several processes that draw and measure together: what one would, each its own share."""

import json
import os
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from tests import heldout_run, shares_run
from tests.shares_run import BATCH, PICTURES
from tests.test_multihost import ENVIRONMENT
from tests.xla_flags import xla_flags
from unclip_jax.evaluate.pictures import with_moments
from unclip_jax.metrics.vectors import Vectors, moments
from unclip_jax.parallel import distributed, shares
from unclip_jax.pipeline.drawing import Kept, in_batches, keeping


def numbered(drew):
    """`make` for `in_batches`, which notes what it is asked for."""

    def make(rows):
        drew.append(rows.tolist())
        return np.float32(rows)[:, None]

    return make


def test_batches_are_dealt_in_turn(monkeypatch):
    """Every process's batches are those that one process would draw."""
    alone, dealt = [], []
    in_batches(10, 3, numbered(alone))
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    for process in range(3):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        dealt.append([rows for rows in shares.own(alone)])
    assert dealt == [[alone[0], alone[3]], [alone[1]], [alone[2]]]


def test_what_was_drawn_is_not_drawn_again(tmp_path):
    def dies(rows):
        if rows[0] == 6:
            raise KeyboardInterrupt
        return np.float32(rows)[:, None]

    with keeping(Kept(tmp_path, ["a"])), pytest.raises(KeyboardInterrupt):
        in_batches(10, 3, dies)
    drew = []
    with keeping(Kept(tmp_path, ["a"])):
        made = in_batches(10, 3, numbered(drew))
        again = in_batches(4, 3, numbered(drew))  # the next set of batches is another
    assert drew == [[6, 7, 8], [9, 9, 9], [0, 1, 2], [3, 3, 3]]
    assert made[:, 0].tolist() == list(range(10)) and again[:, 0].tolist() == list(range(4))
    drew = []
    with keeping(Kept(tmp_path, ["b"])):  # other pictures
        in_batches(10, 3, numbered(drew))
    assert len(drew) == 4
    broken = next(tmp_path.glob("*/0001-00000000.npz"))
    broken.write_bytes(broken.read_bytes()[:50])
    for name in ("a", "b"):
        kept = Kept(tmp_path, [name])
        with keeping(kept):
            assert in_batches(10, 3, numbered([]))[:, 0].tolist() == list(range(10))
        kept.forget()
    assert not any(tmp_path.iterdir())


def in_threads(count, work, monkeypatch):
    """`work()` in threads that take themselves for processes; what each returns."""
    me, board, barrier = threading.local(), [None] * count, threading.Barrier(count, timeout=300)
    found = [None] * count

    def exchange(value):
        board[me.index] = value
        barrier.wait()
        every = list(board)
        barrier.wait()
        return every

    def run(index):
        me.index = index
        found[index] = work()

    monkeypatch.setattr(jax, "process_count", lambda: count)
    monkeypatch.setattr(jax, "process_index", lambda: me.index)
    gather = lambda value: json.loads(json.dumps(exchange(value)))  # noqa: E731
    monkeypatch.setattr(distributed, "gather", gather)
    allgather = lambda x: np.stack(exchange(np.asarray(x)))  # noqa: E731
    monkeypatch.setattr(shares.multihost_utils, "process_allgather", allgather)
    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize(("total", "count"), [(30_000, 8), (100, 3), (5, 4)])
def test_shares_are_joined_in_order(total, count, monkeypatch):
    """Pictures and moments are those of one process; some processes may have nothing to draw."""
    alone = in_batches(total, BATCH, shares_run.draw([]))

    def work():
        made = in_batches(total, BATCH, shares_run.draw([]))
        features = made.reshape(total, -1).astype(np.float32) / 255
        return made, with_moments(Vectors(features[:, :2], features)).moments

    expected = moments(alone.reshape(total, -1).astype(np.float32) / 255)
    for made, found in in_threads(count, work, monkeypatch):
        np.testing.assert_array_equal(made, alone)
        assert found.count == total
        np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-12)
        np.testing.assert_allclose(found.scatter, expected.scatter, rtol=1e-9, atol=1e-9)


def run_on(count, devices, script, *arguments):
    """A script in so many processes, which find each other; they must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, script.__file__, *arguments, address, str(count), str(i)],
            env=os.environ | ENVIRONMENT | {"XLA_FLAGS": xla_flags(devices)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(count)
    ]
    said = [process.communicate(timeout=1800)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * count, "\n".join(said)


def drawn(folder, count):
    """What `count` processes come to, and which batches each drew."""
    run_on(count, 1, shares_run, str(folder))
    drew = [json.loads((folder / f"drew-{i}.json").read_text()) for i in range(count)]
    return dict(np.load(folder / "drawn.npz")), drew


@pytest.mark.slow
def test_thirty_thousand_pictures_on_eight_processes(tmp_path):
    """The pictures and figures of one process, each drawing an eighth; then nothing anew."""
    made, drew = drawn(tmp_path, 8)
    batches = range(0, PICTURES, BATCH)
    assert drew == [list(batches)[i::8] for i in range(8)]
    alone = in_batches(PICTURES, BATCH, shares_run.draw([]))
    np.testing.assert_array_equal(made["pictures"], alone)
    expected = moments(alone.reshape(PICTURES, -1).astype(np.float32) / 255)
    np.testing.assert_allclose(made["mean"], expected.mean, rtol=1e-12)
    np.testing.assert_allclose(made["scatter"], expected.scatter, rtol=1e-9)
    assert drawn(tmp_path, 3)[1] == [[], [], []]


@pytest.mark.slow
def test_figures_and_previews_by_all_hosts_are_those_of_one(tmp_path):
    """Two processes of two devices, each of which has a part of the weights."""
    run_on(2, 2, heldout_run, str(tmp_path / "both.npz"))
    heldout_run.main([str(tmp_path / "one.npz")])
    both, one = (dict(np.load(tmp_path / f"{name}.npz")) for name in ("both", "one"))
    assert both.keys() == one.keys() and any("heldout_loss" in name for name in one)
    for name, value in one.items():
        most = 1 if name.endswith("preview") else 1e-4 * (1 + abs(value))
        assert np.all(np.abs(np.float64(both[name]) - np.float64(value)) <= most), name
