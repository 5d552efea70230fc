"""Writers, progress lines, curves, captioned grids, PNG metadata."""

import io
import json
import math
import sys

import numpy as np
import pytest
from PIL import Image

from unclip_jax.common import grids
from unclip_jax.errors import UserError
from unclip_jax.training import writers

RED, BLUE = (255, 0, 0), (0, 0, 255)

ODD_CAPTIONS = [
    "",
    "  \t\n ",
    "\x00 control \x07 bell",
    "lone surrogate \ud83d here",
    "family \U0001f468\u200d\U0001f469\u200d\U0001f467, flag \U0001f1e9\U0001f1ff",
    "日本語のキャプション、とても長いので折り返さなければならない",
    "عربى וגם עברית",
    "e\u0301\u0302\u0303 combining",
    "x" * 5000,
    "many " * 500,
]


def picture(height, width, colour):
    return np.broadcast_to(np.array(colour, np.uint8), (height, width, 3))


def read_events(folder):
    """What TensorBoard itself, if installed, reads in a folder."""
    name = "tensorboard.backend.event_processing.event_accumulator"
    return pytest.importorskip(name).EventAccumulator(str(folder)).Reload()


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self):
        return True


# metrics.jsonl and TensorBoard


def test_metrics_are_cut_at_the_step_a_run_goes_on_from(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = writers.JsonLinesWriter(path, start=0)
    for step in (10, 20, 30):
        writer.write_scalars(step, {"train/loss": 1.0 / step})
    writer.write_scalars(30, {"eval/x": math.nan})
    writer.close()
    assert path.read_text().splitlines()[-1] == '{"step": 30, "eval/x": null}'
    assert math.isnan(writers.read_metrics(path)[-1]["eval/x"])
    with path.open("a") as file:
        file.write('{"step": 40, "train/lo')  # the run is killed here
    writer = writers.JsonLinesWriter(path, start=20)
    writer.write_scalars(30, {"train/loss": 5.0})
    writer.close()
    assert writers.read_metrics(path) == [
        {"step": 10, "train/loss": 0.1},
        {"step": 20, "train/loss": 0.05},
        {"step": 30, "train/loss": 5.0},
    ]


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for line in ("not json", "[]", '{"loss": 1}'):
        path.write_text('{"step": 1}\n' + line + '\n{"step": 2}\n')
        with pytest.raises(UserError, match="line 2: damaged"):
            writers.read_metrics(path)
    assert writers.read_metrics(tmp_path / "absent") == []


def test_tensorboard_reads_what_was_written(tmp_path):
    writer = writers.Report(tmp_path, steps=3, start=0)
    writer.write_scalars(3, {"train/loss": 0.25})
    writer.write_image(3, "preview", picture(4, 6, RED))
    writer.write_text(3, "description", "ä 日本")
    writer.flush()
    writer.close()
    events = read_events(tmp_path / "tensorboard")
    (scalar,) = events.Scalars("train/loss")
    assert (scalar.step, scalar.value) == (3, 0.25)
    (image,) = events.Images("preview")
    with Image.open(io.BytesIO(image.encoded_image_string)) as png:
        assert png.size == (6, 4) and png.getpixel((0, 0)) == RED


def test_tensorboard_is_written_without_torch(tmp_path, monkeypatch):
    """It is asked for, where it is installed, by a module that can do without it."""
    for name in list(sys.modules):
        if name.partition(".")[0] in ("tensorboardX", "torch"):
            monkeypatch.delitem(sys.modules, name)
    writers.Report(tmp_path, steps=3, start=0).close()
    assert "tensorboardX" in sys.modules and "torch" not in sys.modules


def test_tensorboard_forgets_what_came_after_the_checkpoint(tmp_path):
    for start, steps in ((0, (10, 20, 30)), (20, (25,))):
        writer = writers.Report(tmp_path, 30, start)
        for step in steps:
            writer.write_scalars(step, {"loss": 1.0})
        writer.close()
    events = read_events(tmp_path / "tensorboard")
    assert [event.step for event in events.Scalars("loss")] == [10, 20, 25]


# Progress


def test_a_log_gets_plain_lines():
    stream = io.StringIO()
    progress = writers.Progress(steps=100, start=0, stream=stream)
    progress.update()
    speeds = {"train/steps_per_second": 0.025, "train/examples_per_second": 0.2}
    progress.write_scalars(10, {"train/loss": 0.12345} | speeds)
    progress.write_scalars(10, {"eval/cosine": 0.5})
    progress.line("done")
    progress.close()
    assert stream.getvalue().splitlines() == [
        "step 10/100  loss 0.1235  steps_per_second 0.025  examples_per_second 0.2"
        "  time left 1:00:00",
        "step 10/100  eval/cosine 0.5",
        "done",
    ]


def test_a_log_is_never_silent_for_long(monkeypatch):
    moment, stream = [0.0], io.StringIO()
    monkeypatch.setattr(writers.time, "monotonic", lambda: moment[0])
    progress = writers.Progress(steps=9, start=2, stream=stream)
    for _ in range(5):
        moment[0] += 12.0
        progress.update()
        if moment[0] == 48.0:
            progress.line("something else")
    assert stream.getvalue().splitlines() == ["step 5/9", "something else"]


def test_a_terminal_gets_one_live_line():
    stream = Terminal()
    progress = writers.Progress(steps=100, start=40, stream=stream)
    for _ in range(60):
        progress.update()
    speeds = {"train/steps_per_second": 2.0, "train/examples_per_second": 16.0}
    progress.write_scalars(100, {"train/loss": 0.5} | speeds)
    progress.line("saved")
    progress.close()
    shown = stream.getvalue()
    assert "40/100" in shown and "100/100" in shown
    assert "loss 0.5, 16 examples/s" in shown
    assert "saved\n" in shown and shown.count("\n") == 2


# Curves


def test_curves_are_drawn(tmp_path):
    writers.plot_metrics(tmp_path)
    assert not (tmp_path / writers.CURVES_FILE).exists()  # nothing to draw
    records = [{"step": i, "train/loss": 1 / i, "train/grad_norm": math.nan} for i in range(1, 5)]
    records += [{"step": 4, "eval/loss": 0.3}]
    lines = [json.dumps(record).replace("NaN", "null") for record in records]
    (tmp_path / writers.METRICS_FILE).write_text("\n".join(lines) + "\n")
    writers.plot_metrics(tmp_path)
    with Image.open(tmp_path / writers.CURVES_FILE) as image:
        assert image.format == "PNG" and len(image.convert("RGB").getcolors(2**20)) > 10


def test_what_was_measured_once_or_never_changes_is_no_curve(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.set", lambda axes, **of: drawn.append(of["title"]))
    records = [{"step": i, "train/loss": 1 / i, "eval/pairs": 20.0} for i in (1, 2)]
    records += [{"step": 2, "eval/psnr": 9.0}]
    (tmp_path / writers.METRICS_FILE).write_text("\n".join(map(json.dumps, records)) + "\n")
    writers.plot_metrics(tmp_path)
    assert drawn == ["loss"]
    records = records[1:]
    (tmp_path / writers.METRICS_FILE).write_text("\n".join(map(json.dumps, records)) + "\n")
    (tmp_path / writers.CURVES_FILE).unlink()
    writers.plot_metrics(tmp_path)
    assert not (tmp_path / writers.CURVES_FILE).exists()


# Grids


def test_pictures_stand_whole_in_equal_cells():
    images = [picture(40, 200, RED), picture(200, 40, BLUE), picture(200, 200, RED)]
    grid = np.asarray(grids.captioned_grid(images, ["a", "b", "c"], columns=2))
    red = np.all(grid == RED, axis=-1)
    blue = np.all(grid == BLUE, axis=-1)
    assert red.sum() == 40 * 200 + 200 * 200 and blue.sum() == 200 * 40
    rows, columns = np.nonzero(blue)
    assert (np.ptp(rows), np.ptp(columns)) == (199, 39)
    # The wide picture is centred on the row of the tall one beside it.
    wide = np.nonzero(red[: rows.max() + 1])[0]
    assert (wide.min() + wide.max()) == (rows.min() + rows.max())
    assert np.all(grid[0] == 255) and np.all(grid[:, 0] == 255)


def test_small_pictures_are_enlarged_pixel_for_pixel():
    grid = np.asarray(grids.captioned_grid([picture(8, 8, RED)], [""], min_side=60))
    assert np.all(grid == RED, axis=-1).sum() == 64**2


def test_captions_are_inked_below_their_picture_and_within_their_cell():
    def ink(caption):
        grid = np.asarray(grids.captioned_grid([picture(150, 150, RED)], [caption]))
        return np.nonzero(grid.max(axis=-1) < 128)

    assert len(ink("")[0]) == 0
    rows, columns = ink("a long caption that must be wrapped to stay under its picture")
    grid = np.asarray(grids.captioned_grid([picture(150, 150, RED)], ["x"]))
    cell = np.nonzero(np.all(grid == RED, axis=-1))
    assert rows.min() > cell[0].max()
    assert columns.min() >= cell[1].min() and columns.max() <= cell[1].max()


def test_accents_are_drawn_not_boxed():
    def drawn(text):
        return grids.captioned_grid([picture(9, 9, RED)], [text]).tobytes()

    assert len({drawn(text) for text in ("é", "ő", "ж", "λ", "\U0001f600", "日")}) == 6
    assert drawn("日") == drawn("本")  # no glyph: a box for each


@pytest.mark.parametrize("caption", ODD_CAPTIONS)
def test_no_caption_breaks_a_grid(caption):
    grid = grids.captioned_grid([picture(64, 64, RED)] * 2, [caption, "plain"], title=caption)
    assert grid.height < 500


def test_grey_pictures_and_wrong_ones():
    grey = np.full((8, 8, 1), 77, np.uint8)
    assert (77, 77, 77) in {colour for _, colour in grids.captioned_grid([grey], ["g"]).getcolors()}
    for wrong in (
        np.zeros((8, 8, 3), np.float32),
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
    ):
        with pytest.raises(UserError, match="grid image 0: got"):
            grids.captioned_grid([wrong], ["x"])
    with pytest.raises(UserError, match="1 images and 2 captions"):
        grids.captioned_grid([grey], ["a", "b"])
    with pytest.raises(UserError, match="0 images"):
        grids.captioned_grid([], [])
    with pytest.raises(UserError, match="columns: got 0"):
        grids.captioned_grid([grey], ["a"], columns=0)


# PNG metadata


def test_png_metadata_survives(tmp_path):
    metadata = {"prompt": "日本 \U0001f600 ä", "empty": "", "long": "z" * 10**6, "json": '{"a": 1}'}
    path = tmp_path / "new" / "a.png"
    grids.save_png(Image.new("RGB", (3, 2), RED), path, metadata)
    assert grids.read_png_metadata(path) == metadata
    assert [child.name for child in path.parent.iterdir()] == ["a.png"]


def test_odd_metadata(tmp_path):
    image = Image.new("RGB", (3, 2))
    grids.save_png(image, tmp_path / "a.png", {"a": "x\0y\ud800"})
    assert grids.read_png_metadata(tmp_path / "a.png") == {"a": "xy?"}
    for key in ("", "k" * 80, "日", "a\nb"):
        with pytest.raises(UserError, match="PNG metadata key"):
            grids.save_png(image, tmp_path / "b.png", {key: "x"})
    assert not (tmp_path / "b.png").exists()


def test_what_is_not_a_whole_png(tmp_path):
    path = tmp_path / "a.png"
    grids.save_png(Image.effect_noise((64, 64), 50), path, {})
    whole = path.read_bytes()
    for content in (b"", b"GIF89a", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="not a whole PNG"):
            grids.read_png_metadata(path)
    with pytest.raises(UserError, match="no such file"):
        grids.read_png_metadata(tmp_path / "absent.png")
