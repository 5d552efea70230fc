"""sample.py's tasks on a tiny model: files of every kind, grids that say how they were made."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from tests import tiny
from unclip_jax.common.grids import read_png_metadata
from unclip_jax.errors import UserError
from unclip_jax.pipeline.drawing import Kept
from unclip_jax.pipeline.tasks import command as sample
from unclip_jax.pipeline.tasks import run as tasks
from unclip_jax.pipeline.tasks.inputs import read_image

QUICK = ("--batch_size", "2")
WALK = (*QUICK, "--steps", "4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, image files of every kind, a mask, and things that are none of these."""
    root = tmp_path_factory.mktemp("tasks")
    tiny.model().save(root / "model")
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (5, 9, 3), np.uint8)).resize((45, 25))
    colours.save(root / "plain.png")
    colours.convert("CMYK").save(root / "cmyk.jpg")
    colours.convert("P").save(root / "palette.gif")
    colours.convert("L").save(root / "grey.webp")
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(root / "clear.png")
    Image.fromarray(np.full((3, 3), 40000, np.uint16)).save(root / "deep.png")
    Image.new("1", (1, 1)).save(root / "one.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side
    tall = Image.new("RGB", (8, 4), "blue")
    tall.paste("red", (0, 0, 4, 4))
    tall.save(root / "turned.png", exif=exif)
    mask = np.zeros((25, 45), np.uint8)
    mask[5:20, 15:30] = 255
    Image.fromarray(mask).save(root / "mask.png")
    (root / "broken.png").write_bytes((root / "plain.png").read_bytes()[:60])
    (root / "text.png").write_text("this is no picture")
    data = root / "data"
    data.mkdir()
    for i in range(12):
        pixels = rng.integers(0, 256, (2, 2, 3), np.uint8)
        Image.fromarray(pixels).resize((16, 16)).save(data / f"{i}.png")
        (data / f"{i}.txt").write_text(f"picture {i}")
    return root


@pytest.fixture(scope="module", autouse=True)
def one_report():
    """All tasks report to the same bars here, so that they share compiled programs."""
    bars = tasks.StageBars()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "StageBars", lambda: bars)
        yield


def run(folder, *command):
    """One task on the tiny model; a name of a file in the folder stands for its path."""
    files = {path.name for path in folder.iterdir()}
    words = [str(folder / word) if word in files else str(word) for word in command]
    sample.main([*words, "--model", str(folder / "model")])


TASKS = {
    "img2img": (("--image", "plain.png", "one.png", "--prompt", "x", "--num", 2, *WALK), 3, 6),
    "mix": (
        ("--image", "plain.png", "--prompt", "a cat", "--weight", 1, "0.5", "--num", 3, *QUICK),
        4, 4,
    ),
    "reconstruct": (("--image", "plain.png", "one.png", "--steps", 4, 5, *QUICK), 3, 6),
    "variations": (("--image", "cmyk.jpg", "--image", "clear.png", "--num", 2, *WALK), 3, 6),
    "interpolate": (("--image", "palette.gif", "grey.webp", "--frames", 3, *WALK), 5, 10),
    "textdiff": (("--image", "turned.png", "--to", "a cat", "--frames", 2, *WALK), 3, 3),
    "inpaint": (("--image", "plain.png", "--mask", "mask.png", "--prompt", "x", "--num", 2), 4, 4),
    "upscale": (("--image", "deep.png", "plain.png", "--num", 2, *QUICK), 4, 8),
    "probe pca": (
        ("--image", "plain.png", "--data", "data", "--split", "all", "--dims", 1, 8, *WALK), 3, 3,
    ),
    "probe prior": (("--prompt", "a dog", "--prompt", "ein Stück 🍎", *WALK), 2, 6),
    "probe typographic": (
        ("--image", "plain.png", "--word", "iPod", "--label", "a", "--label", "b", "--num", 2,
         *WALK), 3, 6,
    ),
    "probe binding": (
        ("--image", "plain.png", "--prompt", "a cat", "--prompt", "a dog", "--num", 1, *WALK), 2, 6,
    ),
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_every_task_writes_a_labelled_grid_and_single_pictures(folder, task, tmp_path, capsys):
    flags, columns, cells = TASKS[task]
    if task == "inpaint":
        flags = (*flags, *WALK)
    out = tmp_path / "new" / "grid.png"
    run(folder, *task.split(), *flags, "--out", out, "--seed", 3)
    assert f"{out}: {cells} pictures" in capsys.readouterr().out
    about = read_png_metadata(out)
    settings = json.loads(about["settings"])
    assert about["task"] == task and settings["seed"] == 3 and "model" in settings
    singles = sorted((tmp_path / "new" / "grid").iterdir())
    assert [path.name for path in singles] == [f"{i:04d}.png" for i in range(cells)]
    assert all(read_png_metadata(path)["label"].strip() for path in singles)
    with Image.open(out) as grid:
        assert grid.width > columns * 128 and grid.height > cells // columns * 128
    made = [Image.open(path).size for path in singles if path.name != "0000.png"]
    assert (32, 32) in made and set(made) <= {(32, 32), (16, 16)}


def test_pictures_of_several_seeds_and_numbers_are_those_of_each_alone(folder, tmp_path):
    def drawn(*flags):
        run(
            folder,
            "text2im",
            *flags,
            "--batch_size",
            1,
            "--no_upsample",
            "--out",
            tmp_path / "a.png",
        )
        files = sorted((tmp_path / "a").iterdir())
        about = [read_png_metadata(path) for path in files]
        names = [(one["prompt"], one["sample"]) for one in about]
        return dict(zip(names, [np.asarray(Image.open(path)) for path in files], strict=True))

    cat, dog = ("--prompt", "a cat"), ("--prompt", "a dog")
    both = drawn(*cat, *dog, "--seed", 3, 4, "--num", 1, 2, "--first", 1, 0)
    assert list(both) == [("a cat", "1"), ("a dog", "0"), ("a dog", "1")]
    for flags, names in (
        ((*cat, "--seed", 3), [("a cat", "1")]),
        ((*dog, "--seed", 4), [*both][1:]),
    ):
        alone = drawn(*flags, "--num", 2)
        for name in names:
            np.testing.assert_array_equal(both[name], alone[name])
    with pytest.raises(UserError, match="how many values of num: got 3"):
        drawn(*cat, *dog, "--num", 1, 2, 3)


def test_karlo_is_a_model_too(folder, tmp_path):
    karlo_folders = pytest.importorskip("tests.karlo_folders")
    sizes = karlo_folders.tiny(12, 3, 35, (1,), (6,), 6, 1, "quick_gelu")
    karlo_folders.pipelines(sizes, tmp_path / "tokenizer")[1].save_pretrained(tmp_path / "karlo")
    command = [
        "textdiff", "--model", tmp_path / "karlo", "--image", folder / "plain.png", "--to", "a cat",
        "--frames", 2, "--no_upsample", *WALK, "--out", tmp_path / "grid.png",
    ]  # fmt: skip
    sample.main([str(word) for word in command])
    assert len(list((tmp_path / "grid").iterdir())) == 3


def test_the_same_command_makes_the_same_pictures_and_another_seed_others(
    folder, tmp_path, monkeypatch
):
    def pixels(name, *flags):
        run(folder, *command, "--out", tmp_path / name, *flags)
        return np.asarray(Image.open(tmp_path / name))

    command = ("variations", "--image", "plain.png", "--num", 2, *WALK)
    first = pixels("a.png")
    np.testing.assert_array_equal(pixels("b.png"), first)
    assert (pixels("c.png", "--seed", 1) != first).any()

    def killed(*_):
        raise KeyboardInterrupt

    keep = ("--keep", tmp_path / "kept")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tasks, "write", killed)
        pixels("d.png", *keep)
    with monkeypatch.context() as patch:  # nothing is drawn again
        patch.setattr(Kept, "write", killed)
        np.testing.assert_array_equal(pixels("d.png", *keep), first)
    assert not any((tmp_path / "kept").iterdir())


def test_without_upsampling_pictures_have_the_decoders_size(folder, tmp_path):
    run(
        folder, "textdiff", "--image", "plain.png", "--to", "a cat", "--frames", 2, *WALK,
        "--no_upsample", "--out", tmp_path / "small.png",
    )  # fmt: skip
    assert Image.open(tmp_path / "small" / "0001.png").size == (16, 16)


def test_image_files_of_any_mode_are_read_as_they_look(folder):
    assert (read_image(folder / "clear.png") == 255).all()  # transparent, hence white
    assert (read_image(folder / "deep.png") == round(40000 / 257)).all()
    turned = read_image(folder / "turned.png")
    assert turned.shape == (8, 4, 3)
    assert tuple(turned[0, 0]) == (255, 0, 0) and tuple(turned[-1, 0]) == (0, 0, 255)
    assert read_image(folder / "one.png").shape == (1, 1, 3)
    plain = read_image(folder / "plain.png")
    assert np.abs(read_image(folder / "cmyk.jpg").astype(int) - plain).mean() < 40
    for name in ("palette.gif", "grey.webp"):
        assert read_image(folder / name).shape == plain.shape


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("reconstruct", "--image", "nothing.png"), "--image.*nothing.png.*No such file"),
        (("reconstruct", "--image", "text.png"), "--image.*text.png.*not a readable image"),
        (("variations", "--image", "broken.png"), "--image.*broken.png"),
        (("variations", "--image", "data"), "--image.*data"),
        (("variations", "--image", "a\0b"), "--image.*give an image file"),
        (("variations", "--image", "plain.png", "--eta", "2"), "eta: got 2.0"),
        (("variations", "--image", "plain.png", "--num", "0", *WALK), "num: got 0"),
        (("variations", "--image", "plain.png", "--steps", "0"), "steps: got 0"),
        (("variations", "--image", "plain.png", "--seed", "-1"), "--seed: got -1"),
        (("variations", "--image", "plain.png", "--out", "x.jpg"), r"--out.*\.png"),
        (("upscale", "--image", "plain.png", "--upsampler_steps", "x"), "spacing: got 'x'"),
        (("interpolate", "--image", "plain.png"), "--image: got 1, expected two"),
        (("interpolate", "--image", "plain.png", "one.png", "--rows", "-1"), "--rows: got -1"),
        (("textdiff", "--image", "plain.png", "--to", ""), r"prompts\[0\]"),
        (("textdiff", "--image", "plain.png", "--to", "x", "--theta_max", "-1"), "theta"),
        (("textdiff", "--image", "plain.png", "--to", "x", "--frames", "0"), "--frames: got 0"),
        (("inpaint", "--image", "plain.png", "--mask", "text.png"), "--mask.*text.png"),
        (("inpaint", "--image", "plain.png", "--mask", "deep.png"), "proportions"),
        (("inpaint", "--image", "plain.png", "--mask", "turned.png"), "lightest grey is 85 of 255"),
        (
            ("probe", "pca", "--image", "plain.png", "--dims", "9", "--data", "data", "--split",
             "all"), "from 1 to CLIP's 8",
        ),
        (("probe", "prior"), "no caption given"),
        (("probe", "binding", "--prompt", "alone"), "at least two"),
        (
            ("probe", "typographic", "--image", "plain.png", "--word", "x", "--label", "a"),
            "at least two",
        ),
    ],
)  # fmt: skip
def test_wrong_input_is_named(folder, command, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        run(folder, *command)
    assert not list(tmp_path.glob("*.png"))


def test_a_grid_that_cannot_be_written_is_named_before_anything_is_computed(folder, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "mine.png").write_bytes((folder / "plain.png").read_bytes())
    (tmp_path / "closed").write_text("in the place of the single pictures")
    long = tmp_path / f"{'x' * 300}.png"
    for out in ("file/grid.png", "", "mine.png", "closed.png", long, "/proc/none.png", "a\0.png"):
        with pytest.raises(UserError, match="--out"):
            run(folder, "upscale", "--image", "plain.png", "--out", tmp_path / out)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "mine.png", "closed"}


def test_bars_tell_the_batch_and_the_end_tells_the_seconds(folder, tmp_path, capsys):
    bars = tasks.StageBars()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "StageBars", lambda: bars)
        more = ("--num", 3, "--batch_size", 2, *QUICK, "--out", tmp_path / "a.png")
        run(folder, "upscale", "--image", "plain.png", *more)
    told = capsys.readouterr()
    assert "batch 1 of 2" in told.err and "batch 2 of 2" in told.err
    assert re.search(r"a\.png: 5 pictures in [\d.]+ s; each alone in ", told.out)


@pytest.mark.parametrize(
    "command",
    [
        ("variations",),
        ("probe",),
        ("textdiff", "--image", "plain.png"),
        ("inpaint", "--image", "plain.png"),
        ("reconstruct", "--image", "plain.png", "--steps", "x"),
        ("textdiff", "--image", "plain.png", "--to", "x", "--theta_max", "nan"),
    ],
)
def test_wrong_usage_is_status_two(folder, command, capsys):
    with pytest.raises(SystemExit) as error:
        run(folder, *command)
    assert error.value.code == 2 and "error" in capsys.readouterr().err


# --------------------------------------------------------------------- what an earlier run left


def draw(folder, out, num, *more):
    run(folder, "upscale", "--image", "plain.png", "--num", num, *QUICK, "--out", out, *more)


def test_no_picture_of_an_earlier_run_is_left_beside_a_new_one(folder, tmp_path):
    draw(folder, tmp_path / "st.png", 3)
    (tmp_path / "st" / "notes.txt").write_text("mine")
    (tmp_path / "st" / "best.png").write_bytes((tmp_path / "st" / "0001.png").read_bytes())
    draw(folder, tmp_path / "st.png", 1, "--seed", 1)
    left = sorted(path.name for path in (tmp_path / "st").iterdir())
    assert left == ["0000.png", "0001.png", "0002.png", "best.png", "notes.txt"]
    about = [read_png_metadata(tmp_path / "st" / f"{i:04d}.png") for i in range(3)]
    assert all(json.loads(one["settings"])["seed"] == 1 for one in about)


def test_what_another_made_is_not_replaced(folder, tmp_path):
    (tmp_path / "st").mkdir()
    for content in ((folder / "plain.png").read_bytes(), b"no picture"):
        (tmp_path / "st" / "0007.png").write_bytes(content)
        with pytest.raises(UserError, match=r"--out.*0007.png is there, which unclip sample did"):
            draw(folder, tmp_path / "st.png", 1)
        assert (tmp_path / "st" / "0007.png").read_bytes() == content
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"--out.*is a file"):
        draw(folder, tmp_path / "file.png", 1)


def test_a_picture_that_is_read_is_not_replaced(folder, tmp_path):
    draw(folder, tmp_path / "st.png", 1)
    for image in ("st.png", "st/0001.png"):
        command = ["upscale", "--image", tmp_path / image, "--out", tmp_path / "st.png"]
        with pytest.raises(UserError, match=r"--out.*would replace.*which is read"):
            run(folder, *command, *QUICK)
    assert len(list((tmp_path / "st").iterdir())) == 3
