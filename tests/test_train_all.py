"""`unclip train-all`: what it finds, how it spends its time, what survives a kill, and its page."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import tiny, toy_run, train_all_run
from unclip_jax.__main__ import dispatch
from unclip_jax.data.datasets import DataConfig
from unclip_jax.errors import UserError
from unclip_jax.train_all import budget, page, run, sizes, words
from unclip_jax.train_all.budget import Budget, Entry
from unclip_jax.train_all.look import look
from unclip_jax.train_all.pace import Pace
from unclip_jax.training.config import TrainConfig
from unclip_jax.training.doctor import curves, findings, workdir

PNG = page._png(np.zeros((9, 9, 3), np.uint8))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return train_all_run.make(tmp_path_factory.mktemp("data") / "pictures", 48)


def found_in(folder, tmp_path):
    return look(DataConfig(name=str(folder), cache_dir=str(tmp_path / "cache")))


# What it finds


def test_it_says_what_is_in_a_folder(pictures, tmp_path):
    (pictures / "broken.png").write_bytes(b"no picture")
    (pictures / "broken.txt").write_text("a broken thing")
    found = found_in(pictures, tmp_path)
    (pictures / "broken.png").unlink()
    (pictures / "broken.txt").unlink()
    said = "\n".join(found.words())
    assert found.heldout_split == "heldout" and 40 <= found.images < 49
    assert "pairs of" in said and "held out, never trained on" in said
    assert "shorter sides: all 24 px" in said
    assert 'captions such as "a ' in said and found.context_length == 24
    few, small = found.warnings(draws=256)
    assert "by heart" in few and "fewer than 256 px" in small
    assert len(found.warnings(draws=16)) == 1


def test_long_captions_are_read_whole(tmp_path):
    folder = train_all_run.make(tmp_path / "long", 30)
    for file in folder.rglob("*.txt"):
        file.write_text(" ".join([file.read_text()] * 4))
    assert found_in(folder, tmp_path).context_length == 48


def test_a_handful_of_pictures_holds_none_out(tmp_path):
    folder = train_all_run.make(tmp_path / "few", 3)
    found = found_in(folder, tmp_path)
    assert found.heldout_split == "train" and found.heldout_captions == ()
    assert any("too few are held out" in line for line in found.warnings(16))
    config = sizes.config("clip", "small", found, tmp_path)
    assert config.heldout_split == "train" and config.train.batch_size == 8


def test_classes_are_counted(pictures, tmp_path):
    found = found_in(pictures, tmp_path)
    assert set(found.classes) == {"red", "green", "blue"}
    assert sum(found.classes.values()) == found.images
    assert any(line.startswith("3 classes: ") for line in found.words())


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "no image|nothing|none"),
        ({"a.png": b"", "a.txt": b"a caption"}, "an empty file"),
        ({"a.png": PNG}, "^--data: .*none of its 1 images has a caption"),
        ({"a.txt": b"a caption alone"}, "image|picture|none"),
    ],
)
def test_a_folder_of_nothing_is_an_error(tmp_path, files, said):
    (tmp_path / "data").mkdir()
    for name, content in files.items():
        (tmp_path / "data" / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        found_in(tmp_path / "data", tmp_path)


def test_a_misspelt_folder_is_asked_about(tmp_path, monkeypatch):
    (tmp_path / "my_pictures").mkdir()
    monkeypatch.chdir(tmp_path)
    said = r"^--data: got 'my_picturs', expected a folder, and none .* did you mean my_pictures\?"
    with pytest.raises(UserError, match=said):
        look(DataConfig(name="my_picturs"))


# Sizes


@pytest.mark.parametrize("size", sizes.SIZES)
def test_stages_of_a_size_belong_together(size, pictures, tmp_path):
    found = found_in(pictures, tmp_path)
    clip, prior, decoder, upsampler = (
        sizes.config(stage, size, found, tmp_path, steps=103).to_dict() for stage in sizes.STAGES
    )
    width = clip["stage"]["model"]["embed_dim"]
    assert width == prior["stage"]["model"]["embed_dim"] == decoder["stage"]["model"]["embed_dim"]
    assert decoder["stage"]["model"]["unet"]["image_size"] == upsampler["stage"]["low_size"]
    assert upsampler["stage"]["model"]["image_size"] == sizes.draws(size)
    # A crop has 16 patches a side at least: of fewer, edges are all that an upsampler ever sees.
    grid = upsampler["stage"]["crop"] * sizes.draws(size) / upsampler["stage"]["model"]["patch"]
    assert grid >= 16
    for config in (clip, prior, decoder, upsampler):
        train = config["train"]
        # Nothing that a step computes depends on how many there are.
        assert train["schedule"] == "constant" and train["batch_size"] <= 64
        for every in ("checkpoint_every", "preview_every", "eval_every"):
            assert train[every] * 5 >= train["steps"] > train[every] * 4


@pytest.mark.parametrize(
    ("platform", "minutes", "size"),
    [("cpu", 15.0, "tiny"), ("cpu", 30.0, "small"), ("gpu", 15.0, "base"), ("tpu", 60.0, "base")],
)
def test_the_size_suits_the_machine_and_the_time(
    platform, minutes, size, tmp_path, monkeypatch, capsys
):
    device = types.SimpleNamespace(platform=platform)
    monkeypatch.setattr(run.jax, "devices", lambda: [device])
    assert run._size(None, None, minutes, tmp_path) == size
    assert ("--size small draws 256 px" in capsys.readouterr().out) == (size == "tiny")
    assert run._size(None, "small", minutes, tmp_path) == "small"
    assert run._size(planned(60.0), None, minutes, tmp_path) == "tiny"  # as it was begun


# Its time


def planned(minutes, *, compiling=0.0, step=1.0):
    entries = {name: Entry(Pace(1000, 8, compiling, step)) for name in sizes.STAGES}
    return Budget("tiny", "data", "print", minutes, 0.0, entries)


def test_a_time_is_shared_out_and_none_of_it_is_left():
    plan = planned(10.0)
    for name in sizes.STAGES:
        entry = plan.settle(name, trained=0)
        assert entry.steps == pytest.approx(600 * sizes.SHARES[name], abs=1)
        entry.done = True
        plan.spent += entry.seconds
    assert plan.left() == [] and plan.spent == pytest.approx(600, abs=4)


def test_what_one_stage_loses_the_others_make_up():
    plan = planned(10.0)
    plan.settle("clip", trained=0)
    plan.entries["clip"].done, plan.spent = True, 300.0  # it should have been 120
    assert plan.settle("prior", trained=0).seconds == pytest.approx(300 * 0.1 / 0.8)


def test_compiling_is_reckoned_with_and_every_stage_trains_a_little():
    slow = planned(10.0, compiling=20.0)
    assert slow.settle("clip", 0).steps < planned(10.0).settle("clip", 0).steps
    hopeless = planned(0.1, compiling=20.0)
    assert hopeless.settle("clip", 0).steps == budget.FEWEST_STEPS


def test_more_time_trains_all_but_clip_on(tmp_path):
    plan = planned(10.0)
    for name in sizes.STAGES:
        plan.settle(name, trained=0)
        plan.entries[name].done = True
    plan.spent = 600.0
    plan.extend(10.0)
    assert plan.left() == []
    plan.extend(20.0)
    assert plan.left() == ["prior", "decoder", "upsampler"]
    entry = plan.settle("decoder", trained=300)
    assert (entry.base, entry.steps) == (300, 300 + int(600 * 0.5 / 0.8))
    plan.write(tmp_path)
    assert Budget.read(tmp_path) == plan


def test_too_short_a_time_says_how_much_is_enough(tmp_path, capsys):
    plan = planned(3.0, compiling=60.0)
    plan.spent = 250.0
    run._say_plan(plan, tmp_path)
    told = capsys.readouterr().out
    assert "3 minutes are too few" in told and "--size tiny" not in told  # it is tiny
    plan.extend(float(re.search(r"give --minutes (\d+) or more", told)[1]))
    run._say_plan(plan, tmp_path)
    assert "too few" not in capsys.readouterr().out
    assert plan.training_seconds() >= plan.minutes * 60 / 2


def test_each_stage_is_named_before_it_is_compiled(pictures, tmp_path, capsys, monkeypatch):
    train_all_run.shrink(monkeypatch.setattr)
    made = {}
    plan = run._begin(found_in(pictures, tmp_path), "tiny", 1.0, tmp_path, made)
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[0] for line in lines[::2]] == list(sizes.STAGES) == list(made)
    assert all("M parameters, compiling, about " in line for line in lines[::2])
    assert all("compiled in " in line and "a step of 8 takes" in line for line in lines[1::2])
    assert all(0 < entry.pace.parameters < 1e6 for entry in plan.entries.values())


@pytest.mark.parametrize("content", ["", "{}", '{"entries": {}}', "[1]"])
def test_a_damaged_budget_is_named(tmp_path, content):
    (tmp_path / budget.FILE).write_text(content)
    with pytest.raises(UserError, match=r"train_all\.json: damaged"):
        Budget.read(tmp_path)


# The command


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (("--minutes", "0"), "--minutes: got 0"),
        (("--minutes", "nan"), "--minutes"),
        (("--out", "/proc/nowhere"), r"--out ./proc/nowhere.: cannot be written \([^/]*\); give"),
        (("--out", __file__), "--out.*is a file; give a folder"),
        (("--data", "no/such/folder"), "no/such/folder"),
        (("--size", "base"), "--size: got 'base', expected tiny"),
        ((), "--data.*pictures and captions that .* was begun with"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_trained(pictures, tmp_path, typed, said):
    planned(1.0).write(tmp_path)
    words = {"--data": str(pictures), "--out": str(tmp_path)} | dict([typed] if typed else [])
    with pytest.raises(UserError, match=said):
        dispatch(["train-all", *(word for pair in words.items() for word in pair)])


def test_a_second_run_on_the_same_folder_waits_for_nobody(pictures, tmp_path):
    code = f"""
import sys, time
from pathlib import Path
from unclip_jax.training import lock
with lock.hold(Path({str(tmp_path)!r})):
    print("held", flush=True)
    time.sleep(60)
"""
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=toy_run.environment()
    )
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="in use by process"):
            run.run(str(pictures), tmp_path, "tiny", 1.0)
    finally:
        other.kill()
        other.wait()


# The page


class Page(HTMLParser):
    """The tags of a page, each with its attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def of(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


def test_the_page_asks_for_more_minutes_than_it_took(tmp_path):
    plan = planned(15.0)
    assert "--minutes 30</pre>" in page._next(tmp_path, plan)
    plan.spent = 55.2 * 60
    assert "--minutes 112</pre>" in page._next(tmp_path, plan)


FLAG = re.compile(r"train\.\w+|stage\.\w+|data\.augment|--config|batch")


@pytest.mark.parametrize(
    ("records", "name", "said"),
    [
        ({"train/loss": (1, 1, 0.7, 0.3)}, "still_falling", "more --minutes would help"),
        (
            {"train/loss": (0.9, 0.8, 0.75, 0.74), "eval/heldout_loss": (1, 0.9, 1.2, 1.4)},
            "overfitting",
            "more pictures",
        ),
        (
            {"train/loss": (1,) * 4, "eval/cosine_z_i": (0.1,) * 4,
             "eval/cosine_z_i_shuffled": (0.1,) * 4},
            "prior_ignores_captions",
            "then more --minutes",
        ),
    ],
)  # fmt: skip
def test_the_doctor_speaks_of_flags_that_train_all_has(records, name, said):
    many = {key: np.repeat(values, 5) for key, values in records.items()}
    described = {"train": {"steps": 2000}, "stage": {}}
    rows = [{"step": 100.0 * (i + 1), "train/grad_norm": 3.0, "train/learning_rate": 1e-3,
             "train/param_norm": 1.0, **{key: float(values[i]) for key, values in many.items()}}
            for i in range(20)]  # fmt: skip
    train = TrainConfig(steps=2000, batch_size=64, learning_rate=1e-3)
    run = workdir.Workdir(Path("runs/mine/prior"), described, tiny.PRIOR, train, rows)
    found = {one.name: words.in_its_flags(one) for one in curves.examine(run)}
    assert said in found[name].advice
    assert not [one for one in found.values() if one.name not in words.UNASKED
                and FLAG.search(one.advice)]  # fmt: skip


def test_no_finding_speaks_against_another():
    found = [
        findings.warning("overfitting", "x", "more data, data.augment"),
        findings.note("still_falling", "x", "more steps would help: a new workdir"),
    ]
    assert [one.name for one in words.told(found)] == ["overfitting"]
    assert [one.name for one in words.told(found[1:])] == ["still_falling"]


def test_a_page_of_nothing_trained_says_what_is_to_do(pictures, tmp_path):
    (tmp_path / "clip").mkdir()
    page.write(tmp_path, found_in(pictures, tmp_path), planned(3.0), drawing=False)
    text = (tmp_path / page.PAGE).read_text()
    assert "still to train: clip, prior, decoder, upsampler" in text and "Not begun" in text
    assert "&lt;thing&gt;" in text and "<thing>" not in text


def run_nano(pictures, out):
    own = {"UNCLIP_JAX_CACHE": str(out.parent / "cache"), "JAX_NUM_CPU_DEVICES": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.train_all_run", str(pictures), str(out), "0.001"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=toy_run.environment(**own),
        start_new_session=True,
    )


def wait_for(process, path):
    while not list(path.parent.glob(path.name)):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)


@pytest.mark.slow
def test_killed_twice_it_ends_in_a_model_and_a_page(pictures, tmp_path):
    out = tmp_path / "mine"
    for moment in ("clip/metrics.jsonl", "decoder/metrics.jsonl"):
        process = run_nano(pictures, out)
        wait_for(process, out / moment)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    kept = json.loads((out / budget.FILE).read_text())
    process = run_nano(pictures, out)
    told, _ = process.communicate()
    assert process.returncode == 0, told
    assert "timing a few steps" not in told and "== clip" not in told and "== decoder" in told
    after = json.loads((out / budget.FILE).read_text())
    for name in sizes.STAGES:
        entry = after["entries"][name]
        assert entry["done"] and entry["pace"] == kept["entries"][name]["pace"]
        assert entry["steps"] == train_all_run.STEPS
        previews = sorted(path.name for path in (out / name / "previews").iterdir())
        assert previews == [f"step_{step:08d}.png" for step in range(1, 6)]
        described = json.loads((out / name / "model" / "config.json").read_text())
        assert described["description"]["step"] == train_all_run.STEPS
    shown = Page((out / page.PAGE).read_text())
    assert not [1 for tag, of in shown.tags for k in ("src", "href") if "://" in of.get(k, "")]
    images = shown.of("img")
    assert len(images) >= 4 + 4 * 3 and all(of["alt"] for of in images)
    assert all(of["src"].startswith("data:image/png;base64,") for of in images)
    text = (out / page.PAGE).read_text()
    assert text.count("The doctor says") == 4 == text.count("Previews, the first and the last.")
    assert "too_short" in text
    assert "for captions it never saw" in text and "nothing is wrong" not in text
    assert "checkpoint_damaged" not in text
    with Image.open(out / page.SAMPLES) as grid:
        assert grid.width > 200
