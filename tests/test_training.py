"""The loop: what it reads, reports and saves, and resuming bit for bit."""

import gc
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny, toy_run
from tests.toy_run import (
    Batches,
    assert_same,
    environment,
    loss_fn,
    numpy_leaves,
    run,
    step_fn,
)
from tests.xla_flags import xla_flags
from unclip_jax import stages
from unclip_jax.common import config as settings
from unclip_jax.errors import UserError
from unclip_jax.parallel import sharding
from unclip_jax.training import (
    TrainConfig,
    make_optimizer,
    make_train_step,
    prepared,
    writers,
)
from unclip_jax.training import checkpoints as resume
from unclip_jax.training.saved import Saved


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """Drawing the curves takes longer than a toy run; one test looks at them."""
    if "draws_curves" not in request.node.name:
        monkeypatch.setattr(writers, "plot_metrics", lambda workdir: None)


def metrics_of(workdir):
    return [
        {name: value for name, value in record.items() if not writers.by_the_clock(name)}
        for record in writers.read_metrics(Path(workdir) / writers.METRICS_FILE)
    ]


def command(workdir, save_to=None, **changes):
    arguments = [sys.executable, toy_run.__file__, str(workdir), json.dumps(changes)]
    return arguments + ([str(save_to)] if save_to else [])


def wait_for(condition, process):
    """Until `condition()`; the process must live meanwhile."""
    deadline = time.monotonic() + 600  # a busy machine takes long to start a process
    while not condition():
        assert process.poll() is None, "the run ended early"
        assert time.monotonic() < deadline
        time.sleep(0.02)


# The loop


def test_training_learns_reports_exports_and_draws_curves(tmp_path, capsys):
    exported = {}
    final = run(
        tmp_path,
        evaluate=lambda params, step: {"bias": float(params["network"]["bias"][0])},
        preview=lambda params, step: (
            [(np.full((9, 9, 3), 200, np.uint8), "dä 日本 \U0001f600")] * 3
        ),
        export=lambda params, step: exported.update({step: jax.tree.map(np.asarray, params)}),
        eval_every=15,
        preview_every=20,
    )
    assert int(final.step) == 30
    assert_same(exported[30], final.averaged)
    records = metrics_of(tmp_path)
    losses = [(r["step"], r["train/loss"]) for r in records if "train/loss" in r]
    assert [step for step, _ in losses] == [4, 8, 10, 12, 16, 20, 24, 28, 30]
    assert losses[-1][1] < losses[0][1]
    assert [r["step"] for r in records if "eval/bias" in r] == [15, 30]
    previews = sorted(path.name for path in (tmp_path / "previews").iterdir())
    assert previews == ["step_00000020.png", "step_00000030.png"]
    for name in ("curves.png", "description.json", "parameters.txt", "tensorboard", "lock"):
        assert (tmp_path / name).exists()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("21 parameters, 18 of them trained, on 1 x")
    assert any(line.startswith("step 4/30  loss ") and "time left" in line for line in lines)


def test_logged_values_are_means_over_the_steps_between(tmp_path):
    """A loss that is the step number: the mean of 1..4, then of 5..8."""

    def loss(params, batch, key):
        return loss_fn(params, batch, key)[0], {"index": batch["index"][0].astype(jnp.float32)}

    class Numbered(Batches):
        def __next__(self):
            batch = super().__next__()
            return batch | {"index": np.full(self.batch_size, self.index, np.int32)}

    run(tmp_path, Numbered(), loss=loss, steps=8, checkpoint_every=8)
    assert [record["train/index"] for record in metrics_of(tmp_path)] == [2.5, 6.5]


def test_no_batch_is_read_that_is_not_trained_on(tmp_path):
    batches = Batches(end=30)
    run(tmp_path, batches)
    assert batches.log == list(range(30))


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    """SIGTERM in step 17, between checkpoints; the line logged there is one more.

    The position in the data is bytes here, as with Grain's loader.
    """

    class Terminating(Batches):
        def __next__(self):
            if self.index == 17:
                signal.raise_signal(signal.SIGTERM)
            return super().__next__()

    whole = run(tmp_path / "whole", Batches(as_bytes=True))
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "parts", Terminating(as_bytes=True))
    assert stop.value.code == 0
    batches = Batches(as_bytes=True)
    assert_same(run(tmp_path / "parts", batches), whole)
    assert batches.log == list(range(17, 30))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    steps = [record["step"] for record in metrics_of(tmp_path / "parts")]
    assert steps == [4, 8, 10, 12, 16, 17, 20, 24, 28, 30]
    same = [4, 8, 10, 12, 16, 24, 28, 30]
    expected = [r for r in metrics_of(tmp_path / "whole") if r["step"] in same]
    assert [r for r in metrics_of(tmp_path / "parts") if r["step"] in same] == expected


def test_a_finished_run_trains_no_more_but_exports_again(tmp_path):
    exported = []
    first = run(tmp_path)
    batches = Batches()
    again = run(tmp_path, batches, export=lambda params, step: exported.append(step))
    assert_same(first, again)
    assert exported == [30] and batches.log == []


def test_a_run_whose_time_is_over_ends_as_if_that_had_been_its_last_step(tmp_path, capsys):
    """With a step compiled before: nothing of it depends on how many there are to be."""

    settings = {"schedule": "constant", "eval_every": 10, "preview_every": 10}
    whole = run(tmp_path / "whole", steps=16, **settings)
    step_fn = make_train_step(
        toy_run.noisy_loss_fn,
        make_optimizer(made := toy_run.toy_config(steps=4, **settings)),
        made,
        sharding.make_mesh(),
    )
    told, exported = [], []
    callbacks = {
        "evaluate": lambda params, step: told.append(step) or {"bias": 0.0},
        "export": lambda params, step: exported.append(step),
    }
    assert capsys.readouterr().out.count("compiling, about") == 1
    callbacks |= {"ends": lambda step: step == 16, "step_fn": step_fn}
    cut = run(tmp_path / "cut", **settings, **callbacks)
    assert capsys.readouterr().out.count("compiling, about") == 0
    assert_same(cut, whole)
    assert told == [10, 16] and exported == [16]
    assert (tmp_path / "cut" / "checkpoints" / "16").is_dir()
    described = json.loads((tmp_path / "cut" / "description.json").read_text())
    assert described["train"]["steps"] == 16
    assert int(run(tmp_path / "cut", **settings).step) == 30  # and goes on


def test_a_run_that_goes_on_has_one_state_in_memory(tmp_path, monkeypatch):
    """Where a state just fits on its devices, a run begins, and must be able to go on."""
    restore, alive = resume.Checkpoints.restore, []

    def count():
        gc.collect()
        return sum(array.shape == (5, 3) for array in jax.live_arrays())

    def watched(self, step, like):
        alive.append(count())
        return restore(self, step, like)

    run(tmp_path, steps=10)
    before = count()
    monkeypatch.setattr(resume.Checkpoints, "restore", watched)
    state = run(tmp_path, steps=20)
    assert alive == [before + 1]  # the first params, in the host's memory
    assert int(state.step) == 20


def test_a_run_from_before_a_field_was_there_goes_on(tmp_path):
    """A checkpoint's description is completed by the defaults of what has come since."""
    run(tmp_path / "parts", steps=20, schedule="constant")
    newer = {"stage": {"kind": "toy", "layers": 1, "width": 8}}
    again = {"steps": 30, "schedule": "constant", "description": newer}
    with pytest.raises(UserError, match=r"stage\.width was absent, now 8"):
        run(tmp_path / "parts", **again)

    def complete(description):
        return description | {"stage": {"width": 8} | description["stage"]}

    parts = run(tmp_path / "parts", complete=complete, **again)
    assert_same(parts, run(tmp_path / "whole", schedule="constant"))


def test_what_a_description_was_written_too_early_for_is_the_default():
    full = stages.describe(tiny.CLIP)
    model = {name: value for name, value in full["model"].items() if name != "dtype"}
    older = {"stage": full | {"model": model}, "data": {"name": "emoji"}, "train": {"steps": 3}}
    found = prepared.complete(older | {"clip_fingerprint": "0"})
    assert found["stage"] == full and found["clip_fingerprint"] == "0"
    assert found["train"] == settings.to_dict(TrainConfig(steps=3))
    assert found["data"]["split"] == "train" and "cache_bytes" not in found["data"]


def test_more_steps_go_on_where_the_run_ended(tmp_path):
    run(tmp_path / "parts", steps=20, schedule="constant")
    parts = run(tmp_path / "parts", steps=30, schedule="constant", log_every=7)
    assert_same(parts, run(tmp_path / "whole", schedule="constant"))
    expected = r"train\.steps: got 10, expected at least 30, where .* is already"
    with pytest.raises(UserError, match=expected):
        run(tmp_path / "parts", steps=10, schedule="constant")


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    """kill -9 at random moments, the same command each time, and then to the end."""
    changes = {"steps": 400, "checkpoint_every": 20, "log_every": 8}
    whole = run(tmp_path / "whole", **changes)
    workdir = tmp_path / "killed"
    delays = random.Random(0)
    reached = -1
    for _ in range(2):
        process = subprocess.Popen(
            command(workdir, **changes), env=environment(), stdout=subprocess.DEVNULL
        )

        def further(reached=reached):
            steps = [
                int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit()
            ]
            return max(steps, default=-1) > reached

        wait_for(further, process)
        time.sleep(delays.uniform(0.0, 0.2))
        process.kill()
        process.wait()
        steps = [int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit()]
        reached = max(steps)
    assert 0 < reached < 400
    assert_same(run(workdir, **changes), whole)
    assert metrics_of(workdir) == metrics_of(tmp_path / "whole")


def test_training_stops_when_the_loss_is_not_finite(tmp_path):
    with pytest.raises(UserError, match=r"step 18: .*last good checkpoint is step 10"):
        run(tmp_path, Batches(poison=17))
    checkpoints = resume.Checkpoints(tmp_path / "checkpoints", TrainConfig())
    assert checkpoints.latest() == 10
    with pytest.raises(UserError, match=r"step 3: .*none was saved"):
        run(tmp_path / "other", Batches(poison=2), log_every=100)


def test_a_run_that_stopped_goes_on_with_another_rate(tmp_path, capsys):
    """As if it had had that rate from its last checkpoint on; what changed is written down."""
    settings = {"schedule": "constant", "warmup_steps": 0}
    with pytest.raises(UserError, match=r"go on from step 10, such as .*learning_rate=0\.001"):
        run(tmp_path, Batches(poison=17), **settings)
    changes = {"learning_rate": 1e-3, "grad_clip": 0.5, "weight_decay": 0.2, "ema_decay": 0.8}
    changed = run(tmp_path, **settings | changes)
    assert "from step 10 on: train.learning_rate was 0.02, now 0.001" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "changes.jsonl").read_text().splitlines()]
    assert {line["setting"] for line in lines} == {f"train.{name}" for name in changes}
    assert lines[-1] == {"step": 10, "setting": "train.weight_decay", "was": "0.1", "now": "0.2"}
    config = TrainConfig(batch_size=16, steps=30, **settings | changes)
    kept = Saved(tmp_path).item(30, "description")["train"]
    assert kept["learning_rate"] == 1e-3
    # By hand: the first ten steps as they were, then twenty of the new settings' step.
    state = run(tmp_path / "first", steps=10, **settings)
    batches = Batches()
    batches.index = 10
    step = step_fn(config, toy_run.noisy_loss_fn)
    for _ in range(20):
        state, _ = step(state, next(batches))
    assert_same(changed, state)
    run(tmp_path, steps=32, **settings | changes)
    lines = (tmp_path / "changes.jsonl").read_text().splitlines()
    assert len(lines) == 5 and json.loads(lines[-1])["setting"] == "train.steps"


def test_a_bad_step_never_reaches_a_checkpoint(tmp_path):
    """The bad step lies right before the save, and nothing is logged until then."""
    with pytest.raises(UserError, match=r"step 9: .*in a new workdir"):
        run(tmp_path, Batches(poison=8), log_every=1000)
    assert resume.Checkpoints(tmp_path / "checkpoints", TrainConfig()).latest() is None


def test_only_the_last_checkpoints_stay(tmp_path):
    run(tmp_path, checkpoint_every=3, keep_checkpoints=2)
    steps = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert steps == [27, 30]


def test_another_description_is_refused(tmp_path):
    run(tmp_path, steps=5)
    with pytest.raises(UserError) as error:
        run(
            tmp_path,
            steps=5,
            b1=0.5,
            description={"stage": {"kind": "toy", "layers": 2}},
        )
    message = str(error.value)
    assert "stage.layers was 1, now 2" in message
    assert "train.b1 was 0.9, now 0.5" in message
    assert "train.steps" in message  # among those that may change
    with pytest.raises(UserError, match=r"stage\.diffusion\.steps was absent, now 7"):
        run(
            tmp_path,
            steps=5,
            description={"stage": {"kind": "toy", "layers": 1, "diffusion": {"steps": 7}}},
        )


def test_a_workdir_in_use_is_refused(tmp_path):
    script = (
        "import sys, pathlib; from unclip_jax.training import lock\n"
        "with lock.hold(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"in use by process {holder.pid} on"):
            run(tmp_path, steps=4)
        holder.kill()
    run(tmp_path, steps=4)


def test_data_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(UserError, match="ran out at step 6 of 30"):
        run(tmp_path / "a", Batches(end=5))
    with pytest.raises(UserError, match=r"batch\['x'\]: got shape \[8, 5\], expected 16 rows"):
        run(tmp_path / "b", Batches(batch_size=8))

    class Captions(Batches):
        def __next__(self):
            return super().__next__() | {"caption": np.array(["a"] * 16)}

    with pytest.raises(UserError, match=r"batch\['caption'\]: got dtype <U1, expected numbers"):
        run(tmp_path / "c", Captions())


def test_workdirs_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run", "s3://bucket/run", ""):
        with pytest.raises(UserError, match="workdir"):
            run(workdir, steps=4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("steps", 0),
        ("learning_rate", 0.0),
        ("ema_decay", 1.0),
        ("b2", 1.0),
        ("eps", 0.0),
        ("schedule", "linear"),
        ("log_every", 0),
        ("eval_every", -1),
        ("grad_clip", -1.0),
        ("keep_checkpoints", 0),
    ],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(UserError, match=rf"train\.{name}: got"):
        TrainConfig(**{name: value})


def test_train_config_survives_the_round_trip():
    config = TrainConfig(steps=7, schedule="cosine", learning_rate=1e-3)
    plain = json.loads(json.dumps(settings.to_dict(config)))
    assert settings.build(TrainConfig, plain, "config.train") == config


# Devices


def test_eight_devices_equal_one(tmp_path):
    """A batch split over eight devices, in two microbatches, against one device."""
    changes = {"steps": 12, "grad_accum": 2}
    eight = subprocess.run(
        command(tmp_path / "eight", tmp_path / "eight.npz", **changes),
        env=environment(XLA_FLAGS=xla_flags(8)),
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert " on 8 x " in eight.stdout
    one = numpy_leaves(run(tmp_path / "one", **changes))
    with np.load(tmp_path / "eight.npz") as arrays:
        for a, name in zip(one, arrays.files, strict=True):
            np.testing.assert_allclose(a, arrays[name], rtol=1e-4, atol=1e-6)


def test_a_batch_that_does_not_split_over_the_devices():
    mesh = jax.sharding.AbstractMesh((4, 2, 3), ("data", "fsdp", "tensor"))
    sharding.check_batch_size(32, mesh, grad_accum=2)
    with pytest.raises(UserError, match=r"train\.batch_size: got 12, expected a multiple of 16"):
        sharding.check_batch_size(12, mesh, grad_accum=2)
