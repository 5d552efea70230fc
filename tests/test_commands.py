"""train.py, sample.py and evaluate as a user runs them: on a folder of pictures, and wrongly."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unclip_jax.common.grids import read_png_metadata

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "UNCLIP_JAX_CACHE": str(ROOT / ".cache" / "unclip_jax")}
COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 210), "black": (0, 0, 0)}


# Runs of training one after another, each in a fork of a process that has imported everything.
NEXT = "== the next run ==\n"
IN_A_ROW = f"""
import json, os, sys
import matplotlib.pyplot
from unclip_jax.training import command, loop, prepare
for i, argv in enumerate(json.loads(sys.argv[1])):
    for stream in (sys.stdout, sys.stderr):
        stream.write({NEXT!r} * (i > 0))
        stream.flush()
    child = os.fork()
    if not child:
        command.main(argv[1:])
        sys.exit()
    assert os.waitpid(child, 0)[1] == 0, argv
"""


def run(*command, check=True):
    """A command in the checkout, as a process of its own; returns status, stdout and stderr."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def fails(*command, status=1):
    """The one line on stderr of a command that must fail without a traceback.

    The bad image, of which training tells when it meets it, does not count.
    """
    done = run(*command, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip() and "broken.png" not in line]
    assert "Traceback" not in done.stderr
    assert len(lines) == 1 or status == 2, done.stderr
    return lines[-1]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of coloured squares and discs with captions, one file among them broken."""
    folder = tmp_path_factory.mktemp("pictures")
    y, x = np.mgrid[:40, :40] - 19.5
    for name, colour in COLOURS.items():
        for shape, inside in (("square", abs(x) + 0 * y < 12), ("disc", x**2 + y**2 < 150)):
            image = np.where(inside[..., None], np.array(colour), 255).astype(np.uint8)
            Image.fromarray(image).save(folder / f"{name}_{shape}.png")
            (folder / f"{name}_{shape}.txt").write_text(f"a {name} {shape}")
    (folder / "broken.png").write_bytes(b"this is no picture")
    (folder / "broken.txt").write_text("a broken picture")
    return folder


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    """A workdir per stage, trained for a few steps by train.py on the folder."""
    out = tmp_path_factory.mktemp("runs")
    data = (
        f"--config.data.name={pictures}",
        "--config.data.split=all",
        "--config.heldout_split=all",
        f"--config.data.cache_dir={out / 'cache'}",
        "--config.train.batch_size=4",
    )
    extra = {
        "clip": (),
        "prior": (f"--config.clip={out / 'clip'}",),
        "decoder": (
            f"--config.clip={out / 'clip'}",
            "--config.stage.model.unet.channel_mults=(1,)",
            "--config.stage.model.unet.attention_sizes=(16,)",
        ),
        "upsampler": (
            "--config.stage.model.channel_mults=(1,)", "--config.stage.model.image_size=128",
        ),
    }  # fmt: skip
    argv = {
        stage: [
            "train.py", f"--config=configs/emoji/{stage}.py:smoke", f"--workdir={out / stage}",
            *data, *flags,
        ]
        for stage, flags in extra.items()
    }  # fmt: skip
    clip = run(*argv.pop("clip"))
    rest = run("-c", IN_A_ROW, json.dumps(list(argv.values())))
    told = zip(*(text.split(NEXT) for text in (rest.stdout, rest.stderr)), strict=True)
    for stage, (stdout, stderr) in zip(extra, [(clip.stdout, clip.stderr), *told], strict=True):
        assert "broken.png" in stderr, "the bad image is named"
        assert "step 4/4" in stdout + stderr
        lines = stdout.splitlines()
        assert lines[0] == f"train: configs/emoji/{stage}.py:smoke in {out / stage}, starting"
        assert any(line.startswith("data: ") and " images" in line for line in lines)
        assert "compiling, about " in stdout and "the first step took " in stdout
        assert ("embedding " in stdout) == (stage == "prior"), "they are kept"
    return out


@pytest.mark.parametrize("stage", ["clip", "prior", "decoder", "upsampler"])
def test_train_leaves_a_model_metrics_and_previews(trained, stage):
    workdir = trained / stage
    assert (workdir / "model" / "config.json").is_file()
    assert Image.open(workdir / "previews" / "step_00000004.png").width > 100
    losses = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert {row["step"] for row in losses} >= {2, 4}


def test_sample_writes_a_grid_that_says_how_it_was_made(trained, tmp_path):
    out = tmp_path / "new" / "grid.png"
    done = run(
        "sample.py", "text2im", "--model", trained, "--prompt", "a red square", "--prompt",
        "ein Stück 🍎", "--prompt", "very " * 40 + "long",
        "--num", 2, "--seed", 5, "--guidance_scale", 1.5, "--decoder_steps", 3, "--prior_steps", 3,
        "--upsampler_steps", 2, "--out", out,
    )  # fmt: skip
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert any("were cut" in line and "very" in line for line in warnings)
    about = read_png_metadata(out)
    assert json.loads(about["prompt"])[:2] == ["a red square", "ein Stück 🍎"]
    settings = json.loads(about["settings"])
    assert settings["seed"] == 5 and settings["guidance_scale"] == 1.5
    singles = sorted((tmp_path / "new" / "grid").iterdir())
    assert len(singles) == 6
    assert Image.open(singles[0]).size == (128, 128)
    assert read_png_metadata(singles[3])["prompt"] == "ein Stück 🍎"


@pytest.mark.slow
def test_evaluate_prints_and_writes_figures(trained, pictures, tmp_path):
    done = run(
        "-m", "unclip_jax", "evaluate", "--model", trained, "--data", pictures, "--split", "all",
        "--heldout_split", "all", "--num", 4, "--out", tmp_path,
    )  # fmt: skip
    found = json.loads((tmp_path / "figures.json").read_text())
    figures = found["figures"]
    assert figures["clip"]["pairs"] == 8 and figures["decoder"]["pictures"] == 4
    assert all(np.isfinite(v) for part in figures.values() for v in part.values())
    assert found["about"]["model"] == str(trained)
    assert "prior/cosine_z_i_shuffled" in done.stdout
    assert "generated.png" in (tmp_path / "index.html").read_text()


def test_a_run_that_is_not_finite_says_the_command_that_goes_on(trained, pictures, tmp_path):
    """Word for word, through a shell; what is in the flags survives it."""
    shutil.copytree(trained / "clip", tmp_path / "a run")
    flags = (
        "--config=configs/emoji/clip.py:smoke", f"--workdir={tmp_path / 'a run'}",
        f"--config.data.name={pictures}", "--config.data.split=all", "--config.heldout_split=all",
        f"--config.data.cache_dir={trained / 'cache'}", "--config.train.batch_size=4",
        "--config.train.steps=6",
    )  # fmt: skip
    line = fails("train.py", *flags, "--config.train.learning_rate", "1e30")
    assert "the last good checkpoint is step 4" in line
    command = line.split("learning_rate=0.001: ")[1]
    assert command.endswith("--config.train.learning_rate=0.001") and "1e30" not in command
    done = subprocess.run(
        command, shell=True, env=os.environ | ENVIRONMENT, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "resumed from step 4 of 6" in done.stdout
    assert "from step 4 on: train.steps was 4, now 6" in done.stdout
    about = json.loads((tmp_path / "a run" / "model" / "config.json").read_text())
    assert about["description"]["step"] == 6


def test_resuming_with_another_network_is_refused(trained, pictures):
    line = fails(
        "train.py", "--config=configs/emoji/upsampler.py:smoke",
        f"--workdir={trained / 'upsampler'}", f"--config.data.name={pictures}",
        "--config.data.split=all", "--config.heldout_split=all", "--config.train.batch_size=4",
        f"--config.data.cache_dir={trained / 'cache'}", "--config.stage.model.channels=96",
        "--config.stage.model.channel_mults=(1,)", "--config.stage.model.image_size=128",
    )  # fmt: skip
    assert "stage.model.channels was 64, now 96" in line


@pytest.mark.parametrize(
    ("command", "status", "expected"),
    [
        (["train.py", "--config=configs/emoji/clip.py:smoke"], 1, "--workdir: missing"),
        (["sample.py", "text2im", "--model", "docs", "--prompt", "x"], 1, "no trained stage"),
        (["sample.py", "text2im", "--model", "d", "--num", "x"], 2, "error"),
        (["-m", "unclip_jax", "evaluate", "--model", "no_model"], 1, "is no folder"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_process_fails_with_a_line_and_a_status(command, status, expected):
    """One of each script; test_wrong_inputs.py has the rest, without a process for each."""
    assert expected in fails(*command, status=status)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["clip", "prior", "decoder", "upsampler"])
def test_killed_at_random_moments_a_run_ends_as_if_it_had_not_been(
    stage, trained, pictures, tmp_path
):
    command = [
        sys.executable, "train.py", f"--config=configs/emoji/{stage}.py:smoke",
        f"--config.data.name={pictures}", "--config.data.split=all",
        "--config.heldout_split=all", f"--config.data.cache_dir={trained / 'cache'}",
        "--config.train.batch_size=4", "--config.train.steps=60",
        "--config.train.checkpoint_every=7", "--config.train.log_every=5",
    ]  # fmt: skip
    command += [f"--config.clip={trained / 'clip'}"] * (stage in ("prior", "decoder"))
    quiet = {"env": os.environ | ENVIRONMENT, "cwd": ROOT, "stderr": subprocess.STDOUT}

    def finish(workdir):
        subprocess.run([*command, f"--workdir={workdir}"], check=True, **quiet)
        return (workdir / "model" / "params.safetensors").read_bytes()

    whole = finish(tmp_path / "whole")
    kills = 0
    for wait in np.random.default_rng().uniform(0.0, 2.0, 3):
        with subprocess.Popen(
            [*command, f"--workdir={tmp_path / 'cut'}"], stdout=subprocess.PIPE, text=True, **quiet
        ) as process:
            for line in process.stdout:  # until it trains, then a random moment longer
                if line.startswith("step "):
                    break
            time.sleep(wait)
            kills += process.poll() is None
            process.kill()
    assert kills, "every run ended before it was killed"
    assert finish(tmp_path / "cut") == whole
