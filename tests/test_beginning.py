"""What a run begins with: measured once for the same data, by all processes, and not to go on."""

import dataclasses
import threading
import types

import fsspec
import jax
import numpy as np
import pytest

from tests import tiny, toy_run
from unclip_jax import stages
from unclip_jax.data.embeddings.shards import Meta
from unclip_jax.errors import UserError
from unclip_jax.models.ar_prior import ARPriorConfig
from unclip_jax.parallel import distributed
from unclip_jax.stages import ar_prior
from unclip_jax.training import beginning

AR_PRIOR = stages.ARPriorStage(
    model=ARPriorConfig(
        embed_dim=tiny.DIM, width=16, layers=2, heads=2, context_length=tiny.CONTEXT,
        vocab_size=tiny.VOCAB, code_dims=5, buckets=16, dot_buckets=4,
    )
)  # fmt: skip
CENTRED = dataclasses.replace(
    tiny.CANVAS, model=dataclasses.replace(tiny.CANVAS.model, centres=30, layers=0)
)
STAGES = {"prior": tiny.PRIOR, "canvas": tiny.CANVAS, "ar_prior": AR_PRIOR}


class Stored:
    """Embeddings in seven parts; counts how often they are passed over."""

    def __init__(self, clip="clip-1", fingerprint="data-1"):
        meta = Meta(clip, "", 70, tiny.DIM, tiny.CONTEXT, tiny.VOCAB, True)
        self.store, self.fingerprint = types.SimpleNamespace(meta=meta), fingerprint
        rng = np.random.default_rng(0)
        self._parts = rng.normal(size=(7, 2, 10, tiny.DIM)).astype(np.float32)
        self.passes = 0

    def chunks(self, part=(0, 1)):
        self.passes += 1
        yield from ((z_i, z_t) for z_i, z_t in self._parts[part[0] :: part[1]])


def name_of(kind):
    return "codes" if kind == "ar_prior" else "whiten"


def same(one, other, **near):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_allclose(a, b, **near or {"rtol": 0})


@pytest.mark.parametrize("kind", [*STAGES, "centred"])
def test_what_is_measured_is_kept_under_the_datas_fingerprint(kind, tmp_path):
    stage, name, source = (STAGES | {"centred": CENTRED})[kind], name_of(kind), Stored()
    expected = stage.fit_constants(name, source.chunks)
    for where in (str(tmp_path), "memory://bucket/measured"):
        source = Stored()
        first = beginning.measured(stage, name, source, where)
        passes = source.passes
        assert passes == {"prior": 1, "canvas": 2, "ar_prior": 2, "centred": 4}[kind]
        same(first, expected)
        same(beginning.measured(stage, name, source, where), expected)
        assert source.passes == passes
        for other in (Stored(fingerprint="data-2"), Stored(clip="clip-2")):
            beginning.measured(stage, name, other, where)
            assert other.passes == passes
    for path in (tmp_path / "constants").iterdir():
        path.write_bytes(path.read_bytes()[:-30])
    same(beginning.measured(stage, name, source, str(tmp_path)), expected)
    assert source.passes == 2 * passes
    fsspec.filesystem("memory").store.clear()


def test_other_codes_and_other_normalisations_are_measured_apart(tmp_path):
    source = Stored()
    beginning.measured(AR_PRIOR, "codes", source, str(tmp_path))
    model = dataclasses.replace(AR_PRIOR.model, buckets=8)
    found = beginning.measured(
        dataclasses.replace(AR_PRIOR, model=model), "codes", source, str(tmp_path)
    )
    assert source.passes == 4
    same(found, {"normalisation": ar_prior.fit_quantiser(model, source.chunks)})
    passes = source.passes
    for name in ("scale", "none"):
        same(
            beginning.measured(tiny.PRIOR, name, source, str(tmp_path)),
            tiny.PRIOR.fit_constants(name, source.chunks),
        )
    assert source.passes == passes and len(list((tmp_path / "constants").iterdir())) == 2


def together(stage, name, source, count):
    """What each of so many processes measures, each on its part of the data."""
    barrier, told, found = threading.Barrier(count), {}, {}

    def process(index):
        def gather(arrays):
            told[index] = distributed.gather_arrays(arrays)[0]  # as it comes out of its bytes
            barrier.wait(timeout=60)
            every = [dict(told[i]) for i in range(count)]
            barrier.wait(timeout=60)
            return every

        found[index] = stage.fit_constants(
            name, lambda: source.chunks(part=(index, count)), gather=gather
        )

    threads = [threading.Thread(target=process, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(count):
        same(found[index], found[0])
    return found[0]


@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize("count", [2, 8])  # of eight, one has no part
def test_processes_measure_together_what_one_measures(kind, count):
    stage, name, source = STAGES[kind], name_of(kind), Stored()
    found = together(stage, name, source, count)
    same(found, stage.fit_constants(name, source.chunks), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count, centres", [(2, 30), (8, 30), (2, 70), (5, 69), (2, 90)])
def test_centres_of_several_processes_are_spread_over_the_pairs_of_all(count, centres):
    """Of seven parts, one process has more than another."""
    source, model = Stored(), dataclasses.replace(CENTRED.model, centres=centres)
    stage = dataclasses.replace(CENTRED, model=model)
    found = together(stage, "whiten", source, count)["network"]["basis"]["centres"]["kernel"]
    every = dataclasses.replace(CENTRED.model, centres=70)  # one of each pair there is
    one = dataclasses.replace(CENTRED, model=every).fit_constants("whiten", source.chunks)
    near = np.asarray(found).T @ one["network"]["basis"]["centres"]["kernel"]
    np.testing.assert_allclose(near.max(axis=1), 1.0, atol=1e-4)
    times = np.bincount(near.argmax(axis=1), minlength=70)
    assert np.sum(times > 0) == min(centres, 70) and times.max() <= -(-centres // 70)
    parts = times.reshape(7, 10).sum(axis=1)
    assert np.ptp(parts) <= 2  # as many of each part


@pytest.mark.parametrize("name", ["whiten", "scale", "none"])
def test_centres_of_no_pairs_are_refused(name):
    with pytest.raises(UserError, match="embeddings: got 0, expected at least"):
        CENTRED.fit_constants(name, lambda: iter(()))


def test_dots_are_evenly_spaced_ones_and_a_bounded_number(monkeypatch):
    monkeypatch.setattr(ar_prior, "DOTS", 50)
    rng, numbers = np.random.default_rng(0), np.arange(3000, dtype=np.float32)
    for _ in range(20):
        dots, start = ar_prior._Dots(), 0
        while start < len(numbers):
            stop = start + int(rng.integers(1, 90))
            dots.add(numbers[start:stop])
            assert len(dots.kept) <= 50
            assert dots.kept.tolist() == numbers[: min(stop, 3000) : dots.every].tolist()
            start = stop
        assert dots.every == 64


class First:
    """The toy's first params, that say what they are without being made."""

    def __init__(self):
        self.made = 0

    def __call__(self):
        self.made += 1
        return toy_run_init()

    def shapes(self):
        return jax.eval_shape(toy_run_init)


toy_run_init = toy_run.init_params


def test_a_run_that_goes_on_makes_no_params(tmp_path, monkeypatch):
    whole = toy_run.run(tmp_path / "whole", steps=12, checkpoint_every=6, schedule="constant")
    first = First()
    monkeypatch.setattr(toy_run, "init_params", first)
    for steps in (6, 12):
        parts = toy_run.run(tmp_path / "cut", steps=steps, checkpoint_every=6, schedule="constant")
        assert first.made == 1
    toy_run.assert_same(whole, parts)


@pytest.mark.parametrize("kind", STAGES)
def test_shapes_are_those_of_the_params_and_nothing_is_made_for_them(kind, monkeypatch):
    stage, source = STAGES[kind], Stored()

    def measured():
        return stage.fit_constants(name_of(kind), source.chunks)

    first = beginning.FromRandom(stage, jax.random.key(0), {}, measured)
    monkeypatch.setattr(beginning, "random_params", lambda *_: pytest.fail("drawn"))
    shapes = first.shapes()
    assert source.passes == 0
    assert beginning.shapes_and_frozen(first) == (shapes, {})
    monkeypatch.undo()
    params = first()
    assert jax.tree.structure(params) == jax.tree.structure(shapes)
    for made, said in zip(jax.tree.leaves(params), jax.tree.leaves(shapes), strict=True):
        assert (made.shape, made.dtype) == (said.shape, said.dtype)
