"""What one process compiled, the next one finds."""

import json
import os
import subprocess
import sys

import pytest

from unclip_jax.parallel import compile_cache

SAMPLE = """
import json, sys
import jax, jax.monitoring
from unclip_jax.diffusion.progress import Watchable
from unclip_jax.parallel import compile_cache
from unclip_jax.diffusion.gaussian import Diffusion
from unclip_jax.diffusion.samplers import Sampling, sample

found = {"hits": 0, "misses": 0}
def count(event, **_):
    for name in found:
        found[name] += event == f"/jax/compilation_cache/cache_{name}"
jax.monitoring.register_event_listener(count)
compile_cache.LEAST_SECONDS = 0.0
compile_cache.use()

@Watchable
def walk(x_T, keys, *, loop):
    return sample(lambda x, t: x / 2, x_T, keys, Diffusion(), Sampling("ddpm", "4"), loop=loop)

keys = jax.random.split(jax.random.key(0), 2)
x_T = jax.random.normal(jax.random.key(1), (2, 3))
x_0 = walk(x_T, keys, progress=lambda *_: None)
print(json.dumps(found | {"x_0": x_0.tolist(), "at": str(jax.config.jax_compilation_cache_dir)}))
"""


def run(cache, **settings):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    env = kept | {"JAX_PLATFORMS": "cpu", "UNCLIP_JAX_CACHE": str(cache)} | settings
    done = subprocess.run(
        [sys.executable, "-c", SAMPLE], env=env, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_a_watched_sampler_is_compiled_once_for_all_processes(tmp_path):
    first, second = run(tmp_path), run(tmp_path)
    assert first["hits"] == 0 and first["misses"] >= 2
    assert second["misses"] == 0 and second["hits"] == first["misses"]
    assert first["x_0"] == second["x_0"]
    assert list((tmp_path / "compiled").glob("*/*-cache"))


def test_jax_own_settings_go_first(tmp_path):
    other = tmp_path / "other"
    assert run(tmp_path, JAX_COMPILATION_CACHE_DIR=str(other))["at"] == str(other)
    assert not (tmp_path / "compiled").exists()


def test_a_program_that_a_killed_process_half_wrote_is_written_anew(tmp_path):
    """JAX writes a program, then when it was used; where one lacks that, it keeps no new ones."""
    first = run(tmp_path)
    (*_, largest) = sorted((tmp_path / "compiled").glob("*/*-cache"), key=size)
    whole = largest.read_bytes()
    largest.write_bytes(whole[: len(whole) // 2])
    largest.with_name(largest.name.replace("-cache", "-atime")).unlink()
    second, third = run(tmp_path), run(tmp_path)
    assert (second["misses"], third["misses"]) == (1, 0)
    assert third["hits"] == first["misses"]
    assert first["x_0"] == second["x_0"] == third["x_0"]


def size(path):
    return path.stat().st_size


@pytest.mark.parametrize("pack", ["zlib", "zstandard"])
def test_what_was_written_in_part_is_dropped(tmp_path, pack):
    packed = pytest.importorskip(pack).compress(os.urandom(9_000_000))
    for name, content in {"whole": packed, "torn": packed[:-1], "none": b""}.items():
        (tmp_path / f"{name}-cache").write_bytes(content)
    compile_cache._drop_torn(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["whole-cache"]
