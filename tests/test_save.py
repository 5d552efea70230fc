"""Checkpoints that stay, and model folders made of them."""

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny, toy_run
from unclip_jax import stages
from unclip_jax.common.params import fingerprint
from unclip_jax.errors import UserError
from unclip_jax.training import loop, save, sums, writers
from unclip_jax.training.saved import Saved, damage
from unclip_jax.weights import folder as model_folder
from unclip_jax.weights import trained as parts


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(writers, "plot_metrics", lambda workdir: None)


FIGURES = {4: 3.0, 8: 1.0, 12: 2.0, 16: float("nan"), 20: 1.5}


def run_with_figures(workdir, **settings):
    """20 steps whose evaluations are made up."""
    return toy_run.run(
        workdir,
        evaluate=lambda params, step: {"figure": FIGURES[step], "other": -FIGURES[step]},
        **{"steps": 20, "checkpoint_every": 10, "eval_every": 4, "keep_checkpoints": 1} | settings,
    )


def steps_in(workdir) -> set[int]:
    return {int(p.name) for p in (Path(workdir) / "checkpoints").iterdir() if p.name.isdigit()}


@pytest.mark.parametrize(
    ("settings", "best"),
    [
        ({"best": "figure"}, 8),
        ({"best": "figure", "best_is": "greatest"}, 4),
        ({"best": "other", "best_is": "greatest"}, 8),
    ],
)
def test_the_best_checkpoint_stays_beside_the_last(tmp_path, settings, best):
    """It is saved at the evaluation that finds it, between the regular ones."""
    run_with_figures(tmp_path, **settings)
    assert steps_in(tmp_path) == {best, 20}
    with Saved(tmp_path) as saved:
        assert save.choose(saved, "best") == best
        assert save.choose(saved, "latest") == 20


def test_a_run_that_goes_on_still_knows_its_best(tmp_path):
    run_with_figures(tmp_path / "whole", best="figure")
    run_with_figures(tmp_path / "parts", best="figure", steps=12, schedule="constant")
    with pytest.raises(UserError, match=r"train\.b1"):
        run_with_figures(tmp_path / "parts", best="figure", schedule="constant", b1=0.5)
    run_with_figures(tmp_path / "parts", best="figure", schedule="constant")
    assert steps_in(tmp_path / "parts") == steps_in(tmp_path / "whole") == {8, 20}


@pytest.mark.parametrize("best", ["", "figure"])
def test_a_checkpoint_with_figures_is_whole_and_a_changed_figure_is_told(tmp_path, best):
    run_with_figures(tmp_path, best=best)
    checkpoint = tmp_path / "checkpoints" / "20"
    assert damage(checkpoint) == ""
    kept = checkpoint / "metrics" / "metrics"
    assert kept.is_file() == bool(best)  # Orbax keeps what it judges by
    if best:
        kept.write_text('{"figure": 9.0, "other": 0.0}')
        assert damage(checkpoint) == "metrics has changed since it was written"


def test_a_sum_of_figures_that_were_never_kept_is_no_damage(tmp_path, monkeypatch):
    former = functools.partial(sums.table, metrics={"figure": 1.5})
    monkeypatch.setattr(sums, "table", former)
    run_with_figures(tmp_path)
    assert damage(tmp_path / "checkpoints" / "20") == ""


def test_a_figure_that_there_is_not_is_named(tmp_path):
    with pytest.raises(UserError, match=r"train\.best: got 'fid', expected one of .*figure, other"):
        run_with_figures(tmp_path, best="fid")
    with pytest.raises(UserError, match=r"train\.best: got 'loss', .* as train.eval_every is 0"):
        loop.TrainConfig(best="loss")


class Noise:
    """Batches that never end, told apart by their number."""

    index = 0

    def __next__(self):
        self.index += 1
        return {k: np.asarray(v) for k, v in tiny.batch(8, 16, self.index).items()}

    def get_state(self):
        return self.index

    def set_state(self, states):
        (self.index,) = states


def short_run(stage, workdir, ema_dtype="bfloat16", **about):
    """A tiny stage trained for 6 steps, with checkpoints at 3 and 6 and its own export."""
    about |= {"stage": stages.describe(stage)}

    def export(params, step):
        about_step = about | {"step": step}
        model_folder.save_stage(workdir / "model", params=params, description=about_step)

    loop.train(
        loss_fn=stage.loss,
        init_params=lambda: tiny.params(stage, 1),
        batches=Noise(),
        config=loop.TrainConfig(
            batch_size=8, steps=6, checkpoint_every=3, learning_rate=1e-3, ema_dtype=ema_dtype
        ),
        workdir=workdir,
        description=about,
        export=export,
    )
    return workdir


@pytest.fixture(scope="module")
def prior_run(tmp_path_factory):
    return short_run(tiny.PRIOR, tmp_path_factory.mktemp("prior"), clip_fingerprint="0" * 16)


def test_a_rounded_clip_is_still_the_clip_that_others_stand_on(tmp_path):
    workdir = short_run(tiny.CLIP, tmp_path / "run", ema_dtype="float32")
    trained = parts.load_part(workdir, "clip")
    save.main(["--workdir", str(workdir), "--out", str(tmp_path / "half"), "--dtype", "bfloat16"])
    rounded = parts.load_part(tmp_path / "half", "clip")
    assert fingerprint(rounded.params) != fingerprint(trained.params)
    assert parts.clip_fingerprint(rounded) == parts.clip_fingerprint(trained)


def test_a_saved_checkpoint_is_what_training_exports(prior_run, tmp_path, capsys):
    save.main(["--workdir", str(prior_run), "--out", str(tmp_path / "last")])
    assert "the prior at step 6" in capsys.readouterr().out
    fingerprints = [
        model_folder.read_fingerprint(folder) for folder in (tmp_path / "last", prior_run / "model")
    ]
    assert fingerprints[0] == fingerprints[1]
    described = model_folder.read_description(tmp_path / "last")
    assert described["clip_fingerprint"] == "0" * 16 and described["step"] == 6
    save.main(["--workdir", str(prior_run), "--out", str(tmp_path / "early"), "--step", "3"])
    assert model_folder.read_fingerprint(tmp_path / "early") != fingerprints[0]
    # What is read back is a stage that samples.
    shapes = jax.eval_shape(tiny.PRIOR.init, jax.random.key(0))
    params, _ = model_folder.load_stage(tmp_path / "early", shapes)
    batch = tiny.batch(2, 16)
    cond = tiny.PRIOR.condition(batch["tokens"], batch["z_t"], None)
    keys = jax.random.split(jax.random.key(0), 2)
    assert bool(jnp.isfinite(tiny.PRIOR.sample(params, keys, cond)).all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "4"], r"--step: got '4', expected latest, best or one of 3, 6"),
        (["--step", "best"], r"--step: got best, but this run compared no checkpoints"),
        (["--init", "x"], r"--init: got 'x', expected none: this run started from no folder"),
    ],
)
def test_what_cannot_be_saved_is_named(prior_run, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        save.main(["--workdir", str(prior_run), "--out", str(tmp_path / "m"), *arguments])
    assert not (tmp_path / "m").exists()


def test_workdirs_without_checkpoints_are_named(tmp_path):
    with pytest.raises(UserError, match=r"has no checkpoints; give the --workdir"):
        save.main(["--workdir", str(tmp_path), "--out", str(tmp_path / "m")])
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"has no whole checkpoint yet"):
        save.main(["--workdir", str(tmp_path), "--out", str(tmp_path / "m")])


def test_a_damaged_checkpoint_is_named(prior_run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(prior_run, workdir)
    description = workdir / "checkpoints" / "6" / "description" / "metadata"
    assert json.loads(description.read_text())["stage"]["kind"] == "prior"
    description.write_text("{")
    with pytest.raises(UserError, match=r"checkpoints/6: the checkpoint is damaged"):
        save.main(["--workdir", str(workdir), "--out", str(tmp_path / "m")])
