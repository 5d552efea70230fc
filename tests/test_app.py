"""What stands behind the web page, without a browser: the same pictures, and the one queue."""

import argparse
import contextlib
import dataclasses
import functools
import json
import re
import shlex
import threading
import time
from html import unescape

import jax
import numpy as np
import pytest
from PIL import Image

from tests import tiny
from unclip_jax import stages
from unclip_jax.app import look, results, tasks
from unclip_jax.app.tasks import Served
from unclip_jax.app.worker import Worker
from unclip_jax.common.grids import read_png_metadata
from unclip_jax.common.params import fingerprint
from unclip_jax.errors import UserError
from unclip_jax.pipeline.tasks import command as sample
from unclip_jax.pipeline.unclip import UnCLIP
from unclip_jax.weights.known import Known
from unclip_jax.weights.trained import Part

compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: "backend_compile" in event and compiled.append(event)
)


@functools.cache
def model():
    """The tiny model, its upsampler of one level too: there are many programs to compile."""
    enlarges = dataclasses.replace(tiny.UPSAMPLER.model, channel_mults=(1,))
    about = {"clip_fingerprint": fingerprint(tiny.params(tiny.CLIP))}

    def part(stage):
        return Part(stage, tiny.params(stage), {"stage": stages.describe(stage)} | about)

    return UnCLIP(
        clip=part(tiny.CLIP),
        prior=part(tiny.PRIOR),
        decoder=part(tiny.DECODER),
        upsamplers=(part(dataclasses.replace(tiny.UPSAMPLER, model=enlarges)),),
    )


def filled(root):
    """A folder with the model and two pictures."""
    model().save(root / "model")
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        small.resize((40, 40), Image.Resampling.BICUBIC).save(root / f"{name}.png")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return filled(tmp_path_factory.mktemp("app"))


@pytest.fixture(scope="module")
def served(folder):
    return Served(model(), str(folder / "model"), batch_size=1)  # so that programs are shared


@pytest.fixture
def worker():
    made = Worker(waiting=2)
    yield made
    made.close()


def run(worker, task, owner="someone"):
    job = worker.submit(owner, task)
    assert job.over.wait(120)
    return job


# ------------------------------------------------------------------------------- the same pictures

FORMS = {
    "text2im": lambda one, two: (tasks.text_to_image, ("a red apple", 4, 3, 2.5, None, False)),
    "img2img": lambda one, two: (
        tasks.img2img,
        (one, "a dog", 0.5, False, 4, 1, 10, 2.0, True, "a cat"),
    ),
    "mix": lambda one, two: (
        tasks.mix,
        (None, two, "a dog\na cat", "1, -0.5 0.5", "sum", 4, 2, None, True),
    ),
    "variations": lambda one, two: (tasks.variations, (one, 4, 0.5, 1, 10, None, True)),
    "interpolate": lambda one, two: (tasks.interpolation, (one, two, 5, 2, 10, None, False)),
    "textdiff": lambda one, two: (
        tasks.text_diff,
        (one, "a dog", '-it\'s "a cat"', 0.4, 5, 0, 10, 1.5, True),
    ),
    "typographic": lambda one, two: (
        tasks.labels,
        (one, "red apple\ndog face", "dog", 4, 7, 10, None, True),
    ),
    "prior": lambda one, two: (tasks.ablation, ("red apple", 5, 10, None, True)),
}


@pytest.fixture(scope="module", params=FORMS)
def kept(request, served, folder, tmp_path_factory):
    """One request of each tab, drawn and written."""
    prepare, form = FORMS[request.param](*(str(folder / f"{n}.png") for n in ("one", "two")))
    asked = prepare(served, *form)
    drawn = asked.draw(lambda *_: None)
    return asked, results.keep(asked, drawn, tmp_path_factory.mktemp("result"))


def told(path):
    """What a PNG says of itself."""
    found = read_png_metadata(path)
    return found | {"settings": json.loads(found["settings"])}


def test_the_command_shown_draws_the_same_pictures(kept, folder, tmp_path, monkeypatch):
    asked, result = kept
    monkeypatch.chdir(folder)  # where the uploads lie under their names
    door, task, *argv = shlex.split(result.command)
    assert (door, task) == ("unclip", "sample")
    sample.main([*argv, "--out", str(tmp_path / "again.png")])
    again = sorted((tmp_path / "again").iterdir())
    assert len(again) == len(result.drawn.cells)
    for ours, (cell, _), theirs in zip(result.pictures, result.drawn.cells, again, strict=True):
        pixels = np.asarray(Image.open(ours[0]))
        np.testing.assert_array_equal(pixels, cell)
        np.testing.assert_array_equal(pixels, np.asarray(Image.open(theirs)))
        assert told(ours[0]) == told(theirs)
    assert told(result.grid) == told(tmp_path / "again.png")
    grids = [np.asarray(Image.open(path)) for path in (result.grid, tmp_path / "again.png")]
    np.testing.assert_array_equal(*grids)  # and so are its captions
    assert told(result.grid)["settings"]["seed"] == asked.args.seed


def test_what_lies_along_theta_is_a_gif_there_and_back(kept):
    asked, result = kept
    if asked.args.task not in ("interpolate", "textdiff"):
        assert result.gif is None and result.walk == []
        return
    frames = asked.args.frames
    assert [float(caption[4:]) for _, caption in result.walk] == pytest.approx(
        np.linspace(0, asked.args.theta_max if "theta_max" in asked.args else 1, frames), abs=0.006
    )
    with Image.open(result.gif) as gif:
        assert gif.n_frames == 2 * frames - 2 and gif.info["loop"] == 0
        for i in range(frames):
            gif.seek(i)
            shown = np.asarray(gif.convert("RGB"), np.float32)
            first = np.asarray(Image.open(result.walk[i][0]), np.float32)
            assert np.abs(shown - first).mean() < 12  # 256 colours each


def test_another_prompt_seed_scale_eta_or_theta_compiles_nothing(served, folder):
    one, two = (str(folder / f"{name}.png") for name in ("one", "two"))

    def everything(prompt, seed, scale, eta, theta):
        for request in (
            tasks.text_to_image(served, prompt, 4, seed, scale, scale, False),
            tasks.img2img(served, one, prompt, theta, False, 4, seed, 10, scale, False),
            tasks.img2img(served, one, "", theta, True, 4, seed, 10, scale, False),
            tasks.mix(served, one, None, prompt, f"{theta} 1", "sphere", 4, seed, scale, False),
            tasks.variations(served, one, 4, eta, seed, 10, scale, False),
            tasks.interpolation(served, two, one, 5, seed, 10, scale, False),
            tasks.text_diff(served, two, prompt, "a cat", theta, 5, seed, 10, scale, False),
            tasks.labels(served, one, f"{prompt}\nx", "dog", 4, seed, 10, scale, False),
            tasks.ablation(served, prompt, seed, 10, scale, False),
        ):
            run(worker, request.draw).result  # noqa: B018

    worker = Worker(waiting=1)
    try:
        everything("a dog", 0, 2.0, 1.0, 0.5)
        before = len(compiled)
        assert before, "compilations are counted"
        everything("a red apple", 123, 3.5, 0.3, 0.2)
        assert len(compiled) == before
    finally:
        worker.close()


@pytest.mark.parametrize(
    "text", ["-dash", "--seed", "it's", 'say "x"', "$HOME `ls` ; rm", "ä😀\u202e", "a\\b", "%s {}"]
)
def test_any_prompt_comes_back_out_of_the_command(text):
    args = argparse.Namespace(task="text2im", seed=0, prompt=[text], num=4, guidance_scale=None)
    parsed = sample.parse(shlex.split(results.command(args))[2:])
    assert parsed.prompt == [text] and parsed.seed == 0 and parsed.num == 4


def test_a_negative_prompt_leads_away_and_is_in_the_command(served):
    request = tasks.text_to_image(served, "a dog", 4, 1, None, None, True, "a cat")
    parsed = sample.parse(shlex.split(results.command(request.args))[2:])
    assert parsed.negative == "a cat"
    plain = tasks.text_to_image(served, "a dog", 4, 1, None, None, True, "")
    assert "--negative" not in results.command(plain.args)
    drawn, other = (asked.draw(lambda *_: None).cells for asked in (request, plain))
    assert any(np.any(a != b) for (a, _), (b, _) in zip(drawn, other, strict=True))


def test_labels_alone_are_judged_without_drawing(served, folder, tmp_path):
    request = tasks.labels(served, str(folder / "one.png"), "a\nb\nc", "", 0, 0, 10, None, False)
    drawn = request.draw(lambda *_: pytest.fail("nothing is sampled"))
    assert sum(p for (p,) in drawn.chances.values()) == pytest.approx(1.0)
    assert len(drawn.cells) == 1
    assert results.keep(request, drawn, tmp_path).command == ""


# ------------------------------------------------------------------------------------ the one queue


def test_two_users_get_their_own_pictures(served, worker):
    forms = {"a": ("a dog", 1), "b": ("a red apple", 2)}
    asked = {
        owner: tasks.text_to_image(served, prompt, 4, seed, None, None, True)
        for owner, (prompt, seed) in forms.items()
    }
    alone = {owner: request.draw(lambda *_: None).cells for owner, request in asked.items()}
    jobs = {owner: worker.submit(owner, request.draw) for owner, request in asked.items()}
    for owner, job in jobs.items():
        assert job.over.wait(120) and not job.error
        for (got, caption), (expected, _) in zip(job.result.cells, alone[owner], strict=True):
            np.testing.assert_array_equal(got, expected)
            assert caption == forms[owner][0]
    assert not np.array_equal(jobs["a"].result.cells[0][0], jobs["b"].result.cells[0][0])


def test_cancelling_stops_the_sampling_and_the_next_job_is_as_ever(served, worker):
    request = tasks.text_to_image(served, "a dog", 4, 1, None, None, False)
    before = request.draw(lambda *_: None).cells
    reports = []

    def draw(progress):
        def watched(stage, step, steps):
            reports.append((stage, step))
            if stage == "decoder":
                worker.cancel("someone")
            progress(stage, step, steps)

        return request.draw(watched)

    job = run(worker, draw)
    assert job.error == "cancelled" and job.result is None
    assert [stage for stage, _ in reports].count("decoder") == 1
    assert not any(stage.startswith("upsampler") for stage, _ in reports)
    after = run(worker, request.draw).result.cells
    for (x, _), (y, _) in zip(before, after, strict=True):
        np.testing.assert_array_equal(x, y)


def until_cancelled(progress):
    for step in range(10**9):
        progress("prior", step, 10**9)
        time.sleep(0.001)


def test_jobs_wait_in_order_and_a_full_queue_says_so(worker):
    done = []
    first = worker.submit("1", until_cancelled)
    second = worker.submit("2", lambda progress: done.append("2"))
    with pytest.raises(UserError, match="not finished"):
        worker.submit("2", until_cancelled)
    third = worker.submit("3", lambda progress: done.append("3"))
    while worker.ahead(third) > 2 or not first.stages:  # until the first has begun
        time.sleep(0.001)
    fourth = None
    with contextlib.suppress(UserError):  # two wait already
        fourth = worker.submit("4", until_cancelled)
    assert fourth is None
    with pytest.raises(UserError, match="the queue is full: 2 others"):
        worker.submit("4", until_cancelled)
    assert [worker.ahead(job) for job in (first, second, third)] == [0, 1, 2]
    assert worker.cancel("2") and second.over.is_set() and "before it began" in second.error
    assert not worker.cancel("2")
    assert worker.cancel("1") and first.over.wait(10) and first.error == "cancelled"
    assert third.over.wait(10) and done == ["3"]


def test_failures_are_told_in_words_and_leave_the_worker_working(worker, caplog):
    def fails(error):
        def task(progress):
            raise error

        return run(worker, task).error

    assert fails(UserError("seed: got\n-1")) == "seed: got -1"
    assert (
        fails(ValueError("secret")) == "the program failed (ValueError); the server's log says more"
    )
    assert fails(MemoryError()) == "out of memory; ask for fewer pictures"
    assert "secret" in caplog.text


def test_a_caption_that_is_cut_is_noted(worker):
    job = run(worker, lambda progress: model().embed_text(["apple " * 99] * 2))
    (note,) = job.notes
    assert not job.error and "apple" in note


def test_the_pictures_are_seen_while_they_are_drawn(served, worker):
    seen = {}

    def draw(progress):
        request = tasks.text_to_image(served, "a dog", 4, 1, None, None, False)

        def watched(stage, step, steps):
            progress(stage, step, steps)
            seen.setdefault(stage, []).append((job.draft, look.waiting(job, 0)))

        watched.look = progress.look
        return request.draw(watched)

    job = worker.submit("someone", draw)
    assert job.over.wait(120) and not job.error
    draft, html = seen["prior"][0]
    assert draft is None and "<img" not in html
    for stage in ("decoder", "upsampler 32"):
        (name, images), html = seen[stage][-1]
        assert name == stage and images.dtype == np.uint8 and images.shape[-1] == 3
        assert re.search(
            rf'<img class="draft" src="data:image/jpeg;[^"]+" alt="being.*{stage}', html
        )
    last, drawn = seen["upsampler 32"][-1][0][1], job.result.cells[-1][0]
    np.testing.assert_array_equal(last[-1], drawn)  # after all steps, what was drawn


def test_a_hint_names_what_the_model_does_not_know():
    known = Known.of(["red apple, noto style"], ["a red apple"])
    html = look.unfamiliar(known, "<b>red</b> aple", "Prompt")
    assert "“b”, “aple”" in html and "<b>" not in html
    fill = re.search(r'data-fill="([^"]*)"', html)[1]
    assert json.loads(unescape(fill)) == {"Prompt": "red apple"}
    assert look.unfamiliar(known, "a red apple", "Prompt") == ""
    assert look.unfamiliar(None, "a quantum", "Prompt") == ""
    assert "1 names" in look.head(None, 64, known)


def test_a_form_whose_settings_were_never_opened_is_taken(served):
    request = tasks.text_to_image(served, "a dog", 4, 1, None, None, False, None)
    assert request.args.negative == ""


def test_closing_ends_what_runs_and_what_waits():
    worker = Worker(waiting=1)
    running, waiting = worker.submit("1", until_cancelled), worker.submit("2", until_cancelled)
    worker.close()
    assert running.over.is_set() and waiting.over.is_set()
    assert not any(thread.name == "device" for thread in threading.enumerate())
