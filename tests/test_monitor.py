"""What a run says of its own speed: goodput, MFU, slow hosts, standstill, a profile."""

import threading
import time

import jax
import jax.numpy as jnp
import pytest

from tests.toy_run import Batches, run
from unclip_jax.errors import UserError
from unclip_jax.parallel import distributed, flops
from unclip_jax.training import monitor, writers
from unclip_jax.training.config import TrainConfig
from unclip_jax.training.goodput import Goodput
from unclip_jax.training.profile import Span


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(writers, "plot_metrics", lambda workdir: None)


def watching(tmp_path, start=0, **settings):
    said = []
    config = TrainConfig(batch_size=8, **settings)
    return monitor.Monitor(tmp_path, start, time.perf_counter(), config, 2, said.append), said


# Goodput


def test_what_a_killed_run_repeats_is_lost(tmp_path):
    first = Goodput(tmp_path, 0)
    first.add(10, 100.0, {"input": 20.0, "compile": 30.0}, saved=True)
    first.add(20, 40.0, {"checkpoint": 8.0}, saved=False)
    first.write()
    assert first.seconds == {
        "productive": 82.0, "input": 20.0, "compile": 30.0, "checkpoint": 8.0, "evaluate": 0.0,
        "lost": 0.0,
    }  # fmt: skip
    again = Goodput(tmp_path, 10)  # killed after step 20, goes on from step 10
    assert again.seconds["lost"] == 32.0 and again.seconds["productive"] == 50.0
    again.add(20, 32.0, {}, saved=True)
    assert again.shares()["goodput"] == pytest.approx(82 / 172)
    assert sum(again.shares().values()) == pytest.approx(1.0)
    again.write()
    assert Goodput(tmp_path, 20).seconds["lost"] == 32.0  # an orderly stop loses nothing more
    assert Goodput(tmp_path, 0).seconds["lost"] == 114.0  # begun anew: all of it


def test_a_damaged_file_of_goodput_stops_no_run(tmp_path):
    for text in ("", "[]", '{"seconds": {}}', '{"seconds": {"lost": "x"}}'):
        (tmp_path / "goodput.json").write_text(text)
        assert sum(Goodput(tmp_path, 3).seconds.values()) == 0


def test_shares_of_a_run_are_in_its_metrics(tmp_path):
    """A slow evaluation and slow data are told apart from work; a second life adds to the first."""

    class Slow(Batches):
        def __next__(self):
            time.sleep(0.03)
            return super().__next__()

    def evaluate(params, step):
        time.sleep(0.3)
        return {"score": 1.0}

    settings = {"eval_every": 10, "evaluate": evaluate, "checkpoint_every": 10, "log_every": 10}
    run(tmp_path, Slow(), steps=20, schedule="constant", **settings)
    records = [r for r in writers.read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in r]
    last = records[-1]
    parts = ("goodput", "input", "compile", "checkpoint", "evaluate", "lost")
    assert sum(last[f"run/{name}"] for name in parts) == pytest.approx(1.0)
    seconds = Goodput(tmp_path, 20).seconds
    assert seconds["evaluate"] >= 0.6 and seconds["input"] > 0.3 and seconds["lost"] == 0
    assert seconds["compile"] > 0 and seconds["checkpoint"] > 0
    run(tmp_path, Slow(), steps=30, schedule="constant", **settings)
    assert Goodput(tmp_path, 30).seconds["evaluate"] > seconds["evaluate"]


# MFU


def test_mfu_counts_three_forward_passes_of_the_loss(tmp_path, monkeypatch):
    kind = jax.devices()[0].device_kind
    monkeypatch.setitem(flops.PEAKS, kind, 1e9)
    run(tmp_path, steps=20, log_every=10)
    last = writers.read_metrics(tmp_path / "metrics.jsonl")[-1]
    model = 3 * 2 * 16 * 5 * 3  # of a product of [16, 5] and [5, 3]
    expected = model * last["train/steps_per_second"] / jax.device_count() / 1e9
    assert last["run/mfu"] == pytest.approx(expected)
    assert flops.peak("TPU v5 lite") == 197e12 and flops.peak("TPU v5p") == 459e12
    assert flops.peak("TPU v6 lite") == 918e12 and flops.peak("NVIDIA H100 80GB HBM3") == 989e12
    assert flops.peak("a device of another kind") is None


# Hosts


def test_the_slow_host_is_named_once(tmp_path, monkeypatch):
    one, said = watching(tmp_path)
    with one:
        one.restart(10)
        one._since -= 20.0  # 10 steps of 2 s
        others = [
            {"host": f"host-{i}", "own": own, "overheads": dict.fromkeys(monitor.OVERHEADS, 0.0),
             "memory": (i + 1) * 2**30}
            for i, own in enumerate((0.1, 0.2, 1.8, 0.15))
        ]  # fmt: skip
        monkeypatch.setattr(distributed, "gather", lambda mine: others)
        figures = one.read(20, saved=False)
        assert figures["run/slowest_process"] == 2 and figures["run/host_seconds"] == 1.8
        assert figures["run/step_seconds"] == pytest.approx(2.0, rel=0.05)
        assert figures["run/device_memory_gib"] == 4.0
        one.read(20, saved=False)
        (line,) = said
        assert "host host-2 (process 2) is slow: it takes 1.8 s a step" in line
        assert "the others 0.15 s" in line
        others[2]["own"] = 0.2
        one.read(20, saved=False)
        assert len(said) == 1


# Standstill


def test_a_standstill_dumps_the_stacks_of_all_threads(tmp_path, capfd):
    held, free = threading.Event(), threading.Event()

    def a_thread_that_hangs():
        held.set()
        free.wait()

    thread = threading.Thread(target=a_thread_that_hangs)
    thread.start()
    held.wait()
    one, _ = watching(tmp_path, stall_minutes=0.02 / 60)
    with one:
        file = tmp_path / "stacks-0.txt"
        deadline = time.monotonic() + 60
        while "a_thread_that_hangs" not in (file.read_text() if file.exists() else ""):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.1)
        dumps = file.read_text().count("a_thread_that_hangs")
        time.sleep(0.1)
        assert file.read_text().count("a_thread_that_hangs") == dumps == 1  # once a standstill
    free.set()
    thread.join()
    assert "no step has ended for" in capfd.readouterr().err


def test_no_standstill_is_seen_while_steps_end(tmp_path):
    one, _ = watching(tmp_path, stall_minutes=1.0)
    with one:
        with one.step(1) as result:
            result.append(jnp.zeros(()))
        deadline = time.monotonic() + 60
        while one._ends.step != 1:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    assert not (tmp_path / "stacks-0.txt").exists()


# Profile


def test_a_profile_of_some_steps(tmp_path, capsys):
    run(tmp_path, steps=6, schedule="constant", profile=Span.parse("3:4"))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert f"profile of steps 3 to 4: tensorboard --logdir {tmp_path}" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["3", "0:4", "5:3", "a:b", "1:2:3", "-1:4", "3:"])
def test_a_profile_that_makes_no_sense(text):
    with pytest.raises(UserError, match=r"--profile: got .*, expected START:STOP"):
        Span.parse(text)


def test_a_profile_of_steps_that_do_not_come(tmp_path):
    assert Span.parse("") is None
    with pytest.raises(UserError, match=r"--profile: got '3:40', expected steps up to"):
        run(tmp_path, steps=6, schedule="constant", profile=Span.parse("3:40"))
