"""The whole evaluation of a tiny model on a folder of pictures."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from PIL import Image

from tests import tiny
from unclip_jax import stages
from unclip_jax.common.grids import read_png_metadata
from unclip_jax.common.params import fingerprint
from unclip_jax.data.datasets import DataConfig
from unclip_jax.errors import UserError
from unclip_jax.evaluate import features, page
from unclip_jax.evaluate.command import main, scales
from unclip_jax.evaluate.measure import Settings, choose, evaluate
from unclip_jax.evaluate.pictures import Measurer
from unclip_jax.pipeline.unclip import UnCLIP
from unclip_jax.weights.trained import Part

CLASSES = ("circle", "line", "ring", "square")
SETTINGS = Settings(num=4, sweep=(1.0, 3.0), class_pictures=2, batch_size=8)


def random_part(stage, seed, **about):
    """A stage with params drawn by NumPy: compiling the initialisation would take longest here."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[0].key != "network":
            return np.full(leaf.shape, path[-1].key == "std", np.float32)
        noise = 0.2 * rng.standard_normal(leaf.shape) + (path[-1].key == "scale")
        return noise.astype(np.float32)

    shapes = jax.eval_shape(stage.init, jax.random.key(0))
    description = {"stage": stages.describe(stage)} | about
    return Part(stage, jax.tree_util.tree_map_with_path(draw, shapes), description)


@pytest.fixture(scope="module")
def model():
    """A model without upsamplers."""
    clip = random_part(tiny.CLIP, 0)
    about = {"clip_fingerprint": fingerprint(clip.params)}
    return UnCLIP(clip, random_part(tiny.PRIOR, 1, **about), random_part(tiny.DECODER, 2, **about))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three pictures of each of four classes, and one that is no picture."""
    root = tmp_path_factory.mktemp("shapes")
    rng = np.random.default_rng(0)
    for i, name in enumerate(CLASSES):
        (root / name).mkdir()
        for j in range(3):
            image = rng.integers(0, 60, (16, 16, 3)) + 45 * i
            Image.fromarray(image.astype(np.uint8)).save(root / name / f"{name} {j}.png")
            (root / name / f"{name} {j}.txt").write_text(f"{name} {j}")
    (root / "ring" / "broken.png").write_text("no picture")
    return root


@pytest.fixture(scope="module")
def data(folder):
    return DataConfig(name=str(folder), split="all", context_length=tiny.CONTEXT)


@pytest.fixture(scope="module")
def report(model, data):
    return evaluate(model, data, "all", SETTINGS)


def test_every_figure_is_there(report):
    figures = report.figures
    assert set(figures) == {"clip", "prior", "decoder", "pictures", "classes"}
    assert figures["clip"]["pairs"] == 12 and figures["decoder"]["pictures"] == 4
    assert figures["decoder"]["captions"] == 12  # of one folder twice
    pictures = figures["pictures"]
    names = {"frechet", "cmmd", "clip_score", "precision", "recall"}
    assert set(pictures) == names | {f"real_{name}" for name in names}
    assert all(math.isfinite(value) for value in pictures.values())
    assert pictures["frechet"] > 0 and pictures["cmmd"] > 0
    assert figures["classes"]["subsets"] == 6 and figures["classes"]["chance"] == 0.25
    assert [row["guidance_scale"] for row in report.sweep] == [1.0, 3.0]
    assert report.about["pictures"] == 4 and report.about["reference_pictures"] == 8
    # The scale of the model itself is one of the sweep, and not drawn twice.
    assert tiny.DECODER.guidance_scale in {row["guidance_scale"] for row in report.sweep}


def test_the_size_of_a_batch_changes_no_figure(model, report, data):
    other = evaluate(model, data, "all", dataclasses.replace(SETTINGS, batch_size=3))
    assert set(other.figures) == set(report.figures)
    for part, figures in report.figures.items():
        for name, value in figures.items():
            assert other.figures[part][name] == pytest.approx(
                value, rel=1e-2, abs=1e-4, nan_ok=True
            )
    for ours, theirs in zip(report.grids, other.grids, strict=True):
        for (a, _), (b, _) in zip(ours.cells, theirs.cells, strict=True):
            assert np.abs(a.astype(int) - b.astype(int)).max() <= 1


def test_an_evaluation_goes_on_from_what_it_keeps(model, report, data, tmp_path, monkeypatch):
    """Killed at its last batch, it draws that one alone, and its figures are the same."""
    drawn, batches = Measurer._drawn, []

    def dies(self, keys, captions, *how):
        batches.append(captions)
        if len(batches) == last:
            raise KeyboardInterrupt
        return drawn(self, keys, captions, *how)

    monkeypatch.setattr(Measurer, "_drawn", dies)
    last = len(report.sweep) + 1  # one batch for each guidance scale, and one for the classes
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, data, "all", SETTINGS, keep=tmp_path)
    last, batches[:] = 0, []
    again = evaluate(model, data, "all", SETTINGS, keep=tmp_path)
    assert len(batches) == 1
    assert str(again.figures) == str(report.figures) and str(again.sweep) == str(report.sweep)
    assert not any(tmp_path.iterdir())


def test_pictures_of_captions_do_not_share_their_noise(report):
    (cells,) = [grid.cells for grid in report.grids if grid.name == "classes"]
    first, second = cells[0][0], cells[1][0]  # two of one class
    assert (first != second).any()


def test_another_clip_may_measure(model, report, data):
    plain = dataclasses.replace(SETTINGS, sweep=(), class_pictures=0)
    other = evaluate(model, data, "all", plain, random_part(tiny.CLIP, 9))
    assert other.about["clip_fingerprint"] != report.about["clip_fingerprint"]
    assert other.figures["clip"] != report.figures["clip"]
    # The pictures are the same, and so are the prior's cosines in the space of the model's CLIP.
    assert other.figures["prior"] == pytest.approx(report.figures["prior"], rel=1e-5)
    ours, theirs = report.grids[0].cells, other.grids[0].cells
    assert all((a == b).all() for (a, _), (b, _) in zip(ours, theirs, strict=True))


def test_everything_is_written(report, tmp_path):
    page.write(report, tmp_path / "new")
    found = json.loads((tmp_path / "new" / page.JSON).read_text())
    assert found["figures"]["clip"]["pairs"] == 12 and len(found["sweep"]) == 2
    shown = (tmp_path / "new" / page.PAGE).read_text()
    for name in ("sweep", "subsets", "generated", "sweep_pictures", "classes"):
        assert f'src="{name}.png"' in shown
        assert Image.open(tmp_path / "new" / f"{name}.png").size[0] > 100
    assert "evaluation" in read_png_metadata(tmp_path / "new" / "generated.png")
    assert "guidance 3/frechet" in page.as_table(report)
    (tmp_path / "new" / "mine.png").write_text("not of a report")
    page.write(report._replace(sweep=[], subsets=None, grids=report.grids[:1]), tmp_path / "new")
    left = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert left == ["figures.json", "generated.png", "index.html", "mine.png"]


def test_the_undefined_is_null_and_a_dash(report):
    undefined = report._replace(figures={"pictures": {"real_frechet": math.nan}}, sweep=[])
    assert json.loads(page.as_json(undefined))["figures"]["pictures"]["real_frechet"] is None
    assert page.as_table(undefined).split() == ["pictures/real_frechet", "-"]


def test_the_command(model, report, folder, tmp_path, capsys):
    model.save(tmp_path / "model")
    main([
        "--model", str(tmp_path / "model"), "--data", str(folder), "--split", "all",
        "--heldout_split", "all", "--num", "7", "--batch_size", "8", "--out", str(tmp_path / "out"),
    ])  # fmt: skip
    found = json.loads((tmp_path / "out" / page.JSON).read_text())
    assert found["about"]["reference"] == "all pictures" and found["sweep"] == []
    assert found["figures"]["pictures"]["real_frechet"] is None
    assert found["figures"]["pictures"]["real_clip_score"] > 0
    # The same figure of the same pictures, whatever else was asked for.
    assert found["figures"]["clip"]["rank_99"] == report.figures["clip"]["rank_99"]
    printed = capsys.readouterr().out
    assert "decoder/generated_r1" in printed and "index.html" in printed
    with pytest.raises(UserError, match=r"\d class, expected at least 2|no sub-folder"):
        evaluate(model, DataConfig(name=str(folder / "ring"), split="all"), "all", SETTINGS)


def test_the_reference_is_what_is_not_drawn_if_that_suffices():
    chosen, reference, disjoint = choose(10, 4, seed=0)
    assert disjoint and sorted([*chosen, *reference]) == list(range(10))
    chosen, reference, disjoint = choose(10, 100, seed=0)
    assert not disjoint and list(chosen) == list(reference) == list(range(10))
    with pytest.raises(
        UserError, match="--data: got 3, expected at least 4 pictures in this split"
    ):
        choose(3, 100, seed=0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num": 3}, "--num: got 3, expected at least 4"),
        ({"batch_size": 0}, "--batch_size: got 0"),
        ({"class_pictures": -1}, "--class_pictures: got -1"),
        ({"template": "a photo"}, "--template: got 'a photo'"),
        ({"sweep": (1.0, math.inf)}, "guidance scale: got inf"),
        ({"guidance_scale": math.nan}, "guidance scale: got nan"),
        ({"seed": -1}, "--seed: got -1"),
    ],
)
def test_wrong_settings_are_named(changes, expected):
    with pytest.raises(UserError) as caught:
        Settings(**changes)
    assert expected in str(caught.value)


def test_models_and_networks_that_do_not_do(model, data, tmp_path):
    reads_captions = dataclasses.replace(tiny.DECODER.model, embed_dim=0, clip_tokens=0)
    captions_alone = random_part(dataclasses.replace(tiny.DECODER, model=reads_captions), 3)
    with pytest.raises(UserError, match="--model: has no CLIP"):
        evaluate(UnCLIP(None, None, captions_alone), data, "all", SETTINGS)
    with pytest.raises(UserError, match="--model: has no prior"):
        evaluate(dataclasses.replace(model, prior=None), data, "all", SETTINGS)
    lite0 = "efficientnet-lite0"
    for name in ("vgg", "inception", "inception:", f"{lite0}:", f"{lite0}:8", f"{lite0}:big"):
        with pytest.raises(UserError, match="--features: got"):
            features.load(name, features.of_clip(model.clip))
    with pytest.raises(UserError, match="no such file"):
        features.load(f"inception:{tmp_path / 'none.pth'}", features.of_clip(model.clip))


def test_a_feature_network_looks_beside_clip(model):
    clip = features.of_clip(model.clip)
    colour = features.FeatureNetwork("colour", 2.0, lambda scale, x: scale * x.mean((1, 2)), None)
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    seen = Measurer(model, model.clip, clip, colour, batch_size=8).look(images)
    np.testing.assert_allclose(seen.features, 2 * images.mean((1, 2)), rtol=1e-6)
    np.testing.assert_allclose(seen.z_i, model.embed_image(images), atol=1e-5)


def test_wrong_command_lines(tmp_path):
    assert scales("1,2.5") == (1.0, 2.5) and scales("") == ()
    with pytest.raises(UserError, match="--sweep: got '1;2'"):
        scales("1;2")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        main(["--model", "m", "--out", str(tmp_path / "file")])
