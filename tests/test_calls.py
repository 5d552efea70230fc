"""Samplers take what people give them: keys, steps, states, networks, meshes, transformations."""

import functools
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import calls_run
from tests.calls_run import DIFFUSION, KEY, X_T, conditional, draw, network
from tests.xla_flags import xla_flags
from unclip_jax.diffusion import Diffusion, Sampling, Watchable, guidance, invert, sample
from unclip_jax.errors import UserError

ROOT = Path(__file__).parent.parent


def test_a_sampler_needs_no_more_than_a_number_of_steps():
    by_name = draw(sampling=Sampling("dpm++", "7"))
    np.testing.assert_array_equal(draw(sampling=None, steps=7), by_name)
    np.testing.assert_array_equal(draw(keys=None, sampling=None, steps=np.int64(7)), by_name)
    np.testing.assert_array_equal(
        draw(sampling=None, keys=None), draw(sampling=Sampling("dpm++", "20"))
    )
    np.testing.assert_array_equal(
        draw(sampling=Sampling("ddim", "7")), draw(sampling=Sampling("ddim"), steps=7)
    )
    short = Diffusion(steps=8, prediction="v")
    assert draw(sampling=None, diffusion=short).shape == X_T.shape
    x_0 = draw(sampling=Sampling("ddim"), steps=200)
    again = invert(network, x_0, DIFFUSION, steps=200)
    np.testing.assert_allclose(again, X_T, atol=0.05)


def test_keys_may_be_one_or_many_typed_or_legacy():
    expected = draw(keys=jax.random.split(KEY, 4))
    np.testing.assert_array_equal(draw(keys=KEY), expected)
    np.testing.assert_array_equal(draw(keys=jax.random.key_data(KEY)), expected)
    legacy = jax.random.key_data(jax.random.split(KEY, 4))
    np.testing.assert_array_equal(draw(keys=np.asarray(legacy)), expected)
    np.testing.assert_array_equal(jax.jit(draw)(X_T, legacy), jax.jit(draw)(X_T, KEY))


def test_a_state_may_be_any_tree_of_arrays():
    """Each leaf as if alone, and the same numbers as of one array where the network is one."""
    tree = {"a": X_T[:, :2], "b": (X_T[:, 2:].reshape(4, 2, 2),)}
    noise = jax.random.normal(jax.random.key(3), (4, 4, 6))

    def of_tree(x, t):
        output = network(jnp.concatenate([x["a"], x["b"][0].reshape(4, 4)], axis=1), t)
        return {"a": output[:, :2], "b": (output[:, 2:].reshape(4, 2, 2),)}

    noises = {"a": noise[..., :2], "b": (noise[..., 2:].reshape(4, 4, 2, 2),)}
    found, states = draw(tree, None, denoise=of_tree, noise=noises, return_trajectory=True)
    expected, path = draw(X_T, None, noise=noise, return_trajectory=True)
    np.testing.assert_allclose(found["a"], expected[:, :2], atol=1e-6)
    np.testing.assert_allclose(found["b"][0].reshape(4, 4), expected[:, 2:], atol=1e-6)
    np.testing.assert_allclose(states["b"][0].reshape(6, 4, 4), path[..., 2:], atol=1e-6)
    back = invert(of_tree, found, DIFFUSION, steps=5)
    np.testing.assert_allclose(
        back["a"], invert(network, expected, DIFFUSION, steps=5)[:, :2], atol=1e-5
    )

    learned = Diffusion(prediction="v", variance="learned_range")

    def both(x, t):
        return jax.tree.map(lambda y: jnp.concatenate([y, 0 * y + 0.5], axis=-1), of_tree(x, t))

    def flat(x, t):
        return jnp.concatenate([network(x, t), jnp.full((4, 6), 0.5)], axis=-1)

    found = draw(tree, None, denoise=both, noise=noises, diffusion=learned)
    expected = draw(X_T, None, denoise=flat, noise=noise, diffusion=learned)
    np.testing.assert_allclose(found["b"][0].reshape(4, 4), expected[:, 2:], atol=1e-6)


def test_the_trajectory_is_the_walk_and_is_kept_only_when_asked():
    x_0, states = jax.jit(functools.partial(draw, return_trajectory=True))(X_T, KEY)
    np.testing.assert_array_equal(states[0], X_T)
    np.testing.assert_array_equal(states[-1], x_0)
    np.testing.assert_allclose(x_0, draw(), atol=1e-6)
    shorter = draw(states[1], None, Sampling(spacing=tuple(map(int, spacing()[:4]))), noise=later())
    np.testing.assert_allclose(shorter, x_0, atol=1e-5)

    def memory(**more):
        run = functools.partial(draw, sampling=Sampling("ddim", "500"), **more)
        return jax.jit(run).lower(X_T, KEY).compile().memory_analysis()

    plain, kept = memory(), memory(return_trajectory=True)
    assert plain.temp_size_in_bytes + plain.output_size_in_bytes < 500 * X_T.nbytes / 4
    assert kept.output_size_in_bytes >= 500 * X_T.nbytes

    watched = Watchable(lambda x, *, loop: draw(x, KEY, return_trajectory=True, loop=loop))
    np.testing.assert_allclose(watched(X_T, progress=lambda *_: None)[1], states, atol=1e-6)


def spacing():
    return DIFFUSION.process("5").timesteps


def later():
    """The noise of all steps but the noisiest, as the keys draw it."""
    keys = jax.random.split(KEY, 4)
    each = [jax.vmap(jax.random.fold_in, (0, None))(keys, i) for i in (3, 2, 1)]
    return jnp.stack([jax.vmap(lambda k: jax.random.normal(k, (6,)))(key) for key in each], axis=1)


def test_a_gradient_with_remat_has_the_memory_of_one_step():
    width, diffusion = 512, DIFFUSION
    weights = [jax.random.normal(jax.random.key(i), (6, width)) for i in range(2)]

    def loss(weights, steps, remat):
        def wide(x, t):
            return jnp.tanh(jnp.sin(x @ weights[0]) @ weights[1].T / width)

        walk = {"steps": steps, "remat": remat}
        return jnp.sum(sample(wide, X_T, None, diffusion, Sampling("ddim"), **walk) ** 2)

    def memory(steps, remat):
        run = functools.partial(loss, steps=steps, remat=remat)
        compiled = jax.jit(jax.grad(run)).lower(weights).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    plain, again = (memory(80, each) - memory(20, each) for each in (False, True))
    assert plain > 60 * 4 * width * 4  # each step's activations
    assert again < 60 * X_T.nbytes * 4  # each step's states
    plain, again = (jax.grad(loss)(weights, 6, each) for each in (False, True))
    np.testing.assert_allclose(plain[0], again[0], rtol=1e-4, atol=1e-7)


def test_under_vmap_scan_and_grad():
    """Each is what it is without: of two scales, of two seeds, against finite differences."""

    def guided(scale, x=X_T, key=KEY):
        denoise = guidance.classifier_free(conditional, X_T, 0 * X_T, scale)
        return draw(x, key, denoise=denoise)

    scales = jnp.array([2.0, 3.0])
    together = jax.vmap(guided)(scales)
    _, scanned = jax.lax.scan(lambda carry, scale: (carry, guided(scale)), 0, scales)
    for i, scale in enumerate(scales):
        np.testing.assert_allclose(together[i], guided(scale), atol=1e-5)
        np.testing.assert_allclose(scanned[i], guided(scale), atol=1e-5)
    keys = jax.random.split(jax.random.key(9), 2)
    seeds = jax.vmap(functools.partial(guided, scales[0], X_T))(keys)
    np.testing.assert_allclose(seeds[1], guided(scales[0], X_T, keys[1]), atol=1e-5)

    def total(scale):
        return jnp.sum(guided(scale) ** 2)

    found = (total(2.05) - total(1.95)) / 0.1
    np.testing.assert_allclose(jax.grad(total)(2.0), found, rtol=2e-2)


def test_on_meshes_and_under_shard_map_a_sample_is_what_it_is_without():
    environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags(2)}
    run = [sys.executable, calls_run.__file__]
    done = subprocess.run(run, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["Explicit", "Auto", "shard_map"]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: draw(denoise=lambda x, t: (x, t)), "output: got a tuple of 2, expected"),
        (lambda: draw(denoise=lambda x, t: None), "output: got NoneType, expected one"),
        (lambda: draw(denoise=lambda x, t: x[:, :5]), r"network output's shape: got \(4, 5\)"),
        (lambda: draw(denoise=lambda x, t: x[:, 0]), r"network output's shape: got \(4,\)"),
        (lambda: draw(denoise=lambda x, t: x > 0), "network output's dtype: got dtype"),
        (
            lambda: draw(denoise=guidance.classifier_free(lambda x, t, c: (x,), X_T, X_T, 2.0)),
            "network output: got a tuple of 1",
        ),
        (
            lambda: draw(denoise=guidance.classifier_free(lambda x, t, c: x[:3], X_T, X_T, 2.0)),
            r"network output's shape: got \(3, 6\), expected \(8, ...\)",
        ),
        (lambda: draw({"a": X_T}, denoise=lambda x, t: X_T), "network output's structure"),
        (lambda: draw({"a": X_T}, denoise=lambda x, t: {"a": x["a"][:2]}), "output's shapes"),
        (lambda: draw({"a": X_T, "b": X_T[:2]}), "x_T's shapes"),
        (lambda: draw(keys=0), "keys: got 'int', expected a key"),
        (lambda: draw(keys=jnp.zeros(4)), "one typed key per example"),
        (lambda: draw(keys=jax.random.split(KEY, 3)), "keys' shape"),
        (lambda: draw(keys=None), "keys and noise: got neither"),
        (lambda: draw(diffusion=DIFFUSION.process("5")), "diffusion: got 'Process', expected"),
        (lambda: draw(sampling=None, steps=0), "steps|spacing"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_a_user_error(call, message):
    with pytest.raises(UserError, match=message):
        call()


def blocks(heading):
    page = (ROOT / "docs" / "samplers.md").read_text(encoding="utf-8")
    section = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def test_the_pages_networks_of_every_library_run():
    scope = {}
    found = blocks("Any network")
    for code in found + blocks("What one may pass, and what comes back"):
        if "equinox" in code and not importlib.util.find_spec("equinox"):
            continue
        exec(compile(code, "docs/samplers.md", "exec"), scope)
    assert len(found) == 5
    drawn = [scope[name] for name in ("of_linen", "of_nnx", "of_eqx") if name in scope]
    assert all(x.shape == (16, 8) and np.all(np.isfinite(x)) for x in drawn) and len(drawn) >= 2
    assert scope["states"]["b"].shape == (9, 16, 2, 1)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(scope["gradient"]))
