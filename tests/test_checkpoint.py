"""Model folders, training checkpoints on disk, and settings to dataclasses and back."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests import toy_run
from unclip_jax.common import config
from unclip_jax.common.params import fingerprint
from unclip_jax.errors import UserError
from unclip_jax.training import loop, writers
from unclip_jax.weights import folder as model_folder

DESCRIPTION = {"stage": {"kind": "toy", "sizes": [1, 2]}, "step": 7, "note": "ä 日本"}


def make_params():
    rng = np.random.default_rng(0)
    return {
        "network": {
            # A transposed view: what is saved is the array, not its memory.
            "kernel": jnp.asarray(rng.normal(size=(3, 4)).T, jnp.float32),
            "scale": jnp.float32(2.5),
            "table": jnp.arange(6, dtype=jnp.int32).reshape(2, 3),
        },
        "normalisation": {"mean": jnp.asarray(rng.normal(size=3), jnp.float32)},
    }


def shapes(params):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)


def assert_equal(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def saved(tmp_path):
    params = make_params()
    model_folder.save_stage(tmp_path / "model", params=params, description=DESCRIPTION)
    return tmp_path / "model", params


# Model folders


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_others_may_read_weights_where_they_may_read_any_new_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        model_folder.save_stage(tmp_path / "model", params=make_params(), description=DESCRIPTION)
    finally:
        os.umask(before)
    for path in (tmp_path / "model").iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path.name


def test_nothing_else_writes_weights():
    """By safetensors' own function others could not read them."""
    package = Path(model_folder.__file__).parent.parent
    using = [path for path in package.rglob("*.py") if "save_file" in path.read_text()]
    assert using == [package / "weights" / "folder.py"]


def test_a_model_folder_gives_back_what_was_saved(saved):
    folder, params = saved
    loaded, description = model_folder.load_stage(folder, shapes(params))
    assert_equal(loaded, params)
    assert description == model_folder.read_description(folder) == DESCRIPTION
    assert_equal(model_folder.load_stage(folder)[0], params)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model"]


def test_the_file_is_plain_safetensors(saved):
    folder, params = saved
    arrays = load_file(folder / model_folder.PARAMS_FILE)
    assert set(arrays) == {"network/kernel", "network/scale", "network/table", "normalisation/mean"}
    np.testing.assert_array_equal(arrays["network/kernel"], params["network"]["kernel"])


def test_numpy_views_are_saved_as_they_read(tmp_path):
    params = {"kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3).T}
    model_folder.save_stage(tmp_path / "m", params=params, description={})
    np.testing.assert_array_equal(
        model_folder.load_stage(tmp_path / "m")[0]["kernel"], params["kernel"]
    )


def test_bfloat16_halves_the_weights_but_not_the_constants(tmp_path):
    params = make_params()
    params["last_network"] = {"kernel": params["network"]["kernel"] + 1.0}
    params["null_caption"] = {"z_t": jnp.float32(0.1)}
    model_folder.save_stage(tmp_path / "m", params=params, description={}, dtype="bfloat16")
    arrays = load_file(tmp_path / "m" / model_folder.PARAMS_FILE)
    assert arrays["network/kernel"].dtype == arrays["last_network/kernel"].dtype == jnp.bfloat16
    assert arrays["network/table"].dtype == np.int32
    loaded, _ = model_folder.load_stage(tmp_path / "m", shapes(params))
    for name in ("normalisation", "null_caption"):
        assert_equal(loaded[name], params[name])
    assert loaded["network"]["kernel"].dtype == jnp.float32
    np.testing.assert_allclose(loaded["network"]["kernel"], params["network"]["kernel"], rtol=2**-8)
    narrow, _ = model_folder.load_stage(tmp_path / "m", shapes(params), "bfloat16")
    assert narrow["network"]["kernel"].dtype == narrow["last_network"]["kernel"].dtype
    assert narrow["network"]["kernel"].dtype == jnp.bfloat16
    assert_equal(narrow["null_caption"], params["null_caption"])
    with pytest.raises(UserError, match="dtype: got 'int8'"):
        model_folder.save_stage(tmp_path / "m", params=params, description={}, dtype="int8")


def test_saving_again_replaces_the_model(saved):
    folder, params = saved
    params["network"]["scale"] = jnp.float32(-1.0)
    model_folder.save_stage(folder, params=params, description={"step": 8})
    loaded, description = model_folder.load_stage(folder)
    assert float(loaded["network"]["scale"]) == -1.0 and description == {"step": 8}


def test_a_save_that_fails_leaves_the_old_model(saved, monkeypatch):
    folder, params = saved

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(model_folder, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        model_folder.save_stage(folder, params=params, description={"step": 8})
    assert_equal(model_folder.load_stage(folder)[0], params)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model"]


def test_a_save_cut_short_between_its_two_moves_loses_nothing(saved):
    folder, params = saved
    aside = folder.with_name(".model.old")
    folder.rename(aside)
    with pytest.raises(UserError, match=r"a save was cut short .*rename .*\.model\.old back"):
        model_folder.load_stage(folder)
    with pytest.raises(ValueError, match="slash"):
        model_folder.save_stage(folder, params={"a/b": params["network"]["scale"]}, description={})
    model_folder.save_stage(folder, params=params, description={"step": 9})
    assert model_folder.read_description(folder) == {"step": 9} and not aside.exists()


def test_nothing_but_a_model_is_overwritten(saved):
    folder, params = saved
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"also holds thesis\.tex"):
        model_folder.save_stage(folder, params=params, description={})
    assert (folder / "thesis.tex").read_text() == "years of work"
    (folder.parent / "file").write_text("")
    with pytest.raises(UserError, match="a file of that name"):
        model_folder.save_stage(folder.parent / "file", params=params, description={})


def test_weights_of_another_model_are_refused_in_words(saved):
    folder, params = saved
    expected = shapes(params)
    expected["network"]["kernel"] = jax.ShapeDtypeStruct((4, 5), jnp.float32)
    expected["network"]["table"] = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    expected["network"]["extra"] = jax.ShapeDtypeStruct((1,), jnp.float32)
    del expected["normalisation"]
    with pytest.raises(UserError) as error:
        model_folder.load_stage(folder, expected)
    for words in (
        "1 missing (network/extra)",
        "1 unexpected (normalisation/mean)",
        "2 of another shape or dtype",
        "network/kernel is float32[4, 3], expected float32[4, 5]",
        "network/table is int32[2, 3], expected float32[2, 3]",
    ):
        assert words in str(error.value)
    many = {f"layer_{i}": jax.ShapeDtypeStruct((1,), jnp.float32) for i in range(9)}
    with pytest.raises(UserError, match=r"9 missing \(layer_0, layer_1, layer_2 and 6 more\)"):
        model_folder.load_stage(folder, many)


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_weights_cut_short_are_refused(saved, keep):
    folder, _ = saved
    path = folder / model_folder.PARAMS_FILE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="damaged or cut short"):
        model_folder.load_stage(folder)


def test_what_is_not_a_model_folder_is_refused(saved, tmp_path):
    folder, _ = saved
    with pytest.raises(UserError, match="no such folder"):
        model_folder.load_stage(tmp_path / "absent")
    with pytest.raises(UserError, match="that is a file"):
        model_folder.load_stage(folder / model_folder.CONFIG_FILE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="the folder is empty"):
        model_folder.load_stage(tmp_path / "empty")
    with pytest.raises(UserError, match="found empty, model there"):
        model_folder.load_stage(tmp_path)
    (folder / model_folder.PARAMS_FILE).unlink()
    with pytest.raises(UserError, match=r"params\.safetensors: missing"):
        model_folder.load_stage(folder)


def test_another_config_file_is_refused(saved, tmp_path):
    folder, params = saved
    path = folder / model_folder.CONFIG_FILE
    written = json.loads(path.read_text())
    for text, words in (
        ("{", "damaged, not JSON"),
        ("[]", "has no schema_version"),
        ('{"model": 1}', "has no schema_version"),
        (json.dumps(written | {"schema_version": 99}), "schema_version 99"),
        (json.dumps({"schema_version": 1}), "damaged, without description"),
        (json.dumps(written | {"description": 3}), "damaged, without description"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            model_folder.load_stage(folder)
    other = jax.tree.map(lambda x: x + 1, params)
    model_folder.save_stage(tmp_path / "other", params=other, description=DESCRIPTION)
    shutil.copy(tmp_path / "other" / model_folder.CONFIG_FILE, path)
    with pytest.raises(UserError, match="belongs to another"):
        model_folder.load_stage(folder)


def test_a_fingerprint_sees_every_change():
    params = make_params()
    marks = {fingerprint(params)}
    for change in (
        lambda p: p["network"].update(scale=jnp.nextafter(p["network"]["scale"], jnp.float32(9))),
        lambda p: p["network"].update(kernel=p["network"]["kernel"].reshape(3, 4)),
        lambda p: p["network"].update(table=p["network"]["table"].astype(jnp.uint32)),
        lambda p: p["network"].update(other=p["network"].pop("scale")),
        lambda p: p.pop("normalisation"),
    ):
        changed = make_params()
        change(changed)
        marks.add(fingerprint(changed))
    assert len(marks) == 6 and all(len(mark) == 16 for mark in marks)
    reordered = dict(reversed(make_params().items()))
    assert fingerprint(reordered) == fingerprint(params)
    assert fingerprint(jax.tree.map(np.asarray, params)) in marks


# Training checkpoints


@pytest.fixture
def finished(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "plot_metrics", lambda workdir: None)
    toy_run.run(tmp_path, steps=6, checkpoint_every=3)
    return tmp_path


# Orbax leaves a reader thread behind when an array cannot be read, which complains later.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_is_named_and_can_be_deleted(finished):
    latest = finished / "checkpoints" / "6"
    for path in (latest / "state").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(UserError, match=r"checkpoints/6: .*damaged .*to go on from step 3"):
        toy_run.run(finished, steps=6)
    shutil.rmtree(latest)
    batches = toy_run.Batches()
    toy_run.run(finished, batches, steps=6, checkpoint_every=3)
    assert batches.log == [3, 4, 5]


def test_a_checkpoint_without_its_data_position_is_damaged(finished):
    shutil.rmtree(finished / "checkpoints" / "6" / "data")
    with pytest.raises(UserError, match="damaged"):
        toy_run.run(finished, steps=6)


def test_a_half_deleted_older_checkpoint_disturbs_nothing(finished):
    shutil.rmtree(finished / "checkpoints" / "3" / "state")
    (finished / "checkpoints" / "9.orbax-checkpoint-tmp-1").mkdir()
    final = toy_run.run(finished, steps=8, checkpoint_every=3)
    assert int(final.step) == 8


def test_a_checkpoint_of_another_network_is_refused(finished, monkeypatch):
    params = toy_run.init_params() | {"more": {"kernel": jnp.zeros((2, 2))}}
    monkeypatch.setattr(toy_run, "init_params", lambda: params)
    with pytest.raises(UserError, match=r"not those of this model: 1 missing \(more/kernel\)"):
        toy_run.run(finished, steps=6)


# Settings


@dataclasses.dataclass(frozen=True)
class Inner:
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[float, str] = (0.5, "a")


@dataclasses.dataclass(frozen=True)
class Outer:
    rate: float
    inner: Inner = Inner()
    other: Inner | None = None
    mode: Literal["fast", "good"] = "good"
    limit: int | float | None = None
    flag: bool = False
    names: dict[str, int] = dataclasses.field(default_factory=dict)


@pytest.mark.parametrize(
    "value",
    [
        Outer(rate=1.0),
        Outer(rate=0.1, other=Inner((3,)), mode="fast", limit=3, flag=True, names={"a": 1}),
        Outer(rate=1e-300, inner=Inner((), (2.0, "日")), limit=3.5),
    ],
)
def test_settings_survive_the_round_trip(value):
    plain = json.loads(json.dumps(config.to_dict(value), allow_nan=False))
    assert config.build(Outer, plain) == value
    tree = ml_collections.ConfigDict(config.to_dict(value))
    assert config.build(Outer, tree) == value
    assert config.build(Outer, ml_collections.FrozenConfigDict(tree)) == value
    built = config.build(Outer, tree)
    assert type(built.rate) is float and type(built.limit) is type(value.limit)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "config.x.rate: missing; give it a number"),
        ({"rat": 1.0}, "config.x.rat: no such field; did you mean rate?"),
        ({"rate": "1"}, "config.x.rate: got '1', expected a number"),
        ({"rate": True}, "config.x.rate: got True, expected a number"),
        ({"rate": float("nan")}, "config.x.rate: got nan, expected a finite number"),
        ({"rate": 1, "flag": 1}, "config.x.flag: got 1, expected True or False"),
        ({"rate": 1, "mode": "bad"}, "config.x.mode: got 'bad', expected one of 'fast'"),
        ({"rate": 1, "inner": 3}, "config.x.inner: got 3, expected the fields of Inner"),
        ({"rate": 1, "inner": {"sizes": [1, 2.5]}}, "config.x.inner.sizes[1]: got 2.5, expected"),
        ({"rate": 1, "inner": {"sizes": "12"}}, "config.x.inner.sizes: got '12', expected"),
        ({"rate": 1, "inner": {"pair": [1.0]}}, "config.x.inner.pair: got [1.0], expected"),
        ({"rate": 1, "other": {"size": 1}}, "config.x.other.size: no such field; did you mean"),
        ({"rate": 1, "limit": "3"}, "config.x.limit: got '3', expected"),
        ({"rate": 1, "names": {"a": "b"}}, "config.x.names.a: got 'b', expected a whole"),
    ],
)
def test_wrong_settings_are_named_by_their_path(settings, message):
    with pytest.raises(UserError) as error:
        config.build(Outer, settings, "config.x")
    assert str(error.value).startswith(message)


def test_a_required_placeholder_must_be_filled():
    tree = ml_collections.ConfigDict(
        {"rate": ml_collections.config_dict.required_placeholder(float)}
    )
    with pytest.raises(UserError, match=r"config\.rate: required, but not set"):
        config.build(Outer, tree)


def test_numpy_numbers_become_plain_ones():
    built = config.build(loop.TrainConfig, {"steps": np.int64(5), "b1": np.float32(0.5)})
    assert type(built.steps) is int and type(built.b1) is float
