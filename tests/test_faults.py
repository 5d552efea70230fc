"""Faults that machines have: changed bytes, full disks, cut files, clocks that jump."""

import hashlib
import io
import json
import random
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tests import fault_run, tar_shards, toy_run
from tests.toy_run import Batches, assert_same, environment, run
from unclip_jax.data.records import BadRecord
from unclip_jax.errors import UserError
from unclip_jax.training import checksums, save, writers
from unclip_jax.training.saved import Damaged, Saved, damage
from unclip_jax.weights import folder as model_folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Drawing the curves takes longer than a toy run."""
    monkeypatch.setattr(writers, "plot_metrics", lambda workdir: None)


def flip(path, position, bit=0):
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(bytes(content))


# Changed bytes in model folders


@pytest.fixture
def model(tmp_path):
    """A small model folder, and what it holds."""
    rng = np.random.default_rng(0)
    kernel, bias = rng.normal(size=(3, 4)), rng.normal(size=2)
    params = {
        "network": {"a-b": {"kernel": np.float32(kernel)}, "a": {"b": np.float32(bias)}},
        "normalisation": {"std": np.ones(2, np.float32)},
    }
    description = {"stage": {"kind": "toy", "rate": 0.1}, "step": 3}
    model_folder.save_stage(tmp_path / "model", params=params, description=description)
    return tmp_path / "model", params, description


@pytest.mark.parametrize("name", [model_folder.CONFIG_FILE, model_folder.PARAMS_FILE])
@pytest.mark.parametrize("typed", [False, True])
def test_every_changed_byte_of_a_model_folder_is_told(model, name, typed):
    """Each byte in turn. What still loads must be what was saved: blanks in JSON may change."""
    folder, params, description = model
    expected = jax.eval_shape(lambda: params) if typed else None
    whole = (folder / name).read_bytes()
    bits = random.Random(0)
    blank = 0
    for position in range(len(whole)):
        flip(folder / name, position, bits.randrange(8))
        try:
            loaded, described = model_folder.load_stage(folder, expected)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            blank += 1
            assert_same(loaded, params)
            assert described == description
        (folder / name).write_bytes(whole)
    assert blank <= whole.count(b" ") + whole.count(b"\n")


def test_a_changed_description_is_told_before_weights_are_read(model):
    folder, _, _ = model
    path = folder / model_folder.CONFIG_FILE
    path.write_text(path.read_text().replace('"rate": 0.1', '"rate": 0.2'))
    with pytest.raises(UserError, match=r'content has changed.*delete the line "checksum"'):
        model_folder.read_description(folder)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if '"checksum"' not in line))
    assert model_folder.read_description(folder)["stage"]["rate"] == 0.2


# Changed bytes in training checkpoints


@pytest.fixture
def trained(tmp_path):
    """A toy run with checkpoints 3 and 6."""
    run(tmp_path, steps=6, checkpoint_every=3, schedule="constant")
    return tmp_path


def test_a_changed_byte_of_a_training_checkpoint_is_told_or_changes_nothing(trained):
    """Bytes of every file of it: what is read all the same is, bit for bit, what was saved."""
    folder = trained / "checkpoints" / "6"
    assert not damage(folder)
    with Saved(trained) as run_saved:
        whole_state, items = run_saved.state(6, lambda tree: tree), read_items(run_saved)
    places = random.Random(0)
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    assert len(paths) > 10
    told = 0
    for i, path in enumerate(paths):
        whole = path.read_bytes()
        for change in ("flip", "cut", "remove")[i % 3 :: 2]:
            if change == "flip":
                flip(path, places.randrange(len(whole)), places.randrange(8))
            elif change == "cut":
                path.write_bytes(whole[: len(whole) // 2])
            else:
                path.unlink()
            try:
                with Saved(trained) as run_saved:
                    run_saved.check(6)
                    assert_same(run_saved.state(6, lambda tree: tree), whole_state)
                    assert read_items(run_saved) == items
            except Damaged:
                told += 1
            path.write_bytes(whole)
    assert told > len(paths) / 3


def read_items(run_saved):
    return [run_saved.item(6, name) for name in ("data", "description")]


def test_a_checkpoint_of_a_former_version_is_checked_by_its_files(trained):
    """It has a table of the SHA-256 of its files, and no sums."""
    folder = trained / "checkpoints" / "6"
    shutil.rmtree(folder / "sums")
    assert not damage(folder)  # the very first ones had neither
    table = {
        path.relative_to(folder).as_posix(): [
            path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
        ]
        for path in sorted(folder.rglob("*")) if path.is_file()
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()
    file = folder / checksums.CHECKSUMS_FILE
    file.write_text(json.dumps({"digest": digest, "files": table}))
    assert not damage(folder)
    path = sorted((folder / "state").rglob("d/*"))[-1]
    flip(path, path.stat().st_size // 2)
    assert "SHA-256" in damage(folder)
    with pytest.raises(UserError, match=r"checkpoints/6: the checkpoint is damaged .*SHA-256"):
        run(trained, steps=9, schedule="constant")
    flip(path, path.stat().st_size // 2)
    run(trained, steps=9, checkpoint_every=3, schedule="constant")


def test_a_damaged_checkpoint_stops_the_run_and_the_one_before_is_used_if_asked(trained):
    settings = {"steps": 9, "checkpoint_every": 3, "schedule": "constant"}
    for path in (trained / "checkpoints" / "6" / "state").rglob("d/*"):
        flip(path, path.stat().st_size // 2)
    batches = Batches()
    with pytest.raises(UserError, match=r"checkpoints/6: the checkpoint is damaged .*from step 3"):
        run(trained, batches, **settings)
    assert batches.log == []
    with pytest.raises(UserError, match=r"checkpoints/6: .*damaged.*choose another with --step"):
        save.main(["--workdir", str(trained), "--out", str(trained / "out")])

    with pytest.warns(UserWarning, match="checkpoint 6 is damaged .* moved to .*damaged/6"):
        final = run(trained, batches, if_damaged="previous", **settings)
    assert batches.log == [3, 4, 5, 6, 7, 8]
    assert (trained / "damaged" / "6" / "state").is_dir()
    assert_same(final, run(trained.parent / "whole", **settings))
    # Asked once, it goes back once: the same command again finds a whole checkpoint.
    assert_same(final, run(trained, if_damaged="previous", **settings))


def test_no_whole_checkpoint_is_left(trained):
    for step in (3, 6):
        flip(trained / "checkpoints" / str(step) / "data" / "metadata", 5)
    with pytest.warns(UserWarning, match="checkpoint 6"), pytest.raises(UserError) as error:
        run(trained, steps=6, schedule="constant", if_damaged="previous")
    assert "checkpoints/3: the checkpoint is damaged" in str(error.value)
    assert "delete that folder to start from the beginning" in str(error.value)


def test_a_checkpoint_from_before_there_were_checksums_goes_on(trained):
    for path in trained.rglob("sums"):
        shutil.rmtree(path)
    batches = Batches()
    run(trained, batches, steps=9, checkpoint_every=3, schedule="constant")
    assert batches.log == [6, 7, 8]


def test_a_checkpoint_without_constants_is_read(tmp_path, monkeypatch):
    """CLIP and the upsamplers have nothing in their params but the network."""
    kernel = {"network": {"kernel": jax.numpy.ones((5, 3))}}
    monkeypatch.setattr(toy_run, "init_params", lambda: kernel)
    final = run(tmp_path, loss=bare, steps=3, schedule="constant")
    with Saved(tmp_path) as saved:
        assert_same(saved.averaged(3), final.averaged)


def bare(params, batch, key):
    """Squared error of a model that is one kernel."""
    return jax.numpy.mean((batch["x"] @ params["network"]["kernel"] - batch["y"]) ** 2), {}


# Full disks


def in_a_process(workdir, *limit, **settings):
    """`tests/fault_run.py` in a process of its own."""
    run = [str(workdir), json.dumps(settings), *map(str, limit)]
    command = [sys.executable, fault_run.__file__, *run]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)


def test_a_write_that_fails_is_a_line_and_the_last_checkpoint_stays(tmp_path):
    """No file may grow beyond 1 MB, as if the disk filled up in the midst of a write."""
    settings = {"checkpoint_every": 2, "log_every": 2}
    fault_run.main([str(tmp_path), json.dumps(settings | {"steps": 2})])
    broken = in_a_process(tmp_path, 1_000_000, steps=6, **settings)
    assert broken.returncode == 1
    # TensorStore's threads may complain before and after.
    (line,) = (line for line in broken.stderr.splitlines() if line.startswith("error: "))
    assert "could not be written" in line
    assert "File too large" in line and line.rstrip().endswith("then run the same command again")
    assert not damage(tmp_path / "checkpoints" / "2")
    whole = in_a_process(tmp_path, steps=6, **settings)
    assert whole.returncode == 0 and "resumed from step 2 of 6" in whole.stdout
    steps = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert steps == ["4", "6"]  # and nothing of the broken one


def test_a_checkpoint_that_would_not_fit_is_not_begun(tmp_path, monkeypatch):
    settings = {"checkpoint_every": 3, "schedule": "constant"}
    run(tmp_path, steps=3, **settings)
    with monkeypatch.context() as patch:
        usage = type("Usage", (), {"free": 100})
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(UserError, match=r"checkpoint 6 would not fit \(0\.0 MiB, and 0\.0 MiB"):
            run(tmp_path, steps=9, **settings)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]
    assert_same(run(tmp_path, steps=9, **settings), run(tmp_path / "whole", steps=9, **settings))


def test_metrics_on_a_full_disk_are_a_line(tmp_path, monkeypatch):
    def full(self, step, scalars):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writers.JsonLinesWriter, "write_scalars", full)
    with pytest.raises(UserError, match=r"workdir .* cannot be written to .*No space left"):
        run(tmp_path, steps=6)


# Numbers and clocks


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_nan_in_a_batch_stops_the_run_before_it_is_saved(tmp_path, bad):
    """The same command stops at the same step; the checkpoint before it is whole and finite."""
    for _ in range(2):
        with pytest.raises(UserError, match=r"step 18: .*last good checkpoint is step 10"):
            run(tmp_path, Batches(poison=17, bad=bad))
    assert not damage(tmp_path / "checkpoints" / "10")
    with Saved(tmp_path) as saved:
        state = saved.averaged(10)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("jump", [-86_400.0, 86_400.0])
def test_a_clock_that_jumps_changes_no_speed(tmp_path, monkeypatch, jump):
    """A day back or forth in the midst of the run, as when a machine first hears from NTP."""
    clock, moment = time.time, [0.0]

    class Jumping(Batches):
        def __next__(self):
            if self.index == 15:
                moment[0] = jump
            return super().__next__()

    monkeypatch.setattr(time, "time", lambda: clock() + moment[0])
    began = time.perf_counter()
    run(tmp_path, Jumping())
    seconds = time.perf_counter() - began
    records = writers.read_metrics(tmp_path / writers.METRICS_FILE)
    speeds = [r["train/steps_per_second"] for r in records if "train/steps_per_second" in r]
    assert len(speeds) == 9 and all(speed > 1 / seconds for speed in speeds)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


@pytest.mark.parametrize("jump", [-86_400.0, 86_400.0])
def test_a_clock_that_jumps_leaves_the_live_line_alive(monkeypatch, jump):
    moment = [1e9]
    monkeypatch.setattr("tqdm.std.time", lambda: moment[0])
    stream = Terminal()
    progress = writers.Progress(steps=40, start=0, stream=stream)
    for step in range(1, 41):
        moment[0] += jump if step == 20 else 1.0
        progress.update()
        progress.write_scalars(step, {"train/loss": 1.0})
    progress.close()
    shown = stream.getvalue().split("\r")[-1]
    assert "40/40" in shown and "loss 1" in shown


# Shards that are cut


def test_a_shard_that_is_cut_under_a_running_reader_is_named(tmp_path):
    """Its index is known, so its pairs are asked for; those beyond the cut are bad, by name."""
    data = tar_shards.source(tar_shards.fill(tmp_path))
    whole = [data[i]["image"] for i in range(len(data))]
    shard = tmp_path / "00001.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    bad = []
    for i, image in enumerate(whole):
        try:
            assert data[i]["image"] == image
        except BadRecord as error:
            bad.append(i)
            assert "00001.tar" in str(error) and "\n" not in str(error)
    assert bad and set(bad) <= set(range(10, 20))
