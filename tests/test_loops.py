"""A loop gives the same whole, watched in any stretches, and when it is stopped and run again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.diffusion import progress
from unclip_jax.diffusion.gaussian import Diffusion
from unclip_jax.diffusion.progress import Watchable, whole
from unclip_jax.diffusion.samplers import METHODS, Sampling, invert, sample


@functools.partial(Watchable, static=("steps",))
def logistic(x, *, steps, loop=whole, **rates):
    """Chaotic: another order or number of steps gives something else entirely."""
    rate = loop.once(lambda: rates["rate"] + 0.0)
    step = lambda n, carry: rate * carry * (1 - carry) + 1e-3 * n / steps  # noqa: E731
    return {"x": loop(step, x, steps) * 2}


def reference(x, steps, rate):
    x, rate = np.float32(x), np.float32(rate)
    for n in range(steps):
        x = rate * x * (1 - x) + np.float32(1e-3) * np.float32(n) / np.float32(steps)
    return x * 2


@pytest.mark.parametrize("seconds", [0.0, 1e-4, 1.0])  # of a stretch: steps by one, by some, all
def test_watched_equals_whole(monkeypatch, seconds):
    monkeypatch.setattr(progress, "SECONDS", seconds)
    x, seen = jnp.linspace(0.1, 0.8, 4), []
    expected = logistic(x, steps=25, rate=jnp.float32(2.9))["x"]
    np.testing.assert_allclose(expected, reference(np.asarray(x), 25, 2.9), rtol=1e-5)
    found = logistic(x, steps=25, rate=jnp.float32(2.9), progress=lambda *s: seen.append(s))["x"]
    np.testing.assert_array_equal(found, expected)
    assert seen[-1] == (25, 25) and seen == sorted(set(seen)) and {n for _, n in seen} == {25}
    assert seconds or len(seen) == 25


def test_stretches_of_any_length_are_one_program(monkeypatch):
    x = jnp.full(3, 0.4)
    logistic(x, steps=40, rate=jnp.float32(2.0), progress=lambda *_: None)
    before = logistic.programs()
    for seconds in (0.0, 1e-4, 1.0):
        monkeypatch.setattr(progress, "SECONDS", seconds)
        logistic(x, steps=40, rate=jnp.float32(2.5), progress=lambda *_: None)
    assert logistic.programs() == before
    logistic(x, steps=41, rate=jnp.float32(2.5), progress=lambda *_: None)
    assert logistic.programs() == before + 2  # where the loop starts, and a stretch of it


def test_what_progress_raises_comes_through_and_ends_the_loop():
    seen = []

    def stop(done, steps):
        seen.append(done)
        if done >= 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        logistic(jnp.full(3, 0.4), steps=9, rate=jnp.float32(2.0), progress=stop)
    assert seen == [1, 2]


def test_a_function_without_a_loop_is_named():
    @Watchable
    def nothing(x, *, loop):
        return x

    with pytest.raises(TypeError, match="nothing never called its loop"):
        nothing(jnp.ones(2), progress=lambda *_: None)


def test_what_comes_before_the_loop_is_computed_once():
    @functools.partial(Watchable, static=("steps",))
    def walk(matrix, x, *, steps, loop=whole):
        square, table = loop.once(jnp.matmul, matrix, matrix), np.arange(float(steps))
        return loop(lambda n, c: jnp.tanh(square * c) + matrix + jnp.asarray(table)[n], x, steps)

    given = {"matrix": jnp.full((3, 3), 0.1), "x": jnp.ones((3, 3)), "steps": 4}
    computed, carry, _ = walk._begin(**given)
    np.testing.assert_allclose(computed, [np.full((3, 3), 0.03)], rtol=1e-6)
    stretch = walk._stretch.lower(computed, carry, jnp.int32(0), jnp.int32(2), **given)
    assert " dot(" in walk._begin.lower(**given).compile().as_text()
    assert " dot(" not in stretch.compile().as_text()
    watched = walk(**given, progress=lambda *_: None)
    np.testing.assert_allclose(watched, walk(**given), rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_every_sampler_is_the_same_watched(monkeypatch, method):
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    diffusion = Diffusion()

    @Watchable
    def walk(x_T, keys, *, loop):
        sampling = Sampling(method, "7")
        denoise = lambda x_t, t: jnp.tanh(x_t) * 0.3  # noqa: E731
        analytic = jnp.full(1000, 0.2)
        return sample(denoise, x_T, keys, diffusion, sampling, analytic=analytic, loop=loop)

    x_T = jax.random.normal(jax.random.key(0), (3, 5))
    keys, seen = jax.random.split(jax.random.key(1), 3), []
    found = walk(x_T, keys, progress=lambda *s: seen.append(s))
    np.testing.assert_array_equal(found, walk(x_T, keys))
    assert seen == [(i, 7) for i in range(1, 8)]


def test_inversion_is_the_same_watched(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0.0)

    @Watchable
    def walk(x_0, *, loop):
        sampling = Sampling("ddim", "6")
        return invert(lambda x_t, t: jnp.tanh(x_t), x_0, Diffusion(), sampling, loop)

    x_0, seen = jax.random.normal(jax.random.key(0), (2, 5)), []
    np.testing.assert_array_equal(walk(x_0, progress=lambda *s: seen.append(s)), walk(x_0))
    assert [done for done, _ in seen] == [1, 2, 3, 4, 5, 6]


def test_watching_calls_nothing_on_the_host():
    """A program that calls back is never kept in the compilation cache."""
    given = {"x": jnp.ones(2), "rate": jnp.float32(1), "steps": 5}
    computed, carry, _ = logistic._begin(**given)
    ends = jnp.int32(0), jnp.int32(2)
    text = logistic._stretch.lower(computed, carry, *ends, **given).as_text()
    assert "while" in text and "callback" not in text
