"""Runs that are killed with kill -9, again and again, and what holds a workdir meanwhile."""

import contextlib
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from tests import toy_run
from tests.toy_run import assert_same, environment, run
from unclip_jax.errors import UserError
from unclip_jax.training import lock, writers
from unclip_jax.training.saved import Saved, damage, has_sums


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Drawing the curves takes longer than a toy run."""
    monkeypatch.setattr(writers, "plot_metrics", lambda workdir: None)


# Two runs, and a lock that was left


def waits_for(condition, process):
    """Until `condition()`; the process must live meanwhile."""
    deadline = time.monotonic() + 600  # a busy machine takes long to start a process
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)


@contextlib.contextmanager
def toy(workdir, **settings):
    """`tests/toy_run.py` in a process of its own, which does not outlive the block."""
    command = [sys.executable, toy_run.__file__, str(workdir), json.dumps(settings)]
    output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=environment(), **output) as process:
        try:
            yield process
        finally:
            process.kill()


def whole_checkpoints(workdir):
    found = (workdir / "checkpoints").glob("*")
    return sorted(int(path.name) for path in found if path.name.isdecimal())


def test_the_second_run_on_a_workdir_is_refused_and_a_killed_one_blocks_nothing(tmp_path):
    settings = {"steps": 100_000, "schedule": "constant", "checkpoint_every": 5000}
    with toy(tmp_path, **settings) as first:
        waits_for(lambda: (tmp_path / writers.METRICS_FILE).is_file(), first)
        before = first.pid
        with pytest.raises(UserError, match=f"in use by process {before} on"):
            run(tmp_path, **settings)
        assert lock.holder(tmp_path).startswith(f"process {before} on")
        assert first.poll() is None  # and it was not disturbed
        first.kill()
    assert f"process {before} on" in (tmp_path / "lock").read_text()  # the lock file stays
    assert lock.holder(tmp_path) is None
    run(tmp_path / "new", steps=2, schedule="constant")
    shutil.copy(tmp_path / "lock", tmp_path / "new" / "lock")
    run(tmp_path / "new", steps=3, schedule="constant")


def test_what_a_killed_writer_left_goes_and_nothing_else(tmp_path):
    (tmp_path / "previews").mkdir()
    leftovers = [".description.json.123.tmp", ".curves.png.4567.tmp", "previews/.step_1.png.8.tmp"]
    others = [".notes.tmp", "notes.1.tmp", "previews/.hidden"]
    for name in leftovers + others:
        (tmp_path / name).write_text("half")
    run(tmp_path, steps=2, schedule="constant")
    assert not any((tmp_path / name).exists() for name in leftovers)
    assert all((tmp_path / name).exists() for name in others)


# kill -9 of the loop on a toy


KILLS = 30


def killed_and_resumed(tmp_path):
    """Kill a run again and again, every other time in the midst of writing a checkpoint.

    After each death the newest checkpoint must be at least that of before, as many must be whole as
    the run keeps, and what was logged must be, number for number, what an undisturbed run logs.

    Returns:
        How often a checkpoint was being written when the run died.
    """
    settings = {"steps": 2000, "checkpoint_every": 20, "log_every": 4, "keep_checkpoints": 3}
    whole, workdir = tmp_path / "whole", tmp_path / "killed"
    final = run(whole, **settings)
    expected = {
        record["step"]: values(record) for record in writers.read_metrics(whole / "metrics.jsonl")
    }
    delays = random.Random(0)
    reached, writing = 0, 0
    for kill in range(KILLS):
        with toy(workdir, **settings) as process:
            waits_for(
                lambda seen=reached: max(whole_checkpoints(workdir), default=0) > seen, process
            )
            if kill % 2:
                time.sleep(delays.uniform(0.0, 0.1))
                waits_for(lambda: unfinished(workdir), process)
                time.sleep(delays.uniform(0.0, 0.01))
            else:
                time.sleep(delays.uniform(0.0, 0.3))
            process.kill()
        writing += unfinished(workdir)
        steps = whole_checkpoints(workdir)
        assert steps[-1] > reached and len(steps) >= min(3, steps[-1] // 20)
        reached = steps[-1]
        for step in steps[-3:]:  # an older one may have died while it was being deleted
            folder = workdir / "checkpoints" / str(step)
            assert has_sums(folder) and not damage(folder)
        for record in writers.read_metrics(workdir / "metrics.jsonl"):
            assert values(record) == expected[record["step"]]
    assert reached < settings["steps"]
    assert_same(run(workdir, **settings), final)
    assert not unfinished(workdir)
    logged = writers.read_metrics(workdir / "metrics.jsonl")
    assert {record["step"]: values(record) for record in logged} == expected
    return writing


def values(record):
    return {n: value for n, value in record.items() if not writers.by_the_clock(n)}


def unfinished(workdir):
    return any("tmp" in path.name for path in (workdir / "checkpoints").glob("*"))


@pytest.mark.slow
def test_thirty_kills(tmp_path):
    writing = killed_and_resumed(tmp_path)
    print(f"{KILLS} of {KILLS} resumed; {writing} died while a checkpoint was being written")
    assert writing >= 5


# kill -9 of train.py

KEEP = 3
STEPS = 400
TRAIN = [
    "train.py", "--config=configs/emoji/clip.py:smoke",
    "--config.stage.model.image_size=16", "--config.stage.model.patch=8",
    "--config.stage.model.vision_width=32", "--config.stage.model.vision_layers=1",
    "--config.stage.model.vision_heads=2", "--config.stage.model.text_width=32",
    "--config.stage.model.text_layers=1", "--config.stage.model.text_heads=2",
    "--config.stage.model.embed_dim=16", "--config.data.split=all", "--config.heldout_split=all",
    "--config.train.batch_size=4", f"--config.train.steps={STEPS}", "--config.train.log_every=1",
    "--config.train.eval_every=150", "--config.train.preview_every=0",
    f"--config.train.keep_checkpoints={KEEP}",
]  # fmt: skip


@pytest.fixture
def pictures(tmp_path):
    """A folder of six pictures with captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, colour in enumerate(("red", "green", "blue", "black", "white", "yellow")):
        Image.new("RGB", (16, 16), colour).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {colour} square")
    return folder


@contextlib.contextmanager
def train(workdir, pictures, checkpoint_every=2):
    """train.py in a process of its own, which does not outlive the block.

    It keeps compiled programs as it does for users, in a cache that begins empty, so that kills
    fall into that as well.
    """
    command = [
        sys.executable, *TRAIN, f"--config.data.name={pictures}", f"--workdir={workdir}",
        f"--config.train.checkpoint_every={checkpoint_every}",
    ]  # fmt: skip
    cache = {"UNCLIP_JAX_CACHE": str(workdir.with_name(f"{workdir.name}_cache"))}
    env = {name: value for name, value in environment(**cache).items() if "_CACHE_" not in name}
    root = Path(toy_run.__file__).parents[1]
    with (
        workdir.with_name(f"{workdir.name}.log").open("a") as log,
        subprocess.Popen(command, env=env, cwd=root, stdout=log, stderr=log) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def none_is_lost(workdir, before):
    """The finished checkpoints; of those before, any that went made room for as many as stay."""
    steps = whole_checkpoints(workdir)
    for step in set(before) - set(steps):
        assert sum(other > step for other in steps) >= KEEP
    for step in steps[-KEEP:]:  # an older one may have died while it was being deleted
        folder = workdir / "checkpoints" / str(step)
        assert has_sums(folder) and not damage(folder)
    return steps


def kept(workdir):
    """The whole state after the last step, and the position in the data."""
    with Saved(workdir) as saved:
        state = saved.state(STEPS, lambda tree: tree)
        return state, saved.item(STEPS, "data")


def names(workdir):
    """Of all files but TensorBoard's and those of checkpoints."""
    found = (path.relative_to(workdir) for path in workdir.rglob("*"))
    return {str(path) for path in found if path.parts[0] not in ("checkpoints", "tensorboard")}


@pytest.mark.slow
def test_train_killed_thirty_times_ends_as_if_it_had_not_been(tmp_path, pictures):
    """A third of the kills as it starts, a third as it trains, a third in the midst of a write."""
    whole, workdir = tmp_path / "whole", tmp_path / "killed"
    moments = random.Random(0)
    finished, writing, starting = [], 0, 5.0
    for kill in range(30):
        with train(workdir, pictures) as process:
            began = time.monotonic()
            if kill % 3 == 0:
                time.sleep(moments.uniform(0.0, starting))
            else:
                reached = max(finished, default=0)
                waits_for(
                    lambda seen=reached: max(whole_checkpoints(workdir), default=0) > seen, process
                )
                starting = time.monotonic() - began
                time.sleep(moments.uniform(0.0, 0.5))
            if kill % 3 == 2:
                waits_for(lambda: unfinished(workdir), process)
                time.sleep(moments.uniform(0.0, 0.01))
            assert process.poll() is None, "it ended before it was killed"
            process.kill()
        assert lock.holder(workdir) is None
        writing += kill % 3 > 0 and unfinished(workdir)
        finished = none_is_lost(workdir, finished)
        assert sum("tmp" in path.name for path in workdir.glob("checkpoints/*")) <= 1
    print(f"30 kills, {writing} as a checkpoint was written, the last after step {finished[-1]}")
    assert writing >= 10

    for folder, every in ((workdir, 2), (whole, 50)):
        with train(folder, pictures, checkpoint_every=every) as process:
            assert process.wait() == 0
    (state, position), (expected, expected_position) = kept(workdir), kept(whole)
    assert_same(state, expected)
    assert position == expected_position
    # The loss of every batch is that of the same batch, so the same examples were seen.
    logged = [values(record) for record in writers.read_metrics(workdir / "metrics.jsonl")]
    assert logged == [values(record) for record in writers.read_metrics(whole / "metrics.jsonl")]
    assert {record["step"] for record in logged} == set(range(1, STEPS + 1))
    assert names(workdir) == names(whole)
    assert len(list((workdir / "checkpoints").iterdir())) == KEEP
    model = "model/params.safetensors"
    assert (workdir / model).read_bytes() == (whole / model).read_bytes()
