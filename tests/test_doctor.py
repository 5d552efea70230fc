"""Runs broken in every way that the doctor knows, each told by its own finding; healthy ones not.

The runs are real: a tiny prior and decoder trained by the loop on pictures of one colour each, on a
CLIP of random weights, whose embeddings of them differ.
"""

import dataclasses
import json
import shutil
import subprocess
import sys
import threading
from typing import NamedTuple

import jax
import numpy as np
import pytest
from PIL import Image

from configs import base
from tests import object_store, tiny
from unclip_jax import stages
from unclip_jax.data.datasets import DataConfig
from unclip_jax.errors import UserError
from unclip_jax.metrics.retrieval import image_text_retrieval
from unclip_jax.training import lock, loop, prepare, writers
from unclip_jax.training import workdir as training_workdir
from unclip_jax.training.config import TrainConfig
from unclip_jax.training.doctor import command as doctor
from unclip_jax.training.doctor import curves, weights, workdir
from unclip_jax.training.doctor import settings as asked
from unclip_jax.training.doctor.command import main
from unclip_jax.weights import folder as model_folder
from unclip_jax.weights.trained import load_part

COLOURS = {
    "red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 230), "white": (250, 250, 250),
    "black": (5, 5, 5), "yellow": (240, 240, 10), "cyan": (10, 230, 230), "pink": (240, 120, 200),
}  # fmt: skip

# What follows from another fault, or not, as chance has it.
FOLLOWS = {"prior_ignores_captions", "average_behind", "loss_spikes", "loss_rising"}

HEALTHY = TrainConfig(
    batch_size=48, steps=300, learning_rate=1e-2, warmup_steps=20, schedule="cosine",
    ema_decay=0.97, log_every=20, checkpoint_every=150,
)  # fmt: skip


pytestmark = pytest.mark.usefixtures("no_curves")


def examine(path, *clip, **settings):
    return doctor.examine(workdir.read(path), *clip, **settings)


class Repeated:
    """The whole data set as a batch, again and again."""

    def __init__(self, batches):
        self.batch = next(batches)

    def __next__(self):
        return self.batch

    def get_state(self):
        return {}

    def set_state(self, states):
        """There is one place to be."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with pictures, the same without telling captions, and a CLIP."""
    home = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    for folder, caption in (("pictures", "{}"), ("untold", "a thing")):
        (home / folder).mkdir()
        for i in range(48):
            name, colour = list(COLOURS.items())[i % len(COLOURS)]
            pixels = np.clip(np.array(colour) + rng.normal(0, 8, (16, 16, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(home / folder / f"{i}.png")
            (home / folder / f"{i}.txt").write_text(caption.format(name))
    description = {"stage": stages.describe(tiny.CLIP)}
    model_folder.save_stage(home / "clip", params=tiny.params(tiny.CLIP), description=description)
    return home


def trained(home, name, stage=tiny.PRIOR, train=HEALTHY, data="pictures", **rest):
    """The workdir of a run."""
    settings = DataConfig(
        name=str(home / data), split="all", cache_dir=str(home / "cache"), cache_bytes=0
    )
    defaults = {"heldout_split": "all", "clip": str(home / "clip")}
    run = prepare.prepare(base.make(stage, settings, train, **defaults | rest))
    loop.train(
        loss_fn=run.loss,
        init_params=run.init_params,
        batches=Repeated(run.batches()),
        config=run.train,
        workdir=home / name,
        description=run.description,
    )
    return home / name


@pytest.fixture(scope="module")
def healthy(home):
    """A run that nothing is wrong with."""
    return trained(home, "healthy")


@pytest.fixture
def patient(healthy, home, request):
    """A copy of the healthy run, to be broken by hand."""
    copy = home / f"copy_of_{request.node.name.split('[')[0]}"
    shutil.copytree(healthy, copy, dirs_exist_ok=True)
    yield copy
    shutil.rmtree(copy)


def wrong(found):
    """The names of all findings but notes."""
    return {finding.name for finding in found if finding.severity != "note"}


def test_nothing_is_wrong_with_a_healthy_run(healthy, capsys):
    main(["--workdir", str(healthy)])
    assert capsys.readouterr().out.splitlines()[0] == f"{healthy}: prior, step 300 of 300"


def change(stage=None, **train):
    """Settings of `trained` that differ from the healthy run's."""
    changed = {"train": dataclasses.replace(HEALTHY, **train)} if train else {}
    return changed | ({"stage": dataclasses.replace(tiny.PRIOR, **stage)} if stage else {})


RATE = change(learning_rate=100.0, warmup_steps=0, schedule="constant", steps=100)
SLOWLY = change(learning_rate=1e-9)
AVERAGE = change(ema_decay=0.99999, ema_warmup=False)
UNDROPPED = change({"caption_drop": 0.0, "guidance_scale": 2.0})
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("rate", RATE, {"loss_above_ignorance"}),
        pytest.param("average", AVERAGE, {"average_too_slow", "average_behind"}, marks=SLOW),
        ("untold", {"data": "untold"}, {"prior_ignores_captions"}),
        pytest.param("slow", SLOWLY, {"nothing_learned", "prior_ignores_captions"}, marks=SLOW),
        pytest.param("std", {"normalisation": "none"}, {"embedding_std"}, marks=SLOW),
        pytest.param("scale", {"normalisation": "scale"}, {"embedding_std"}, marks=SLOW),
        pytest.param("dropped", change({"caption_drop": 0.99}), {"conditions_dropped"}, marks=SLOW),
        pytest.param("guidance", UNDROPPED, {"guidance_untrained"}, marks=SLOW),
    ],
)
def test_a_run_broken_by_its_settings(home, name, changes, expected):
    found = wrong(examine(trained(home, name, **changes)))
    assert expected <= found <= expected | FOLLOWS


@pytest.mark.parametrize(
    ("part", "changes", "expected"),
    [
        ("stage", {"caption_drop": 0.95}, {"conditions_dropped"}),
        ("stage", {"caption_drop": 0.0}, {"guidance_untrained"}),
        ("stage", {"caption_drop": 0.0, "guidance_scale": 1.0}, set()),
        ("train", {"ema_warmup": False, "ema_decay": 0.9999}, {"average_too_slow"}),
        ("train", {"ema_warmup": True, "ema_decay": 0.9999}, set()),
        ("", {"normalisation": "none"}, {"embedding_std"}),
        ("", {"normalisation": "scale"}, {"embedding_std"}),
    ],
)
def test_settings_that_cannot_work(healthy, part, changes, expected):
    run = workdir.read(healthy)
    if part:
        run = dataclasses.replace(run, **{part: dataclasses.replace(getattr(run, part), **changes)})
    else:
        run = dataclasses.replace(run, description=run.description | changes)
    assert wrong(asked.examine(run)) == expected


def test_a_network_that_says_the_same_of_everything(home, healthy):
    run = workdir.read(healthy)
    _, averaged = weights.read_weights(run)
    batch = weights.read_batch(run, home / "clip")
    silent = averaged | {"network": jax.tree.map(np.zeros_like, averaged["network"])}
    cond = run.stage.data(averaged, batch)[1]
    assert not wrong(weights.guidance(run, averaged, cond))
    assert not wrong(weights.guidance(run, averaged, weights.synthetic(run.stage)))
    assert wrong(weights.guidance(run, silent, cond)) == {"guidance_dead"}
    assert wrong(weights.worth(run, silent, batch)) == {"prior_ignores_captions"}


@pytest.mark.slow
def test_a_decoder_that_never_left_its_beginning(home):
    """Its last layer is still zero, so it says the same of everything."""
    train = dataclasses.replace(
        HEALTHY, steps=2, learning_rate=1e-12, warmup_steps=0, log_every=1, ema_decay=0.01
    )
    found = wrong(examine(trained(home, "dead", tiny.DECODER, train)))
    assert found == {
        "guidance_dead", "decoder_ignores_conditions", "nothing_learned", "too_short",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("steps", "of", "init", "expected", "verdict"),
    [
        (40, 40, False, {"warning too_short"}, "1 wrong"),
        (40, 300, False, {"note too_early"}, "too early to say more"),
        (40, 40, True, set(), "nothing is wrong"),  # it began with trained weights
        (300, 300, False, set(), "nothing is wrong"),
    ],
)
def test_a_run_is_judged_by_the_examples_it_has_seen(tmp_path, steps, of, init, expected, verdict):
    train = dataclasses.replace(HEALTHY, steps=of)
    records = [{"step": step, "train/loss": 1.0} for step in range(20, steps + 1, 20)]
    about = {"init": {}} if init else {}
    run = workdir.Workdir(tmp_path, about, tiny.PRIOR, train, records)
    found = list(curves.length(run))
    assert {f"{finding.severity} {finding.name}" for finding in found} == expected
    assert doctor.as_text(run, found).splitlines()[-1] == verdict


# Broken by hand


def rewrite(workdir, **columns):
    """Replace metrics.jsonl; a column is a function of the step, or a list."""
    steps = range(20, 301, 20)
    rows = [{"step": step} for step in steps]
    columns = {"learning_rate": 0.01, "param_norm": 16.0, "grad_norm": 1.0, "mse": 0.1} | columns
    for name, column in columns.items():
        name = name if "/" in name else f"train/{name}"
        for i, row in enumerate(rows):
            row[name] = column[i] if isinstance(column, list) else column
    lines = [json.dumps(row) for row in rows]
    (workdir / writers.METRICS_FILE).write_text("\n".join(lines) + "\n")


FALLING = [1.0 / (i + 1) for i in range(15)]


def replaced(values, **at):
    return [at.get(f"at_{i}", value) for i, value in enumerate(values)]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"loss": FALLING}, set()),
        ({"loss": replaced(FALLING, at_7=None)}, {"not_finite"}),
        ({"loss": replaced(FALLING, at_9=0.9)}, {"loss_spikes"}),
        ({"loss": [0.1 + 0.1 * i for i in range(15)]}, {"loss_exploded"}),
        ({"loss": FALLING[:5] + [0.2 + 0.01 * i for i in range(10)]}, {"loss_rising"}),
        ({"loss": FALLING, "mse": 1.3}, {"loss_above_ignorance"}),
        ({"loss": FALLING, "mse": 1.0}, {"nothing_learned"}),
        ({"loss": FALLING, "mse": 0.6}, {"hardly_learned"}),
        ({"loss": FALLING, "grad_norm": 0.0}, {"no_gradient"}),
        ({"loss": FALLING, "grad_norm": replaced([1.0] * 15, at_6=50.0)}, {"gradient_spikes"}),
        (
            {"loss": FALLING, "eval/heldout_loss": [abs(i - 5) * 0.1 + 1 for i in range(15)]},
            {"overfitting"},
        ),
        (
            {"loss": FALLING, "eval/cosine_z_i": 0.41, "eval/cosine_z_i_shuffled": 0.4},
            {"prior_ignores_captions"},
        ),
        ({"loss": FALLING, "eval/cosine_z_i": 0.7, "eval/cosine_z_i_shuffled": 0.4}, set()),
        ({"loss": FALLING, "eval/psnr": 20.0, "eval/psnr_bicubic": 24.0}, {"worse_than_bicubic"}),
    ],
)  # fmt: skip
def test_a_curve_broken_by_hand(patient, columns, expected):
    rewrite(patient, **columns)
    assert wrong(curves.examine(workdir.read(patient))) == expected


@pytest.mark.parametrize(
    ("init", "then", "expected"),
    [
        (False, [0.75] * 5, {"rises_in_warm_up"}),
        (True, [0.75] * 5, set()),
        (True, [1.1] * 5, {"rises_in_warm_up"}),
    ],
)
def test_a_loss_that_rises_in_the_warm_up(patient, init, then, expected):
    """Trained weights may lose what they gain back."""
    run = workdir.read(patient)
    described = run.description | ({"init": {}} if init else {})
    trained = dataclasses.replace(run.train, warmup_steps=200)
    losses = [1.0, 0.9, 0.8, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, *then]
    rewrite(patient, loss=losses)
    records = writers.read_metrics(patient / writers.METRICS_FILE)
    run = dataclasses.replace(run, train=trained, records=records, description=described)
    assert wrong(curves.warm_up(run)) == expected


@pytest.mark.parametrize(
    ("psnr", "crop", "said"),
    [
        ((19.0, 20.0, 20.1), 0.25, "train longer"),
        ((21.0, 20.0, 19.0), 0.25, "raise stage.crop"),
        ((21.0, 20.0, 19.0), 1.0, "more data, or fewer steps"),
    ],
)
def test_an_upsampler_that_gets_worse_is_not_told_to_train_on(healthy, psnr, crop, said):
    rows = [
        {"step": 100.0 * i, "eval/psnr": x, "eval/psnr_bicubic": 24.0} for i, x in enumerate(psnr)
    ]
    stage = dataclasses.replace(tiny.UPSAMPLER, crop=crop)
    run = dataclasses.replace(workdir.read(healthy), stage=stage, records=rows)
    [one] = curves.evaluations(run)
    assert one.name == "worse_than_bicubic" and said in one.advice


@pytest.mark.parametrize(("known", "said"), [(0.1, "train longer"), (0.97, "97% of those that it")])
def test_a_clip_that_knows_its_pairs_by_heart_is_told_so(healthy, known, said):
    row = {"step": 300, "eval/pairs": 469.0, "eval/chance_r5": 5 / 469, "train/accuracy": known}
    row |= {f"eval/{way}_r5": 0.01 for way in ("image_to_text", "text_to_image")}
    run = dataclasses.replace(workdir.read(healthy), stage=tiny.CLIP, records=[row])
    assert all(said in one.advice for one in curves.evaluations(run))
    assert len([*curves.evaluations(run)]) == 2


@pytest.mark.parametrize(("found", "expected"), [(0.05, set()), (0.03, {"retrieval_at_chance"})])
def test_retrieval_is_compared_with_chance(healthy, found, expected):
    """Of 469 pairs, 5 in 469 is 1.1 % and one standard error 0.5 %: 3 % is sure, 2 % is not."""
    run = dataclasses.replace(workdir.read(healthy), stage=tiny.CLIP)
    figures = {f"eval/{way}_r5": found - 0.01 for way in ("image_to_text", "text_to_image")}
    record = figures | {"step": 300, "eval/pairs": 469.0, "eval/chance_r5": 5 / 469}
    record |= {f"train/{name}": 1.0 for name in ("learning_rate", "param_norm")}
    run = dataclasses.replace(run, records=[record])
    assert wrong(curves.evaluations(run)) == expected


@pytest.mark.parametrize(
    ("pairs", "captions", "found", "expected"),
    [
        (200, 40, 1.0, {"note captions_repeat"}),
        (200, 40, 0.025, {"note captions_repeat", "error retrieval_at_chance"}),
        (20, 4, 1.0, {"note captions_repeat"}),  # chance is 1/4, and 5 are all
        (8, 8, 1.0, set()),
        (8, 8, 0.1, {"error retrieval_at_chance"}),
        (3, 3, 1.0, {"note heldout_tells_nothing"}),
        (6, 1, 1.0, {"note captions_repeat", "note heldout_tells_nothing"}),
    ],
)
def test_retrieval_with_few_pairs_and_repeated_captions(healthy, pairs, captions, found, expected):
    """A perfect CLIP is never called broken; one at chance is, where the pairs can tell."""
    own = np.arange(pairs) % captions
    z = np.eye(captions)[own]
    figures = image_text_retrieval(z, z, np.arange(pairs), own)
    record = {
        f"eval/{n}": min(v, found) if "to_" in n and "ch" not in n else v
        for n, v in figures.items()
    }
    record |= {f"train/{name}": 1.0 for name in ("learning_rate", "param_norm")} | {"step": 300}
    run = dataclasses.replace(workdir.read(healthy), stage=tiny.CLIP, records=[record])
    said = {f"{f.severity} {f.name}" for f in curves.evaluations(run)}
    assert said == expected
    assert {f.name for f in curves.few_heldout(run)} == ({"few_held_out"} if pairs < 32 else set())


def test_a_changed_byte_in_a_checkpoint(patient):
    for path in (patient / "checkpoints" / "300" / "state").rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content))
    found = examine(patient)  # the networks are not looked at, for there are none to trust
    assert wrong(found) == {"checkpoint_damaged"}
    assert str(patient / "checkpoints" / "300") in found[0].evidence


def test_checkpoints_that_are_gone(patient):
    shutil.rmtree(patient / "checkpoints")
    assert wrong(examine(patient)) == {"no_checkpoint"}


def test_metrics_that_are_gone(patient):
    (patient / writers.METRICS_FILE).unlink()
    assert wrong(examine(patient, files_only=True)) == {"no_metrics"}


def test_another_clip(patient, home, tmp_path):
    other = tmp_path / "other"
    description = {"stage": stages.describe(tiny.CLIP)}
    model_folder.save_stage(other, params=tiny.params(tiny.CLIP, 7), description=description)
    assert wrong(examine(patient, str(other), files_only=True)) == {"clip_mismatch"}
    assert wrong(examine(patient, str(home / "clip"), files_only=True)) == set()
    shutil.copytree(patient, tmp_path / "run")
    assert wrong(examine(tmp_path / "run", files_only=True)) == {"clip_mismatch"}


def test_a_normalisation_of_another_clip(home, healthy):
    """Weights of a CLIP whose embeddings are ten times closer together than those at hand."""
    run = workdir.read(healthy)
    _, averaged = weights.read_weights(run)
    batch = weights.read_batch(run, home / "clip")
    assert not wrong(weights.embeddings(averaged, batch))
    std = averaged["normalisation"]["std"] / 10
    other = averaged | {"normalisation": averaged["normalisation"] | {"std": std}}
    assert wrong(weights.embeddings(other, batch)) == {"embedding_std"}


class Usage(NamedTuple):
    """What `shutil.disk_usage` returns."""

    total: int
    used: int
    free: int


def test_a_full_disk(patient, monkeypatch):
    shutil.rmtree(patient / "checkpoints" / "300")
    rewrite(patient, loss=FALLING)
    lines = (patient / writers.METRICS_FILE).read_text().splitlines(keepends=True)
    (patient / writers.METRICS_FILE).write_text("".join(lines[:8]))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 10**4))
    found = examine(patient, files_only=True)
    assert wrong(found) == {"disk_nearly_full"}
    assert "unfinished" in {finding.name for finding in found}


def test_a_run_that_lives(patient):
    script = (
        "import fcntl, sys\n"
        "with open(sys.argv[1], 'r+') as file:\n"
        "    fcntl.lockf(file, fcntl.LOCK_EX)\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(patient / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        names = {finding.name for finding in examine(patient, files_only=True)}
        assert "running" in names and "unfinished" not in names
        holder.kill()
    assert lock.holder(patient) is None


# A run in a bucket

THERE = "gs://bucket/runs"


@pytest.fixture
def bucket(home, healthy, tmp_path, monkeypatch):
    """A bucket with the healthy run and its CLIP; the function that puts a file or folder there."""
    monkeypatch.setattr(lock, "BEAT", 0.1)
    monkeypatch.setattr(lock, "PATIENCE", 3.0)
    monkeypatch.setenv("UNCLIP_JAX_CACHE", str(tmp_path / "cache"))
    with object_store.bucket(tmp_path / "objects", monkeypatch):
        files = object_store.BucketFileSystem()

        def put(path, name):
            for file in (path, *path.rglob("*")):
                if file.is_file() and file.name != "lock":
                    whole = f"{name}/{file.relative_to(path)}".removesuffix("/.")
                    files.pipe_file(f"{THERE}/{whole}", file.read_bytes())

        put(home / "clip", "clip")
        put(healthy, "healthy")
        for step in (150, 300):  # there is no renaming: this is how Orbax says that one is whole
            files.pipe_file(f"{THERE}/healthy/checkpoints/{step}/commit_success.txt", b"")
        yield files, put


@pytest.mark.parametrize("files_only", [True, pytest.param(False, marks=SLOW)])
def test_a_run_in_a_bucket_is_judged_as_one_on_a_disk(healthy, bucket, files_only):
    """Its weights, too, with the embeddings of the CLIP that lies beside it in the bucket."""
    here, there = (examine(at, files_only=files_only) for at in (healthy, f"{THERE}/healthy"))
    assert [f.name for f in here] == [f.name for f in there] and not wrong(there)


def test_a_run_in_a_bucket_that_was_killed(bucket, capsys):
    """What was being written is no checkpoint, and a lock that nobody writes anew is nobody's."""
    files, _ = bucket
    run = workdir.read(f"{THERE}/healthy")
    assert [path.name for path in run.checkpoints] == ["150", "300"]
    files.rm_file(f"{THERE}/healthy/checkpoints/300/commit_success.txt")
    lines = files.cat_file(f"{THERE}/healthy/metrics.jsonl").splitlines(keepends=True)
    files.pipe_file(f"{THERE}/healthy/metrics.jsonl", b"".join(lines[:5]))
    files.pipe_file(f"{THERE}/healthy/lock", b'{"holder": "it", "token": "x", "beat": 7}')
    main(["--workdir", f"{THERE}/healthy", "--clip", f"{THERE}/clip", "--files_only"])
    told = capsys.readouterr().out
    assert told.startswith(f"{THERE}/healthy: prior, step 150 of 300\n")
    assert "note unfinished: nothing trains here" in told
    with pytest.raises(UserError, match=r"--workdir: 'gs://bucket/runs/clip' is no workdir"):
        workdir.read(f"{THERE}/clip")


def test_a_run_in_a_bucket_that_lives(bucket):
    store, over = training_workdir.Bucket(f"{THERE}/healthy"), threading.Event()

    def beat():
        held = {"holder": "it", "token": "x", "beat": 0}
        while not over.wait(0.02):
            held["beat"] += 1
            store.write("lock", json.dumps(held).encode())

    thread = threading.Thread(target=beat)
    thread.start()
    while store.read("lock") is None:
        assert thread.is_alive()
    found = {f.name: f.evidence for f in examine(f"{THERE}/healthy", files_only=True)}
    over.set()
    thread.join()
    assert found["running"] == "it trains here, at step 300 of 300"


def test_a_clip_in_a_bucket(home, bucket, tmp_path):
    """config.clip may be an address; weights are copied once, and again where they are others."""
    _, put = bucket
    settings = {"name": str(home / "pictures"), "split": "all", "cache_bytes": 0}
    data = DataConfig(**settings, cache_dir=str(home / "cache"))
    for folder in (str(home / "clip"), f"{THERE}/clip"):
        run = prepare.prepare(
            base.make(tiny.PRIOR, data, HEALTHY, clip=folder, heldout_split="all")
        )
        own = model_folder.read_fingerprint(home / "clip")
        assert run.description["clip_fingerprint"] == own
    (copy,) = (tmp_path / "cache" / "models").iterdir()
    before = copy.stat().st_ino
    there = load_part(f"{THERE}/clip", "clip")
    for a, b in zip(
        *(jax.tree.leaves(p) for p in (there.params, tiny.params(tiny.CLIP))), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert copy.stat().st_ino == before

    content = bytearray(copy.read_bytes())
    content[-1] ^= 1
    copy.write_bytes(content)
    with pytest.raises(UserError, match="damaged, the weights have changed"):
        load_part(f"{THERE}/clip")
    load_part(f"{THERE}/clip")

    params = jax.tree.map(lambda leaf: leaf + 1, tiny.params(tiny.CLIP))
    model_folder.save_stage(
        tmp_path / "run" / "model", params=params, description={"stage": stages.describe(tiny.CLIP)}
    )
    put(tmp_path / "run" / "model" / "config.json", "clip/config.json")
    with pytest.raises(UserError, match=r"gs://.*safetensors: belongs to another config.json"):
        load_part(f"{THERE}/clip")  # the weights are still being sent
    put(tmp_path / "run" / "model" / "params.safetensors", "clip/params.safetensors")
    found = load_part(f"{THERE}/clip").params
    np.testing.assert_array_equal(jax.tree.leaves(found)[0], jax.tree.leaves(params)[0])
    put(tmp_path / "run", "again")  # a training workdir
    assert load_part(f"{THERE}/again/").stage == tiny.CLIP

    with pytest.raises(UserError, match=r"'gs://bucket/runs/none': no such folder"):
        load_part(f"{THERE}/none")
    with pytest.raises(UserError, match=r"model: got 'ftp://a/b', expected a path, gs:// or s3://"):
        load_part("ftp://a/b")


# The command


def test_the_command_writes_what_it_says(patient, tmp_path, capsys):
    rewrite(patient, loss=FALLING, mse=1.3)
    with pytest.raises(SystemExit) as status:
        main(["--workdir", str(patient), "--files_only", "--json", str(tmp_path / "found.json")])
    assert status.value.code == 1
    out = capsys.readouterr().out
    assert "error loss_above_ignorance: train/mse is 1.3 at step 300" in out
    assert out.endswith("1 wrong\n")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["wrong"] and found["kind"] == "prior" and found["step"] == 300
    assert [f["name"] for f in found["findings"] if f["severity"] != "note"] == [
        "loss_above_ignorance"
    ]


def test_the_doctor_changes_nothing(patient):
    before = {path: path.read_bytes() for path in patient.rglob("*") if path.is_file()}
    examine(patient)
    assert before == {path: path.read_bytes() for path in patient.rglob("*") if path.is_file()}


def test_what_is_no_workdir(tmp_path, patient):
    for path, message in (
        (tmp_path, "no description.json in it"),
        (tmp_path / "nowhere", "no such folder"),
    ):
        with pytest.raises(UserError, match=f"is no workdir of train.py .{message}"):
            examine(path)
    (patient / "description.json").write_text("{")
    with pytest.raises(UserError, match=r"description\.json: damaged"):
        examine(patient)
